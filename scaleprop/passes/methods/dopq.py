"""DopQ: RepQ with the scale that is nearest to most channels' own, their median.

The mean of the channels' scales follows the few that are large; the scale of least mean absolute
deviation, argmin Σ_j |S_j − S̃|, does not (L. Yang et al., DopQ-ViT, arXiv:2408.03291, MOSF, after
its abstract). Which formats that matters to, ``repq`` says. Their quantizer for softmax outputs
(TanQ) is a format of its own and not here.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from scaleprop.passes.methods.repq import Common, RepQ


@dataclasses.dataclass(frozen=True)
class DopQ(RepQ):
    """Give all channels after a norm the same range, the median one (DopQ-ViT)."""

    common: Common = "median"

    name: ClassVar[str] = "dopq"
