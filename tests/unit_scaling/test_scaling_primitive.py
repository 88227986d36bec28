"""scale_fwd_bwd: one constant forward, another backward, seen by compilers as multiplications."""

from __future__ import annotations

import pytest
import torch

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
