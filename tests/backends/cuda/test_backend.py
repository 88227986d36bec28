"""The CUDA backend gives what the reference gives, to a bound, whatever the format."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scaleprop
from scaleprop.backends.cuda import dialect, operators, words
from scaleprop.recipes import Recipe, Role
from tests.backends.cuda.test_quantize_kernels import DEVICE

kernels: Any = torch.ops.scaleprop_cuda
# of the largest result: two products of 96 and 64 float32 terms, and codes that lie on a boundary
BOUND = 2.0**-18


class Block(nn.Module):
    """Norm, two linears, an activation, and a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Block().eval()


def example(count: int = 2) -> Tensor:
    return torch.randn(count, 5, 64, generator=torch.Generator().manual_seed(count))


def compiled(model: nn.Module, backend: str, recipe: str | Recipe, **options: Any) -> Any:
    return scaleprop.compile(model, (example(),), recipe=recipe, backend=backend,
                             calibration=[(example(),)], **options)


@pytest.mark.parametrize("recipe", ["int8", "int4-int8-token", "mxfp8", "nvfp4", "fp8", "int4"])
def test_recipes(model, recipe):
    ours, reference = (compiled(model, backend, recipe) for backend in ("cuda", "reference"))
    got, want = ours(example().to(DEVICE)), reference(example())
    assert got.device.type == DEVICE
    assert (got.cpu() - want).abs().max() <= BOUND * want.abs().max()
    runs = {row.lowering for row in ours.report.records if row.role == "fprop.w"}
    known = ("Triton product", "library product")  # the latter where the device has one
    assert runs and all(str(run).startswith(known) for run in runs)


def test_the_library_multiplies_where_it_can(model, monkeypatch):
    for module in (dialect, operators):
        monkeypatch.setattr(module, "capability_of", lambda device: (9, 0))
    ours, reference = (compiled(model, backend, "fp8") for backend in ("cuda", "reference"))
    want = reference(example())
    assert (ours(example()).cpu() - want).abs().max() <= BOUND * want.abs().max()
    runs = {row.lowering for row in ours.report.records if row.role == "fprop.w"}
    assert runs and all(str(run).startswith("library product") for run in runs)


@pytest.mark.parametrize(("weight", "activation"), [
    ("nf4", "mxfp8"), ("int3", None), ("mxfp4", "nf4")])  # fmt: skip
def test_what_no_kernel_has_is_left_to_torch_and_listed(model, weight, activation):
    roles = {"fprop.w": Role(format=weight)} | (
        {} if activation is None else {"fprop.x": Role(format=activation)})
    recipe = Recipe(name="other", description="", roles=roles)
    ours, reference = (compiled(model, backend, recipe) for backend in ("cuda", "reference"))
    want = reference(example())
    assert (ours(example()).cpu() - want).abs().max() <= BOUND * want.abs().max()
    runs = {row.lowering for row in ours.report.records if row.role == "fprop.w"}
    assert all(str(run).startswith("float32 product") for run in runs)


def test_results_take_the_dtype_that_is_read(model):
    narrow = Block().eval().to(torch.bfloat16)
    narrow.load_state_dict(model.state_dict())
    x = example().to(torch.bfloat16)
    ours, reference = (scaleprop.compile(narrow, (x,), recipe="mxfp8", backend=backend)
                       for backend in ("cuda", "reference"))
    got, want = ours(x).cpu(), reference(x)
    assert got.dtype == torch.bfloat16
    # a code of MXFP8 that lies on a boundary: an element of 96 moves by 2^-3 of itself
    assert (got - want).abs().max() <= 2.0**-6 * want.abs().max()


@pytest.mark.parametrize("recipe", ["int4", "mxfp4-weight", "nvfp4-weight", "fp8-weight"])
def test_weights_of_few_rows_are_decoded_in_pairs(model, recipe, monkeypatch):
    ran: list[int] = []

    def noted(x: Tensor, *args: Any) -> Tensor:
        ran.append(len(x))
        return multiply(x, *args)

    multiply = words.multiply
    monkeypatch.setattr(words, "multiply", noted)
    narrow = Block().eval().to(torch.bfloat16)
    narrow.load_state_dict(model.state_dict())
    x = example().to(torch.bfloat16)
    ours, reference = (scaleprop.compile(narrow, (x,), recipe=recipe, backend=backend)
                       for backend in ("cuda", "reference"))
    want = reference(x)
    assert (ours(x).cpu() - want).abs().max() <= 2.0**-7 * want.abs().max()
    assert len(ran) == 2


def test_weights_that_are_not_plain_are_decoded_one_by_one(model, monkeypatch):
    monkeypatch.setattr(words, "multiply", None)
    wild = Block().eval().to(torch.bfloat16)
    with torch.no_grad():
        for parameter in (wild.up.weight, wild.down.weight):
            parameter[0] *= 2.0**30
    x = example().to(torch.bfloat16)
    ours, reference = (scaleprop.compile(wild, (x,), recipe="mxfp4-weight", backend=backend)
                       for backend in ("cuda", "reference"))
    want = reference(x)
    assert (ours(x).cpu() - want).abs().max() <= 2.0**-7 * want.abs().max()


