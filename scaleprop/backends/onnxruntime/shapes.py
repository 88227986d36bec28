"""Sizes at lowering time: integers where they are known, one-element int64 vectors elsewhere.

A symbolic size is emitted at most once: as ``Shape`` of the first value that has it, which is a
graph input wherever possible. Reshapes copy or infer a symbolic size (0, −1) instead of computing
it, so that ordinary models contain no chains of shape arithmetic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir

from scaleprop.backends.onnxruntime.builder import GraphBuilder
from scaleprop.passes.dimensions import spell


@dataclasses.dataclass(frozen=True)
class Size:
    """A size that is known only when the graph runs.

    expression: equal expressions, equal sizes. emit: the size as a one-element int64 vector;
    None where nothing computes it, and only a reshape can infer it.
    """

    expression: Any
    emit: Callable[[], ir.Value] | None = dataclasses.field(compare=False)

    def vector(self) -> ir.Value:
        """The size as a one-element int64 vector."""
        if self.emit is None:
            raise ValueError(f"size {self.expression} can only be inferred")
        return self.emit()


Dim = int | Size


def expression_of(size: Any) -> Any:
    """The sympy expression of a ``SymInt``."""
    return size.node.expr


def is_static(sizes: Sequence[Dim]) -> bool:
    """Whether every size is a known integer."""
    return all(isinstance(size, int) for size in sizes)


def shape_vector(builder: GraphBuilder, sizes: Sequence[Dim]) -> ir.Value:
    """The sizes as one int64 vector: a constant where all are known, else a ``Concat``."""
    if is_static(sizes):
        return builder.integers([size for size in sizes if isinstance(size, int)])
    pieces: list[ir.Value] = []
    known: list[int] = []
    for size in sizes:
        if isinstance(size, int):
            known.append(size)
            continue
        if known:
            pieces.append(builder.integers(known))
            known = []
        pieces.append(size.vector())
    if known:
        pieces.append(builder.integers(known))
    return pieces[0] if len(pieces) == 1 else builder.op("Concat", *pieces, axis=0)


def reshape(
    builder: GraphBuilder, x: ir.Value, have: Sequence[Dim], want: Sequence[Dim]
) -> ir.Value:
    """``x`` of shape ``have`` as shape ``want``; no node where they are equal."""
    if list(have) == list(want):
        return x
    if 0 in want or 0 in have:
        return builder.op("Reshape", x, shape_vector(builder, want), allowzero=1)
    target: list[Dim] = [
        0 if isinstance(size, Size) and axis < len(have) and have[axis] == size else size
        for axis, size in enumerate(want)
    ]
    unknown = [axis for axis, size in enumerate(target) if isinstance(size, Size)]
    if unknown:  # the one that nothing computes, else the last
        inferred = [axis for axis in unknown if want[axis].emit is None]  # pyright: ignore
        target[(inferred or unknown)[-1]] = -1
    return builder.op("Reshape", x, shape_vector(builder, target))


def onnx_shape(shape: Sequence[Any], names: dict[str, str]) -> ir.Shape:
    """A torch shape as an ONNX shape; ``names``: symbol → the dimension name to show for it."""
    return ir.Shape([size if isinstance(size, int) else spell(size, names) for size in shape])


def scalar(builder: GraphBuilder, vector: ir.Value) -> ir.Value:
    """A one-element vector as a 0-d tensor."""
    return builder.op("Squeeze", vector, builder.integers([0]))
