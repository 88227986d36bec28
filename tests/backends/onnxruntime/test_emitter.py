"""The emitter: names, dimensions, metadata, weights, outputs, sizes, and its errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.export import Dim
from torch.utils import _pytree as pytree

from scaleprop.backends.onnxruntime import OnnxRuntimeBackend, emit
from scaleprop.errors import LoweringError, UnsupportedOpError
from scaleprop.passes.base import PROVENANCE, Program, Provenance, relative_error
from scaleprop.passes.capture import capture


class Lambda(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


class Encoder(nn.Module):
    """Embedding, linear, and a head tied to the embedding; a dictionary of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Linear(3, 3)

    def forward(self, ids: torch.Tensor) -> dict[str, Any]:
        hidden = torch.relu(self.middle(self.embed(ids)))
        return {"logits": self.head(hidden), "hidden": (hidden, hidden), "none": None}


BATCH, SEQUENCE = Dim("batch"), Dim("sequence")


@pytest.fixture(scope="module")
def encoder() -> Program:
    torch.manual_seed(0)
    ids = torch.randint(0, 11, (2, 5))
    return capture(Encoder(), (ids,), {}, ({0: BATCH, 1: SEQUENCE},))


def equal_to_eager(
    model: nn.Module, args: tuple[Any, ...], *others: tuple[Any, ...], dynamic: Any = None,
    bound: float = 2e-6,
) -> Program:  # fmt: skip
    """Capture, lower, and compare on ``args`` and on inputs of other sizes."""
    program = capture(model, args, {}, {} if dynamic is None else dynamic)
    executable = OnnxRuntimeBackend().lower(program)
    for inputs in (args, *others):
        with torch.no_grad():
            expected = pytree.tree_leaves(model(*inputs))
        actual = executable(pytree.tree_leaves(inputs))
        assert len(actual) == len(expected)
        for got, want in zip(actual, expected, strict=True):
            if isinstance(want, torch.Tensor):
                assert got.dtype == want.dtype and got.shape == want.shape
                assert relative_error(got, want) <= bound
            else:
                assert got == want
    return program


def nodes_of(program: Program) -> list[str]:
    return [node.op_type for node in emit(program).model.graph]


def test_names_of_inputs_outputs_and_dimensions(encoder: Program) -> None:
    emitted = emit(encoder)
    graph = emitted.model.graph
    assert [value.name for value in graph.inputs] == ["ids"]
    assert [str(dim) for dim in graph.inputs[0].shape] == ["batch", "sequence"]
    assert [value.name for value in graph.outputs] == ["logits", "hidden_0", "hidden_1"]
    assert [str(dim) for dim in graph.outputs[0].shape] == ["batch", "sequence", "11"]
    assert [port.kind for port in emitted.outputs] == ["tensor", "tensor", "tensor", "constant"]


def test_opset_ir_version_and_checker(encoder: Program) -> None:
    model = ir.to_proto(emit(encoder).model)
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version == 13
    assert {entry.domain: entry.version for entry in model.opset_import} == {
        "": 26, "com.microsoft": 1}  # fmt: skip


def test_tied_weight_is_stored_once_and_unused_ones_not_at_all(encoder: Program) -> None:
    weights = emit(encoder).model.graph.initializers
    shapes = sorted(tuple(value.shape) for value in weights.values() if value.shape)  # pyright: ignore
    assert [shape for shape in shapes if shape[0] > 2] == [(8,), (8, 8), (11, 8)]


def test_weights_are_references(encoder: Program) -> None:
    weights = emit(encoder).model.graph.initializers.values()
    table = next(value.const_value for value in weights if tuple(value.shape or ()) == (11, 8))
    parameter = next(p for p in encoder.module.parameters() if tuple(p.shape) == (11, 8))
    assert table is not None
    assert table.raw.data_ptr() == parameter.data_ptr()  # pyright: ignore


