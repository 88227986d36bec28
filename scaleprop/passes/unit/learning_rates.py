"""How much of a learning rate each parameter of a unit-scaled model takes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

import torch

from scaleprop.errors import ConfigError
from scaleprop.passes.unit.schemes import SchemeName
from scaleprop.passes.unit.structure import Structure

OptimizerName = Literal["adam", "sgd", "muon"]
Role = Literal["input", "hidden", "output"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Use:
    """What one parameter is used for.

    roles: for each product that it is in; none for gains, biases and the like.
    fan_in, fan_out: the largest of its products'; of another parameter, its number of elements.
    branches: how many the residual stream has that its product is in a branch of; 0 for none.
    divided: what it was divided by at the start. potential: its gradient is held at 2^potential.
    """

    roles: tuple[Role, ...]
    fan_in: int
    fan_out: int
    branches: int
    rank: int
    divided: float
    potential: float


def find_uses(
    module: torch.nn.Module, structure: Structure, divided: dict[str, float],
    potentials: dict[str, float],
) -> dict[str, Use]:
    """Of every parameter, by its first name."""
    names = {id(value): name for name, value in module.named_parameters()}
    products: dict[str, list[Any]] = {name: [] for name in names.values()}
    for product in structure.products.values():
        parameter = module.get_parameter(str(product.parameter.target))
        products[names[id(parameter)]].append(product)
    sizes = {names[id(module.get_parameter(name))]: size for name, size in divided.items()}
    found: dict[str, Use] = {}
    for name, parameter in module.named_parameters():
        uses = products[name]
        found[name] = Use(
            roles=tuple(dict.fromkeys(_role(use.node, structure) for use in uses)),
            fan_in=max((use.fan_in for use in uses), default=parameter.numel()),
            fan_out=max((use.fan_out for use in uses), default=parameter.numel()),
            branches=max((structure.inside.get(use.node, 0) for use in uses), default=0),
            rank=parameter.dim(), divided=sizes.get(name, 1.0),
            potential=potentials.get(name, 0.0))
    return found


def _role(node: torch.fx.Node, structure: Structure) -> Role:
    if node in structure.readouts:
        return "output"
    return "input" if node in structure.first else "hidden"


def lr_factor(
    use: Use, scheme: SchemeName, optimizer: OptimizerName, base_width: int
) -> float | None:
    """Factor on the learning rate; None for a parameter that ``optimizer`` does not take.

    ``unit`` keeps a learning rate's meaning: a step changes a parameter by the same share as
    before it was divided by its size. The others take the rate to any width: for Adam
    fan-in^-½ inside, over √depth in residual branches, fan-out^-½ for embeddings and 1 elsewhere
    (Blake et al., u-µP, 2024, table 2; Narayan et al., µnit Scaling, 2025, table 1); for SGD what
    Yang et al. (Tensor Programs V, 2022, table 3) give, on true gradients; for Muon, whose steps
    have unit spectral norm, the inverse of the product's own factor.

    Raises:
        ConfigError: for an unknown optimizer.
    """
    if optimizer not in get_args(OptimizerName):
        raise ConfigError(f"unknown optimizer {optimizer!r}; known: "
                          f"{', '.join(get_args(OptimizerName))}")
    if optimizer == "muon" and (use.rank != 2 or use.roles != ("hidden",)):
        return None
    if scheme == "unit":
        return _unit(use, optimizer)
    roles: tuple[Role | None, ...] = use.roles or (None,)
    return min(_by_width(use, role, scheme, optimizer, base_width) for role in roles)


def _unit(use: Use, optimizer: OptimizerName) -> float:
    if optimizer == "sgd":
        return use.divided**-2 * 2.0**-use.potential
    return 1 / use.divided


def _by_width(
    use: Use, role: Role | None, scheme: SchemeName, optimizer: OptimizerName, base_width: int
) -> float:
    depth = math.sqrt(max(use.branches / 2, 1.0))
    if optimizer == "muon":
        return math.sqrt(use.fan_in) / depth
    if optimizer == "sgd":
        width = use.fan_in if role in ("hidden", "output") else use.fan_out
        return width / depth**2 * 2.0**-use.potential
    if scheme == "mus":
        return math.sqrt(base_width / use.fan_in) if role == "hidden" else 1.0
    if role == "hidden":
        return use.fan_in**-0.5 / depth
    return use.fan_out**-0.5 if role == "input" else 1.0


def plain_module(model: torch.nn.Module) -> torch.nn.Module:
    """``model`` without ``torch.compile``'s wrapper."""
    return getattr(model, "_orig_mod", model)


def unit_scaling_of(model: torch.nn.Module) -> Any:
    """What ``unit_scale`` did to a model, also behind ``torch.compile``'s wrapper.

    Raises:
        ConfigError: where it is not unit-scaled.
    """
    inner = plain_module(model)
    scaling = getattr(inner, "meta", {}).get("unit_scaling") if isinstance(
        inner, torch.fx.GraphModule) else None
    if scaling is None:
        raise ConfigError(f"{type(model).__name__} is not unit-scaled: call scaleprop.unit_scale "
                          "first, and pass what it returns")
    return scaling
