"""What a lowering sees: the graph under construction, and the values made so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
import onnx_ir as ir
import torch
import torch.fx

from scaleprop.backends.onnxruntime import shapes
from scaleprop.backends.onnxruntime.builder import GraphBuilder
from scaleprop.backends.onnxruntime.shapes import Dim, Size
from scaleprop.backends.onnxruntime.types import held, onnx_type
from scaleprop.errors import LoweringError, describe
from scaleprop.recipes.base import TOLERANCE

Node = torch.fx.Node
Number = bool | int | float
Arg = Node | Number


class Context:
    """One graph being lowered.

    Lowered values are kept by graph node. A node's value is one of
      ``torch.Tensor``  a constant; it becomes an initializer when a lowering asks for its value,
      ``ir.Value``      a tensor that is computed when the graph runs,
      ``Size``          a symbolic integer, float or boolean (a one-element vector),
      a list of these, or any object that the lowerings of its users understand.
    """

    def __init__(self, builder: GraphBuilder, readers: Mapping[int, set[Any]] | None = None,
                 tolerance: float = TOLERANCE, sizes: Mapping[Any, int] | None = None) -> None:
        """readers: address of a parameter → the operators that read it. tolerance: the largest
        error that a lowering may add to a product, relative to its largest value. sizes: symbol →
        its size in the example inputs."""
        self.builder = builder
        self.tolerance = tolerance
        self.bounds: dict[str, float] = {}  # node → stated error, relative to its largest value
        self.loading = 0.0  # bytes that expanding weights takes while a session loads
        self._readers = readers or {}
        self._sizes = sizes or {}
        self.lowerings: dict[str, str] = {}
        self.memo: dict[Any, Any] = {}  # for lowerings: what was already emitted, by their own key
        self._results: dict[Node, Any] = {}
        self._initializers: dict[Any, ir.Value] = {}
        self._tensors: list[torch.Tensor] = []  # keeps keys of _initializers (addresses) valid
        self._symbols: dict[Any, Size] = {}

    # ---- values -------------------------------------------------------------------------------

    def result(self, node: Node) -> Any:
        """What ``node`` was lowered to, as it is."""
        return self._results[node]

    def set_result(self, node: Node, result: Any) -> None:
        """Remember what ``node`` was lowered to."""
        self._results[node] = result
        if isinstance(result, ir.Value):
            self._note_symbols(node, result)

    def value(self, arg: Arg, dtype: torch.dtype | None = None) -> ir.Value:
        """A node or a number as an ONNX value, cast to ``dtype`` where it has another.

        bfloat16 and float16 tensors are float32 here, see ``types.held``.
        """
        if not isinstance(arg, Node):
            return self.number(arg, dtype or _type_of_number(arg))
        result = self._results[arg]
        if isinstance(result, torch.Tensor):
            if result.dim() == 0 and dtype is not None:
                return self.number(result.item(), dtype)
            value = self.weight(result, arg.name)
        elif isinstance(result, Size):
            value = self._once(("scalar", result.expression),
                               lambda: shapes.scalar(self.builder, result.vector()))
        elif isinstance(result, ir.Value):
            value = result
        else:
            raise LoweringError(
                f"{describe(arg)}: its value has no plain tensor form on onnxruntime, but an "
                f"operator other than scaled_mm or dequantize reads it; remedy: dequantize it first"
            )
        return self.cast(value, self.dtype(arg), dtype or self.dtype(arg))

    def values(self, args: Sequence[Arg], dtype: torch.dtype | None = None) -> list[ir.Value]:
        """``value`` of each."""
        return [self.value(arg, dtype) for arg in args]

    def tensor(self, arg: Any) -> torch.Tensor | None:
        """The concrete tensor behind a parameter, buffer or constant; None for computed values."""
        result = self._results.get(arg) if isinstance(arg, Node) else None
        return result if isinstance(result, torch.Tensor) else None

    def parts(self, arg: Sequence[Node] | Node) -> list[torch.Tensor] | list[ir.Value]:
        """A list argument as concrete tensors where all are constant, else as values.

        A node that was lowered to a list (an operator that returns one) gives that list.
        """
        if isinstance(arg, Node):
            return list(self._results[arg])
        tensors = [self.tensor(part) for part in arg]
        constant = [tensor for tensor in tensors if tensor is not None]
        return constant if len(constant) == len(tensors) else [self.value(part) for part in arg]

    def weight(self, tensor: torch.Tensor, name: str) -> ir.Value:
        """A constant as a value of its held type; tied tensors are stored once, not copied."""
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() <= 1:  # scalars are shared by value, and empty tensors have no address
            key = (str(tensor.tolist()), tuple(tensor.shape), tensor.dtype)
        if key not in self._initializers:
            self._tensors.append(tensor)
            stored = self.builder.initializer(tensor, name)
            self._initializers[key] = self.cast(stored, tensor.dtype, held(tensor.dtype))
        return self._initializers[key]

    def number(self, value: Number, dtype: torch.dtype) -> ir.Value:
        """A 0-d constant of the held type of ``dtype``, shared between equal ones."""
        dtype = held(dtype)
        array = torch.tensor(value, dtype=dtype).numpy()
        return self.builder.constant(array, array.dtype)

    def cast(self, value: ir.Value, have: torch.dtype, want: torch.dtype) -> ir.Value:
        """``value`` of torch dtype ``have`` in the held type of ``want``; no node where equal."""
        have, want = (held(have) if value.dtype is None else have), held(want)
        if value.dtype is not None:
            if value.dtype == onnx_type(want):
                return value
        elif have == want:
            return value
        return self._once(("cast", id(value), want),
                          lambda: self.builder.op("Cast", value, to=int(onnx_type(want))))

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """``builder.op`` with one output."""
        return self.builder.op(op_type, *inputs, **attributes)

    def branch(self, condition: ir.Value, then: Callable[[], ir.Value],
               otherwise: Callable[[], ir.Value], dtype: torch.dtype) -> ir.Value:  # fmt: skip
        """``If`` over what the two functions emit. They must not put values in ``memo``."""
        return self.builder.branch(condition, lambda: [then()], lambda: [otherwise()],
                                   [onnx_type(held(dtype))])

    def is_shared(self, node: Node, among: Sequence[Any]) -> bool:
        """Whether an operator other than those in ``among`` reads the same parameter."""
        tensor = self.tensor(node)
        return tensor is not None and bool(
            self._readers.get(tensor.data_ptr(), set()) - set(among))

    # ---- types and shapes ---------------------------------------------------------------------

    def meta(self, arg: Any) -> Any:
        """The fake value of a node; a number as itself."""
        return arg.meta["val"] if isinstance(arg, Node) else arg

    def dtype(self, arg: Arg) -> torch.dtype:
        """The torch dtype of a node (as captured) or of a Python number."""
        value = self.meta(arg)
        return value.dtype if isinstance(value, torch.Tensor) else _type_of_number(value)

    def rank(self, node: Node) -> int:
        """The number of dimensions of a tensor."""
        return self.meta(node).dim()

    def sizes(self, node: Node) -> list[Dim]:
        """The shape of a tensor: integers, and ``Size`` where symbolic."""
        return [self.size(node, axis) for axis in range(self.rank(node))]

    def size(self, node: Node, axis: int) -> Dim:
        """One dimension of a tensor."""
        size = self.meta(node).shape[axis]
        if isinstance(size, int):
            return size
        expression = shapes.expression_of(size)
        if expression not in self._symbols:
            axis %= self.rank(node)
            self._symbols[expression] = self._size_of(expression, self.value(node), axis)
        return self._symbols[expression]

    def hint(self, node: Node, axis: int) -> int:
        """A dimension of a tensor in the example: for cost models, never for meaning."""
        size = self.meta(node).shape[axis]
        if isinstance(size, int):
            return size
        found = size.node.expr.subs(self._sizes)
        return int(found) if found.is_number else int(size.node.hint)

    def dim(self, arg: Any) -> Dim:
        """An integer argument: a number, or a node that computes one."""
        if isinstance(arg, int):
            return int(arg)
        result = self._results[arg]
        if isinstance(result, Size):
            return result
        if isinstance(result, int):
            return result
        raise LoweringError(f"{describe(arg)}: expected an integer")

    def symbol(self, node: Node, vector: ir.Value) -> Size:
        """A symbolic number computed as a one-element ``vector``; equal expressions are shared."""
        expression = shapes.expression_of(self.meta(node))
        return self._symbols.setdefault(expression, Size(expression, lambda: vector))

    def shape_vector(self, sizes: Sequence[Dim]) -> ir.Value:
        """Sizes as an int64 vector."""
        return shapes.shape_vector(self.builder, sizes)

    def reshape(self, x: ir.Value, have: Sequence[Dim], want: Sequence[Dim]) -> ir.Value:
        """``x`` of shape ``have`` as shape ``want``; no node where they are equal."""
        return shapes.reshape(self.builder, x, have, want)

    def ints(self, values: Sequence[int]) -> ir.Value:
        """A constant int64 vector."""
        return self.builder.constant(list(values), np.int64)

    # ---- report -------------------------------------------------------------------------------

    def lowered_as(self, node: Node, what: str) -> None:
        """Record for the report what runs for ``node``, e.g. ``MatMulIntegerToFloat u8×s8``."""
        self.lowerings[node.name] = what

    # ---- inside -------------------------------------------------------------------------------

    def _once(self, key: Any, emit: Any) -> Any:
        """The node of ``emit``, made at the first call with this key."""
        if key not in self.memo:
            self.memo[key] = emit()
        return self.memo[key]

    def _size_of(self, expression: Any, value: ir.Value, axis: int) -> Size:
        def emit() -> ir.Value:
            return self._once(("size", expression), lambda: self.builder.op(
                "Shape", value, start=axis, end=axis + 1, name=f"size_{expression}"))

        return Size(expression, emit)

    def _note_symbols(self, node: Node, value: ir.Value) -> None:
        """The first value with a symbolic dimension is where that size is read."""
        meta = node.meta.get("val")
        if not isinstance(meta, torch.Tensor):
            return
        for axis, size in enumerate(meta.shape):
            if is_symbolic(size):
                expression = shapes.expression_of(size)
                self._symbols.setdefault(expression, self._size_of(expression, value, axis))


def is_symbolic(size: Any) -> TypeGuard[torch.SymInt]:
    """Whether a size is a ``SymInt``."""
    return isinstance(size, torch.SymInt)


def _type_of_number(value: Any) -> torch.dtype:
    if isinstance(value, (bool, torch.SymBool)):
        return torch.bool
    if isinstance(value, (int, torch.SymInt)):
        return torch.int64
    return torch.float64 if isinstance(value, torch.SymFloat) else torch.float32
