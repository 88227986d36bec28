"""Modules whose weight is stored as codes and scales, and that compute as a scaled graph does.

    nn.Linear      y = scaled_mm(quantize(x), [codes, scale, …], b)
    nn.Conv*d      y = conv(fake_quantize(x), dequantize([codes, scale, …]), b)
    nn.Embedding   y = dequantize([codes[ids], scale[ids], …])

A module is changed in place: it keeps its bias, its options and its own ``forward``, where that
calls its parent's. The stored parts are buffers ``weight_data``, ``weight_scale``, …, which a
change of dtype leaves alone; ``weight`` is what they stand for, made anew whenever it is read.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from scaleprop import ops
from scaleprop.errors import ConfigError
from scaleprop.formats import parse
from scaleprop.formats.tensor import storage_layout
from scaleprop.passes.assign import unfit
from scaleprop.passes.quantize_weights import PLAIN_NAMES, part_names, quantized_matrix
from scaleprop.recipes import Recipe, Role
from scaleprop.rules import Contraction, rule_for

Kind = Literal["linear", "conv", "embedding"]
aten = torch.ops.aten
# the operator that a kind of module is in a graph → the recipe's roles for (weight, activation)
_ROLES: Mapping[Kind, tuple[str, str | None]] = {
    "linear": ("fprop.w", "fprop.x"), "conv": ("conv.w", "conv.x"),
    "embedding": ("embedding", None)}
_OPERATORS: Mapping[type[nn.Module], Any] = {
    nn.Linear: aten.linear.default, nn.Embedding: aten.embedding.default,
    nn.Conv1d: aten.conv1d.default, nn.Conv2d: aten.conv2d.default, nn.Conv3d: aten.conv3d.default}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What becomes of one module.

    base: the type that it is treated as. operator: what it is in a graph. weight, activation: None
        for an activation that stays as it is. transposed: its weight lies as [K, N].
    format, names: of the stored parts, the latter as buffers. reads: the activation's format.
    """

    base: type[nn.Module]
    operator: str
    weight: Role
    activation: Role | None
    transposed: bool = False
    # found once: torch.compile does not trace formats
    format: str = dataclasses.field(init=False)
    names: tuple[str, ...] = dataclasses.field(init=False)
    reads: str | None = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        fmt, read = parse(self.weight.format), self.activation
        found = {"format": str(fmt), "names": tuple(f"weight_{name}" for name in part_names(fmt)),
                 "reads": None if read is None else str(parse(read.format))}
        for name, value in found.items():
            object.__setattr__(self, name, value)

    def matrix_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """[N, K] of a weight of this shape, K being what is summed."""
        rows, columns = shape[0], math.prod(shape[1:])
        return (columns, rows) if self.transposed else (rows, columns)

    def quantized(self, weight: Tensor) -> dict[str, Tensor]:
        """The buffers of a weight.

        Raises:
            FormatError: for numbers that the format cannot take.
        """
        matrix = weight.detach().t() if self.transposed else weight.detach().flatten(1)
        return dict(zip(self.names, quantized_matrix(matrix, self.weight).parts, strict=True))


def plan_for(module: nn.Module, recipe: Recipe, linears: Mapping[type[nn.Module], bool]
             ) -> Plan | None:  # fmt: skip
    """What ``recipe`` makes of ``module``; None: it stays as it is.

    linears: more types that are linear layers → whether their weight lies as [K, N].
    """
    base = next((kind for kind in (*linears, *_OPERATORS) if isinstance(module, kind)), None)
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    is_read = isinstance(module, NonDynamicallyQuantizableLinear)  # by attention, which owns it
    if base is None or weight is None or is_read or not _reaches(type(module), base):
        return None
    operator = aten.linear.default if base in linears else _OPERATORS[base]
    contraction = _contraction(operator)
    kind = _kind(contraction)
    names = _ROLES[kind]
    stored = _fitting(recipe.roles.get(names[0]), contraction, "weight")
    computes_wide = weight.dtype not in PLAIN_NAMES
    if stored is None or computes_wide or getattr(module, "max_norm", None) is not None:
        return None
    read = _fitting(recipe.roles.get(names[1] or ""), contraction, "activation")
    return Plan(base=base, operator=str(operator), weight=stored, activation=read,
                transposed=linears.get(base, False))


