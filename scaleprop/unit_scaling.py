"""Unit scaling: a model whose values and gradients have unit RMS, without loss scaling."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any, Literal, get_args

import torch

from scaleprop.errors import ConfigError
from scaleprop.passes.unit import SchemeName, UnitScaled, unit_scaled
from scaleprop.passes.unit.learning_rates import (
    OptimizerName,
    lr_factor,
    plain_module,
    unit_scaling_of,
)
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
        ConfigError: on an unknown scheme, a loss that is none, or a model that is no module.
    """
    if not isinstance(model, torch.nn.Module) or isinstance(model, torch.jit.ScriptModule):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"unit_scale takes a torch.nn.Module that is no TorchScript, not "
                          f"{type(model).__name__}")
    if loss_fn is not None and not callable(loss_fn):
        raise ConfigError(f"loss_fn={loss_fn!r} is no function of the model's output")
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
    without: Collection[str] = (),
) -> list[dict[str, Any]]:
    """What to give an optimizer in place of ``model.parameters()``, for a unit-scaled ``model``.

    Learning rates are ``lr`` times each parameter's factor by the model's scheme; weight decays
    are divided by that factor, so that a step shrinks every parameter by lr·weight_decay. A
    parameter with several uses takes the smallest factor.

    Args:
        optimizer: ``adam`` (AdamW and its kin, which normalise gradients), ``sgd``, or ``muon``:
            then only the matrices inside the network; ask again, for ``adam``, ``without`` them.
        decay: which parameters decay: those of ``products``, or ``all``.
        base_width: for ``mus``, the width at which ``lr`` was found.
        without: names of parameters to leave out; each group has its own in ``param_names``.

    Raises:
        ConfigError: where ``model`` is not unit-scaled, or has parameters that it had not then; on
            an unknown optimizer or decay; on rates that are negative or not finite.
    """
    _check_numbers(lr, weight_decay, decay, base_width)
    scaling = unit_scaling_of(model)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in plain_module(model).named_parameters():
        if name not in scaling.parameters:
            raise ConfigError(f"{name!r} is not known: it was added after scaleprop.unit_scale. "
                              "Remedy: unit-scale the model with all of its parameters.")
        use = scaling.parameters[name]
        factor = lr_factor(use, scaling.scheme, optimizer, base_width)
        if factor is None or name in without or not parameter.requires_grad:
            continue
        decays = weight_decay / factor if decay == "all" or use.roles else 0.0
        group = groups.setdefault((factor, decays), {
            "params": [], "param_names": [], "lr": lr * factor, "weight_decay": decays})
        group["params"].append(parameter)
        group["param_names"].append(name)
    return list(groups.values())


def _check_numbers(lr: float, weight_decay: float, decay: str, base_width: int) -> None:
    if decay not in get_args(Decay):
        raise ConfigError(f"unknown decay {decay!r}; known: {', '.join(get_args(Decay))}")
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not isinstance(value, (int, float)) or not 0 <= value < math.inf:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"{name}={value!r}: a finite number, 0 or more, is expected")
    if base_width < 1:
        raise ConfigError(f"base_width={base_width!r}: a width is 1 or more")
