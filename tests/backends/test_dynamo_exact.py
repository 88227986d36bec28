"""Exact mode: the exponents that a recipe wants, in full precision, change no bit of a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.exact import without_casts
from scaleprop.backends import dynamo
from scaleprop.passes.training import Formats, Lowered, lower_products
from tests.backends.test_dynamo_breakages import build

from .joint_graphs import assert_equal, assert_parallel, step

# those that have a linear layer; the others' products stay as they are
LINEAR = ("root_linear", "root_sequential", "input_gradients", "attention_layer",
          "tied_embeddings", "two_heads", "two_heads_two_outputs", "checkpointed",
          "checkpointed_dropout", "norms", "embedding_with_padding")
OTHERS = ("attention_gqa_causal_scale", "attention_by_hand_lowest_added",
          "cross_entropy_weighted_smoothed", "exp_of_zeros", "log_softmax", "cat", "cumulative",
          "integer_sums_to_embedding", "conv2d_strided", "activations_in_place")


class Exact:
    """``torch.compile``'s backend; ``head``: whether the last layers' values are held elsewhere
    too."""

    def __init__(self, formats: Formats, inner: Any) -> None:
        self.formats, self.inner = formats, inner
        self.done: list[Lowered] = []

    def __call__(self, module: torch.fx.GraphModule, given: Any) -> Any:
        def transform(joint: torch.fx.GraphModule) -> None:
            parameters, inputs = dynamo.given_inputs(joint.graph, given)
            self.done.append(lower_products(joint, parameters, self.formats, inputs))
            without_casts(joint)

        return dynamo.compile_joint(module, given, transform, self.inner)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("head", [True, False], ids=["all", "but_heads"])
@pytest.mark.parametrize("name", LINEAR)
def test_exponents_of_a_recipe_leave_the_step(name: str, head: bool):
    model, inputs = build(name)
    expected = step(model, *inputs)
    exact = Exact(Formats(head=head), "eager")
    assert_equal(step(torch.compile(model, backend=exact, fullgraph=True), *inputs), expected)
    (done,) = exact.done
    assert done.products or not head
    assert not any(cast.exponent is None and cast.kind == "w" for cast in done.casts)


@pytest.mark.parametrize("name", OTHERS)
def test_steps_without_linear_layers_are_left_too(name: str):
    """Nothing is lowered, but sizes and drifts are found: of masks and of huge numbers too."""
    model, inputs = build(name)
    expected = step(model, *inputs)
    exact = Exact(Formats(head=True), "eager")
    got = step(torch.compile(model, backend=exact), *inputs)
    largest = max(float(value.abs().max()) for value in expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14 * largest)
    assert not exact.done[0].products


def test_exponents_of_a_recipe_leave_the_step_in_inductor():
    model, inputs = build("tied_embeddings")
    expected = step(model, *inputs)
    exact = Exact(Formats(head=True), "inductor")
    assert_parallel(step(torch.compile(model, backend=exact), *inputs), expected)
