"""Unit scaling's own claims, operator by operator: outputs and gradients have standard deviation
1 ± 0.1 on independent normal inputs (unit-scaling's tests/test_functional.py has the list).

An operator's inputs are parameters; what it makes goes into a linear layer. Constants are measured
on one batch and checked on other numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import scaleprop
from scaleprop.ops.scaling import scale_fwd_bwd
from scaleprop.passes.unit.forward import rms

N = 256


class Op(nn.Module):
    """function(*parameters) @ weight."""

    def __init__(self, function: Callable[..., torch.Tensor], shapes: Sequence[Sequence[int]],
                 width: int) -> None:
        super().__init__()
        self.given = nn.ParameterList(nn.Parameter(torch.randn(*shape)) for shape in shapes)
        self.function = function
        self.head = nn.Linear(width, N, bias=False)

    def forward(self, one: torch.Tensor) -> torch.Tensor:
        return self.head(self.function(*self.given) * one)


class Watch(torch.fx.Interpreter):
    """Keeps what the last linear layer reads."""

    def run_node(self, n: torch.fx.Node) -> Any:
        if n.target is torch.ops.aten.linear.default:
            self.read = self.env[n.args[0]]
        return super().run_node(n)


def scaled(model: nn.Module, *inputs: torch.Tensor) -> Any:
    torch.manual_seed(0)
    return scaleprop.unit_scale(model, inputs, powers_of_two=False)


def step(model: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    """One backward with random weights on the output; what the last linear layer read."""
    torch.manual_seed(1)
    watch = Watch(model)
    (result,) = torch.utils._pytree.tree_leaves(watch.run(*inputs, enable_io_processing=False))
    (result * torch.randn_like(result)).sum().backward()
    return watch.read.detach()


SHAPE = (512, N)
CASES = {
    "gelu": (F.gelu, [SHAPE], N),
    "silu": (F.silu, [SHAPE], N),
    "relu": (F.relu, [SHAPE], N),
    "glu": (F.glu, [(512, 2 * N)], N),
    "silu_glu": (lambda a, b: F.silu(a) * b, [SHAPE, SHAPE], N),
    "softmax": (lambda x: x.softmax(-1), [(64, 2048)], 2048),
    "matmul": (lambda a, b: a @ b, [(512, 128), (128, N)], N),
    "sdpa": (F.scaled_dot_product_attention, [(4, 4, 128, 64)] * 3, 64),
    "causal": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
               [(4, 4, 128, 64)] * 3, 64),
    "layer_norm": (lambda x, g, b: F.layer_norm(x, (N,), g, b), [SHAPE, (N,), (N,)], N),
    "rms_norm": (lambda x, g: F.rms_norm(x, (N,), g), [SHAPE, (N,)], N),
    "add": (lambda a, b: a + b, [SHAPE, SHAPE], N),
    "broadcast": (lambda a, b: a + b, [SHAPE, (N,)], N),
    "dropout": (lambda x: F.dropout(x, 0.5), [SHAPE], N),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_have_unit_size(name: str) -> None:
    function, shapes, width = CASES[name]
    torch.manual_seed(2)
    one = torch.ones(())
    model = scaled(Op(function, shapes, width).train(), one)
    read = step(model, one)
    assert rms(read) == pytest.approx(1, abs=0.1)
    for parameter in model.parameters():
        assert rms(parameter.grad) == pytest.approx(1, abs=0.1)


def test_products_convolutions_and_lookups() -> None:
    torch.manual_seed(2)
    cases = [
        (nn.Sequential(nn.Linear(N, 512), nn.Linear(512, N)), torch.randn(512, N)),
        (nn.Sequential(nn.Conv1d(32, 64, 5, stride=3, groups=4), nn.Conv1d(64, 32, 1)),
         torch.randn(16, 32, 200)),
        (nn.Sequential(nn.Conv2d(16, 32, 3), nn.Conv2d(32, 16, 1)), torch.randn(8, 16, 32, 32)),
        (nn.Sequential(nn.Embedding(64, N), nn.Linear(N, N)), torch.randint(64, (512,))),
    ]
    for model, x in cases:
        unit = scaled(model, x)
        torch.manual_seed(1)
        y = unit(x)
        assert rms(y.detach()) == pytest.approx(1, abs=0.1)
        (y * torch.randn_like(y)).sum().backward()
        for parameter in unit.parameters():  # a bias has few elements to tell from
            tolerance = 0.1 if parameter.dim() > 1 else 4 / math.sqrt(parameter.numel())
            assert rms(parameter.grad) == pytest.approx(1, abs=tolerance)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_has_one_expectation_in_training_and_eval(p: float) -> None:
    torch.manual_seed(2)
    one = torch.ones(())
    model = scaled(Op(lambda x: F.dropout(x, p), [(4096, 64)], 64).train(), one)
    trained = step(model, one)
    evaluated = step(model.eval(), one)
    assert rms(trained) == pytest.approx(1, abs=0.1)
    assert rms(evaluated) == pytest.approx(math.sqrt(1 - p), abs=0.1)


def test_the_loss_is_the_loss_and_its_gradient_has_unit_size() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(N, 64, bias=False)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
            logits = self.a(x)
            return F.cross_entropy(logits, labels), logits

    torch.manual_seed(2)
    x, labels = torch.randn(512, N), torch.randint(64, (512,))
    model = scaled(Classifier(), x, labels)
    loss, logits = model(x, labels)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels), rtol=0, atol=0)
    assert rms(logits.detach()) == pytest.approx(1, abs=0.1)
    loss.backward()
    assert rms(model.a.weight.grad) == pytest.approx(1, abs=0.01)


class Block(nn.Module):
    """A stream with two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(N, N) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        x = x + F.layer_norm(self.b(x), (N,))
        return x + self.c(x)


@pytest.mark.parametrize("scheme", ["unit", "u-mup", "mus"])
def test_residual_weights_keep_the_stream_at_unit_size(scheme: str) -> None:
    x = torch.randn(512, N)
    torch.manual_seed(0)
    model = scaleprop.unit_scale(Block(), (x,), scheme)  # type: ignore[arg-type]
    found = model.meta["unit_scaling"].multipliers
    pairs = list(zip([m.factor for m in found if m.why == "stream"],
                     [m.factor for m in found if m.why == "branch"], strict=True))
    assert len(pairs) == 2
    for skip, branch in pairs:
        assert skip**2 + branch**2 == pytest.approx(1)
    assert rms(model(x).detach()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("reader", [torch.tanh, torch.exp, torch.sigmoid,
                                    lambda x: x.softmax(-1) * 3, lambda x: x + 1])
def test_what_a_multiplier_would_change_gets_none(reader: Callable[..., torch.Tensor]) -> None:
    """a² has no unit size, and what reads it minds."""
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return reader(self.a(x) * self.a(x) * 3)

    model = scaleprop.unit_scale(Model(), torch.randn(64, 16))
    whys = {m.why for m in model.meta["unit_scaling"].multipliers}
    assert whys <= {"readout", "1/√16"}
    assert sum(n.target is scale_fwd_bwd and n.args[1] != 1 for n in model.graph.nodes) == 2
