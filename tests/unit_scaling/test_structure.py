"""Residual streams, readouts and first layers are found in a forward graph, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from scaleprop.passes.unit.capture import capture_training
from scaleprop.passes.unit.learning_rates import find_uses
from scaleprop.passes.unit.structure import Structure, find_structure

D = 8
X = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(10).view(2, 5)


class Of(nn.Module):
    """``run`` of named layers and the inputs."""

    def __init__(self, run: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: Any) -> Any:
        return self.run(self, *inputs)


def square(names: str) -> dict[str, nn.Module]:
    return {name: nn.Linear(D, D, bias=False) for name in names}


class Found:
    """A model's structure, told by the names of its parameters."""

    def __init__(self, model: nn.Module, *inputs: torch.Tensor) -> None:
        self.module, _ = capture_training(model.train(), inputs, {}, None)
        self.structure: Structure = find_structure(self.module)

    def _names(self, nodes: Any) -> set[str]:
        return {str(self.structure.products[node].parameter.target).removesuffix(".weight")
                for node in nodes}

    @property
    def streams(self) -> list[tuple[int, int, str]]:
        """(stream, index, branch) of each residual sum, in the graph's order."""
        return [(r.stream, r.index, r.branch) for r in self.structure.residuals.values()]

    @property
    def readouts(self) -> set[str]:
        return self._names(self.structure.readouts)

    @property
    def first(self) -> set[str]:
        return self._names(self.structure.first)

    @property
    def inside(self) -> dict[str, int]:
        """Product → branches of the stream that it is in a branch of."""
        return {next(iter(self._names([node]))): count
                for node, count in self.structure.inside.items()}


def attention(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x))
    return m.o(y)


def spelled(m: Any, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    scores = m.q(x) @ m.k(x).mT / D**0.5 + mask
    return m.o(scores.softmax(-1) @ m.v(x))


def mlp(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.d(F.gelu(m.u(x)))


def norm(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, (D,))


def test_a_stream_with_its_branches_and_readout():
    def run(m: Any, ids: torch.Tensor) -> torch.Tensor:
        x = m.table(ids)
        x = x + attention(m, norm(x))
        x = x + mlp(m, norm(x))
        x = x + mlp(m, norm(x))
        return m.head(norm(x))

    found = Found(Of(run, table=nn.Embedding(10, D), head=nn.Linear(D, 10), **square("qkvoud")),
                  IDS)
    assert found.streams == [(0, 0, "attention"), (0, 1, "mlp"), (0, 2, "mlp")]
    assert found.structure.length(0) == 3
    assert found.readouts == {"head"} and found.first == {"table"}
    assert found.inside == dict.fromkeys("qkvoud", 3)


@pytest.mark.parametrize("swapped", [False, True], ids=["skip + branch", "branch + skip"])
def test_which_term_is_the_stream(swapped: bool):
    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.a(x)
        return m.b(x).relu() + x if swapped else x + m.b(x).relu()

    found = Found(Of(run, **square("ab")), X)
    ((node, residual),) = found.structure.residuals.items()
    assert residual.skip == int(swapped)
    assert node.args[residual.skip].target is torch.ops.aten.linear.default
    assert not found.readouts  # b's result joins a stream
    assert found.first == {"a"}


@pytest.mark.parametrize("between", [
    lambda x: F.dropout(x, 0.1), lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    lambda x: x.to(torch.float64).float()], ids=["dropout", "views", "casts"])
def test_a_stream_goes_through_what_keeps_values(between: Callable[[Any], Any]):
    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.a(x)
        x = between(x) + m.b(x)
        return between(x) + m.c(x)

    assert Found(Of(run, **square("abc")), X).streams == [(0, 0, "mlp"), (0, 1, "mlp")]


@pytest.mark.parametrize("order", ["stream first", "branches first"])
def test_parallel_branches(order: str):
    """Attention and MLP of the same norm, as in GPT-J: two branches of one stream."""

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.a(x)
        for _ in range(2):
            y = norm(x)
            x = x + attention(m, y) + mlp(m, y) if order == "stream first" else \
                attention(m, y) + mlp(m, y) + x
        return m.h(norm(x))

    found = Found(Of(run, **square("ahqkvoud")), X)
    assert found.readouts == {"h"}
    assert set(found.inside) == set("qkvoud")
    if order == "stream first":
        assert found.streams == [(0, 0, "attention"), (0, 1, "mlp"), (0, 2, "attention"),
                                 (0, 3, "mlp")]
    else:  # their sum is one branch
        assert found.streams == [(0, 0, "attention"), (0, 1, "attention")]


def test_post_norm():
    """Each norm ends a stream and begins the next."""

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = norm(m.a(x))
        x = norm(x + attention(m, x))
        x = norm(x + mlp(m, x))
        return m.h(x)

    found = Found(Of(run, **square("ahqkvoud")), X)
    assert found.streams == [(0, 0, "attention"), (1, 0, "mlp")]
    assert found.inside == dict.fromkeys("qkvoud", 1)
    assert found.readouts == {"h"}


def test_norms_at_the_end_of_branches_keep_one_stream():
    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.a(x)
        x = x + norm(attention(m, norm(x)))
        return x + norm(mlp(m, norm(x)))

    assert Found(Of(run, **square("aqkvoud")), X).streams == [(0, 0, "attention"), (0, 1, "mlp")]


def gelu_by_hand(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3))))


