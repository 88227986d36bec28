"""Quantized products on onnxruntime against ``scaleprop::scaled_mm``, every candidate by itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from quantized_graphs import OPS, Graph, Linear, linear

import scaleprop
from scaleprop.backends.onnxruntime.quantized import lowering, products
from scaleprop.backends.onnxruntime.quantized.products import (
    ByteProduct,
    Candidate,
    FloatProduct,
    LimbProduct,
    Problem,
    ResidualProduct,
)

INT8 = "int8[row]*f32"

PAIRS = [
    ("mxfp4", "mxfp4"), ("mxfp4:rceil", "mxfp4"), ("mxfp6", "mxfp6"), ("mxfp6_e3m2", "mxfp6_e3m2"),
    ("nvfp4", "nvfp4"), ("mxfp8", "mxfp8"), ("mxfp8_e5m2", "mxfp8"), ("mxfp8", "mxfp4"),
    ("fp8", "e4m3[row]*f32"), ("e4m3[row]*f32", "e4m3[row]*f32"), ("mxint8", "mxint8"),
    ("int8", INT8), ("int8+zp", INT8), (INT8, INT8), ("int8+zp", "int8[row]*f32+zp"),
    ("int8[row]*f32+zp", INT8), ("int8", "int4[row]*f32"), ("int8[1x128]*f32", "int4"),
    (INT8, "int4[1x32]*f32"), ("f32", INT8), ("f32", "int8"), ("f32", "int4"), ("f32", "int4+zp"),
    ("f32", "int4[1x32]*f16"), ("f32", "int3"), ("f32", "int2"), ("f32", "ternary"),
    ("f32", "binary"), ("f32", "nf4"), ("f32", "mxfp4"), ("f32", "mxfp6"), ("f32", "mxfp8"),
    ("f32", "nvfp4"), ("f32", "nvfp4_2d"), ("f32", "fp4_ue5m3"), ("f32", "fp8"),
]


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Problem, Candidate]]]:
    """What was chosen; a test may put a candidate in front to have it taken instead."""
    log: list[tuple[Problem, Candidate]] = []

    def choose(problem: Problem, tolerance: float, spare: float) -> Candidate:
        candidate = products.choose(problem, tolerance, spare)
        log.append((problem, candidate))
        return candidate

    monkeypatch.setattr(lowering, "choose", choose)
    yield log


def forced(monkeypatch: pytest.MonkeyPatch, candidate: Candidate) -> list[Problem]:
    seen: list[Problem] = []

    def choose(problem: Problem, tolerance: float, spare: float) -> Candidate:
        seen.append(problem)
        return candidate

    monkeypatch.setattr(lowering, "choose", choose)
    return seen


def spread(*shape: int, octaves: float, seed: int = 0) -> torch.Tensor:
    """Gaussian data in blocks of 16 whose scales span ``octaves``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape[:-1], -(-shape[-1] // 16), 16, generator=generator)
    x = x * torch.exp2(-octaves * torch.rand(*x.shape[:-1], 1, generator=generator))
    return x.flatten(-2)[..., : shape[-1]].contiguous()


def check(built: Linear, problem: Problem, candidate: Candidate, *inputs: torch.Tensor) -> None:
    for x in inputs:
        bound = candidate.error(problem)
        error = built.error(x)
        assert error <= bound, f"{candidate.name}: {error:.3g} > {bound:.3g}"


@pytest.mark.parametrize(("x_format", "w_format"), PAIRS)
def test_every_pair_of_formats(x_format: str, w_format: str, tmp_path: Path,
                               chosen: list[tuple[Problem, Candidate]]) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(48, 192) * 0.05, torch.randn(48)
    built = linear(torch.randn(2, 16, 192), weight, bias, x_format, w_format, tmp_path,
                   dynamic=(0, 1))
    problem, candidate = chosen[0]
    check(built, problem, candidate, torch.randn(2, 16, 192), torch.randn(1, 1, 192),
          spread(3, 5, 192, octaves=6.0))


@pytest.mark.parametrize(("x_format", "w_format"), PAIRS)
def test_odd_sizes_without_bias(x_format: str, w_format: str, tmp_path: Path,
                                chosen: list[tuple[Problem, Candidate]]) -> None:
    torch.manual_seed(1)
    weight = torch.randn(33, 75)
    built = linear(torch.randn(7, 75), weight, None, x_format, w_format, tmp_path, dynamic=(0,))
    problem, candidate = chosen[0]
    check(built, problem, candidate, torch.randn(7, 75), torch.randn(1, 75))


@pytest.mark.parametrize("candidate", [LimbProduct(1, 1), LimbProduct(2, 1)], ids=str)
@pytest.mark.parametrize("octaves", [0.0, 3.0, 8.0])
@pytest.mark.parametrize("rule", ["floor", "rceil", "even"])
def test_mxfp4_is_exact_to_the_bit(candidate: Candidate, octaves: float, rule: str,
                                   tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = forced(monkeypatch, candidate)
    weight = torch.randn(64, 320, generator=torch.Generator().manual_seed(2))
    built = linear(torch.randn(4, 9, 320), weight, torch.randn(64), f"mxfp4:{rule}", "mxfp4",
                   tmp_path, dynamic=(0, 1))
    assert candidate.error(seen[0]) == 0.0
    for seed in range(3):
        x = spread(4, 9, 320, octaves=octaves, seed=seed)
        assert torch.equal(built.built(x), built.reference(x))
    assert torch.equal(built.built(x[:1, :1]), built.reference(x[:1, :1]))


def test_mxfp4_rows_over_thirty_octaves(tmp_path: Path) -> None:
    """More limbs than two round their sum more than once, by one float32 rounding."""
    weight = torch.randn(32, 256)
    built = linear(torch.randn(8, 256), weight, None, "mxfp4", "mxfp4", tmp_path)
    assert built.error(spread(8, 256, octaves=30.0)) <= 2.0**-22


def test_mxfp4_is_chosen_exact(tmp_path: Path, chosen: list[tuple[Problem, Candidate]]) -> None:
    for rows in (1, 64):
        directory = tmp_path / str(rows)
        directory.mkdir()
        linear(torch.randn(rows, 256), torch.randn(64, 256), None, "mxfp4", "mxfp4", directory)
    assert [candidate.error(problem) for problem, candidate in chosen] == [0.0, 0.0]


@pytest.mark.parametrize(("x_format", "w_format", "candidate"), [
    ("mxfp6", "mxfp6", LimbProduct(2, 2)), ("mxfp6_e3m2", "mxfp6_e3m2", LimbProduct(2, 2)),
    ("nvfp4", "nvfp4", LimbProduct(2, 2)), ("mxint8", "mxint8", LimbProduct(2, 2)),
    ("mxfp8", "mxfp8", LimbProduct(2, 2)), ("fp8", "e4m3[row]*f32", LimbProduct(2, 2)),
    ("mxfp8", "mxfp8", LimbProduct(2, 3)), ("f32", "mxfp4", LimbProduct(2, 1)),
    ("f32", "mxfp4", LimbProduct(3, 1)), ("f32", "mxfp6", LimbProduct(3, 2)),
    ("f32", "nvfp4", LimbProduct(3, 2)), ("f32", "nvfp4_2d", LimbProduct(2, 2)),
    ("f32", INT8, LimbProduct(2, 1)), ("f32", INT8, LimbProduct(3, 1)),
    ("f32", "int8[row]*f32+zp", LimbProduct(3, 1)), ("f32", "int4", LimbProduct(2, 2)),
    ("f32", "int4+zp", LimbProduct(2, 2)), ("f32", "int3", LimbProduct(2, 2)),
    ("int8[row]*f32+zp", INT8, LimbProduct(2, 1)), ("int8[1x128]*f32", "int4", LimbProduct(2, 2)),
    ("f32", "int4", ResidualProduct(1)), ("f32", "int4", ResidualProduct(2)),
    ("f32", "int4", ResidualProduct(3)), ("f32", "int4+zp", ResidualProduct(2)),
    ("f32", "int4[1x32]*f16", ResidualProduct(3)), ("f32", "int2", ResidualProduct(2)),
    ("int8[1x128]*f32", "int4", ResidualProduct(1)),
    ("int8[1x128]*f32", "int4", ResidualProduct(1, unrounded=True)),
    ("int8[1x128]*bf16", "int4", ResidualProduct(1)), ("int8[1x128]*e4m3", "int4", FloatProduct()),
    (INT8, "int4", ResidualProduct(2)), ("mxfp4", "mxfp4", LimbProduct(4, 1)),
    ("nvfp4", "nvfp4", LimbProduct(4, 2)), ("mxfp6", "mxfp6", LimbProduct(4, 2)),
    ("f32", "int4", FloatProduct()), ("mxfp8", "mxfp8", FloatProduct()),
    ("f32", "nvfp4", FloatProduct()), ("int8+zp", INT8, FloatProduct()),
], ids=str)
@pytest.mark.parametrize("size", [256, 150])
def test_each_candidate_keeps_its_bound(x_format: str, w_format: str, candidate: Candidate,
                                        size: int, tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    seen = forced(monkeypatch, candidate)
    torch.manual_seed(3)
    built = linear(torch.randn(2, 8, size), torch.randn(40, size), torch.randn(40), x_format,
                   w_format, tmp_path, dynamic=(0, 1))
    heavy = torch.distributions.StudentT(3.0).sample((2, 8, size))
    check(built, seen[0], candidate, torch.randn(2, 8, size), torch.randn(1, 1, size), heavy)


@pytest.mark.parametrize(("x_format", "w_format"), [
    ("mxfp4", "mxfp4"), ("nvfp4", "nvfp4"), (INT8, INT8), ("int8", INT8), ("int8+zp", INT8),
    ("e4m3[row]*f32", "mxfp8"), ("f32", "int4"), ("f32", "mxfp4")])
def test_zero_rows_and_zero_columns(x_format: str, w_format: str, tmp_path: Path) -> None:
    weight = torch.randn(16, 128)
    weight[3] = 0.0
    x = torch.randn(4, 128)
    x[1] = 0.0
    built = linear(x, weight, torch.ones(16), x_format, w_format, tmp_path)
    y = built.built(x)
    assert torch.equal(y[1], torch.ones(16))
    assert torch.equal(y[:, 3], torch.ones(4))
    assert torch.equal(built.built(torch.zeros(4, 128)), torch.ones(4, 16))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), -float("nan")])
