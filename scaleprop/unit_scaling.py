"""Unit scaling: a model whose values and gradients have unit RMS, without loss scaling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from scaleprop.errors import ConfigError
from scaleprop.passes.unit import SchemeName, UnitScaled, unit_scaled
from scaleprop.passes.unit.learning_rates import OptimizerName, lr_factor, unit_scaling_of
from scaleprop.signature import split_example

Decay = Literal["products", "all"]


def unit_scale(
    model: torch.nn.Module,
    example_inputs: Any,
    scheme: SchemeName = "unit",
    *,
    loss_fn: Callable[[Any], torch.Tensor] | None = None,
    dynamic_shapes: Any = None,
    powers_of_two: bool = True,
) -> UnitScaled:
    """A copy of ``model`` whose values, weights and gradients start at unit RMS.

    Parameters of products are divided by their RMS (their biases zeroed), and what initialisation
    did becomes constants in the graph. On the way back gradients are multiplied by constants too,
    such that each parameter's gradient is the true one times a known power of two. The function
    is another one than the model's: train it from the start.

    Args:
        example_inputs: as for ``compile``; multipliers are measured on them.
        scheme: ``unit`` (Blake et al., 2023), ``u-mup`` (Blake et al., 2024) or ``mus`` (Narayan
            et al., 2025): how residual streams are weighted, what readouts are divided by, and
            what ``parameter_groups`` says.
        loss_fn: makes a scalar of the model's output; gradients are measured with it. Without it
            the output's first scalar is the loss, else random weights on all of the output.
        dynamic_shapes: as for ``compile``.
        powers_of_two: whether gradients' constants are powers of two, so that gradients are exact;
            else RMS are 1, not within √2 of it.

    Returns:
        An ordinary module with ``model``'s parameter names, called as ``example_inputs`` are
        written; it checkpoints the activations that ``model`` does. ``.scaling`` lists every
        constant, what was done to each parameter, and what was left as it was.

    Raises:
        CaptureError: where the model cannot be traced.
        CalibrationError: where a value or gradient is NaN or Inf, or there is no gradient.
        ConfigError: on an unknown scheme, or a loss that is none.
    """
    args, kwargs = split_example(example_inputs)
    return unit_scaled(model, args, kwargs, scheme, loss_fn, dynamic_shapes, powers_of_two)


def parameter_groups(
    model: torch.nn.Module,
    optimizer: OptimizerName,
    *,
    lr: float,
    weight_decay: float = 0.0,
    decay: Decay = "products",
    base_width: int = 256,
) -> list[dict[str, Any]]:
    """What to give an optimizer in place of ``model.parameters()``, for a unit-scaled ``model``.

    Learning rates are ``lr`` times each parameter's factor by the model's scheme; weight decays
    are divided by that factor, so that a step shrinks every parameter by lr·weight_decay. A
    parameter with several uses takes the smallest factor.

    Args:
        optimizer: ``adam`` (AdamW and its kin, which normalise gradients), ``sgd``, or ``muon``:
            then only the matrices inside the network; give the others to ``adam`` by filtering on
            what is left.
        decay: which parameters decay: those of ``products``, or ``all``.
        base_width: for ``mus``, the width at which ``lr`` was found.

    Raises:
        ConfigError: where ``model`` is not unit-scaled, or the optimizer or decay is unknown.
    """
    if decay not in ("products", "all"):
        raise ConfigError(f"unknown decay {decay!r}; known: products, all")
    scaling = unit_scaling_of(model)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    plain = getattr(model, "_orig_mod", model)  # behind torch.compile's wrapper
    for name, parameter in plain.named_parameters():
        use = scaling.parameters[name]
        factor = lr_factor(use, scaling.scheme, optimizer, base_width)
        if factor is None or not parameter.requires_grad:
            continue
        decays = weight_decay / factor if decay == "all" or use.roles else 0.0
        group = groups.setdefault((factor, decays), {
            "params": [], "names": [], "lr": lr * factor, "weight_decay": decays})
        group["params"].append(parameter)
        group["names"].append(name)
    for group in groups.values():
        del group["names"]
    return list(groups.values())
