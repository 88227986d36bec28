"""What becomes of every parameter of a model in a checkpoint: codes, or numbers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from scaleprop.errors import ConfigError, FormatError, describe
from scaleprop.formats.elements import IntegerElement
from scaleprop.interchange import layouts, schemes
from scaleprop.interchange.programs import (
    REMEDY,
    Quantized,
    quantized_weights,
    read_names,
    refuse_runtime,
    tensor_of,
)
from scaleprop.passes.base import Program


@dataclasses.dataclass(frozen=True, eq=False)
class Coded:
    """A weight in codes: its scheme in compressed-tensors' words, and how it is stored."""

    weight: Quantized
    weights: dict[str, Any]
    activations: dict[str, Any] | None
    compression: str

    @property
    def key(self) -> str:
        """Equal for modules of one scheme."""
        return json.dumps([self.weights, self.activations, self.compression], sort_keys=True)

    def tensors(self) -> dict[str, Tensor]:
        """By their names within the module."""
        return {**layouts.written(self.weight.tensor, self.compression), **self._inputs()}

    def _inputs(self) -> dict[str, Tensor]:
        fmt, scales = self.weight.activation, self.weight.scales
        if fmt is None or not scales:
            return {}
        if fmt.two_level:
            return {"input_global_scale": layouts.global_scale(scales[0])}
        parts = {"input_scale": scales[0].to(torch.float32).reshape(1)}
        if fmt.zero_point:
            assert isinstance(fmt.element, IntegerElement)
            shifted = scales[1].to(torch.int16) - (1 << (fmt.bits - 1))
            parts["input_zero_point"] = shifted.to(torch.int8).reshape(1)
        return parts


def coded(weight: Quantized, name: str) -> Coded:
    """How this weight is stored.

    Raises:
        ConfigError: where compressed-tensors has no words for it, naming it.
    """
    fmt, activation = weight.tensor.format, weight.activation
    what = f"{name} in {fmt}"
    try:
        weights = schemes.weight_args(fmt)
        activations = None
        if activation is not None:
            what = f"what is multiplied with {name}, in {activation}"
            activations = schemes.activation_args(
                activation, "static" if weight.scales else "dynamic")
            if weight.tensor.shape[1] % activations.get("group_size", 1):
                raise FormatError(f"{weight.tensor.shape[1]} channels are no whole blocks")
        compression = schemes.compression(weights, activations)
        what = f"{name} in {fmt}"
        found = Coded(weight, weights, activations, compression)
        found.tensors()
    except FormatError as error:
        raise ConfigError(
            f"{describe(weight.node)}: {what} does not fit compressed-tensors: {error}. {REMEDY}; "
            "or take another format, or exclude= the operator") from error
    return found


@dataclasses.dataclass(frozen=True)
class Plan:
    """Every parameter and persistent buffer of ``like``, by its name there.

    dense: those that are written as numbers. coded: those written as codes. untied: whether
    parameters that were one tensor in ``like`` are not one any more. ties: name → the first name
    of the same tensor, of all that share one.
    """

    dense: Mapping[str, Tensor]
    coded: Mapping[str, Coded]
    ties: Mapping[str, str]
    untied: bool

    @property
    def written(self) -> Iterator[str]:
        """Names in the model's order; of a shared tensor the first, unless they have come apart."""
        for name in self.ties:
            if self.untied or self.ties[name] == name:
                yield name

    def decoded(self, like: nn.Module) -> dict[str, Tensor]:
        """Every parameter as numbers, in its dtype in ``like``."""
        return {name: self.dense[name] if name in self.dense
                else self.coded[name].weight.tensor.dequantize(tensor.dtype)
                for name, tensor in like.state_dict().items()}  # fmt: skip


def plan(program: Program, like: nn.Module) -> Plan:
    """What to write for ``program``, which was compiled from ``like``.

    Raises:
        ConfigError: where ``like`` is another model, or something does not fit.
    """
    refuse_runtime(program)
    return _Planning(program, like).plan()