SUMS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "tanh gelu": lambda m, x: m.b(gelu_by_hand(m.a(x))),
    "mask": lambda m, x: (m.a(x) @ m.b(x).mT + torch.zeros(5, 5)).softmax(-1) @ x,
    "given mask": lambda m, x: (m.a(x) @ m.b(x).mT + x[..., :5]).softmax(-1) @ x,
    "two branches": lambda m, x: m.a(x) + m.b(x),
    "itself": lambda m, x: m.b((y := m.a(x)) + y),
    "numbers": lambda m, x: m.b(m.a(x) + 1),
    "broadcast": lambda m, x: (y := m.a(x)) + m.b(y).mean(1, keepdim=True),
    "weighted": lambda m, x: torch.add(y := m.a(x), m.b(y), alpha=0.3),
    "bias": lambda m, x: m.b(m.a(x) + m.a.weight[0]),
    "powers": lambda m, x: m.b((y := m.a(x)) + y.square()),
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_that_are_no_residual(name: str):
    found = Found(Of(SUMS[name], **square("ab")), X)
    assert any(node.target is torch.ops.aten.add.Tensor for node in found.module.graph.nodes)
    assert not found.streams and not found.inside


def test_masks_added_to_scores_inside_of_a_residual():
    """The one residual is the stream's; at a second layer too, where scores depend on it."""
    mask = torch.zeros(5, 5).masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf)

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.a(x)
        for _ in range(2):
            x = x + spelled(m, norm(x), mask)
        return x

    assert Found(Of(run, **square("aqkvo")), X).streams == [(0, 0, "attention"),
                                                           (0, 1, "attention")]


def test_a_tied_embedding_is_input_and_output():
    def run(m: Any, ids: torch.Tensor) -> torch.Tensor:
        x = m.table(ids)
        return m.head(x + mlp(m, norm(x)))

    model = Of(run, table=nn.Embedding(10, D), head=nn.Linear(D, 10, bias=False), **square("ud"))
    model.head.weight = model.table.weight
    found = Found(model, IDS)
    structure = found.structure
    (lookup,), (readout,) = structure.first, structure.readouts
    assert lookup.target is torch.ops.aten.embedding.default
    assert readout.target is torch.ops.aten.linear.default
    assert structure.products[lookup].fan_out == structure.products[readout].fan_in == D
    uses = find_uses(found.module, structure, {}, {})
    assert set(uses["table.weight"].roles) == {"input", "output"} and "head.weight" not in uses
    assert uses["u.weight"].roles == ("hidden",) and uses["u.weight"].branches == 1


def test_readouts_of_two_heads_and_their_losses():
    def run(m: Any, x: torch.Tensor) -> Any:
        shared = m.a(x).relu()
        return F.cross_entropy(m.b(shared).flatten(0, 1), IDS.flatten() % D), m.c(shared)

    found = Found(Of(run, **square("abc")), X)
    assert found.readouts == {"b", "c"} and found.first == {"a"}


def test_what_a_norm_reads_is_no_readout():
    found = Found(Of(lambda m, x: norm(m.b(m.a(x))), **square("ab")), X)
    assert not found.readouts


def test_sizes_of_products():
    conv = nn.Sequential(nn.Conv2d(6, 8, 3, groups=2, bias=False), nn.Flatten(), nn.Linear(8, 3))
    found = Found(conv, torch.randn(2, 6, 3, 3)).structure
    sizes = [(p.fan_in, p.fan_out, p.bias is not None) for p in found.products.values()]
    assert sizes == [(27, 8, False), (8, 3, True)]
