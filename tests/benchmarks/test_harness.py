"""Timing, statistics, resumable results and tables of the benchmark harness."""

from __future__ import annotations

import json
import mmap
import time
from pathlib import Path

import pytest

from benchmarks import harness
from benchmarks.harness import Plan, Timing


def spin(seconds: float) -> None:
    """Use CPU time, which sleeping would not."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_speedup_is_the_median_of_per_round_ratios_and_not_the_ratio_of_medians() -> None:
    fast = Timing((1.0, 1.0, 10.0), (0.0,) * 3)
    slow = Timing((2.0, 3.0, 100.0), (0.0,) * 3)  # medians would give 3.0 too, the means 8.75
    assert harness.speedup(fast, slow, "wall") == harness.Ratio(3.0, 2.5, 6.5)


def test_a_slow_machine_during_one_round_does_not_move_the_ratio() -> None:
    fast = Timing((1.0, 7.0, 1.0, 1.0), (1.0,) * 4)
    slow = Timing((2.0, 14.0, 2.0, 2.0), (1.0,) * 4)
    assert harness.speedup(fast, slow, "wall").median == 2.0


def test_measure_sees_which_candidate_is_slower_on_both_clocks() -> None:
    plan = Plan(rounds=3, min_seconds=0.004, warmup=1)
    timings = harness.measure(
        {"short": lambda: spin(0.0005), "long": lambda: spin(0.004)}, plan)
    for clock in ("wall", "cpu"):
        assert 4 < harness.speedup(timings["short"], timings["long"], clock).median < 12
    assert len(timings["short"].wall) == 3


def test_waiting_costs_wall_time_but_no_cpu_time() -> None:
    timings = harness.measure({"sleep": lambda: time.sleep(0.01)}, Plan(rounds=2, warmup=0))
    assert min(timings["sleep"].wall) >= 0.01
    assert max(timings["sleep"].cpu) < 0.005


def test_timing_survives_json() -> None:
    timing = Timing((0.1, 0.2), (0.3, 0.4))
    assert Timing.from_dict(json.loads(json.dumps(timing.to_dict()))) == timing


def test_results_are_kept_section_by_section_and_resumed(tmp_path: Path) -> None:
    first = harness.Results("table", tmp_path)
    first.add("a", {"x": 1})
    again = harness.Results("table", tmp_path)
    assert again.sections == {"a": {"x": 1}}
    assert harness.Results("table", tmp_path, fresh=True).sections == {}
    again.write_markdown("text\n\n")
    assert (tmp_path / "table.md").read_text() == "text\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.json", "table.md"]


def test_markdown_cells_escape_bars_and_show_missing_values() -> None:
    assert harness.markdown_table(["a", "b"], [["x|y", None]]).splitlines() == [
        "| a | b |", "| --- | --- |", "| x\\|y | – |"]


def test_a_worker_that_crashes_is_an_error_row() -> None:
    result = harness.run_worker("benchmarks.no_such_module", [], 60, {})
    assert "exit status 1" in result["error"]
    assert "no_such_module" in result["error"]


def test_peak_memory_counts_what_was_freed_again() -> None:
    size = 64 * 2**20
    before = harness.resident_bytes()
    with harness.peak_memory() as peak:
        with mmap.mmap(-1, size) as block:  # new pages: malloc may have free ones at hand
            for page in range(0, size, mmap.PAGESIZE):
                block[page] = 1
        assert peak() - before > 0.9 * size
    with harness.peak_memory() as peak:
        assert peak() - before < 0.5 * size


def test_machine_names_what_a_reader_needs() -> None:
    info = harness.machine()
    assert info["cores"] >= 1
    assert info["packages"]["torch"] is not None
    assert info["packages"]["torch"] in harness.machine_line(info)


@pytest.mark.parametrize("length", [20, 500])
def test_error_text_is_one_short_line(length: int) -> None:
    text = harness.error_text(ValueError("a\n b" * length))
    assert text.startswith("ValueError: a b")
    assert len(text) <= 160
    assert "\n" not in text
