"""Unit scaling as a whole: capture, parameters, multipliers, gradients."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from scaleprop._torch_compat import OpOverload
from scaleprop.errors import CalibrationError
from scaleprop.passes.unit.attention import spell_attention
from scaleprop.passes.unit.capture import REGIONS, capture_training
from scaleprop.passes.unit.checkpoints import outline_checkpoints
from scaleprop.passes.unit.einsum import spell_einsums
from scaleprop.passes.unit.forward import Multiplier, scale_forward, scale_parameters
from scaleprop.passes.unit.gradients import LossFunction, scale_backward
from scaleprop.passes.unit.learning_rates import Use, find_uses
from scaleprop.passes.unit.module import UnitScaled
from scaleprop.passes.unit.schemes import SchemeName, scheme
from scaleprop.passes.unit.structure import find_structure
from scaleprop.passes.unit.synonyms import spell_synonyms
from scaleprop.rules import rule_for

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnitScaling:
    """What was done to a model.

    multipliers: in the graph's order. parameters: name → what it is used for, and its gradient's
    potential. unruled: operators without a rule, which values pass as they are. checkpointed: how
    many regions run under activation checkpointing, as in the model. notes: of tracing.
    """

    scheme: SchemeName
    multipliers: tuple[Multiplier, ...]
    parameters: Mapping[str, Use]
    unruled: Mapping[str, int]
    checkpointed: int
    notes: tuple[str, ...]


def unit_scaled(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str,
    loss_fn: LossFunction | None, dynamic_shapes: Any, powers_of_two: bool,
) -> UnitScaled:
    """See ``scaleprop.unit_scale``."""
    chosen = scheme(name)
    inputs = pytree.tree_leaves((args, dict(kwargs)))
    for place, value in enumerate(inputs):
        if isinstance(value, torch.Tensor) and value.is_floating_point() \
                and not bool(torch.isfinite(value).all()):
            raise CalibrationError(f"example input {place} holds NaN or Inf. Remedy: pass a batch "
                                   "of real data.")
    module, notes = capture_training(model, args, kwargs, dynamic_shapes)
    training = {path: child.training for path, child in module.named_modules()}
    module.train()
    spell_attention(module.graph)
    spell_einsums(module.graph)
    spell_synonyms(module.graph)
    structure = find_structure(module)
    unruled = Counter(
        str(node.target) for node in structure.signals
        if node.op == "call_function" and rule_for(node.target) is None
        and node not in structure.products
        and isinstance(node.target, OpOverload))
    divided = scale_parameters(module, structure)
    multipliers = scale_forward(module, structure, chosen, inputs)
    out_spec: Any = module.graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
    potentials = scale_backward(module, structure, inputs, out_spec, loss_fn, powers_of_two)
    uses = find_uses(module, structure, divided, potentials)
    checkpointed = outline_checkpoints(module, module.meta.pop(REGIONS))
    module.recompile()
    module.train(training[""])
    for path, child in module.named_modules():
        child.training = training.get(path, child.training)
    module.meta["unit_scaling"] = UnitScaling(
        scheme=chosen.name, multipliers=tuple(multipliers), parameters=uses,
        unruled=dict(unruled), checkpointed=checkpointed, notes=notes)
    logger.info("%d multipliers; %d operators without a rule", len(multipliers), len(unruled))
    return module
