"""Pareto fronts, tables, CSV and pictures, on made-up numbers."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import math
import random
import re
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from scaleprop.errors import BackendUnavailable, ConfigError
from scaleprop.recipes.training import OPERANDS, Operand, TrainingRecipe
from scaleprop.sweeps.overhead import Overhead, linear_gemms, overhead
from scaleprop.sweeps.picture import ticks
from scaleprop.sweeps.results import Mean, Point, Sweep
from scaleprop.sweeps.runs import Outcome
from scaleprop.sweeps.tables import show

RECIPE = TrainingRecipe(name="made-up", description="",
                        operands=dict.fromkeys(OPERANDS[:6], Operand(format="mxfp8")))
PLAIN = Overhead(100.0, 10.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 100.0, 1.0)


def costing(cost: float) -> Overhead:
    """An overhead whose ``relative`` is about ``cost``."""
    plain = PLAIN.bf16_bytes + PLAIN.result_bytes + PLAIN.operations / 281.25
    return dataclasses.replace(PLAIN, operand_bytes=cost * plain - PLAIN.result_bytes)


def point(gap: float, cost: float, **axes: str) -> Point:
    status = "done" if math.isfinite(gap) else "diverged"
    return Point(axes, RECIPE, costing(cost), {0: Outcome(status, (2.0,), None, 0.25)},
                 Mean(2.0 + gap, 0.01, 3), Mean(gap, 0.01, 3), 50 * gap)


def made_up(*points: Point, skipped: tuple[tuple[dict[str, str], str], ...] = ()) -> Sweep:
    base = Point({}, RECIPE.replace(name="bf16"), costing(1.0),
                 {0: Outcome("done", (2.0,), None, 0.2)}, Mean(2.0, 0.01, 3), Mean(0.0, 0.0, 3),
                 0.0)
    return Sweep({"factory": "m:f", "steps": 4, "learning_rate": 0.1}, (0,), base, points, skipped)


def test_the_front_is_what_nothing_beats():
    """Against every pair, on few values, so that there are many ties."""
    draw = random.Random(0)
    for _ in range(300):
        points = [point(draw.choice([0.0, 0.1, 0.2, 0.3, math.inf]),
                        draw.choice([0.5, 0.75, 1.0, 1.25]), n=str(n))
                  for n in range(draw.randint(0, 9))]
        expected = [
            mine for mine in points if math.isfinite(mine.gap.value) and not any(
                other.gap.value <= mine.gap.value and other.cost <= mine.cost
                and (other.gap.value < mine.gap.value or other.cost < mine.cost)
                for other in points)]
        found = made_up(*points).pareto()
        assert sorted(map(id, found)) == sorted(map(id, expected))
        assert [each.cost for each in found] == sorted(each.cost for each in found)


def test_without_a_cost_there_is_no_front():
    sweep = made_up(dataclasses.replace(point(0.1, 1.0), overhead=None))
    with pytest.raises(ConfigError, match="has no linear layers"):
        sweep.pareto()
    assert "made-up" not in sweep.table() and "+0.1000" in sweep.table()
    assert sweep.to_dict()["pareto"] is None


def test_means():
    assert Mean.of([1.0, 2.0, 6.0]) == Mean(3.0, math.sqrt(7.0 / 3), 3)
    assert Mean.of([1.0]).value == 1.0 and math.isnan(Mean.of([1.0]).error)
    assert Mean.of([1.0, math.inf]).value == math.inf
    assert math.isnan(Mean.of([]).value) and Mean.of([]).count == 0


def test_a_runs_loss():
    losses = tuple(map(float, range(40)))
    assert Outcome("done", losses).loss == (36 + 37 + 38 + 39) / 4
    assert Outcome("done", (3.0, 1.0)).loss == 1.0
    assert Outcome("done", losses, 0.5).loss == 0.5
    assert Outcome("diverged", losses).loss == math.inf
    assert math.isnan(Outcome("running").loss) and math.isnan(Outcome("failed").loss)


GRID = [point(0.3 - 0.1 * i - 0.05 * j, 0.5 + 0.25 * i, format=f"f{i}", **{"a|b<": f"v{j}"})
        for i, j in itertools.product(range(3), range(2))]
SKIPPED = (({"format": "f0", "a|b<": "v9"}, "no such <thing>"),)


def test_csv_has_every_number_back(tmp_path: Path):
    sweep = made_up(*GRID, point(math.inf, 1.0, format="f9", **{"a|b<": "v0"}), skipped=SKIPPED)
    path = tmp_path / "sweep.csv"
    sweep.to_csv(path)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["kind"] for row in rows] == ["baseline", *["combination"] * 7, "skipped"]
    for row, each in zip(rows[1:8], sweep.points, strict=True):
        assert {axis: row[axis] for axis in sweep.axes} == dict(each.axes)
        assert each.overhead is not None
        numbers = {"loss": each.loss.value, "gap": each.gap.value, "gap_error": each.gap.error,
                   "gap_percent": each.percent, "overhead": each.overhead.relative,
                   "operands": each.overhead.operands, "passes": each.overhead.passes,
                   "rotations": each.overhead.rotations, "seconds_per_step": 0.25}
        assert {name: float(row[name]) for name in numbers} == numbers
        assert row["recipe"] == "made-up"
    assert rows[8]["reason"] == "no such <thing>" and rows[8]["gap"] == ""
    assert rows[7]["runs"] == "0 of 1, 1 diverged"


def test_the_table_is_markdown():
    sweep = made_up(*reversed(GRID), skipped=SKIPPED)
    lines = sweep.table().splitlines()
    columns = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[:9]]
    assert columns[0] == ["format", r"a\|b<", "loss", "gap", "gap %", "cost", "operands", "passes",
                          "rotations", "runs", "best"]
    assert {len(row) for row in columns} == {11}
    assert columns[2][0] == "bf16 (baseline)" and columns[2][3] == "+0.0000 ± 0.0000"
    gaps = [float(row[3].split()[0]) for row in columns[3:9]]
    assert gaps == sorted(gaps) and columns[3][4] == "+2.50%"
    marked = {tuple(row[:2]) for row in columns[3:9] if row[-1]}
    assert marked == {tuple(each.axes.values()) for each in sweep.pareto()}
    assert lines[-1] == "- format=f0, a|b<=v9: no such <thing>"


def test_the_terminal_shows_the_same(capsys: pytest.CaptureFixture[str]):
    failed = dataclasses.replace(point(0.3, 2.0, format="[red]", **{"a|b<": "x"}),
                                 outcomes={0: Outcome("failed", error="Traceback\nKeyError: 'x'")})
    again = dataclasses.replace(failed, outcomes={3: failed.outcomes[0], 4: failed.outcomes[0]})
    made_up(*GRID, failed, again, skipped=SKIPPED).show()
    printed = capsys.readouterr().out
    assert "bf16 (baseline)" in printed and "+0.1000 ± 0.0100" in printed and "[red]" in printed
    assert "skipped, format=f0, a|b<=v9: no such <thing>" in printed
    assert "failed, format=[red], a|b<=x, seed 0 and 2 more: KeyError: 'x'" in printed


def test_a_narrow_terminal_cuts_no_numbers(capsys: pytest.CaptureFixture[str]):
    from rich.console import Console

    long = point(0.3, 2.0, format="x" * 90, **{"a|b<": "y"})
    show(made_up(*GRID, long), Console(width=90))
    printed = capsys.readouterr().out
    assert printed.count(" ± 0.0100") == 2 * 7 + 1 and "rotations: with 130" in printed
    assert max(map(len, printed.splitlines())) <= 90


def test_a_real_overhead_is_shown():
    mx = overhead(RECIPE, linear_gemms(64, 64, 64))
    sweep = made_up(dataclasses.replace(GRID[0], overhead=mx))
    assert f"{mx.relative:.2f} | {mx.operands:.2f} | {mx.passes:.2f} | 0.0%" in sweep.table()


class Page(HTMLParser):
    """What a page asks for, and its table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.titles: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "title":
            self.titles.append(data)


