"""How transforms of channels pass operators: the rules that the transform engine follows."""

from __future__ import annotations

import torch.fx

from scaleprop.rules.channels import contractions, movement, norms
from scaleprop.rules.channels.base import MIXING, ChannelRule, Flow, Kind, Slot, channel_rule_for
from scaleprop.rules.channels.layouts import (
    UNTOUCHED,
    Codes,
    Layout,
    Refused,
    block_rows,
    sizes_of,
)
from scaleprop.rules.channels.pointwise import pointwise
from scaleprop.rules.moments_pointwise import is_pointwise

__all__ = ["MIXING", "UNTOUCHED", "ChannelRule", "Codes", "Flow", "Kind", "Layout", "Refused",
           "Slot", "block_rows", "channel_rule", "sizes_of"]

# imported for their registrations
del contractions, movement, norms


def channel_rule(node: torch.fx.Node) -> ChannelRule | None:
    """The rule of a call: its operator's own, or that of everything pointwise; None: none passes.
    """
    if node.op != "call_function":
        return None
    own = channel_rule_for(node)
    return own if own is not None or not is_pointwise(node.target) else pointwise
