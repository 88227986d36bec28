"""Mean, RMS and share of zeros of what an operator makes, from those of what it reads.

The registry is keyed as that of the rules. A rule sees one ``Call`` and answers ``Moments``, a
tuple of them for several outputs, or None where it cannot say. Values are taken for independent,
but where pointwise operators lead back to one and the same value: see ``moments_pointwise``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.fx

from scaleprop._torch_compat import traced_size
from scaleprop.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Moments:
    """What is known of the elements of one tensor.

    mean, rms: over all elements but those that are masked. zeros: share of elements that are
    exactly 0. masked: share that is −∞, or stands for it (see ``limit``). nonnegative: no element
    is below 0. +∞ and NaN count nowhere. A mask has the moments of its zeros and ones.
    """

    mean: float
    rms: float
    zeros: float = 0.0
    masked: float = 0.0
    nonnegative: bool = False

    @property
    def variance(self) -> float:
        """rms² − mean²; ≥ 0."""
        return max(self.rms**2 - self.mean**2, 0.0)

    @classmethod
    def constant(cls, value: float, dtype: torch.dtype = torch.float32) -> Moments:
        """Of a tensor of ``dtype`` that holds one number.

        Raises:
            Unknown: of +∞ and NaN.
        """
        if math.isnan(value) or value == math.inf:
            raise Unknown
        if value <= -limit(dtype):
            return cls(0.0, 0.0, masked=1.0)
        return cls(value, abs(value), zeros=float(value == 0), nonnegative=value >= 0)

    @classmethod
    def of_mask(cls, share: float) -> Moments:
        """Of a mask that is set at ``share`` of its places."""
        return cls(share, math.sqrt(share), zeros=1 - share, nonnegative=True)

    @classmethod
    def measured(cls, x: torch.Tensor, masks: bool = True) -> Moments | None:
        """Of real numbers; None where there are none. masks: see ``numbers``."""
        if x.is_complex() or not x.numel():
            return None
        if x.dtype is torch.bool:
            return cls.of_mask(float(x.double().mean()))
        counted, masked = numbers(x, masks)
        total = counted.numel() + masked
        if not counted.numel():
            return cls(0.0, 0.0, masked=1.0) if masked else None
        return cls(
            float(counted.mean()), float(counted.square().mean().sqrt()),
            zeros=float((counted == 0).sum()) / total, masked=masked / total,
            nonnegative=bool((counted >= 0).all()))

    def times(self, factor: float) -> Moments:
        """Of factor·x."""
        return dataclasses.replace(
            self, mean=self.mean * factor, rms=self.rms * abs(factor),
            zeros=self.zeros if factor else 1.0, nonnegative=self.nonnegative and factor >= 0)


def limit(dtype: torch.dtype) -> float:
    """In a mask, −limit and what is below it stands for −∞: half of the largest number of types of
    16 bits and more; 1e30 at most."""
    if not dtype.is_floating_point or dtype.itemsize == 1:
        return math.inf
    return min(torch.finfo(dtype).max / 2, 1e30)


def numbers(
    x: torch.Tensor, masks: bool, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, int]:
    """The finite elements of ``x`` [n], in float64, and how many are masked.

    masks: whether −∞, and what ``limit`` says stands for it, is there to hide something: then it is
    masked. Else only what is finite counts, and all of it. dtype: whose ``limit``, if not x's own:
    of what x was cast from.
    """
    values = x.detach().double().flatten()
    lowest = -limit(dtype or x.dtype) if masks else -math.inf
    hidden = (values <= lowest) & masks
    return values[values.isfinite() & ~hidden], int(hidden.sum())


class Unknown(Exception):
    """An argument of which nothing is known: then nothing is of the output. Never leaves here."""


# several outputs; None where one is unknown, or is no float
Answer = Moments | None | tuple[Moments | None, ...]


class Call:
    """One call of an operator: its arguments by the names of its schema, and what is known of them.

    known: graph node → the moments of its value, or a tuple of them.
    """

    def __init__(self, node: torch.fx.Node, known: Callable[[torch.fx.Node], Answer]) -> None:
        self.node = node
        self._known = known

    @functools.cached_property
    def arguments(self) -> Mapping[str, Any]:
        """Every argument, defaults filled in."""
        schema: Any = self.node.target._schema  # type: ignore[union-attr]
        given = dict(zip((a.name for a in schema.arguments), self.node.args, strict=False))
        return {a.name: self.node.kwargs.get(a.name, given.get(a.name, a.default_value))
                for a in schema.arguments}

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def first(self) -> Moments:
        """Of argument 0."""
        return self.of(self.node.args[0])

    def of(self, given: Any) -> Moments:
        """Of an argument, by value or by name; a number is a constant.

        Raises:
            Unknown: where nothing is known of it.
        """
        found = self.maybe(given)
        if found is None:
            raise Unknown
        return found

    def maybe(self, given: Any) -> Moments | None:
        """The same; None where nothing is known of it."""
        value = self.arguments[given] if isinstance(given, str) else given
        if isinstance(value, int | float):
            is_known = not math.isnan(value) and value != math.inf
            return Moments.constant(float(value)) if is_known else None
        found = self._known(value) if isinstance(value, torch.fx.Node) else None
        return None if isinstance(found, tuple) else found

    def shape(self, given: Any = None) -> tuple[int, ...]:
        """Of an argument, by value or by name; of the (first) output, without one."""
        node = self.arguments[given] if isinstance(given, str) else given or self.node
        value: Any = node.meta["val"]
        first = value[0] if isinstance(value, tuple | list) else value
        return tuple(traced_size(size) for size in first.shape)

    def numel(self, given: Any = None) -> int:
        """How many elements an argument, or the (first) output, has."""
        return math.prod(self.shape(given))


MomentsRule = Callable[[Call], Answer]
_AnyRule = TypeVar("_AnyRule", bound=MomentsRule)
_MOMENTS: dict[Any, MomentsRule] = {}


def moments_rule(*operators: Any) -> Callable[[_AnyRule], _AnyRule]:
    """Register a function as the answer of ``operators``.

    Raises:
        ConfigError: where one has an answer already.
    """

    def register(rule: _AnyRule) -> _AnyRule:
        for op in operators:
            if op in _MOMENTS:
                raise ConfigError(f"{op} already has a rule for moments")
            _MOMENTS[op] = rule
        return rule

    return register


def moments_rule_for(op: Any) -> MomentsRule | None:
    """How an operator's moments are found, or None: then they are unknown."""
    return _MOMENTS.get(op)


