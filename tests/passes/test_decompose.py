"""Respelling nodes one by one gives what tracing the whole graph again gives."""

from __future__ import annotations

import pytest
import torch

from scaleprop import _torch_compat as compat
from scaleprop.errors import CaptureError
from scaleprop.passes.capture import capture
from scaleprop.passes.decompose import decomposed

D = torch.export.Dim.AUTO


class Mixed(torch.nn.Module):
    """Transposes, reshapes, casts, splits with several results, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 12)
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b, c = self.drop(self.linear(x)).chunk(3, dim=-1)
        scores = (a.double() @ b.transpose(1, 2).double()).to(x.dtype)
        steps = torch.arange(x.shape[1]) + 1
        return scores.flatten(1), (c * steps[:, None]).reshape(-1, 4), x.new_ones(x.shape[0])


class InPlace(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y.add_(1)
        return y


def export(model: torch.nn.Module):
    with torch.no_grad():
        return torch.export.export(model.eval(), (torch.randn(2, 5, 8),),
                                   dynamic_shapes={"x": {0: D, 1: D}})


@pytest.mark.parametrize("model", [Mixed(), InPlace()], ids=["local", "whole"])
def test_both_ways_compute_the_same_in_core_aten(model: torch.nn.Module):
    exported = export(model)
    signature, module = decomposed(exported)
    assert (signature is exported) == isinstance(model, Mixed)
    table = compat.decomposition_table()
    operators = {node.target for node in module.graph.nodes if node.op == "call_function"}
    assert not [op for op in operators if compat.is_decomposed(op, table)]
    module.graph.lint()
    for size in ((2, 5, 8), (3, 4, 8)):
        x = torch.randn(size)
        got = torch.utils._pytree.tree_leaves(module(x.clone()))
        want = torch.utils._pytree.tree_leaves(model(x.clone()))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_values_and_source_lines_survive():
    module = decomposed(export(Mixed()))[1]
    for node in module.graph.nodes:
        if node.users:
            assert "val" in node.meta, node
    permute = next(n for n in module.graph.nodes if n.target is torch.ops.aten.permute.default)
    assert "b.transpose(1, 2)" in permute.meta["stack_trace"]


def test_writing_to_an_input_is_still_refused():
    class Writes(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.add_(1)
            return x * 2

    with pytest.raises(CaptureError, match="writes to its input"):
        capture(Writes(), (torch.ones(2, 3),))


def test_calls_that_look_alike_are_traced_once_and_keep_their_inputs(
    monkeypatch: pytest.MonkeyPatch,
):
    class Similar(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y, similar = x.exp(), torch.nn.functional.cosine_similarity
            return (similar(x, x), similar(x, y), similar(y, x * 2), similar(x, y, dim=0),
                    x.transpose(1, 2), y.transpose(1, 2), (x * y).transpose(1, 2))

    exported = export(Similar())
    traced: list[object] = []
    trace = compat.trace
    monkeypatch.setattr(compat, "trace", lambda f, values, table: (
        traced.append(f), trace(f, values, table))[1])
    module = decomposed(exported)[1]
    # cosine_similarity of one tensor, of two, along another axis; transpose
    assert len(traced) == 4
    x = torch.randn(3, 4, 8)
    for got, want in zip(module(x), Similar()(x), strict=True):
        assert torch.equal(got, want)
    values = [node.meta["val"] for node in module.graph.nodes if "val" in node.meta]
    assert len(set(map(id, values))) == len(values)
