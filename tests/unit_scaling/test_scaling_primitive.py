"""scale_fwd_bwd: one constant forward, another backward, seen by compilers as multiplications."""

from __future__ import annotations

import pytest
import torch

from scaleprop.errors import UnsupportedOpError
from scaleprop.ops.scaling import scale_fwd_bwd


@pytest.mark.parametrize("forward", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("backward", [1.0, 0.25, 7.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_multiplies_each_way(forward: float, backward: float, dtype: torch.dtype) -> None:
    x = torch.randn(4, 3, dtype=dtype, requires_grad=True)
    upstream = torch.randn(4, 3, dtype=dtype)
    y = scale_fwd_bwd(x, forward, backward)
    y.backward(upstream)
    assert y.dtype == dtype and x.grad is not None and x.grad.dtype == dtype
    torch.testing.assert_close(y, x.detach() * forward, rtol=0, atol=0)
    torch.testing.assert_close(x.grad, upstream * backward, rtol=0, atol=0)


def test_is_a_product_where_both_are_equal() -> None:
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: scale_fwd_bwd(v, 0.7, 0.7), (x,))


def test_compiles_whole() -> None:
    x = torch.randn(6, requires_grad=True)
    compiled = torch.compile(lambda v: scale_fwd_bwd(v.sin(), 2.0, 0.5), fullgraph=True,
                             backend="aot_eager")
    y = compiled(x)
    y.sum().backward()
    torch.testing.assert_close(y, x.detach().sin() * 2)
    torch.testing.assert_close(x.grad, x.detach().cos() * 0.5)


def test_exports() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return scale_fwd_bwd(x, 3.0, 1.0)

    x = torch.randn(4)
    torch.testing.assert_close(torch.export.export(Module(), (x,)).module()(x), x * 3)


def test_derivatives_forward_and_batched_are_those_of_the_value() -> None:
    x, tangent = torch.randn(2, 3, 4)
    y, moved = torch.func.jvp(lambda v: scale_fwd_bwd(v, 3.0, 0.5), (x,), (tangent,))[:2]
    assert torch.equal(y, x * 3) and torch.equal(moved, tangent * 3)
    one = torch.func.grad(lambda v: scale_fwd_bwd(v, 3.0, 0.5).square().sum())
    assert torch.equal(torch.vmap(one)(x), 2 * 3 * 0.5 * x)


def test_second_derivatives_are_refused_where_they_would_be_wrong() -> None:
    for backward in (0.5, 2.0):
        x = torch.randn(3, dtype=torch.float64, requires_grad=True)
        y = scale_fwd_bwd(x, 2.0, backward)
        (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        assert torch.equal(first, 3 * y.square() * backward)
        if backward == 2.0:
            (second,) = torch.autograd.grad(first.sum(), x)
            torch.testing.assert_close(second, 6 * 8 * x)
        else:
            with pytest.raises(UnsupportedOpError, match="gradient of a gradient"):
                first.sum().backward()
