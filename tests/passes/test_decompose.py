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
