"""The table of one layer's GPTQ: ratios, errors as rows, and when it fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import gptq_layer, harness


def section(ours: float, theirs: float | None) -> dict[str, Any]:
    seconds = {"ours": ours, "ours, act-order": ours}
    if theirs is not None:
        seconds["torchao"] = theirs
    return {
        "timings": {name: {"wall": [s] * 3, "cpu": [s] * 3} for name, s in seconds.items()},
        "loss": dict.fromkeys(seconds, 0.5),
        "errors": {} if theirs is not None else {"torchao": "ValueError: no kernels"},
    }


def test_a_layer_that_takes_longer_fails(tmp_path: Path):
    results = harness.Results("gptq_layer", tmp_path)
    results.add("8×8 int8", section(0.010, 0.020))
    results.add("8×8 int4", section(0.010, None))
    text, kept = gptq_layer.tables(results)
    assert kept and "| 8×8 int8 | ours | 10.0 | 0.50 [0.50–0.50] | ≤ 1 | 0.500 |" in text
    assert "| 8×8 int4 | torchao | ValueError: no kernels |" in text
    results.add("8×8 nvfp4", section(0.021, 0.020))
    assert not gptq_layer.tables(results)[1]


def test_both_are_given_the_same_layer():
    weight, moment = gptq_layer.layer(4, 6)
    again = gptq_layer.layer(4, 6)
    assert weight.shape == (4, 6) and moment.shape == (6, 6)
    assert (weight == again[0]).all() and (moment == again[1]).all()
    assert gptq_layer.output_error(weight, weight, moment) == 0
