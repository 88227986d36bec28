"""What the values of a joint graph are, measured on one batch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.fx

from scaleprop import _torch_compat as compat
from scaleprop.passes.statistics.masks import carried, fills, mask_chains
from scaleprop.passes.training.roles import gradient_values
from scaleprop.rules.moments import Moments, limit, numbers


@dataclasses.dataclass(frozen=True)
class Measured:
    """Statistics of one float tensor, over the finite elements that stand for numbers.

    kurtosis: E[(x − mean)⁴]/σ⁴, 3 for a normal; None where σ is 0. zeros: share that is exactly 0;
    masked: share that is −∞, or stands for it, to mask a softmax; nonfinite: share that is NaN or
    any other ±∞. exponents: ⌊log2 |x|⌋ → how many, of finite ones other than 0. above: limit →
    share of those other than 0 and not masked that are larger, NaN and ±∞ among them.
    """

    count: int
    amax: float
    rms: float
    mean: float
    kurtosis: float | None
    zeros: float
    masked: float
    exponents: Mapping[int, int]
    above: Mapping[float, float] = dataclasses.field(default_factory=lambda: dict[float, float]())
    nonfinite: float = 0.0

    @classmethod
    def of(
        cls, x: torch.Tensor, limits: Sequence[float] = (), masks: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Measured:
        """Of one tensor; figures in float64, of a piece at a time. masks, dtype: see
        ``rules.moments.numbers``."""
        flat, unit = x.detach().reshape(-1), 1.0
        if flat.dtype == torch.float64:  # or its fourth powers are infinite
            live = flat[flat.isfinite()]
            unit = 2.0 ** max(math.frexp(float(live.abs().max()))[1] - 200, 0) if len(live) else 1.0
        return cls.of_pieces(flat.split(_PIECE), limits, masks, dtype or x.dtype, unit)

    @classmethod
    def of_pieces(
        cls, pieces: Iterable[torch.Tensor], limits: Sequence[float] = (), masks: bool = False,
        dtype: torch.dtype | None = None, unit: float = 1.0,
    ) -> Measured:
        """Of all elements of several tensors, as if they were one. unit: a power of two that
        brings fourth powers into float64's range."""
        sums = Sums(limits, unit)
        for piece in pieces:
            sums.add(piece, masks, dtype)
        return sums.total()

    def below(self, exponent: int) -> float:
        """The share of values other than 0 and not masked that are smaller than 2^exponent."""
        total = sum(self.exponents.values()) + round(self.nonfinite * self.count)
        small = sum(count for e, count in self.exponents.items() if e < exponent)
        return small / total if total else 0.0


_PIECE = 1 << 18  # elements: the temporaries of a piece stay small
_LEAST_EXPONENT = -1075  # of float64's subnormals; the greatest is 1023


class Sums:
    """Running sums of central moments, merged piece by piece: Pébay, SAND2008-6212, 2008."""

    def __init__(self, limits: Sequence[float] = (), unit: float = 1.0) -> None:
        self.unit = unit
        self.count = self.masked = self.number = self.live = 0
        self.amax = self.mean = self.second = self.third = self.fourth = 0.0
        self.above = dict.fromkeys(limits, 0)
        self.exponents = torch.zeros(1024 - _LEAST_EXPONENT, dtype=torch.int64)

    def add(
        self, piece: torch.Tensor, masks: bool = False, dtype: torch.dtype | None = None
    ) -> None:
        """Count one piece; masks, dtype: see ``rules.moments.numbers``."""
        counted, masked = numbers(piece, masks, dtype)
        counted = counted.cpu()
        self.count += piece.numel()
        self.masked += masked
        if not counted.numel():
            return
        live = counted[counted != 0].abs()
        self.live += live.numel()
        if live.numel():
            self.amax = max(self.amax, float(live.max()))
            places = torch.frexp(live).exponent - 1 - _LEAST_EXPONENT
            self.exponents += torch.bincount(places, minlength=len(self.exponents))
        for most in self.above:
            self.above[most] += int((live > most).sum())
        self._merge(counted / self.unit)

    def _merge(self, x: torch.Tensor) -> None:
        n, m = self.number, x.numel()
        mean = float(x.mean())
        centred = x - mean
        square = centred.square()
        second, third = float(square.sum()), float((square * centred).sum())
        delta, total = mean - self.mean, n + m
        self.fourth += (float(square.square().sum())
                        + delta**4 * (n / total) * (m / total) * (n * n - n * m + m * m) / total
                        + 6 * delta**2 * (n**2 * second + m**2 * self.second) / total**2
                        + 4 * delta * (n * third - m * self.third) / total)
        self.third += (third + delta**3 * n * m * (n - m) / total**2
                       + 3 * delta * (n * second - m * self.second) / total)
        self.second += second + delta**2 * n * m / total
        self.mean += delta * m / total
        self.number = total

    def total(self) -> Measured:
        """Of everything so far."""
        count, number = self.count, self.number
        bad = count - number - self.masked
        variance = self.second / number if number else 0.0
        seen = self.live + bad
        return Measured(
            count=count, amax=self.amax, rms=math.sqrt(variance + self.mean**2) * self.unit,
            mean=self.mean * self.unit,
            kurtosis=self.fourth / number / variance**2 if variance**2 > 0 else None,
            zeros=(number - self.live) / max(count, 1), masked=self.masked / max(count, 1),
            exponents={place + _LEAST_EXPONENT: int(self.exponents[place])
                       for place in self.exponents.nonzero().flatten().tolist()},
            above={most: (over + bad) / seen for most, over in self.above.items() if seen},
            nonfinite=bad / max(count, 1))


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a joint graph.

    measured: of every float value; given: moments of what no prediction is made for: inputs, and
    what depends neither on parameters nor on gradients; extra: what ``also`` returned, node by
    node; backward: the values that depend on the loss's gradient; masks: those in which −∞ may
    stand for what is hidden.
    """

    measured: Mapping[torch.fx.Node, Measured]
    given: Mapping[torch.fx.Node, Moments]
    extra: Mapping[torch.fx.Node, Any]
    backward: frozenset[torch.fx.Node]
    masks: frozenset[torch.fx.Node] = frozenset()


# sees a node, its value and its arguments' values; None: nothing to keep
Also = Callable[[torch.fx.Node, Any, tuple[Any, ...], Mapping[str, Any]], Any]


def measure(
    joint: torch.fx.GraphModule, inputs: Sequence[Any], parameters: Mapping[torch.fx.Node, Any],
    also: Also | None = None, limits: Sequence[float] = (),
) -> Run:
    """Run ``joint`` once on real inputs; its caller's random state stays what it was."""
    backward = gradient_values(joint.graph)
    work = Watch(joint, parameters, backward, also, limits)
    with torch.no_grad(), compat.without_modes(), own_random_state(joint.graph, inputs):
        work.run(*inputs, enable_io_processing=False)
    return Run(work.measured, work.given, work.extra, frozenset(backward), frozenset(work.masks))