def answer(call: Call) -> Answer:
    """What the operator's rule says; None where there is none, or it knows too little."""
    rule = moments_rule_for(call.node.target)
    try:
        return None if rule is None else rule(call)
    except Unknown:
        return None


def mixed(parts: Sequence[tuple[float, Moments]]) -> Moments:
    """Of elements taken from several tensors, in the given shares (of any sum)."""
    total = sum(share for share, _ in parts)
    mean = square = zeros = masked = 0.0
    nonnegative = True
    for share, moments in parts:
        part = share / total if total else 0.0
        live = part * (1 - moments.masked)
        mean += live * moments.mean
        square += live * moments.rms**2
        zeros += part * moments.zeros
        masked += part * moments.masked
        nonnegative = nonnegative and moments.nonnegative
    live = 1 - masked
    if live <= 0:
        return Moments(0.0, 0.0, masked=1.0)
    return Moments(mean / live, math.sqrt(square / live), zeros, masked, nonnegative)


ZERO = Moments.constant(0.0)


def among_zeros(moments: Moments, share: float) -> Moments:
    """Of a tensor that is 0 but at ``share`` of its places."""
    return mixed([(share, moments), (1 - share, ZERO)])


def summed(moments: Moments, n: float) -> Moments:
    """Of sums of n independent elements: mean n·m, rms² = n·rms² + n·(n−1)·m².

    n may be below 1: then it is the chance that an element comes at all.
    """
    square = n * moments.rms**2 + max(n * (n - 1), 0.0) * moments.mean**2
    zeros = moments.zeros**n if n >= 1 else 1 - n * (1 - moments.zeros)
    return Moments(n * moments.mean, math.sqrt(square), zeros, nonnegative=moments.nonnegative)


