"""Calls are flattened to a program's leaves, and what does not fit is named."""

from __future__ import annotations

import re

import pytest
import torch

from scaleprop.errors import ConfigError
from scaleprop.passes.capture import capture
from scaleprop.passes.dimensions import symbol_names
from scaleprop.signature import Signature, split_example

X = torch.ones(2, 4)


class Pair(torch.nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None):
        return {"sum": a + b, "c": c}


@pytest.fixture(scope="module")
def by_name() -> Signature:
    program = capture(Pair(), (), {"a": X, "b": X})
    return Signature.of(program)


def test_example_inputs_in_every_spelling():
    assert split_example(X)[0][0] is X
    assert split_example((1, 2)) == ((1, 2), {})
    assert split_example([1, 2]) == ((1, 2), {})
    assert split_example({"a": 1}) == ((), {"a": 1})
    assert split_example(((1,), {"a": 2})) == ((1,), {"a": 2})


@pytest.mark.parametrize("wrong", [3, "text", None, {1: X}])
def test_example_inputs_of_another_kind_are_refused(wrong: object):
    with pytest.raises(ConfigError, match=r"example inputs are|string names"):
        split_example(wrong)


def test_position_and_name_reach_the_same_leaves(by_name: Signature):
    a, b = torch.ones(2, 4), torch.zeros(2, 4)
    for args, kwargs in [((a, b), {}), ((a,), {"b": b}), ((), {"b": b, "a": a}),
                         ((a, b, None), {}), ((), {"a": a, "b": b, "c": None})]:
        leaves = by_name.flatten(args, kwargs)
        assert leaves[0] is a and leaves[1] is b


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((X,), {}, r"missing \['b'\]"),
        ((X, X, X), {}, r"unexpected \['c'\]"),
        ((X, X, None, None), {}, "1 too many"),
        ((X, X), {"a": X}, "given twice"),
        ((X, X.double()), {}, r"input 'b': expected torch.float32, got torch.float64"),
        ((X, torch.ones(2, 5)), {}, r"input 'b': expected shape .* got \[2, 5\]"),
        ((X, torch.ones(2)), {}, r"input 'b': expected shape"),
        ((X, 1.0), {}, r"input 'b': expected a tensor, got float"),
    ],
)
def test_what_does_not_fit_is_named(by_name: Signature, args, kwargs, message: str):
    with pytest.raises(ConfigError, match=message):
        by_name.flatten(args, kwargs)


def test_sizes_that_are_equal_stay_equal(by_name: Signature):
    by_name.flatten((torch.ones(5, 4), torch.ones(5, 4)), {})
    with pytest.raises(ConfigError, match=re.escape(
        "input 'b': expected shape [batch, sequence] with batch = 5, sequence = 4, got [6, 4]"
    )):
        by_name.flatten((torch.ones(5, 4), torch.ones(6, 4)), {})


def test_refusals_speak_of_dimensions():
    signature = Signature.of(capture(torch.nn.Linear(64, 8), (torch.ones(2, 64),)))
    with pytest.raises(ConfigError, match=re.escape(
        "input 'input': expected shape [batch, 64] with batch = 2, got [2, 65]"
    )):
        signature.flatten((torch.ones(2, 65),), {})


def test_a_number_is_no_dimension():
    """A symbol that stands for one number is that number, whatever its axis is called."""
    program = capture(torch.nn.Linear(64, 8), (torch.ones(2, 64),))
    named = program.replace(dynamic_axes={"input_1": {0: "batch", 1: "width"}})
    assert list(symbol_names(named).values()) == ["batch"]
