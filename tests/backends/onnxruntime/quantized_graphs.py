"""Small FX graphs of ``scaleprop::*`` operators, run on onnxruntime: shared by the tests."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime
import torch
import torch.fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from scaleprop import formats
from scaleprop.backends.onnxruntime import quantized
from scaleprop.backends.onnxruntime.builder import GraphBuilder
from scaleprop.backends.onnxruntime.context import Context
from scaleprop.backends.onnxruntime.registry import lowering_of

assert quantized  # imported for what it registers
OPS = torch.ops.scaleprop


@dataclasses.dataclass
class Built:
    """A lowered graph in a session, with its saved and its optimized form."""

    session: onnxruntime.InferenceSession
    optimized: onnx.ModelProto
    path: Path
    lowerings: dict[str, str]

    @property
    def counts(self) -> collections.Counter[str]:
        """Operators left after onnxruntime's optimizer, subgraphs not counted."""
        return collections.Counter(node.op_type for node in self.optimized.graph.node)

    @property
    def nbytes(self) -> int:
        return self.path.stat().st_size

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        names = [value.name for value in self.session.get_inputs()]
        feeds = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return torch.from_numpy(self.session.run(None, feeds)[0])


class Graph:
    """An FX graph under construction, in the form that the passes produce."""

    def __init__(self, tolerance: float | None = None) -> None:
        self.graph = torch.fx.Graph()
        self.mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        self.tensors: dict[str, torch.Tensor] = {}
        self.tolerance = tolerance

    def input(self, example: torch.Tensor, dynamic: Sequence[int] = ()) -> torch.fx.Node:
        from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

        node = self.graph.placeholder("x")
        sizes = [DimDynamic.DYNAMIC if axis in dynamic else DimDynamic.STATIC
                 for axis in range(example.dim())]
        node.meta["val"] = self.mode.from_tensor(
            example, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))
        return node

    def tensor(self, name: str, value: torch.Tensor) -> torch.fx.Node:
        self.tensors[name] = value
        node = self.graph.create_node("get_attr", name)
        node.meta["val"] = self.mode.from_tensor(value, static_shapes=True)
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> torch.fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        fake = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode:
            node.meta["val"] = target(*fake[0], **fake[1])
        return node

    def parts(self, name: str, tensor: formats.ScaledTensor) -> list[torch.fx.Node]:
        return [self.tensor(f"{name}_{i}", part) for i, part in enumerate(tensor.parts)]

    def build(self, output: torch.fx.Node, directory: Path) -> Built:
        """Lower, save, load with default session options."""
        context = Context(GraphBuilder("g", 26))
        if self.tolerance is not None:
            context.tolerance = self.tolerance
        builder = context.builder
        for node in self.graph.nodes:
            if node.op == "placeholder":
                value = ir.Value(name=node.name, type=ir.TensorType(ir.DataType.FLOAT))
                value.shape = _shape(node)
                builder.graph.inputs.append(value)
                context.set_result(node, value)
            elif node.op == "get_attr":
                context.set_result(node, self.tensors[str(node.target)])
            else:
                result = lowering_of(node)(context, node, *node.args, **node.kwargs)
                context.set_result(node, result)
        value = context.result(output)
        value.type = ir.TensorType(ir.DataType.FLOAT)
        value.shape = _shape(output)
        builder.graph.outputs.append(value)
        builder.remove_unused()
        path = directory / "model.onnx"
        ir.save(ir.Model(builder.graph, ir_version=13), path)
        onnx.checker.check_model(path)
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(directory / "optimized.onnx")
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path, options)
        return Built(session, onnx.load(directory / "optimized.onnx"), path, context.lowerings)


def _shape(node: torch.fx.Node) -> ir.Shape:
    return ir.Shape([s if isinstance(s, int) else str(s) for s in node.meta["val"].shape])


@dataclasses.dataclass
class Linear:
    """One quantized linear on onnxruntime, and the reference's answer."""

    built: Built
    reference: Callable[[torch.Tensor], torch.Tensor]
    chosen: str

    def error(self, x: torch.Tensor) -> float:
        """max |y - reference| / max |reference|."""
        want, got = self.reference(x).double(), self.built(x).double()
        assert got.shape == want.shape
        return float((got - want).abs().max() / want.abs().max().clamp_min(1e-300))


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, x_format: str,
           w_format: str, directory: Path, *, dynamic: Sequence[int] = (),
           static: Sequence[torch.Tensor] | None = None, tolerance: float | None = None) -> Linear:
    """``scaled_mm(quantize(x), w, bias)`` lowered; x_format may be ``f32``."""
    w = formats.quantize(weight, w_format)
    graph = Graph(tolerance)
    source = graph.input(x, dynamic)
    given = None if static is None else [graph.tensor(f"s{i}", s) for i, s in enumerate(static)]
    left: Any = [source] if x_format == "f32" else graph.call(
        OPS.quantize.default, source, x_format, scales=given)
    added = None if bias is None else graph.tensor("bias", bias)
    k = weight.shape[1]
    y = graph.call(OPS.scaled_mm.default, left, graph.parts("w", w), added, x_format, w_format, k)
    built = graph.build(y, directory)

    def reference(x: torch.Tensor) -> torch.Tensor:
        parts = [x] if x_format == "f32" else OPS.quantize(
            x, x_format, scales=None if static is None else list(static))
        return OPS.scaled_mm(parts, w.parts, bias, x_format, w_format, k)

    return Linear(built, reference, built.lowerings[y.name])