def averaged(moments: Moments, n: float) -> Moments:
    """Of means of n independent elements."""
    return summed(moments, n).times(1 / n)


def product(left: Moments, right: Moments, n: float = 1) -> Moments:
    """Of sums of n products of independent factors."""
    return summed(Moments(
        left.mean * right.mean, left.rms * right.rms,
        zeros=1 - (1 - left.zeros) * (1 - right.zeros),
        nonnegative=left.nonnegative and right.nonnegative), n)


def added(left: Moments, right: Moments) -> Moments:
    """Of sums of two independent terms."""
    mean = left.mean + right.mean
    return Moments(
        mean, math.sqrt(left.variance + right.variance + mean**2), left.zeros * right.zeros,
        masked=1 - (1 - left.masked) * (1 - right.masked),
        nonnegative=left.nonnegative and right.nonnegative)


# -- distributions: those of least assumption that have the moments


def grid(moments: Moments, points: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and their weights [points + those at 0 and −∞], float64.

    Normal where values have both signs, lognormal where they have one. Evenly spaced in z, so that
    the integral of a smooth function is exact, and no value lies on the mean, where steps are.
    """
    live = max(1 - moments.masked - moments.zeros, 0.0)
    unmasked = 1 - moments.masked
    values, weights = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    if live > 1e-12:
        share = live / unmasked
        mean, square = moments.mean / share, moments.rms**2 / share
        z = torch.linspace(-6, 6, points + 1, dtype=torch.float64)[:-1] + 6 / points
        density = torch.exp(-z * z / 2)
        values, weights = _shaped(z, mean, square, moments.nonnegative), live * density
        weights = weights / density.sum()
    if moments.zeros > 0:
        values = torch.cat([values, values.new_zeros(1)])
        weights = torch.cat([weights, weights.new_tensor([moments.zeros])])
    if moments.masked > 0:
        values = torch.cat([values, values.new_tensor([-math.inf])])
        weights = torch.cat([weights, weights.new_tensor([moments.masked])])
    return values, weights


def _shaped(z: torch.Tensor, mean: float, square: float, nonnegative: bool) -> torch.Tensor:
    """Standard normal numbers → numbers of the given mean and mean square."""
    variance = max(square - mean**2, 0.0)
    if variance <= 1e-14 * square:
        return torch.full_like(z, mean)
    if nonnegative and mean > 0:
        spread = math.log(square / mean**2)
        return torch.exp(math.log(mean) - spread / 2 + math.sqrt(spread) * z)
    return mean + math.sqrt(variance) * z


def drawn(moments: Moments, rows: int, n: int) -> torch.Tensor:
    """Random rows [rows, n], the same at every call; nothing in them is masked."""
    maker = torch.Generator().manual_seed(rows * 1_000_003 + n)
    live = max(1 - moments.zeros / max(1 - moments.masked, 1e-12), 1e-12)
    z = torch.randn(rows, n, generator=maker, dtype=torch.float64)
    values = _shaped(z, moments.mean / live, moments.rms**2 / live, moments.nonnegative)
    if moments.zeros > 0:
        values = values * (torch.rand(rows, n, generator=maker, dtype=torch.float64) < live)
    return values


def by_rows(
    moments: Moments, n: int, function: Callable[[torch.Tensor], torch.Tensor]
) -> Moments | None:
    """Of an operator on rows of n elements, evaluated on rows drawn at random [some, n].

    Some tens of thousands of elements; rows beyond 8192 elements are shortened.
    """
    n = max(1, min(n, 8192))
    return Moments.measured(function(drawn(moments, max(4, 32768 // n), n)))