def _reaches(cls: type[nn.Module], base: type[nn.Module]) -> bool:
    """Whether ``cls`` leaves it to ``base`` what is done with the weight."""
    for kind in cls.__mro__[: cls.__mro__.index(base)]:
        own = [inspect.unwrap(kind.__dict__[name]) for name in ("forward", "_conv_forward")
               if name in kind.__dict__]
        if any("__class__" not in function.__code__.co_freevars for function in own):
            return False  # it does not call super()
    return True


def check_recipe(recipe: Recipe) -> None:
    """Raise ``ConfigError`` for what modules cannot do that a scaled graph can."""
    compiles = f"Remedy: scaleprop.compile(model, inputs, {recipe.name!r}"
    if recipe.needs_calibration:
        raise ConfigError(f"recipe {recipe.name!r} needs calibration, and a folder has no data. "
                          f"{compiles}, calibration=…), or a recipe with dynamic scales and "
                          "weights rounded to nearest")
    for key, role in recipe.roles.items():
        if role.rounding == "stochastic":
            raise ConfigError(f"recipe {recipe.name!r} rounds {key!r} stochastically: codes would "
                              f"depend on the order of loading. {compiles})")
    for operator in _OPERATORS.values():
        contraction = _contraction(operator)
        weight, read = (recipe.roles.get(name or "") for name in _ROLES[_kind(contraction)])
        if _fitting(read, contraction, "activation") and not _fitting(weight, contraction,
                                                                      "weight"):
            raise ConfigError(f"recipe {recipe.name!r} quantizes what {operator} reads, and not "
                              f"its weight. {compiles})")


def _contraction(operator: Any) -> Contraction:
    rule = rule_for(operator)
    assert rule is not None and rule.contraction is not None
    return rule.contraction


def _kind(contraction: Contraction) -> Kind:
    kind: Any = contraction.kind
    return kind


def _fitting(role: Role | None, contraction: Contraction,
             operand: Literal["weight", "activation"]) -> Role | None:
    at = contraction.operand(operand)
    fits = role is not None and at is not None and unfit(role, contraction, at) is None
    return role if fits else None


def empty_parts(plan: Plan, shape: Sequence[int], device: Any) -> dict[str, Tensor]:
    """Buffers of the right shapes and dtypes for a weight of this shape."""
    layout = storage_layout(parse(plan.format), plan.matrix_shape(shape))
    return {name: torch.empty(size, dtype=dtype, device=device)
            for name, (size, dtype) in zip(plan.names, layout, strict=True)}


def scale_module(module: nn.Module, plan: Plan, parts: Mapping[str, Tensor]) -> None:
    """Change ``module`` in place: ``parts``, as ``Plan.quantized`` makes them, are its weight."""
    weight: Any = module.weight
    del module.weight
    module.__class__ = _scaled_class(type(module), plan.base)
    assert isinstance(module, ScaledWeight)
    module.weight_plan = plan
    module.weight_shape, module.weight_dtype = tuple(weight.shape), weight.dtype
    for name, part in parts.items():
        module.register_buffer(name, part)


def restore_module(module: ScaledWeight, dtype: torch.dtype | None = None) -> None:
    """The module as it was, with the weight that its codes stand for as a parameter."""
    weight = module.weight.to(dtype or module.weight_dtype)
    for name in module.weight_plan.names:
        delattr(module, name)
    del module.weight_plan, module.weight_shape, module.weight_dtype
    module.__class__ = module.original  # type: ignore[assignment]
    module.register_parameter("weight", nn.Parameter(weight))