def test_any_batch(model):
    batch = torch.export.Dim("batch", min=1, max=64)
    ours, reference = (compiled(model, backend, "mxfp4", dynamic_shapes=({0: batch},))
                       for backend in ("cuda", "reference"))
    for count in (1, 3, 7):
        want = reference(example(count))
        assert (ours(example(count)).cpu() - want).abs().max() <= BOUND * want.abs().max()


def test_formats_left_to_torch_in_bfloat16(model):
    narrow = Block().eval().to(torch.bfloat16)
    x = example().to(torch.bfloat16)
    recipe = Recipe(name="other", description="", roles={
        "fprop.w": Role(format="nf4"), "fprop.x": Role(format="mxfp8")})
    ours, reference = (scaleprop.compile(narrow, (x,), recipe=recipe, backend=backend)
                       for backend in ("cuda", "reference"))
    want = reference(x)
    assert (ours(x).cpu() - want).abs().max() <= 2.0**-6 * want.abs().max()
    quantized = [run for name, run in ours.executable.lowerings.items() if "quantize" in name]
    assert quantized and set(quantized) == {"fused torch operators"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_small_numbers_have_the_epsilon_of_torch(dtype):
    model = nn.Sequential(nn.RMSNorm(64), nn.Linear(64, 8)).to(dtype).eval()
    x = (example() * 1e-3).to(dtype)
    ours, reference = (scaleprop.compile(model, (x,), recipe="mxfp8", backend=backend)
                       for backend in ("cuda", "reference"))
    want = reference(x)
    assert (ours(x).cpu() - want).abs().max() <= 2.0**-6 * want.abs().max()
    assert "Triton rms_norm+quantize" in ours.executable.lowerings.values()


def test_nothing_to_sum():
    for name in ("mxfp8", "int8[row]*f32", "fp8"):
        got = kernels.quantize(torch.empty(3, 0, device=DEVICE), name)
        want = torch.ops.scaleprop.quantize(torch.empty(3, 0), name)
        assert [part.shape for part in got] == [part.shape for part in want]


class Gated(nn.Module):
    """As in language models."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.gate = nn.RMSNorm(64), nn.Linear(64, 96), nn.Linear(64, 96)
        self.down = nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


@pytest.mark.parametrize(("recipe", "passes", "expected"), [
    ("mxfp8", (), {"Triton rms_norm+quantize", "Triton silu·up+quantize"}),
    ("int8-token", (), {"Triton rms_norm+quantize", "Triton silu·up+quantize"}),
    ("nvfp4", ("fold-norms", "rotate{block=32}"), {"Triton hadamard+quantize"})])  # fmt: skip
def test_quantization_takes_in_what_is_before_it(recipe, passes, expected):
    torch.manual_seed(0)
    model = Gated().eval()
    with torch.no_grad():
        model.norm.weight.uniform_(0.5, 2.0)
    ours, reference = (compiled(model, backend, recipe, passes=passes)
                       for backend in ("cuda", "reference"))
    want = reference(example())
    # sums in another order: codes that lie on a boundary may differ by one
    assert (ours(example()).cpu() - want).abs().max() <= 2.0**-8 * want.abs().max()
    assert expected <= set(ours.executable.lowerings.values())


@pytest.mark.parametrize("call", [
    lambda x: ("quantize", (x, "int8[tensor]*f32")),
    lambda x: ("quantize", (x, "int8[tensor]*f32", -1, "nearest", None, [torch.tensor(0.02)])),
    lambda x: ("quantize", (x.permute(1, 2, 0), "int4[1x16]*f32", 1)),
    lambda x: ("quantize_operand", (x[0], "int4[1x16]*f32", [1, 0])),
    lambda x: ("quantize_operand", (x[0], "e2m1[1x16]*ue5m3*f32", [0], "stochastic:8", 0.75, None,
                                    torch.ones(1, dtype=torch.int64),
                                    [torch.ones(1, dtype=torch.int64)], 7, 16, 4)),
    lambda x: ("quantize_operand", (x[0], "e4m3[tensor]*f32", [0, 1], "nearest", 1.0,
                                    torch.tensor(3.0))),
    lambda x: ("quantize_norm", (x, torch.ones(64), None, "int8[row]*f32+zp", "rms", 1e-6,
                                 torch.bfloat16)),
    lambda x: ("quantize_gated", (x, x + 1, "int4[1x32]*f32", "silu", torch.float32)),
    lambda x: ("quantize_rotated", (x, None, "int4[1x32]*f32", 32)),
    lambda x: ("dequantize", (kernels.quantize(x, "int4[1x16]*f32"), "int4[1x16]*f32", [3, 4, 64],
                              torch.bfloat16)),
    lambda x: ("multiply", ([x], kernels.quantize(x[0], "int4[1x16]*f32"), None, None, "f32",
                            "int4[1x16]*f32", 64, torch.bfloat16)),
    lambda x: ("multiply", ([x.bfloat16()], kernels.quantize(x[0], "int4[row]*f32"), None, None,
                            "f32", "int4[row]*f32", 64, torch.bfloat16, True)),
    lambda x: ("gemm", (*[kernels.quantize(x[0], "int8[row]*f32")] * 2, "int8[row]*f32",
                        "int8[row]*f32", 64, torch.bfloat16))])  # fmt: skip
def test_operators_promise_what_they_do(call):
    """Schemas, shapes, strides; results are new tensors. (torch checks no float8 so.)"""
    name, arguments = call(torch.randn(3, 4, 64))
    torch.library.opcheck(getattr(kernels, name).default, arguments)