def own_random_state(graph: torch.fx.Graph, inputs: Sequence[Any]) -> AbstractContextManager[None]:
    """What is drawn inside leaves the caller's generators as they were: the CPU's, and those of the
    devices that ``inputs`` and the graph's values are on."""
    traced = (node.meta.get("val", node.meta.get("example_value")) for node in graph.nodes)
    devices = {value.device for value in (*inputs, *traced) if isinstance(value, torch.Tensor)}
    others = sorted((device for device in devices if device.type not in ("cpu", "meta")), key=str)
    kind = others[0].type if others else "cuda"
    return torch.random.fork_rng(
        [device for device in others if device.type == kind], device_type=kind)


class Watch(torch.fx.Interpreter):
    """Runs a graph, and looks at every float value that it makes: see ``Run``."""

    def __init__(
        self, joint: torch.fx.GraphModule, parameters: Mapping[torch.fx.Node, Any],
        backward: set[torch.fx.Node], also: Also | None, limits: Sequence[float],
    ) -> None:
        super().__init__(joint)
        self.measured: dict[torch.fx.Node, Measured] = {}
        self.given: dict[torch.fx.Node, Moments] = {}
        self.extra: dict[torch.fx.Node, Any] = {}
        self.masks: dict[torch.fx.Node, torch.dtype | None] = {}  # whose limit tells what is hidden
        self._also = also
        self._limits = limits
        self._moving = set(backward)  # what depends on parameters or gradients
        for node in joint.graph.nodes:
            if node in parameters or any(s in self._moving for s in node.all_input_nodes):
                self._moving.add(node)
        self._chains = mask_chains(joint.graph, self._moving)

    def run_node(self, n: torch.fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        value = super().run_node(n)
        if self._also is not None and n.op == "call_function":
            found = self._also(n, value, tuple(args), kwargs)
            if found is not None:
                self.extra[n] = found
        if n.op == "output":
            return value
        if self._may_mask(n):
            self.masks[n] = self._narrowest(n, value)
        if isinstance(value, torch.Tensor):
            self.keep(n, value)
        return value

    def keep(self, node: torch.fx.Node, value: torch.Tensor) -> None:
        """Note what is known of one value."""
        masks = node in self.masks
        if value.is_floating_point():
            self.measured[node] = seen = Measured.of(
                value, self._limits, masks, self.masks.get(node))
            if not seen.masked:
                self.masks.pop(node, None)
        if node.op == "placeholder" or node not in self._moving:
            moments = Moments.measured(value, masks)
            if moments is not None:
                self.given[node] = moments

    def _narrowest(self, node: torch.fx.Node, value: Any) -> torch.dtype | None:
        """Of the types that a mask has had on its way to ``node``, the one of least range: its
        lowest number stays what it is in a wider one."""
        types = [self.masks.get(source) for source in carried(node)]
        types.append(value.dtype if isinstance(value, torch.Tensor) else None)
        return min((t for t in types if t is not None), key=limit, default=None)

    def _may_mask(self, node: torch.fx.Node) -> bool:
        """Whether −∞ in ``node`` hides something: it was put there by what no parameter has a part
        in, and leads to a softmax; or it was moved or summed from where it does."""
        put = node.op == "placeholder" or node not in self._moving or fills(node)
        return (node in self._chains and put) or any(s in self.masks for s in carried(node))