class ScaledWeight(nn.Module):
    """What all of them share.

    weight_plan: its formats. weight_shape, weight_dtype: of ``weight``.
    """

    weight_plan: Plan
    weight_shape: tuple[int, ...]
    weight_dtype: torch.dtype
    original: ClassVar[type[nn.Module]]

    @property
    def parts(self) -> list[Tensor]:
        """[codes, scale, (tensor scale), (zero point)]."""
        return [getattr(self, name) for name in self.weight_plan.names]

    @property
    def weight(self) -> Tensor:
        """What the codes stand for, dequantized at every reading."""
        shape = list(self.weight_plan.matrix_shape(self.weight_shape))
        matrix = ops.dequantize(self.parts, self.weight_plan.format, shape, -1, self.weight_dtype)
        return matrix.t() if self.weight_plan.transposed else matrix.view(self.weight_shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ScaledWeight:
        """Parts go along to another device and keep their dtypes, which are the format's."""
        parts = {name: self._buffers.pop(name) for name in self.weight_plan.names}
        kept: Mapping[str, Tensor | None] = parts
        try:
            super()._apply(fn, recurse)
            kept = {name: _moved(part, fn) for name, part in parts.items() if part is not None}
        finally:  # a device that does not exist must not cost the weight
            self._buffers.update(kept)
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        return self

    def __reduce__(self) -> Any:
        """The class is made here, so it cannot be found by its name."""
        return _without_state, (self.original, self.weight_plan.base), self.__dict__

    def extra_repr(self) -> str:
        read = f", x={self.weight_plan.reads}" if self.weight_plan.reads else ""
        return f"{super().extra_repr()}, weight={self.weight_plan.format}{read}".removeprefix(", ")


class ScaledLinear(ScaledWeight):
    """``scaled_mm`` in place of ``linear``."""

    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """[…, K] → […, N], in the input's dtype."""
        role, name = self.weight_plan.activation, PLAIN_NAMES.get(input.dtype)
        if name is None:
            raise ConfigError(f"a scaled linear layer computes in {', '.join(PLAIN_NAMES.values())}"
                              f", its input is {input.dtype}. Remedy: model.dequantize()")
        parts = [input]
        if role is not None:
            name = self.weight_plan.reads
            parts = ops.quantize(input, name, -1, role.rounding)
        k = self.weight_plan.matrix_shape(self.weight_shape)[1]
        product = ops.scaled_mm(parts, self.parts, self.bias, name, self.weight_plan.format, k)
        return product.to(input.dtype)


class ScaledConv(ScaledWeight):
    """A convolution with the weight that is stored."""

    def forward(self, input: Tensor) -> Tensor:
        """As the convolution that it was."""
        role = self.weight_plan.activation
        if role is not None:
            input = ops.fake_quantize(input, self.weight_plan.reads, -1, role.rounding)
        return super().forward(input)


class ScaledEmbedding(ScaledWeight):
    """Rows are looked up as codes."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse another number of rows: transformers would resize a copy that nothing reads."""
        if name == "num_embeddings" and value != self.weight_shape[0]:
            raise ConfigError(f"an embedding of {self.weight_shape[0]} rows in codes cannot be "
                              f"resized to {value}. Remedy: resize the float model, save it, and "
                              "load that with ScalepropConfig")
        super().__setattr__(name, value)

    def forward(self, input: Tensor) -> Tensor:
        """[…] indices → […, width]."""
        rows = [part[input] if part.ndim else part for part in self.parts]
        shape = [*input.shape, self.weight_shape[-1]]
        return ops.dequantize(rows, self.weight_plan.format, shape, -1, self.weight_dtype)


def _moved(part: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """``part`` where ``fn`` takes it; tied modules, which hold the same tensor, again get one."""
    known = getattr(part, "_moved_by", None)
    if known is not None and known[0] is fn:
        return known[1]
    moved = fn(part)
    moved = moved if moved.dtype == part.dtype else part.to(moved.device)
    if moved is not part:
        part._moved_by = (fn, moved)  # type: ignore[attr-defined]
    return moved


def _without_state(cls: type[nn.Module], base: type[nn.Module]) -> nn.Module:
    scaled = _scaled_class(cls, base)
    return scaled.__new__(scaled)


_MIXINS: Mapping[type[nn.Module], type[ScaledWeight]] = {
    nn.Embedding: ScaledEmbedding, nn.Conv1d: ScaledConv, nn.Conv2d: ScaledConv,
    nn.Conv3d: ScaledConv}


@functools.cache
def _scaled_class(cls: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """A class that is a ``cls`` and stores scaled weights: ``cls.forward``, where it has its own,
    reaches ours by ``super()``."""
    if cls is base:
        parents: tuple[type, ...] = (_MIXINS.get(base, ScaledLinear), base)
    else:
        parents = (cls, _scaled_class(base, base))
    return type(f"Scaled{cls.__name__}", parents, {"original": cls, "__doc__": cls.__doc__})
