"""Rounding, expansion, files and errors of the quantized operators on onnxruntime."""

from __future__ import annotations

import sys
from pathlib import Path

import onnx
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from quantized_graphs import OPS, Graph, linear

from scaleprop import formats
from scaleprop.backends.onnxruntime.quantized import support
from scaleprop.errors import LoweringError
from scaleprop.formats import ScaledTensor
from scaleprop.formats.elements import element

FLOAT_PRODUCTS = {"MatMul", "Gemm", "FusedMatMul", "MatMulNBits"}
EXPANSION = {"BitShift", "BitwiseAnd", "Cast", "Gather", "Transpose", "DequantizeLinear"}
GRIDS = ("e2m1", "e2m3", "e3m2", "e4m3", "e5m2", "e3m0", "e5m10", "e2m0", "int8", "int4", "mxint8")
ROUNDED = ["mxfp4", "mxfp4:rceil", "mxfp4:even", "mxfp4:ceil", "mxfp6", "mxfp6_e3m2", "mxfp8",
           "mxfp8_e5m2", "mxint8", "nvfp4", "fp4_ue5m3", "fp8", "fp8_e5m2", "e4m3[row]*f32",
           "e4m3[channel]*f32", "int8", "int8+zp", "int8[row]*f32", "int8[row]*f32+zp",
           "int8[1x128]*f32", "int4[1x32]*f16", "int4[row]*bf16", "int8:pow2", "log2"]


def fake_quantized(x: torch.Tensor, name: str, directory: Path, axis: int = -1,
                   static: list[torch.Tensor] | None = None) -> torch.Tensor:
    graph = Graph()
    given = None if static is None else [graph.tensor(f"s{i}", s) for i, s in enumerate(static)]
    y = graph.call(OPS.fake_quantize.default, graph.input(x), name, axis, scales=given)
    return graph.build(y, directory)(x)


@pytest.mark.parametrize("name", ROUNDED)
def test_fake_quantize_equals_the_reference(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 200) * torch.exp2(torch.randint(-8, 8, (3, 5, 200)).float())
    x[1, 2] = 0.0
    assert torch.equal(fake_quantized(x, name, tmp_path), OPS.fake_quantize(x, name))


@pytest.mark.parametrize("amax", [0.5, 40.0, 3000.0])
@pytest.mark.parametrize("name", ["nvfp4", "fp4_ue5m3"])
def test_block_scales_follow_the_data_under_a_given_one(
    name: str, amax: float, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 200) * torch.exp2(torch.randint(-8, 8, (3, 5, 200)).float())
    x[1, 2] = 0.0
    outer = [torch.tensor(amax / (448 * 6))]
    got = fake_quantized(x, name, tmp_path, static=outer)
    assert torch.equal(got, OPS.fake_quantize(x, name, scales=outer))


@pytest.mark.parametrize("name", GRIDS)
def test_rounding_on_and_around_every_tie(name: str, tmp_path: Path) -> None:
    """Grid points, midpoints and their float32 neighbours, with scale 1."""
    item = element(name)
    grid = torch.tensor(sorted({item.decode(c) for c in item.codes} - {float("nan")}))
    grid = grid[grid.isfinite() & (grid >= item.min) & (grid <= item.max)].float()
    points = torch.cat([grid, (grid[1:] + grid[:-1]) / 2, grid * 1.7])
    inf = torch.tensor(float("inf"))
    x = torch.cat([points, torch.nextafter(points, inf), torch.nextafter(points, -inf)])
    x = x[None, x.isfinite()]
    fmt, one = f"{name}[tensor]*f32", [torch.tensor(1.0)]
    got = fake_quantized(x, fmt, tmp_path, static=one)
    assert torch.equal(got, OPS.fake_quantize(x, fmt, scales=one))


