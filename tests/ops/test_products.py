"""Casts and products of training graphs, against the formats' own rounding."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from scaleprop import ops
from scaleprop.errors import FormatError
from scaleprop.formats.elements import element
from scaleprop.formats.rounding import nearest
from scaleprop.ops import products

ELEMENTS = ("e4m3", "e5m2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ELEMENTS)
def test_cast_rounds_as_the_format_says(name: str, dtype: torch.dtype):
    fmt = element(name)
    grid = torch.tensor([fmt.decode(code) for code in fmt.codes], dtype=torch.float64)
    grid = grid[grid.isfinite()].sort().values
    halves = (grid[1:] + grid[:-1]) / 2
    x = torch.cat([grid, halves, halves.nextafter(grid[1:]), halves.nextafter(grid[:-1]),
                   grid * 4, torch.randn(500) * fmt.max / 4]).to(dtype)
    got = ops.cast(x, name)
    assert got.dtype == fmt.storage
    assert torch.equal(got.to(torch.float64), nearest(x.to(torch.float64), fmt))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ELEMENTS)
def test_cast_saturates_what_is_finite_alone(name: str, dtype: torch.dtype):
    x = torch.tensor([math.inf, -math.inf, math.nan, 6e4, -6e4, -0.0], dtype=dtype)
    top = element(name).max
    got = ops.cast(x, name).double()
    assert got[:3].isnan().all() and got[3:5].tolist() == [top, -top]
    assert got[5] == 0.0 and got[5].signbit()


def test_cast_takes_dtypes_of_a_smaller_range():
    x = torch.tensor([65504.0, -65504.0, math.inf], dtype=torch.float16)
    got = ops.cast(x, "bf16").float()
    assert got[:2].tolist() == [65536.0, -65536.0] and got[2].isnan()


def test_cast_refuses_elements_without_a_dtype():
    with pytest.raises(FormatError, match="'e2m1' has no torch dtype"):
        ops.cast(torch.ones(3), "e2m1")


# powers of two that may be multiplied in first, that leave normal numbers, and another
@pytest.mark.parametrize("alpha", [1.0, 0.125, 2.0**-80, 2.0**80, 2.0**-110, 3.0], ids=float.hex)
@pytest.mark.parametrize("elements", ["e4m3 e4m3", "e5m2 e4m3", "e4m3 e5m2"])
def test_gemm_is_alpha_times_the_product(elements: str, alpha: float):
    k = 256
    a, b = (ops.cast(torch.randn(shape), name)
            for name, shape in zip(elements.split(), ((33, k), (k, 70)), strict=True))
    want, size = a.double() @ b.double() * alpha, a.double().abs() @ b.double().abs() * alpha
    got = ops.gemm(a, b, alpha, torch.float32)
    assert ((got.double() - want).abs() <= size * k * 2.0**-24).all()
    narrow = ops.gemm(a, b, alpha, torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    assert ((narrow.double() - want).abs() <= want.abs() * 2.0**-8 + size * k * 2.0**-24).all()
    assert ops.gemm(a[:, :0], b[:0], alpha, torch.float32).abs().sum() == 0


@pytest.mark.parametrize("m, k, n", [(33, 256, 70), (256, 512, 128), (5, 0, 3), (0, 4, 3)])
def test_wide_products_of_bfloat16_are_summed_in_float32(m: int, k: int, n: int):
    a, b = (torch.randn(shape).bfloat16() for shape in ((m, k), (k, n)))
    got = ops.wide_mm(a, b.t().contiguous().t())
    assert got.dtype == torch.float32
    size = a.double().abs() @ b.double().abs()
    assert ((got.double() - a.double() @ b.double()).abs() <= size * k * 2.0**-24).all()
    assert torch.equal(ops.gemm(a, b, 0.25, torch.float32), ops.wide_mm(a, b) * 0.25)


@pytest.mark.parametrize(("capability", "narrow"), [((9, 0), True), ((7, 5), False)])
def test_devices_multiply_bfloat16_as_it_is(capability, narrow, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    called: list[tuple[object, list[torch.dtype]]] = []

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket is torch.ops.aten.mm:
                called.append((func, [each.dtype for each in args[:2]]))
            return func(*args, **(kwargs or {}))

    with FakeTensorMode():
        a, b = (torch.empty(shape, dtype=torch.bfloat16, device="cuda")
                for shape in ((4, 16), (16, 8)))
        with Noted():
            results = [products.gemm(a, b, 1.0, dtype) for dtype in (torch.float32, torch.bfloat16)]
    assert [result.dtype for result in results] == [torch.float32, torch.bfloat16]
    mm, dtype = torch.ops.aten.mm, torch.bfloat16 if narrow else torch.float32
    assert called == [(mm.dtype if narrow else mm.default, [dtype, dtype]),
                      (mm.default, [dtype, dtype])]


def test_wide_products_leave_the_switch_of_the_process():
    switch = torch.backends.mkldnn.matmul
    before = switch.fp32_precision
    a = torch.randn(256, 256).bfloat16()

    def multiply(_: int) -> None:
        for _ in range(20):
            ops.wide_mm(a, a)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(multiply, range(4)))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        products.wide_mm(a, a[:3])
    assert switch.fp32_precision == before


SHAPES = [(32, 64, 48), (5, 50, 7), (1, 16, 16), (3, 1, 1)]  # m, k, n


@pytest.mark.parametrize("elements", [("e4m3", "e4m3"), ("e5m2", "e4m3"), ("e4m3", "e5m2")])
@pytest.mark.parametrize("in_columns", [(False, False), (True, False), (False, True), (True, True)])
def test_scaled_gemm_meets_the_hardware_s_demands(
    monkeypatch: pytest.MonkeyPatch, elements: tuple[str, str], in_columns: tuple[bool, bool]
):
    """Rows, columns, multiples of 16; PyTorch's own kernel for CPUs then gives the product."""
    calls: list[torch.dtype] = []
    real = torch._scaled_mm

    def strict(a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, *,
               out_dtype: torch.dtype) -> torch.Tensor:
        assert a.is_contiguous() and b.t().is_contiguous()
        assert a.shape[1] % 16 == 0 and b.shape[1] % 16 == 0
        assert scale_a.dtype == scale_b.dtype == torch.float32
        calls.append(out_dtype)
        return real(a, b, scale_a, scale_b, out_dtype=out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", strict)
    for m, k, n in SHAPES:
        x = torch.randn(k, m).t() if in_columns[0] else torch.randn(m, k)
        y = torch.randn(n, k).t() if in_columns[1] else torch.randn(k, n)
        a, b = (products.cast(value, name) for value, name in zip((x, y), elements, strict=True))
        want = 0.25 * a.double() @ b.double()
        for dtype, close in ((torch.float32, 1e-6), (torch.float64, 1e-6), (torch.bfloat16, 2e-2)):
            got = products.scaled_gemm(a, b, 0.25, dtype)
            assert got.dtype == dtype and got.shape == (m, n)
            torch.testing.assert_close(got.double(), want, rtol=close, atol=close)
    assert set(calls) == {torch.float32, torch.bfloat16}


def test_gemm_goes_to_hardware_that_has_fp8(monkeypatch: pytest.MonkeyPatch):
    calls: list[float] = []
    monkeypatch.setattr(products, "has_fp8", lambda device: True)
    monkeypatch.setattr(products, "scaled_gemm",
                        lambda a, b, alpha, dtype: calls.append(alpha) or a.new_zeros(2, 2))
    for name, other, goes in (("e4m3", "e4m3", True), ("e4m3", "e5m2", True),
                              ("e5m2", "e5m2", False), ("bf16", "e4m3", False)):
        calls.clear()
        a, b = (torch.ones(2, 2, dtype=element(kind).storage) for kind in (name, other))
        assert products.in_hardware(a, b) is goes
        products.gemm(a, b, 2.0, torch.float32)
        assert calls == [2.0] * goes


def test_no_cpu_has_fp8_units():
    assert not products.has_fp8(torch.device("cpu"))


@pytest.mark.parametrize("name", ELEMENTS)
@pytest.mark.parametrize("margin", [0, 2])
def test_power_scale_brings_amax_below_the_maximum(name: str, margin: int):
    top = element(name).max * 2.0**-margin
    for amax in (1.0, 3.14, 447.9, 448.0, 1e-30, 1e30, 2.0**-100):
        scale = float(ops.power_scale(torch.tensor([amax / 3, -amax]), name, margin))
        assert math.frexp(scale)[0] == 0.5
        assert top / 4 < amax / scale <= top or scale in (2.0**-100, 2.0**100)


@pytest.mark.parametrize("values", [[0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0], []])
def test_power_scale_is_one_where_there_is_nothing_to_scale(values: list[float]):
    assert float(ops.power_scale(torch.tensor(values), "e4m3", 0)) == 1.0


@pytest.mark.parametrize("call", [
    lambda: torch.library.opcheck(ops.cast, (torch.randn(3, 4), "e4m3")),
    lambda: torch.library.opcheck(ops.gemm, (torch.randn(3, 4), torch.randn(4, 2), 2.0,
                                             torch.float32)),
    lambda: torch.library.opcheck(ops.wide_mm, (torch.randn(3, 4).bfloat16(),
                                                torch.randn(4, 2).bfloat16())),
    lambda: torch.library.opcheck(ops.power_scale, (torch.randn(3, 4), "e5m2", 1)),
])  # fmt: skip
def test_opcheck(call: object):
    call()
