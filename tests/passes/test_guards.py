"""What a graph relies on is found, kept, and held against every call."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim, export

import scaleprop
from scaleprop.errors import CalibrationError, ConfigError
from scaleprop.passes.capture import capture
from scaleprop.passes.guards import Guard
from scaleprop.signature import Signature

AUTO = {0: Dim.AUTO, 1: Dim.AUTO}


# ------------------------------------------------------------------ conditions


def test_a_condition_is_arithmetic_on_sizes():
    guard = Guard.parse("(2*b.shape[0]) == a.shape[1]")
    assert guard.text == "2 * b.shape[0] == a.shape[1]"
    assert guard.sizes == (("b", 0), ("a", 1))
    assert guard.holds({"a": (9, 6), "b": (3,)})
    assert not guard.holds({"a": (9, 7), "b": (3,)})


@pytest.mark.parametrize("n", range(9))
@pytest.mark.parametrize(
    "text",
    ["n % 4 == 0", "n // 4 != n", "1 < n <= 5", "max(1, n // 2) >= min(n, 3)", "not n == 3",
     "n > 2 and n < 7 or n == 1", "abs(2 - n) - -n + 3.5 > n ** 2 / 2", "n % (n // 4) == 0",
     "math.ceil(n / 4) * 4 == n", "math.floor(n / 3) > math.trunc(-n / 2)", "round(n / 2) == 2",
     "torch.sym_float(n) ** 0.5 > 2", "(n if n > 4 else 9 // n) == 3"],
)
def test_conditions_mean_what_python_means(text: str, n: int):
    try:
        expected = bool(eval(text, {"n": n, "math": math, "torch": torch}))
    except ZeroDivisionError:
        expected = False
    assert Guard.parse(re.sub(r"\bn\b", "x.shape[0]", text)).holds({"x": (n,)}) == expected


@pytest.mark.parametrize(
    "text",
    ["__import__('os')", "x.shape", "x.shape[y]", "x.size()[0] == 1", "s5 > 3", "x.shape[0] ==",
     "x.shape[0] @ 2", "(lambda: 1)()", "x.__class__[0]", "max(*x.shape[0])", "'a' == 'a'",
     "math.inf > 1", "math.exp(1) > 1", "os.system('a') == 0", "torch.load(1) == 1"],
)
def test_nothing_else_is_a_condition(text: str):
    with pytest.raises(ConfigError, match="is not a condition on sizes"):
        Guard.parse(text)


@pytest.mark.parametrize("text", ["max(3) > n", "n ** 0.5 > -3", "10.0 ** 999 > n", "1 / 0 > n"])
def test_what_cannot_be_computed_does_not_hold(text: str):
    assert not Guard.parse(re.sub(r"\bn\b", "x.shape[0]", text)).holds({"x": (-2,)})


# ------------------------------------------------------------------ what tracing finds


class Halves(nn.Module):
    def forward(self, a, b):
        return torch.cat([b, b]) + a


class Windows(nn.Module):
    """Means over windows of four."""

    def forward(self, x):
        return x.view(x.shape[0], x.shape[1] // 4, 4, x.shape[2]).mean(2)


class Branch(nn.Module):
    """Another function where the two are long together."""

    def forward(self, a, b):
        return a.sum() if a.shape[0] + b.shape[0] > 10 else b.sum()


class Padded(nn.Module):
    """Pads the sequence to a multiple of four."""

    def forward(self, x):
        if x.shape[1] % 4:
            x = nn.functional.pad(x, (0, 0, 0, 4 - x.shape[1] % 4))
        return x.sum(1)


class OneWindow(nn.Module):
    """Python that asks for one window, of which tracing knows only that it is a size."""

    def forward(self, x):
        return x.sum() if x.shape[1] // 4 == 1 else x.mean()


class Rounded(nn.Module):
    """Another function where the number of windows is a whole one, as ``rounding`` finds it."""

    def __init__(self, rounding: Callable[[float], int]) -> None:
        super().__init__()
        self.rounding = rounding

    def forward(self, x):
        return x.sum() if self.rounding(x.shape[1] / 4) * 4 == x.shape[1] else x.mean()


class Half(nn.Module):
    def forward(self, x):
        return x.sum() if int(0.5 * x.shape[1]) == 4 else x.mean()


class Chosen(nn.Module):
    """Arithmetic on one size or another."""

    def forward(self, x):
        n = torch.sym_ite(x.shape[1] > 4, x.shape[1], x.shape[0])
        return x.sum() if 2 * n + x.shape[0] > 11 else x.mean()


FOUND = [
    (Halves(), [(8, 3), (4, 3)], "a.shape[0] == 2 * b.shape[0]", [(6, 3), (2, 3)]),
    (Windows(), [(2, 8, 5)], "x.shape[1] == 4 * (x.shape[1] // 4)", [(2, 6, 5)]),
    (Branch(), [(6, 2), (7, 3)], "a.shape[0] + b.shape[0] > 10", [(5, 2), (5, 3)]),
    (Branch(), [(3, 2), (4, 3)], "a.shape[0] + b.shape[0] <= 10", [(8, 2), (5, 3)]),
    (Padded(), [(2, 7, 3)], "x.shape[1] % 4 != 0", [(2, 8, 3)]),
    (OneWindow(), [(2, 9)], "x.shape[1] // 4 != 1", [(2, 7)]),
    (OneWindow(), [(2, 7)], "x.shape[1] // 4 == 1", [(2, 8)]),
    (Rounded(math.ceil), [(2, 9)], "4 * math.ceil(x.shape[1] / 4) != x.shape[1]", [(2, 8)]),
    (Rounded(math.floor), [(2, 9)], "4 * math.floor(x.shape[1] / 4) != x.shape[1]", [(2, 8)]),
    (Rounded(round), [(2, 8)], "4 * round(x.shape[1] / 4) == x.shape[1]", [(2, 9)]),
    (Half(), [(2, 9)], "math.trunc(0.5 * torch.sym_float(x.shape[1])) == 4", [(2, 7)]),
    (Chosen(), [(2, 9)],
     "x.shape[0] + 2 * (x.shape[1] if x.shape[1] > 4 else x.shape[0]) > 11", [(3, 4)]),
]


@pytest.mark.parametrize(("model", "sizes", "guard", "wrong"), FOUND)
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("from_file", [False, True])
def test_what_code_relies_on_is_found(model, sizes, guard, wrong, strict, from_file, tmp_path):
    inputs = tuple(torch.randn(size) for size in sizes)
    exported = export(model, inputs, dynamic_shapes=tuple(AUTO for _ in inputs), strict=strict)
    if from_file:
        torch.export.save(exported, tmp_path / "m.pt2")
        exported = torch.export.load(tmp_path / "m.pt2")
    program = capture(exported)
    if not from_file:  # torch writes the conditions of a file in its own way
        assert guard in program.guards
    assert not any("not checked" in note for note in program.notes)
    signature = Signature.of(program)
    signature.flatten(inputs, {})
    with pytest.raises(ConfigError, match="the model was captured for"):
        signature.flatten([torch.randn(size) for size in wrong], {})


class Nested(nn.Module):
    def forward(self, pair, key):
        return pair[0] if pair[1].shape[0] > 3 and key["z"].shape[0] % 5 == 0 else key["z"]


@pytest.mark.parametrize("strict", [False, True])
def test_nested_inputs_of_a_file_are_found(strict: bool, tmp_path: Path):
    x, y, z = (torch.randn(size, 3) for size in (6, 5, 5))
    shapes = {"pair": ({0: Dim.AUTO}, {0: Dim.AUTO}), "key": {"z": {0: Dim.AUTO}}}
    exported = export(Nested(), ((x, y),), {"key": {"z": z}}, dynamic_shapes=shapes, strict=strict)
    torch.export.save(exported, tmp_path / "m.pt2")
    program = capture(torch.export.load(tmp_path / "m.pt2"))
    assert {"pair_1.shape[0] > 3", "key_z.shape[0] % 5 == 0"} <= set(program.guards)


def test_bounds_that_the_user_gave_are_kept():
    n = Dim("n", min=4, max=32)
    shapes = {"a": {0: 2 * n}, "b": {0: n}}
    program = capture(Halves(), (torch.randn(16, 3), torch.randn(8, 3)), None, shapes)
    assert program.guards == (
        "a.shape[0] >= 8", "b.shape[0] >= 4", "a.shape[0] <= 64", "b.shape[0] <= 32",
        "a.shape[0] == 2 * b.shape[0]")
    assert program.notes == (
        "calls must satisfy what the model's code depends on: a.shape[0] >= 8; b.shape[0] >= 4; "
        "a.shape[0] <= 64; and 2 more (an ONNX file does not check it)",)


def test_a_multiple_is_held_without_what_it_is_a_multiple_of():
    shapes = ({0: 3 * Dim("n", max=32) + 1},)
    program = capture(nn.ReLU(), (torch.randn(10, 3),), None, shapes)
    guards = [Guard.parse(text) for text in program.guards]
    fits = [n for n in range(2, 120) if all(guard.holds({"input": (n, 3)}) for guard in guards)]
    assert fits == list(range(4, 98, 3))


def test_sizes_of_one_are_no_special_case_to_operators():
    program = capture(Windows(), (torch.randn(2, 8, 5),))
    signature = Signature.of(program)
    for size in ((1, 8, 5), (1, 4, 5), (3, 4, 5), (2, 12, 5)):
        x = torch.randn(size)
        assert torch.equal(program.module(*signature.flatten((x,), {})), Windows()(x))


def test_models_that_take_any_size_have_no_conditions(tied, ids, convnet):
    assert capture(tied, (ids, torch.ones_like(ids))).guards == ()
    assert capture(convnet, (torch.randn(1, 3, 12, 12),)).guards == ()


def test_what_cannot_be_checked_is_a_note(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("scaleprop._torch_compat.loaded_guards", lambda _: ["L['self'].width > 3"])
    program = capture(nn.ReLU(), (torch.randn(4, 3),))
    assert program.guards == ()
    assert program.notes == ("the model's code depends on L['self'].width > 3, which is not "
                             "checked",)


def test_what_is_not_understood_fixes_the_sizes_that_it_is_about(monkeypatch: pytest.MonkeyPatch):
    condition = "is_prime(L['input'].size()[0] + 1)"
    monkeypatch.setattr("scaleprop._torch_compat.loaded_guards", lambda _: [condition])
    program = capture(nn.ReLU(), (torch.randn(4, 3),))
    assert program.guards == ("input.shape[0] == 4",)
    assert program.dynamic_axes == {"input_1": {0: "batch", 1: "sequence"}}


# ------------------------------------------------------------------ compiled models


class Pooled(nn.Module):
    """A linear over means of windows of four."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x.view(x.shape[0], x.shape[1] // 4, 4, 8).mean(2))