@pytest.mark.parametrize("octave", [0, -123, -126, -130, -140, 100, 125])
@pytest.mark.parametrize("name", ["mxfp4", "mxfp6"])
def test_rounding_in_blocks_around_every_tie(name: str, octave: int, tmp_path: Path) -> None:
    """The same with scales found from the data, the smallest and the largest among them."""
    item = element("e2m1" if name == "mxfp4" else "e2m3")
    step = item.smallest / 2
    points = torch.arange(-8.0, 8.0, step)
    inf = torch.tensor(float("inf"))
    x = torch.cat([points, torch.nextafter(points, inf), torch.nextafter(points, -inf)])
    x = x[x.abs() < 8.0]
    x = torch.cat([x, torch.randn(-len(x) % 31)]).reshape(-1, 31)
    x = torch.cat([torch.full_like(x[:, :1], 4.0), x], 1).flatten()[None]
    x = x * 2.0 ** (octave // 2) * 2.0 ** (octave - octave // 2)
    assert torch.equal(fake_quantized(x, name, tmp_path), OPS.fake_quantize(x, name))


@pytest.mark.parametrize("axis", [0, 1])
def test_fake_quantize_along_another_axis(axis: int, tmp_path: Path) -> None:
    x = torch.randn(64, 32, 3)
    assert torch.equal(fake_quantized(x, "mxfp4", tmp_path, axis),
                       OPS.fake_quantize(x, "mxfp4", axis))


@pytest.mark.parametrize("name", sorted(set(formats.named_formats())))
@pytest.mark.parametrize(("shape", "axis"), [((6, 48), -1), ((6, 50), -1), ((5, 3, 40), 1),
                                             ((40,), 0)])
def test_constants_expand_exactly(name: str, shape: tuple[int, ...], axis: int,
                                  tmp_path: Path) -> None:
    if name == "nvfp4_2d" and len(shape) == 1:
        pytest.skip("tiles need two axes")
    tiles = name == "nvfp4_2d" and len(shape) == 3
    tensor = formats.quantize(torch.randn(shape), name, axis)
    graph = Graph()
    x = graph.input(torch.zeros(shape))
    w = graph.call(OPS.dequantize.default, graph.parts("w", tensor), name, list(shape), axis)
    y = graph.call(torch.ops.aten.add.Tensor, x, w)
    if tiles:
        with pytest.raises(LoweringError, match="reshape to a matrix"):
            graph.build(y, tmp_path)
        return
    built = graph.build(y, tmp_path)
    assert torch.equal(built(torch.zeros(shape)), tensor.dequantize())
    assert set(built.counts) <= {"Add"}, "constants are folded at load"


@pytest.mark.parametrize("name", ["int8[row]*f32", "int4[1x32]*f16", "mxfp4", "mxfp6", "nvfp4",
                                  "mxfp8", "int4[1x16]*f32+zp", "int3[row]*f32"])
def test_rows_of_a_table_expand_when_they_are_read(name: str, tmp_path: Path) -> None:
    tensor = formats.quantize(torch.randn(100, 40), name)
    graph = Graph()
    example = torch.zeros(2, 7)
    ids = graph.call(torch.ops.aten._to_copy.default, graph.input(example), dtype=torch.int64)
    whole = {2} if tensor.tensor_scale is not None else set()
    rows = [part if index in whole else graph.call(torch.ops.aten.index.Tensor, part, [ids])
            for index, part in enumerate(graph.parts("table", tensor))]
    y = graph.call(OPS.dequantize.default, rows, name, [2, 7, 40])
    built = graph.build(y, tmp_path)
    chosen = torch.randint(0, 100, (2, 7))
    assert torch.equal(built(chosen.float()), tensor.dequantize()[chosen])


@pytest.mark.parametrize(("x_format", "w_format"), [
    ("int8+zp", "int8[row]*f32"), ("int8", "int8[row]*f32"), ("int8[row]*f32", "int8[row]*f32"),
    ("mxfp4", "mxfp4")])
@pytest.mark.parametrize("dims", [2, 3])
def test_linears_run_in_one_integer_kernel(x_format: str, w_format: str, dims: int,
                                           tmp_path: Path) -> None:
    x = torch.randn(*[2] * (dims - 2), 64, 512)
    built = linear(x, torch.randn(512, 512), torch.randn(512), x_format, w_format, tmp_path,
                   dynamic=range(dims - 1)).built
    counts = built.counts
    integer = counts["MatMulIntegerToFloat"] + counts["DynamicQuantizeMatMul"]
    assert integer == 1
    large = [node for node in built.optimized.graph.node if node.op_type in FLOAT_PRODUCTS
             and any(i.name in node.input and 512 * 512 in (i.dims[0] * i.dims[-1],)
                     for i in built.optimized.graph.initializer)]
    assert not large, "no float product reads the weight"


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6", "nvfp4", "mxfp8", "int4", "int3", "int8"])
def test_weights_are_packed_in_the_file_and_expanded_at_load(name: str, tmp_path: Path) -> None:
    weight = torch.randn(512, 512)
    built = linear(torch.randn(128, 512), weight, None, "f32", name, tmp_path).built
    share = {"mxfp4": 0.15, "mxfp6": 0.22, "nvfp4": 0.16, "mxfp8": 0.27, "int4": 0.15,
             "int3": 0.12, "int8": 0.27}[name]
    assert built.nbytes <= share * weight.nbytes + 16_000
    on_weights = [node.op_type for node in built.optimized.graph.node
                  if node.op_type in EXPANSION - {"DequantizeLinear", "Cast"}]
    assert not on_weights


def test_operands_are_quantized_once_for_all_readers(tmp_path: Path) -> None:
    graph = Graph()
    q = graph.call(OPS.quantize.default, graph.input(torch.randn(4, 64)), "int8+zp")
    bias = graph.tensor("bias", torch.randn(32))
    outs = [graph.call(OPS.scaled_mm.default, q, graph.parts(f"w{i}", formats.quantize(
        torch.randn(32, 64), "int8[row]*f32")), bias, "int8+zp", "int8[row]*f32", 64)
        for i in range(3)]
    y = graph.call(torch.ops.aten.add.Tensor, graph.call(torch.ops.aten.add.Tensor, *outs[:2]),
                   outs[2])
    assert graph.build(y, tmp_path).counts["DynamicQuantizeLinear"] == 1


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.input(torch.randn(4, 64))
    parts = graph.parts("w", formats.quantize(torch.randn(64, 64), "mxfp4"))
    y = x
    for _ in range(2):
        y = graph.call(OPS.scaled_mm.default, [y], parts, None, "f32", "mxfp4", 64)
    graph.build(y, tmp_path)
    names = [i.name for i in onnx.load(tmp_path / "model.onnx").graph.initializer]
    assert sum(name.split("__")[0] == "w_0" for name in names) == 1


def test_hadamard(tmp_path: Path) -> None:
    x, signs = torch.randn(3, 96), torch.where(torch.rand(32) < 0.5, -1.0, 1.0)
    graph = Graph()
    y = graph.call(OPS.hadamard.default, graph.input(x), 32, graph.tensor("signs", signs))
    torch.testing.assert_close(graph.build(y, tmp_path)(x), OPS.hadamard(x, 32, signs))


def test_hadamard_of_another_order_transposed(tmp_path: Path) -> None:
    x, signs = torch.randn(3, 80), torch.where(torch.rand(80) < 0.5, -1.0, 1.0)
    graph = Graph()
    y = graph.call(OPS.hadamard.default, graph.input(x), 20, graph.tensor("signs", signs), -1, True)
    torch.testing.assert_close(graph.build(y, tmp_path)(x), OPS.hadamard(x, 20, signs, -1, True))


@pytest.mark.parametrize(("name", "options", "says"), [
    ("e2m1[16x16]*e4m3*f32", {}, "1-D blocks"), ("nf4", {}, "codebook"),
    ("mxfp4:mse", {}, "scale rule"), ("mxfp4", {"rounding": "stochastic"}, "inductor"),
    ("e8m7[tensor]*f32", {}, "largest value")])
def test_what_cannot_be_lowered_says_so(name: str, options: dict[str, str], says: str,
                                        tmp_path: Path) -> None:
    graph = Graph()
    x = graph.input(torch.randn(32, 32))
    bits = graph.tensor("bits", torch.zeros(32, 32, dtype=torch.uint8)) if options else None
    y = graph.call(OPS.fake_quantize.default, x, name, bits=bits, **options)
    with pytest.raises(LoweringError, match=r"node 'fake_quantize.*remedy") as caught:
        graph.build(y, tmp_path)
    assert says in str(caught.value)


def test_computed_weights_are_refused(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.input(torch.randn(32, 32))
    q = graph.call(OPS.quantize.default, x, "mxfp4")
    y = graph.call(OPS.scaled_mm.default, [x], q, None, "f32", "mxfp4", 32)
    with pytest.raises(LoweringError, match="computed at run time"):
        graph.build(y, tmp_path)


def test_the_support_table_tells_what_the_lowerings_do() -> None:
    table = {(row.operator, row.x_format, row.format): row for row in support(
        ["mxfp4", "int8", "nvfp4_2d", "mxfp8", "e5m10[row]*f32"])}
    assert table["scaled_mm", "mxfp4", "mxfp4"].status == "exact"
    assert table["scaled_mm", "mxfp4", "mxfp4"].error == 0.0
    assert table["scaled_mm", "int8", "int8"].status == "native"
    assert table["scaled_mm", "mxfp8", "mxfp8"].status == "bounded"
    assert table["fake_quantize", None, "nvfp4_2d"].status == "unsupported"
    assert table["scaled_mm", "f32", "e5m10[row]*f32"].status == "unsupported"
    assert all(row.how for row in table.values())


def test_storage_is_the_format_s_own(tmp_path: Path) -> None:
    """What is in the file decodes to the weight without anything else."""
    tensor = formats.quantize(torch.randn(64, 64), "mxfp4")
    linear(torch.randn(4, 64), tensor.dequantize(), None, "mxfp4", "mxfp4", tmp_path)
    stored = {i.name: onnx.numpy_helper.to_array(i)
              for i in onnx.load(tmp_path / "model.onnx").graph.initializer}
    scale = torch.from_numpy(stored["w_0_scale"].view("uint8")).view(torch.float8_e8m0fnu)
    again = ScaledTensor.from_parts([torch.from_numpy(stored["w_0"]), scale], "mxfp4", (64, 64))
    assert torch.equal(again.dequantize(), tensor.dequantize())
