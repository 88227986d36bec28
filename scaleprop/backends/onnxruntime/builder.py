"""A thin, typed way to append ONNX nodes to an ``onnx_ir`` graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

MICROSOFT = "com.microsoft"  # onnxruntime's own operators


class GraphBuilder:
    """Appends nodes and initializers to one graph; small constants are shared by value."""

    def __init__(self, name: str, opset: int) -> None:
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": opset, MICROSOFT: 1}, name=name)
        self._body = self.graph  # where nodes go: the graph, or a branch of an If
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._names: dict[str, int] = {}
        # stamped on, and prefixed to the name of, each node made from now on
        self.metadata: dict[str, str] = {}
        self.scope = ""

    def unique(self, stem: str) -> str:
        """A name in this graph that no other value or node has."""
        count = self._names.get(stem, 0)
        self._names[stem] = count + 1
        return stem if count == 0 else f"{stem}__{count}"

    def op(self, op_type: str, *inputs: ir.Value | None, domain: str = "", outputs: int = 1,
           name: str | None = None, **attributes: Any) -> Any:
        """Append a node. Returns its output value, or a tuple where ``outputs`` > 1."""
        label = self.unique(name or (f"{self.scope}.{op_type}" if self.scope else op_type))
        given = list(inputs)
        while given and given[-1] is None:  # an absent optional input at the end is left out
            given.pop()
        attrs = [ir.convenience.convert_attribute(k, v) for k, v in attributes.items()
                 if v is not None]
        values = [ir.Value(name=label if outputs == 1 else f"{label}.{i}") for i in range(outputs)]
        node = ir.Node(domain, op_type, given, attrs, outputs=values, name=label,
                       metadata_props=dict(self.metadata))
        self._body.append(node)
        return values[0] if outputs == 1 else tuple(values)

    def constant(self, value: Any, dtype: Any, name: str = "const") -> ir.Value:
        """A small initializer (scalars, shapes, tables), shared between equal values."""
        array = np.asarray(value, dtype=dtype)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.initializer(array, name)
        return self._constants[key]

    def initializer(self, tensor: np.ndarray[Any, Any] | torch.Tensor, name: str) -> ir.Value:
        """A weight. Torch tensors are referenced, not copied, until the model is written."""
        label = self.unique(name)
        if isinstance(tensor, torch.Tensor):
            data = _torch_data(tensor.detach(), label)
        else:
            data = ir.tensor(np.ascontiguousarray(tensor).reshape(tensor.shape), name=label)
        value = ir.Value(name=label, shape=ir.Shape(tuple(tensor.shape)),
                         type=ir.TensorType(data.dtype), const_value=data)
        self.graph.register_initializer(value)
        return value

    def integers(self, values: Sequence[int]) -> ir.Value:
        """A 1-D int64 constant: axes, shapes, starts, ends."""
        return self.constant(list(values), np.int64)

    def branch(self, condition: ir.Value, then: Callable[[], Sequence[ir.Value]],
               otherwise: Callable[[], Sequence[ir.Value]],
               dtypes: Sequence[ir.DataType]) -> Any:
        """An ``If`` over what the two functions emit; its outputs as those of ``op``.

        Both may read values of this graph. Nodes they append run only when they are chosen.
        """
        return self.op("If", condition, outputs=len(dtypes),
                       then_branch=self._body_of("then", then, dtypes),
                       else_branch=self._body_of("else", otherwise, dtypes))

    def _body_of(self, name: str, emit: Callable[[], Sequence[ir.Value]],
                 dtypes: Sequence[ir.DataType]) -> ir.Graph:
        """A subgraph of what ``emit`` appends; initializers still go to the main graph."""
        outer, self._body = self._body, ir.Graph(
            [], [], nodes=[], opset_imports=self.graph.opset_imports, name=self.unique(name))
        try:
            for result, dtype in zip(emit(), dtypes, strict=True):
                result.type = ir.TensorType(dtype)
                self._body.outputs.append(result)
            return self._body
        finally:
            self._body = outer

    def rename(self, value: ir.Value, stem: str) -> None:
        """Give a computed value the name ``stem``, made unique."""
        value.name = self.unique(stem)

    def remove_unused(self) -> None:
        """Drop the nodes and initializers that no graph output needs."""
        for node in reversed(list(self.graph)):
            if not any(value.uses() or value.is_graph_output() for value in node.outputs):
                self.graph.remove(node, safe=True)
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self.graph.initializers[name]


def _torch_data(tensor: torch.Tensor, name: str) -> Any:
    """A tensor by reference; one that is not contiguous is copied when it is written."""
    if tensor.is_contiguous():
        return TorchTensor(tensor, name=name)
    kind = TorchTensor(tensor[(slice(0, 0),) * tensor.dim()].contiguous()).dtype
    return ir.LazyTensor(lambda: TorchTensor(tensor.contiguous(), name=name), dtype=kind,
                         shape=ir.Shape(tensor.shape), name=name)