class _Planning:
    def __init__(self, program: Program, like: nn.Module) -> None:
        self.program = program
        self.state: dict[str, Tensor] = like.state_dict(keep_vars=True)
        self.owners = dict(like.named_modules(remove_duplicate=False))
        self.read = read_names(program)
        self.groups: dict[int, list[str]] = {}
        for name, tensor in self.state.items():
            self.groups.setdefault(id(tensor), []).append(name)
        self.dense: dict[str, Tensor] = {}
        self.coded: dict[str, Coded] = {}

    def plan(self) -> Plan:
        for name, weight in quantized_weights(self.program):
            self._place(name, weight)
        folded = {name for record in self.program.transforms if record.refused is None
                  for name in record.absorbed}  # fmt: skip
        for name in self.state:
            if name not in self.coded and name not in self.dense:
                self.dense[name] = self._number(name, folded)
        ties = {name: names[0] for names in self.groups.values() for name in names}
        untied = any(self._differ(names) for names in self.groups.values())
        return Plan(self.dense, self.coded, {name: ties[name] for name in self.state}, untied)

    def _place(self, name: str, weight: Quantized) -> None:
        parameter = self.state.get(name)
        if parameter is None:
            raise ConfigError(
                f"{describe(weight.node)}: its weight {name!r} is no parameter of "
                f"{len(self.state)} in `like`. A weight that lies as [in, out], or of which slices "
                f"are read, has no torch.nn.Linear. {REMEDY}; pass the model that was compiled")
        if parameter.numel() != weight.tensor.shape.numel():
            raise ConfigError(f"{name} has shape {list(parameter.shape)} in `like`, and "
                              f"{list(weight.tensor.shape)} in the graph: pass the model that was "
                              "compiled")
        names = self.groups[id(parameter)]
        if weight.kind == "linear":
            self._check_bias(weight)
            self._code(self._of(names, nn.Linear), name, weight)
        else:
            tensor = weight.tensor.dequantize(parameter.dtype).reshape(parameter.shape)
            chosen = self._of(names, nn.Embedding) if weight.kind == "embedding" else names
            for other in chosen or [name]:
                self.dense[other] = tensor

    def _code(self, names: Sequence[str], name: str, weight: Quantized) -> None:
        if not names:
            owner = type(self.owners.get(name.rpartition(".")[0])).__name__
            raise ConfigError(f"{describe(weight.node)}: {name} belongs to {owner}, and "
                              f"compressed-tensors describes torch.nn.Linear. {REMEDY}")
        for other in names:
            earlier = self.coded.get(other)
            if earlier is not None and not earlier.weight.agrees(weight):
                raise ConfigError(
                    f"{describe(weight.node)}: {other} is read twice, in different formats or with "
                    f"different scales, and a module has one. {REMEDY}")
            self.coded[other] = coded(weight, other)

    def _of(self, names: Sequence[str], kind: type[nn.Module]) -> list[str]:
        """Those that are the weight of such a module."""
        split = [(name, *name.rpartition(".")[::2]) for name in names]
        return [name for name, owner, leaf in split
                if leaf == "weight" and isinstance(self.owners.get(owner), kind)]  # fmt: skip

    def _check_bias(self, weight: Quantized) -> None:
        bias: Any = weight.node.args[2]
        known = bias is None or (bias.op == "get_attr" and str(bias.target) in self.state)
        if not known:
            raise ConfigError(f"{describe(weight.node)}: a pass gave it a bias ({bias}), which the "
                              f"model has no parameter for. {REMEDY}; or leave that pass out")

    def _number(self, name: str, folded: Set[str]) -> Tensor:
        """What the graph reads under this name, or another of the same tensor; else the model's."""
        names = self.groups[id(self.state[name])]
        for other in (name, *names):
            if other in self.read:
                return tensor_of(self.program, other)
        original = self.state[name].detach()
        is_folded = not folded.isdisjoint(names)  # else of a part that the example never reaches
        if is_folded and original.is_floating_point() and self._is_norm(name):
            # a gain or bias that others took up: unread by the graph, and 1 or 0 in the model
            one = 1.0 if name.endswith("weight") else 0.0
            return torch.full_like(original, one)
        return original

    def _is_norm(self, name: str) -> bool:
        """Whether it is the ``weight`` or ``bias`` of a module that has vectors only."""
        owner, _, leaf = name.rpartition(".")
        held = [key for key in self.state if key.rpartition(".")[0] == owner]
        return leaf in ("weight", "bias") and all(self.state[key].ndim == 1 for key in held)

    def _differ(self, names: Sequence[str]) -> bool:
        first: Any = self.coded.get(names[0], self.dense.get(names[0]))
        for name in names[1:]:
            other: Any = self.coded.get(name, self.dense.get(name))
            if isinstance(first, Coded) and isinstance(other, Coded):
                if first.weight is not other.weight:
                    return True
            elif first is not other and not (
                isinstance(first, Tensor) and isinstance(other, Tensor)
                and torch.equal(first, other)
            ):  # fmt: skip
                return True
        return False