def test_metadata_of_model_and_nodes(encoder: Program) -> None:
    program = encoder.fork()
    relu = next(n for n in program.module.graph.nodes if "relu" in n.name)
    relu.meta[PROVENANCE] = Provenance(by="some-pass", why="a reason", source="relu")
    model = emit(program, {"recipe": "int8"}).model
    assert model.metadata_props["scaleprop.recipe"] == "int8"
    node = next(node for node in model.graph if node.op_type == "Relu")
    assert node.metadata_props["scaleprop.by"] == "some-pass"
    assert node.metadata_props["scaleprop.why"] == "a reason"
    assert "test_emitter.py" in node.metadata_props["scaleprop.line"]


def test_values_carry_types_and_shapes(encoder: Program) -> None:
    model = ir.to_proto(emit(encoder).model)
    infos = {info.name: info for info in model.graph.value_info}
    dims = infos["embedding"].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["batch", "sequence", 8]


def test_no_shape_arithmetic_where_one_size_can_be_inferred() -> None:
    def heads(x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        return x.view(batch, length, 2, 4).transpose(1, 2).reshape(batch, 2, -1)

    program = equal_to_eager(Lambda(heads), (torch.randn(3, 5, 8),), (torch.randn(4, 7, 8),),
                             dynamic=(({0: BATCH, 1: SEQUENCE},),))
    assert nodes_of(program) == ["Reshape", "Transpose", "Reshape"]


def _sizes(x: torch.Tensor) -> Any:
    batch, length = x.shape[0], x.shape[1]
    return {
        "moved": x.transpose(0, 1).reshape(length * batch, 4),
        "both": x.reshape(batch * 2, 2, length),
        "expanded": x.new_ones(length)[None].expand(batch, length) * 2,
        "range": torch.arange(length, dtype=torch.float32) / length,
        "half": x[:, : length // 2],
        "ceiled": x[:, : -(-length // 2)],
        "padded": F.pad(x, (0, 0, 0, length % 3)),
        "mask": torch.arange(length)[None, :] <= torch.arange(length)[:, None],
        "full": torch.full((batch, length), 2.5),
        "count": batch * length + 1,
        "repeat": x[:1].repeat(batch, 1, 1),
        "scaled": x / length**0.5,
        "scattered": torch.zeros_like(x).slice_scatter(x[:, 1:], 1, 1),
    }


def test_sizes_as_arguments() -> None:
    any_size = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    equal_to_eager(Lambda(_sizes), (torch.randn(3, 15, 4),), (torch.randn(2, 8, 4),),
                   dynamic=((any_size,),))


def test_outputs_that_are_inputs_constants_and_duplicates() -> None:
    class Aliases(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(3))

        def forward(self, x: torch.Tensor) -> Any:
            y = x + 1
            return x, self.table, y, y, 3, None, torch.tensor(2.0)

    program = equal_to_eager(Aliases(), (torch.randn(4),))
    names = [value.name for value in emit(program).model.graph.outputs]
    assert len(set(names)) == len(names) == 5


def test_constant_and_unused_inputs() -> None:
    model = Lambda(lambda x, flag, unused, nothing: x * 2 if flag else x)
    equal_to_eager(model, (torch.randn(4), True, torch.randn(2), None))


def test_inputs_need_not_be_contiguous_and_are_not_written() -> None:
    program = capture(Lambda(lambda x: x + 1), (torch.zeros(3, 4),), {}, {})
    x = torch.randn(4, 3).t()
    before = x.clone()
    (result,) = OnnxRuntimeBackend().lower(program)([x])
    result.zero_()
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models_run_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4)).to(dtype)
    program = equal_to_eager(model, (torch.randn(3, 8, dtype=dtype),), bound=2e-2)
    stored = emit(program).model.graph.initializers.values()
    assert sum(value.const_value.nbytes for value in stored if value.const_value) < 2 * 300


def _attention(**options: Any) -> Lambda:
    return Lambda(lambda q, k, v, *mask: F.scaled_dot_product_attention(
        q, k, v, *mask, **options))


Q = {"q": torch.randn(2, 4, 5, 8), "k": torch.randn(2, 4, 6, 8), "v": torch.randn(2, 4, 6, 3)}
SPARSE = torch.rand(2, 1, 5, 6) > 0.4
SPARSE[0, :, 2] = False  # a query that may look at nothing
FLOAT = torch.zeros(5, 6).masked_fill(torch.rand(5, 6) > 0.7, torch.finfo(torch.float32).min)


@pytest.mark.parametrize(("options", "mask"), [
    ({}, None), ({"scale": 0.3}, None), ({"is_causal": True}, None), ({}, SPARSE),
    ({}, torch.ones(2, 1, 5, 6, dtype=torch.bool)), ({}, FLOAT), ({}, torch.randn(2, 4, 5, 6)),
    ({"enable_gqa": True}, None), ({"enable_gqa": True}, SPARSE), ({"enable_gqa": True}, FLOAT),
    ({"enable_gqa": True, "is_causal": True}, None),
])  # fmt: skip
def test_attention(options: dict[str, Any], mask: torch.Tensor | None) -> None:
    q, k, v = Q.values()
    if options.get("enable_gqa"):
        k, v = k[:, :2], v[:, :2]
    given = (q, k, v) if mask is None else (q, k, v, mask)
    equal_to_eager(_attention(**options), given)


def test_attention_of_dynamic_size_shares_its_mask_between_layers() -> None:
    def layers(q: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            q = F.scaled_dot_product_attention(q, q, q, keep)
            q = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        return q

    def inputs(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        keep = torch.rand(batch, 1, length, length) > 0.3
        return torch.randn(batch, 2, length, 4), keep | torch.eye(length, dtype=torch.bool)

    program = equal_to_eager(
        Lambda(layers), inputs(2, 5), inputs(3, 9),
        dynamic=(({0: BATCH, 2: SEQUENCE}, {0: BATCH, 2: SEQUENCE, 3: SEQUENCE}),), bound=1e-5)
    kinds = nodes_of(program)
    assert kinds.count("Trilu") == 1
    assert kinds.count("ReduceMin") == 1


def test_masked_scores_never_reach_subnormal_numbers() -> None:
    scores = torch.randn(64, 64).masked_fill(torch.rand(64, 64) > 0.5, -math_inf())
    model = Lambda(lambda x, mask: torch.softmax(x + mask, -1))
    program = equal_to_eager(model, (torch.randn(64, 64), scores.clamp_min(-3e38)))
    assert "Max" in nodes_of(program)


def math_inf() -> float:
    return float("inf")


def test_constants_are_folded_and_shared() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        a = torch.arange(4).float() * 2
        return x * 2.0 + a + torch.arange(4).float() * 2 + (x * 2.0)

    program = equal_to_eager(Lambda(function), (torch.randn(4),))
    assert set(nodes_of(program)) == {"Mul", "Add"}


def test_operator_without_a_lowering_is_named() -> None:
    program = capture(Lambda(lambda x: torch.linalg.inv_ex(x)[0]), (torch.eye(3),), {}, {})
    with pytest.raises(UnsupportedOpError, match=r"inv_ex.*test_emitter\.py.*remedy"):
        emit(program)


def test_data_dependent_selection_is_refused() -> None:
    program = capture(Lambda(lambda x: x[x > 0]), (torch.randn(4),), {}, {})
    with pytest.raises((LoweringError, UnsupportedOpError), match="remedy"):
        emit(program)


def test_lowerings_are_reported() -> None:
    program = capture(nn.Linear(4, 4), (torch.randn(2, 4),), {}, {})
    assert OnnxRuntimeBackend().lower(program).lowerings == {"linear": "MatMul f32"}


def test_records_are_stored_in_the_model(encoder: Program) -> None:
    from scaleprop.report.records import TensorRecord

    record = TensorRecord(node="linear", op="aten.linear", operand="w", role="fprop.w",
                          shape=(8, 8), decided_by="recipe", format="int8[row]*f32")
    model = emit(dataclasses.replace(encoder, records=(record,))).model
    assert "int8[row]*f32" in model.metadata_props["scaleprop.records"]