def test_the_page_stands_alone(tmp_path: Path):
    sweep = made_up(*GRID, point(math.inf, 1.0, format="f9", **{"a|b<": "v0"}), skipped=SKIPPED)
    path = tmp_path / "sweep.html"
    sweep.plot(path, color="a|b<")
    text = path.read_text()
    page = Page(text)
    assert page.links == ["#main"] and "http" not in text.replace("http-equiv", "")
    assert page.tags.count("circle") == 6 and page.tags.count("polyline") == 1
    assert any("format=f1, a|b<=v0: 2.2000 ± 0.0100 · +0.2000 ± 0.0100" in title
               for title in page.titles)
    assert "&lt;thing&gt;" in text and "<thing>" not in text and 'data-noun="combinations"' in text
    svg = ET.fromstring(text[text.index("<svg"):text.index("</svg>") + 6])
    width, height = map(float, svg.attrib["viewBox"].split()[2:])
    for circle in svg.iter("circle"):
        assert 0 < float(circle.attrib["cx"]) < width and 0 < float(circle.attrib["cy"]) < height
    cells = re.findall(r'<td class="number" data-value="([^"]*)"', text)
    assert {float(cell) for cell in cells[1::8][:6]} == {each.gap.value for each in GRID}


def test_pages_of_little_or_nothing(tmp_path: Path):
    for sweep in (made_up(), made_up(point(0.1, 1.0)), dataclasses.replace(
            made_up(point(0.1, 1.0)), baseline=None)):
        sweep.plot(tmp_path / "sweep.html")
        assert "</html>" in (tmp_path / "sweep.html").read_text()


