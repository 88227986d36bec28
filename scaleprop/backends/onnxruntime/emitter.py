"""FX graph → ONNX model, in one walk over the nodes.

An own emitter instead of ``torch.onnx``: it takes the graph as the passes left it (composites and
``scaleprop::*`` operators whole), references the weights instead of copying them, keeps the names
of inputs, outputs and dynamic dimensions, and stamps each node with where it came from.
"""

from __future__ import annotations

import dataclasses
import json
import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import onnx_ir as ir
import torch
import torch.fx
from torch.utils import _pytree as pytree

from scaleprop.backends.onnxruntime import aten, quantized, shapes
from scaleprop.backends.onnxruntime.annotations import annotate
from scaleprop.backends.onnxruntime.aten.constants import fold
from scaleprop.backends.onnxruntime.builder import GraphBuilder
from scaleprop.backends.onnxruntime.context import Context, is_symbolic
from scaleprop.backends.onnxruntime.registry import lowering_of
from scaleprop.backends.onnxruntime.shapes import Size
from scaleprop.backends.onnxruntime.types import held, onnx_type
from scaleprop.errors import (
    LoweringError,
    ScalePropError,
    UnsupportedOpError,
    describe,
    source_line,
)
from scaleprop.passes.base import PROVENANCE, Program, Provenance
from scaleprop.passes.dimensions import example_sizes, symbol_names

OPSET = 26  # the newest that onnxruntime 1.31 loads, with the IR version that goes with it
IR_VERSION = 13

assert aten and quantized  # imported for what they register

Kind = Literal["tensor", "number", "constant"]


@dataclasses.dataclass(frozen=True)
class Port:
    """One flattened input or output of a program.

    tensor: the ONNX value ``name`` of torch dtype ``dtype``. number: the same, a Python number to
    the caller (``dtype`` int64, float64 or bool). constant: ``value``, which is not in the graph.
    """

    kind: Kind
    name: str = ""
    dtype: torch.dtype = torch.float32
    value: Any = None


@dataclasses.dataclass(frozen=True)
class Emitted:
    """An ONNX model, its ports in pytree order, and what each graph node was lowered to.

    values: graph node → name of the ONNX value that holds its tensor, for nodes that have one.
    bounds: graph node → stated error relative to its largest value, for quantized products.
    """

    model: ir.Model
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    lowerings: Mapping[str, str]
    values: Mapping[str, str]
    bounds: Mapping[str, float]


def emit(program: Program, metadata: Mapping[str, str] | None = None) -> Emitted:
    """The ONNX model of ``program``; weights are references to the program's tensors.

    metadata: entries of the model's ``metadata_props``, stored as ``scaleprop.<key>``; with any,
    nodes and values say how they are quantized, see ``annotations``.

    Raises:
        UnsupportedOpError: an operator without a lowering.
        LoweringError: an operator that has one, but not for these arguments.
    """
    return _Emitter(program).run(metadata or {})


