"""Whether parameters, put into the model they are for, make it compute what the graph does."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from scaleprop.backends.registry import backend_named
from scaleprop.errors import ConfigError
from scaleprop.interchange.programs import REMEDY, with_high_activations
from scaleprop.passes.base import Program
from scaleprop.passes.structures import register_structures

# ‖difference‖ / ‖output‖: rounding of a deep model stays below, a missing transform does not
_BOUNDS = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}


def check_same_function(program: Program, like: nn.Module, numbers: Mapping[str, Tensor]) -> None:
    """Run both on the example inputs, activations unquantized.

    numbers: every parameter and buffer of ``like``, decoded.

    Raises:
        ConfigError: where an output differs by more than rounding.
    """
    high = with_high_activations(program)
    with torch.no_grad():
        expected = backend_named("reference").lower(high)(high.example_leaves)
        found = _outputs(program, like, dict(numbers))
    pairs = [(a, b) for a, b in zip(found, expected, strict=False)
             if isinstance(a, Tensor) and isinstance(b, Tensor)]  # fmt: skip
    if len(found) != len(expected) or any(a.shape != b.shape for a, b in pairs):
        raise ConfigError("`like` has other outputs than the compiled model: pass the model that "
                          "was compiled")
    for index, (actual, wanted) in enumerate(pairs):
        error, bound = _error(actual, wanted), _BOUNDS.get(actual.dtype, 0.0)
        if not error <= bound:
            raise ConfigError(
                f"output {index} of `like` with the parameters to be written is off by {error:.3g} "
                f"of its norm (bound {bound:g}): a pass changed what no parameter holds, or `like` "
                f"is not the model that was compiled. {REMEDY}")


def _outputs(program: Program, like: nn.Module, numbers: dict[str, Tensor]) -> list[object]:
    modes = [(module, module.training) for module in like.modules()]
    like.eval()
    try:
        output = torch.func.functional_call(like, numbers, program.example_args,
                                            dict(program.example_kwargs), tie_weights=False)
    finally:
        for module, training in modes:
            module.training = training
    register_structures(output)
    return pytree.tree_leaves(output)


def _error(actual: Tensor, wanted: Tensor) -> float:
    if actual.numel() == 0 or not actual.is_floating_point():
        return 0.0 if torch.equal(actual, wanted) else float("inf")
    norm = wanted.double().norm().clamp_min(torch.finfo(torch.float32).tiny)
    return float((actual.double() - wanted.double()).norm() / norm)