@pytest.mark.parametrize("fmt", ["mxfp4", "mxfp6", "mxfp4:rceil", "mxfp8"])
@pytest.mark.parametrize("count", [2, 4])
def test_nan_and_infinity_poison_their_rows_alone(bad: float, fmt: str, count: int, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever in a block they are."""
    forced(monkeypatch, LimbProduct(count, 2))
    x = torch.randn(70, 128)
    built = linear(x, torch.randn(8, 128), None, fmt, fmt, tmp_path)
    clean = built.built(x)
    for index in range(1, 33):
        x[index, 40 + index] = bad
    got, want = built.built(x), built.reference(x)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[33:], clean[33:])


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp8:rceil"])
def test_no_nan_is_lost_in_a_block(name: str, tmp_path: Path) -> None:
    graph = Graph()
    built = graph.build(graph.call(OPS.fake_quantize.default, graph.input(torch.randn(64, 64)),
                                   name), tmp_path)
    x = torch.randn(64, 64)
    for index in range(64):
        x[index, index] = float("nan")
    assert torch.equal(built(x).isnan(), OPS.fake_quantize(x, name).isnan())


@pytest.mark.parametrize("zero_point", [False, True])
def test_static_scales_saturate_as_the_reference(zero_point: bool, tmp_path: Path) -> None:
    static = [torch.tensor(0.01), *([torch.tensor(90, dtype=torch.uint8)] if zero_point else [])]
    built = linear(torch.randn(4, 64), torch.randn(16, 64), torch.randn(16),
                   "int8+zp" if zero_point else "int8", INT8, tmp_path, static=static)
    assert built.chosen == ByteProduct().name
    assert built.error(3.0 * torch.randn(4, 64)) <= products.ROUNDING


def test_tolerance_is_honoured(tmp_path: Path, chosen: list[tuple[Problem, Candidate]]) -> None:
    """What may err more may run faster; what may not err is a float32 sum."""
    x, weight = torch.randn(1, 2048), torch.randn(512, 2048)
    for index, tolerance in enumerate((2.0**-5, 2.0**-11, 2.0**-18)):
        directory = tmp_path / str(index)
        directory.mkdir()
        linear(x, weight, None, "f32", "int4", directory, tolerance=tolerance)
    assert [candidate for _, candidate in chosen] == [
        ResidualProduct(1), ResidualProduct(2), FloatProduct()]


def test_rows_are_counted_in_the_example(tmp_path: Path) -> None:
    """Tracing takes two for a size of one; the kernel for one row is chosen all the same."""
    model = torch.nn.Sequential(torch.nn.Linear(1024, 512))
    names: list[str | None] = []
    for shape in ((1, 1, 1024), (1, 32, 1024)):
        compiled = scaleprop.compile(model, torch.randn(*shape), recipe="int4")
        compiled.export(tmp_path / "model.onnx")
        names += [r.lowering for r in compiled.report.records if r.role == "fprop.w"]
    assert ["MatMulNBits" in str(name) for name in names] == [True, False]


def test_little_is_expanded_at_load_where_a_kernel_unpacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are expanded while the budget lasts; then the kernel that reads packed ones wins."""
    model = torch.nn.Sequential(torch.nn.Linear(1024, 1024), torch.nn.Linear(1024, 1024))
    monkeypatch.setattr(lowering, "LOADING", 20.0 * 2**20)
    compiled = scaleprop.compile(model, torch.randn(64, 1024), recipe="int4")
    names = [r.lowering for r in compiled.report.records if r.role == "fprop.w"]
    assert ["MatMulNBits" in str(name) for name in names] == [False, True]