class _Emitter:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.builder = GraphBuilder("scaleprop", OPSET)
        self.context = Context(self.builder, _readers(program.module), program.tolerance,
                               example_sizes(program))
        self.inputs: list[Port] = []
        self.outputs: list[Port] = []
        self.dimension_names = symbol_names(program)

    def run(self, metadata: Mapping[str, str]) -> Emitted:
        aten.register_transformers()
        for node in self.program.placeholders:  # first: they own their names
            self._input(node)
        for node in self.program.module.graph.nodes:
            match node.op:
                case "placeholder":
                    pass
                case "get_attr":
                    self.context.set_result(node, _attribute(self.program.module, node))
                case "call_function":
                    self._call(node)
                case "output":
                    self._finish(node.args[0])
                case _:
                    raise LoweringError(f"{describe(node)}: {node.op} in a flat graph; "
                                        f"remedy: capture the model with scaleprop's capture")
        self.builder.remove_unused()
        model = ir.Model(self.builder.graph, ir_version=IR_VERSION, producer_name="scaleprop")
        model.metadata_props.update(self._model_metadata(metadata))
        values = self._values()
        if metadata:  # a file is written, for others to look at
            annotate(self.program, self.builder.graph, values)
        return Emitted(model, tuple(self.inputs), tuple(self.outputs),
                       dict(self.context.lowerings), values, dict(self.context.bounds))

    def _values(self) -> dict[str, str]:
        kept = {value for node in self.builder.graph for value in node.outputs}
        results = ((node, self.context.result(node)) for node in self.program.module.graph.nodes
                   if node.op == "call_function")
        return {node.name: str(value.name) for node, value in results
                if isinstance(value, ir.Value) and value in kept}

    def _input(self, node: torch.fx.Node) -> None:
        meta = node.meta.get("val")
        if not isinstance(meta, torch.Tensor) and not is_symbolic(meta):
            self.inputs.append(Port("constant", value=meta))
            self.context.set_result(node, meta)
            return
        dtype = self.context.dtype(node)
        # a tracer renames what would hide a builtin (input); the target is the user's own name
        value = ir.Value(name=self.builder.unique(str(node.target)))
        self.builder.graph.inputs.append(value)
        if is_symbolic(meta):
            self._stamp(value, dtype, ())
            self.inputs.append(Port("number", str(value.name), dtype))
            vector = self.builder.op("Reshape", value, self.builder.integers([1]))
            self.context.set_result(node, self.context.symbol(node, vector))
            return
        value.type = ir.TensorType(_element_type(node, dtype))
        value.shape = shapes.onnx_shape(node.meta["val"].shape, self.dimension_names)
        self.inputs.append(Port("tensor", str(value.name), dtype))
        self.context.set_result(node, value)
        if held(dtype) != dtype:
            self.context.set_result(node, self.context.cast(value, dtype, held(dtype)))

    def _call(self, node: torch.fx.Node) -> None:
        self.builder.metadata = _node_metadata(node)
        self.builder.scope = node.name
        if node.target is operator.getitem:
            source, index = cast("tuple[torch.fx.Node, int]", node.args)
            self.context.set_result(node, self.context.result(source)[index])
            return
        meta = node.meta.get("val")
        if isinstance(meta, (bool, int, float)):  # a size that tracing found to be fixed
            self.context.set_result(node, meta)
            return
        folded = fold(self.context, node)
        if folded is not None:
            self.context.set_result(node, folded)
            return
        lowering = lowering_of(node)
        try:
            result = lowering(self.context, node, *node.args, **node.kwargs)
        except ScalePropError:
            raise
        except Exception as error:
            error.add_note(f"while lowering {describe(node)} to ONNX")
            raise
        if isinstance(result, ir.Value):
            self._name(result, node.name, meta)
        elif isinstance(result, (list, tuple)) and isinstance(meta, (list, tuple)):
            for index, (part, value) in enumerate(zip(result, meta, strict=False)):
                if isinstance(part, ir.Value):
                    self._name(part, f"{node.name}_{index}", value)
        self.context.set_result(node, result)

    def _name(self, value: ir.Value, name: str, meta: Any) -> None:
        """Give a new value the node's name, type and shape; an alias keeps what it has."""
        if value.type is None and isinstance(meta, torch.Tensor):
            self.builder.rename(value, name)
            self._stamp(value, held(meta.dtype), meta.shape)

    def _stamp(self, value: ir.Value, dtype: torch.dtype, shape: Sequence[Any]) -> None:
        value.type = ir.TensorType(onnx_type(dtype))
        value.shape = shapes.onnx_shape(shape, self.dimension_names)

    def _finish(self, results: Any) -> None:
        self.builder.metadata = {}
        self.builder.scope = ""
        names = output_names(self.program.out_spec)
        for result, name in zip(pytree.tree_leaves(results, is_leaf=_is_none), names, strict=True):
            self.outputs.append(self._output(result, name))

    def _output(self, result: Any, name: str) -> Port:
        if not isinstance(result, torch.fx.Node):
            return Port("constant", value=result)
        lowered = self.context.result(result)
        if not isinstance(lowered, (ir.Value, torch.Tensor, Size)):
            if isinstance(lowered, (bool, int, float, type(None))):
                return Port("constant", value=lowered)
            raise LoweringError(f"{describe(result)}: a model output in quantized form; "
                                f"remedy: return its dequantized value")
        dtype = self.context.dtype(result)
        meta = self.context.meta(result)
        value = self.context.value(result)
        if held(dtype) != dtype:
            value = self.builder.op("Cast", value, to=int(onnx_type(dtype)))
        elif not _is_free(value):
            value = self.builder.op("Identity", value)
        self.builder.rename(value, name)
        self._stamp(value, dtype, meta.shape if isinstance(meta, torch.Tensor) else ())
        self.builder.graph.outputs.append(value)
        kind = "tensor" if isinstance(meta, torch.Tensor) else "number"
        return Port(kind, str(value.name), dtype)

    def _model_metadata(self, given: Mapping[str, str]) -> dict[str, str]:
        records = [
            {key: value for key, value in dataclasses.asdict(record).items() if value is not None}
            for record in self.program.records
        ]
        entries = dict(given)
        if self.program.guards:
            entries["guards"] = json.dumps(self.program.guards)
        if records:
            entries["records"] = json.dumps(records)
        return {f"scaleprop.{key}": value for key, value in entries.items()}


