"""Graphs survive JSON, and JSON cannot name what is not an operator."""

from __future__ import annotations

import json

import pytest
import torch

from scaleprop.errors import ConfigError
from scaleprop.graph_json import graph_from_json, graph_to_json
from scaleprop.passes.capture import capture


class Model(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        grown = x.new_full((x.shape[0] * 2, 3), float("-inf"), dtype=torch.float64)
        return grown, x[:, 1:, ...].to(torch.bfloat16), torch.arange(x.shape[0] + 1)


def test_a_round_trip_computes_the_same():
    x = torch.randn(4, 5)
    module = capture(Model(), (x,)).module
    text = json.dumps(graph_to_json(module.graph))
    graph = graph_from_json(json.loads(text))
    copy = torch.fx.GraphModule(torch.nn.Module(), graph)
    for size in (4, 7):
        inputs = torch.randn(size, 5)
        want = torch.fx.Interpreter(module).run(inputs, enable_io_processing=False)
        got = torch.fx.Interpreter(copy).run(inputs, enable_io_processing=False)
        assert len(want) == len(got)
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize(
    "target", ["ops.aten.no_such_op.default", "os.system", "builtins.eval", "ops.aten.add",
               "torch.load", "operator.attrgetter"],
)
def test_only_operators_can_be_named(target: str):
    nodes = [{"op": "call_function", "name": "a", "target": target, "args": {"tuple": []},
              "kwargs": {"dict": {}}, "source": None}]
    with pytest.raises(ConfigError, match="not registered"):
        graph_from_json(nodes)