@pytest.mark.parametrize("backend", ["reference", "onnxruntime"])
def test_calls_are_held_to_it(backend: str, tmp_path: Path):
    torch.manual_seed(0)
    compiled = scaleprop.compile(Pooled(), torch.randn(2, 8, 8), backend=backend)
    assert any("4 * (x.shape[1] // 4)" in note for note in compiled.report.notes)
    loaded = scaleprop.load(compiled.save(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["guards"]
    for model in (compiled, loaded):
        assert model(torch.randn(3, 16, 8)).shape == (3, 4, 8)
        with pytest.raises(ConfigError, match=(
            r"dimension 1 of input 'x' is 6, but the model was captured for "
            r"x\.shape\[1\] == 4 \* \(x\.shape\[1\] // 4\); compile again"
        )):
            model(torch.randn(2, 6, 8))


def test_calibration_batches_are_held_to_it():
    bad = [torch.randn(2, 8, 8), torch.randn(2, 6, 8)]
    with pytest.raises(CalibrationError, match=r"batch 1 does not fit.*input 'x' is 6"):
        scaleprop.compile(Pooled(), bad[0], "int8", "reference", calibration=bad)
    with pytest.raises(CalibrationError, match=r"batch 1 does not fit.*input 'x' is 6"):
        scaleprop.analyze(Pooled(), bad[0], calibration=bad)


class Even(nn.Module):
    """Another function for an even number of rows."""

    def forward(self, x):
        return x if x.shape[0] % 2 else x * 2


def test_example_inputs_are_held_to_it():
    """One row is traced as two."""
    with pytest.raises(ConfigError, match=r"dimension 0 of input 'x' is 1, .*dynamic_shapes=\{\}"):
        scaleprop.compile(Even(), torch.randn(1, 3), backend="reference")
    with pytest.raises(ConfigError, match=r"dimension 0 of input 'x' is 1, .*dynamic_shapes=\{\}"):
        scaleprop.analyze(Even(), torch.randn(1, 3))
    fixed = scaleprop.compile(Even(), torch.ones(1, 3), backend="reference", dynamic_shapes={})
    assert torch.equal(fixed(torch.ones(1, 3)), torch.ones(1, 3))
