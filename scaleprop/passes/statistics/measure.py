"""What the values of a joint graph are, measured on one batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx

from scaleprop import _torch_compat as compat
from scaleprop.passes.training.roles import gradient_values
from scaleprop.rules.moments import Moments, limit


@dataclasses.dataclass(frozen=True)
class Measured:
    """Statistics of one float tensor, over the elements that stand for numbers, not for ±∞.

    kurtosis: E[(x − mean)⁴]/σ⁴, 3 for a normal; None where σ is 0. zeros: share that is exactly 0;
    masked: share of ±∞, NaN and what stands for them. exponents: ⌊log2 |x|⌋ → how many, of those
    other than 0. above: limit → share of those other than 0 that are larger.
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

    @classmethod
    def of(cls, x: torch.Tensor, limits: Sequence[float] = ()) -> Measured:
        """Of one tensor; figures in float64."""
        values = x.detach().double().flatten()
        counted = values[values.abs() < limit(x.dtype)]
        if not counted.numel():
            return cls(x.numel(), 0.0, 0.0, 0.0, None, 0.0, float(x.numel() > 0), {})
        mean = float(counted.mean())
        centred = counted - mean
        variance = float(centred.square().mean())
        fourth = float(centred.square().square().mean())
        live = counted[counted != 0]
        found, counts = torch.unique(torch.frexp(live).exponent - 1, return_counts=True)
        return cls(
            count=x.numel(), amax=float(counted.abs().max()),
            rms=float(counted.square().mean().sqrt()), mean=mean,
            kurtosis=fourth / variance**2 if variance**2 > 0 else None,
            zeros=(counted.numel() - live.numel()) / x.numel(),
            masked=1 - counted.numel() / x.numel(),
            exponents=dict(zip(found.tolist(), counts.tolist(), strict=True)),
            above={most: float((live.abs() > most).sum()) / live.numel()
                   for most in limits if live.numel()})

    def below(self, exponent: int) -> float:
        """The share of values other than 0 that are smaller than 2^exponent."""
        total = sum(self.exponents.values())
        small = sum(count for e, count in self.exponents.items() if e < exponent)
        return small / total if total else 0.0


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a joint graph.

    measured: of every float value; given: moments of what no prediction is made for: inputs, and
    what depends neither on parameters nor on gradients; extra: what ``also`` returned, node by
    node; backward: the values that depend on the loss's gradient.
    """

    measured: Mapping[torch.fx.Node, Measured]
    given: Mapping[torch.fx.Node, Moments]
    extra: Mapping[torch.fx.Node, Any]
    backward: frozenset[torch.fx.Node]


# sees a node, its value and its arguments' values; None: nothing to keep
Also = Callable[[torch.fx.Node, Any, tuple[Any, ...], Mapping[str, Any]], Any]


def measure(
    joint: torch.fx.GraphModule, inputs: Sequence[Any], parameters: Mapping[torch.fx.Node, Any],
    also: Also | None = None, limits: Sequence[float] = (),
) -> Run:
    """Run ``joint`` once on real inputs; its caller's random state stays what it was."""
    backward = gradient_values(joint.graph)
    work = _Watch(joint, parameters, backward, also, limits)
    with torch.no_grad(), compat.without_modes(), torch.random.fork_rng():
        work.run(*inputs, enable_io_processing=False)
    return Run(work.measured, work.given, work.extra, frozenset(backward))


class _Watch(torch.fx.Interpreter):
    def __init__(
        self, joint: torch.fx.GraphModule, parameters: Mapping[torch.fx.Node, Any],
        backward: set[torch.fx.Node], also: Also | None, limits: Sequence[float],
    ) -> None:
        super().__init__(joint)
        self.measured: dict[torch.fx.Node, Measured] = {}
        self.given: dict[torch.fx.Node, Moments] = {}
        self.extra: dict[torch.fx.Node, Any] = {}
        self._also = also
        self._limits = limits
        self._moving = set(backward)  # what depends on parameters or gradients
        for node in joint.graph.nodes:
            if node in parameters or any(s in self._moving for s in node.all_input_nodes):
                self._moving.add(node)

    def run_node(self, n: torch.fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        value = super().run_node(n)
        if self._also is not None and n.op == "call_function":
            found = self._also(n, value, tuple(args), kwargs)
            if found is not None:
                self.extra[n] = found
        if isinstance(value, torch.Tensor) and n.op != "output":
            if value.is_floating_point():
                self.measured[n] = Measured.of(value, self._limits)
            if n.op == "placeholder" or n not in self._moving:
                moments = Moments.measured(value)
                if moments is not None:
                    self.given[n] = moments
        return value