@pytest.mark.parametrize(("suffix", "start"), [(".svg", b"<?xml"), (".png", b"\x89PNG")])
def test_pictures(suffix: str, start: bytes, tmp_path: Path):
    pytest.importorskip("matplotlib")
    sweep = made_up(*GRID)
    for name in ("one", "two"):
        sweep.plot(tmp_path / f"{name}{suffix}")
    first, second = ((tmp_path / f"{name}{suffix}").read_bytes() for name in ("one", "two"))
    assert first.startswith(start)
    if suffix == ".svg":
        assert first == second and b"best for the cost" in first and b"f2" in first


def test_pictures_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sweep = made_up(*GRID)
    with pytest.raises(ConfigError, match=r"drawn as \.svg, \.png, \.html, not as"):
        sweep.plot(tmp_path / "sweep.pdf")
    with pytest.raises(ConfigError, match="no axis 'z' to colour by"):
        sweep.plot(tmp_path / "sweep.svg", color="z")
    for name in ("sweep.csv", "sweep.svg", "sweep.html"):
        write = sweep.to_csv if name.endswith("csv") else sweep.plot
        with pytest.raises(ConfigError, match=r"cannot write .*No such file"):
            write(tmp_path / "missing" / name)
        with pytest.raises(ConfigError, match="it is a folder"):
            (tmp_path / name).mkdir()
            write(tmp_path / name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BackendUnavailable, match=r"scaleprop\[report\]"):
        sweep.plot(tmp_path / "other.svg")
    sweep.plot(tmp_path / "other.html")


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.3, 12.5), (1e-5, 3e-5), (0.97, 1.0)])
def test_ticks_are_round_and_inside(low: float, high: float):
    found = ticks(low, high)
    assert 3 <= len(found) <= 11
    assert low - 1e-9 <= found[0] and found[-1] <= high + 1e-9
    steps = {round((b - a) / (found[1] - found[0]), 6) for a, b in itertools.pairwise(found)}
    assert steps == {1.0} and f"{found[1] - found[0]:.0e}"[0] in "125"