def output_names(spec: pytree.TreeSpec) -> list[str]:
    """A name for each output leaf from its place: ``hidden_states_0`` for ``out.hidden_states[0]``.

    A lone output is ``output``.
    """

    def walk(node: pytree.TreeSpec, path: tuple[str, ...]) -> list[str]:
        if node.is_leaf():
            return ["_".join(path if path and not path[0].isdigit() else ("output", *path))]
        keys = _keys(node)
        return [name for key, child in zip(keys, node.children(), strict=True)
                for name in walk(child, (*path, key))]

    return walk(spec, ())


def _keys(node: pytree.TreeSpec) -> list[str]:
    """Names of a container's children: dictionary keys, field names, else positions."""
    count = node.num_children
    fields = getattr(node.type, "_fields", None)
    candidates = [node.context, fields]
    if isinstance(node.context, (list, tuple)):
        candidates.extend(node.context)
    for candidate in candidates:
        if (isinstance(candidate, (list, tuple)) and len(candidate) == count > 0
                and all(isinstance(key, str) for key in candidate)):
            return [_valid(key) for key in candidate]
    return [str(index) for index in range(count)]


def _valid(key: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in key)


def _is_none(leaf: Any) -> bool:
    return leaf is None


def _is_free(value: ir.Value) -> bool:
    """Whether a value may be renamed as an output: computed, and not an output already."""
    return value.producer() is not None and not value.is_graph_output()


def _element_type(node: torch.fx.Node, dtype: torch.dtype) -> ir.DataType:
    try:
        return onnx_type(dtype)
    except TypeError as error:
        raise UnsupportedOpError(
            f"{describe(node)}: {error}; remedy: cast it before it enters the model") from error


def _attribute(module: torch.nn.Module, node: torch.fx.Node) -> Any:
    """The tensor that a ``get_attr`` node names."""
    found: Any = module
    for part in str(node.target).split("."):
        found = getattr(found, part)
    if not isinstance(found, torch.Tensor):
        raise UnsupportedOpError(
            f"{describe(node)}: attribute {node.target!r} is a {type(found).__name__} (control "
            f"flow); remedy: replace the branch by torch.where")
    return found.detach()


def _readers(module: torch.fx.GraphModule) -> dict[int, set[Any]]:
    readers: dict[int, set[Any]] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        targets = {user.target for user in node.users}
        readers.setdefault(_attribute(module, node).data_ptr(), set()).update(targets)
    return readers


def _node_metadata(node: torch.fx.Node) -> dict[str, str]:
    props = {"scaleprop.node": node.name, "scaleprop.line": source_line(node)}
    made: Provenance | None = node.meta.get(PROVENANCE)
    if made is not None:
        props.update({"scaleprop.by": made.by, "scaleprop.why": made.why,
                      "scaleprop.source": made.source})
    return props
