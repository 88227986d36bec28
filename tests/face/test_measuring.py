"""Fidelity reaches the report; calibration is spelt in one way everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import scaleprop
from scaleprop.cli.bench import bench
from scaleprop.cli.models import Subject
from scaleprop.errors import CalibrationError, ConfigError

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(8, 8)


def test_verification_fills_the_report(model: torch.nn.Module):
    compiled = scaleprop.compile(model, X, backend="reference", verify=True)
    assert compiled.fidelity is not None and compiled.fidelity.cosine > 0.99
    assert compiled.report.fidelity == {
        "lowering_error": compiled.fidelity.lowering_error,
        "format_error": compiled.fidelity.format_error,
        "cosine": compiled.fidelity.cosine,
    }
    assert not scaleprop.compile(model, X, backend="reference").report.fidelity


def test_analysis_takes_a_function_that_runs_the_model(model: torch.nn.Module):
    outputs: list[torch.Tensor] = []

    def run(observed: Any) -> None:
        outputs.extend((observed(X), observed(input=2 * X)))

    by_function = scaleprop.analyze(model, X, calibration=run)
    by_list = scaleprop.analyze(model, X, calibration=[X, ([2 * X], {})])
    assert by_function.to_dict() == by_list.to_dict()
    assert by_function.to_dict() != scaleprop.analyze(model, X).to_dict()
    torch.testing.assert_close(outputs[1], model(2 * X))


@pytest.mark.parametrize(
    ("calibration", "message"),
    [([], "empty"), (lambda _: None, "empty"), (X, "wrap it in a list"),
     ({"input": X}, "wrap it in a list")],
    ids=["list", "function", "tensor", "mapping"],
)
@pytest.mark.parametrize("what", ["compile", "analyze"])
def test_calibration_that_is_no_data_is_refused(
    model: torch.nn.Module, what: str, calibration: Any, message: str
):
    options = {"recipe": "int8", "backend": "reference"} if what == "compile" else {}
    with pytest.raises(CalibrationError, match=message):
        getattr(scaleprop, what)(model, X, calibration=calibration, **options)


def test_bench_reads_a_generator_once_for_all_recipes(model: torch.nn.Module):
    def batches() -> Iterator[torch.Tensor]:
        yield X

    subject = Subject(model, X)
    rows = bench(subject, ["int8", "int8-dynamic"], "reference", 0.01, calibration=batches())
    assert [row.name for row in rows][2:] == ["reference int8", "reference int8-dynamic"]
    with pytest.raises(ConfigError, match="'mxfp4'"):
        bench(subject, ["mxfp4", "mxfp4"], "reference", 0.01)
