"""Quantizes the factors of convolutions: positions by channels, and filters by their numbers.

    fprop   y = x ∗ w      x [N·H·W, I], w [O, I·kh·kw]      summed over channels
    dgrad   dx             dy [N·H·W, O], w                  summed over a filter's outputs
    wgrad   dw             dy, x                             summed over positions

as linear layers have them, whose tokens are positions. What is quantized is convolved as it is
stored; the scale of a whole tensor is multiplied into the result.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Collection
from typing import Any

import torch
import torch.fx

from scaleprop.passes.training.matrices import Matrix
from scaleprop.passes.training.rewrite import Data, Rewrite
from scaleprop.passes.training.roles import parameter_of, source_of

aten: Any = torch.ops.aten
_COPY: Any = aten._to_copy.default
_FORWARD, _BACKWARD = aten.convolution.default, aten.convolution_backward.default
OPERATORS = (_FORWARD, _BACKWARD)
_GROUPED = "a convolution of groups: what it sums over is not all channels"
_AXES = {"fprop.x": 1, "fprop.w": 1, "dgrad.dy": 1, "dgrad.w": 0, "wgrad.dy": 0, "wgrad.x": 0}


def quantize_convolutions(
    graph: torch.fx.Graph, parameters: Collection[torch.fx.Node], work: Rewrite,
    kept: Collection[torch.fx.Node] = (),
) -> dict[str, str]:
    """Quantize, in place, what convolutions with a parameter read, but for those that are ``kept``
    high; node → why another one stays so."""
    high: dict[str, str] = {}
    for node in list(graph.nodes):
        if node.target not in OPERATORS or node in kept:
            continue
        forward = node.target is _FORWARD
        x, weight = node.args[:2] if forward else node.args[1:3]
        parameter = parameter_of(source_of(weight)[0])
        if parameter not in parameters:
            high[node.name] = "neither factor is a parameter"
        elif node.args[-1 if forward else -2] != 1 or node.args[6 if forward else 7]:
            high[node.name] = _GROUPED
        elif not all(isinstance(size, int) for size in x.meta["val"].shape[1:]):
            high[node.name] = "a convolution over positions whose number is not known"
        else:
            name = work.settings.names.get(parameter, parameter.name)
            layer = _Convolution(work, node, name, x, weight)
            (layer.forward if forward else layer.backward)()
    return high


@dataclasses.dataclass
class _Convolution:
    """One convolution, forward or backward."""

    work: Rewrite
    node: torch.fx.Node
    name: str
    x: torch.fx.Node
    weight: torch.fx.Node

    def forward(self) -> None:
        data = [self._read("fprop.x", self.x), self._read("fprop.w", self.weight)]
        if all(found is None for found in data):
            return
        call, node = self.work.call, self.node
        result = call(node.target, (*self._given(data, (self.x, self.weight)), None,
                                    *node.args[3:]), node)
        result = self._restored(result, data)
        if isinstance(node.args[2], torch.fx.Node):
            bias = call(aten.view.default, (node.args[2], [-1, *[1] * self._spatial]), node)
            result = call(aten.add.Tensor, (result, bias), node)
        node.replace_all_uses_with(result)

    def backward(self) -> None:
        """Each of the three results by a call of its own: they read other factors."""
        parts: dict[int, torch.fx.Node] = {}
        for user in list(self.node.users):
            place: Any = user.args[1]
            if place not in parts:
                parts[place] = (self._input, self._filter, self._bias)[place]()
            user.replace_all_uses_with(parts[place])

    def _input(self) -> torch.fx.Node:
        dy: Any = self.node.args[0]
        data = [self._read("dgrad.dy", dy), self._read("dgrad.w", self.weight)]
        given, weight = self._given(data, (dy, self.weight))
        result = self._restored(self._part(0, given, self.x, weight), data)
        if not self.work.estimates("x"):
            return result
        flat = self.work.estimated(self._flat(result), self._matrix("fprop.x", self.x), "x",
                                   self.name, self.node, self.node)
        return self._unflat(flat, self.x)

    def _filter(self) -> torch.fx.Node:
        dy: Any = self.node.args[0]
        data = [self._read("wgrad.dy", dy), self._read("wgrad.x", self.x)]
        given, x = self._given(data, (dy, self.x))
        result = self._restored(self._part(1, given, x, self.weight), data)
        if not self.work.estimates("w"):
            return result
        flat = self._view(result, [result.meta["val"].shape[0], -1])
        flat = self.work.estimated(flat, self._matrix("fprop.w", self.weight), "w", self.name,
                                   self.node, self.node)
        return self._view(flat, list(self.weight.meta["val"].shape))

    def _bias(self) -> torch.fx.Node:
        return self._part(2, *self.node.args[:3])

    def _part(self, place: int, dy: Any, x: Any, weight: Any) -> torch.fx.Node:
        mask = [place == each for each in range(3)]
        made = self.work.call(_BACKWARD, (dy, x, weight, *self.node.args[3:-1], mask), self.node)
        return self.work.call(operator.getitem, (made, place), self.node)

    def _read(self, role: str, value: torch.fx.Node) -> Data | None:
        """The data of a factor, laid out as the convolution reads it; None for itself."""
        if role not in self.work.settings.operands:
            return None
        found = self.work.operand(self.name, role, self._matrix(role, value), self.node)
        wide = self.work.call(_COPY, (found.node,), self.node,
                              kwargs={"dtype": value.meta["val"].dtype})
        shape = list(value.meta["val"].shape)
        laid = self._view(wide, shape) if role.endswith(".w") else self._unflat(wide, value)
        return dataclasses.replace(found, node=laid)

    def _matrix(self, role: str, value: torch.fx.Node) -> Matrix:
        made = self.work.once(("matrix", value), lambda: self._flat(value)
                              if not role.endswith(".w") else
                              self._view(value, [value.meta["val"].shape[0], -1]))
        return Matrix(made, False, (made,), _AXES[role])

    def _flat(self, value: torch.fx.Node) -> torch.fx.Node:
        """[N, C, …] → [N·…, C]."""
        last = self.work.call(aten.permute.default,
                              (value, [0, *range(2, self._spatial + 2), 1]), self.node)
        whole = self.work.call(aten.clone.default, (last,), self.node,
                               kwargs={"memory_format": torch.contiguous_format})
        return self._view(whole, [-1, value.meta["val"].shape[1]])

    def _unflat(self, flat: torch.fx.Node, like: torch.fx.Node) -> torch.fx.Node:
        """The inverse."""
        shape = like.meta["val"].shape
        laid = self._view(flat, [-1, *shape[2:], shape[1]])
        last = self._spatial + 1
        turned = self.work.call(aten.permute.default, (laid, [0, last, *range(1, last)]), self.node)
        return self.work.call(aten.clone.default, (turned,), self.node,
                              kwargs={"memory_format": torch.contiguous_format})

    def _view(self, value: torch.fx.Node, shape: list[Any]) -> torch.fx.Node:
        return self.work.call(aten.view.default, (value, shape), self.node)

    def _given(
        self, data: list[Data | None], plain: tuple[torch.fx.Node, torch.fx.Node]
    ) -> list[torch.fx.Node]:
        return [value if found is None else found.node
                for found, value in zip(data, plain, strict=True)]

    def _restored(self, result: torch.fx.Node, data: list[Data | None]) -> torch.fx.Node:
        return self.work.restored(result, [found for found in data if found is not None],
                                  self.node_dtype, self.node)

    @property
    def node_dtype(self) -> torch.dtype:
        value = self.node.meta["val"]
        return (value if isinstance(value, torch.Tensor) else
                next(part for part in value if part is not None)).dtype

    @property
    def _spatial(self) -> int:
        return self.x.meta["val"].ndim - 2
