"""Generated pages: what they say agrees with independent sources, and nothing is left out."""

from __future__ import annotations

import math
import re
import statistics

import ml_dtypes
import numpy as np
import pytest

from benchmarks.harness import Ratio
from docs.generate import api, copied, errors, fields, formats, markdown, peers, recipes
from scaleprop.formats.rounding import MODES
from scaleprop.recipes import named_recipes
from scaleprop.recipes.training_named import NAMED

ORACLES = {
    "fp4": {"e2m1": ml_dtypes.float4_e2m1fn},
    "fp6": {"e3m2": ml_dtypes.float6_e3m2fn, "e2m3": ml_dtypes.float6_e2m3fn},
    "fp8": {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2},
}
LOWERED = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹−", "-0123456789-")


def value(text: str) -> float:
    """What a cell means: ``1.75·2⁻⁷``, ``−6``, ``Inf``."""
    if found := re.fullmatch(r"(−?)(?:([\d.]+)·)?2([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)", text):
        size = float(found[2] or 1) * 2.0 ** int(found[3].translate(LOWERED))
        return -size if found[1] else size
    return float(text.translate(LOWERED))


def values(section: str) -> list[float]:
    """All values of a section's tables, its columns of codes left out."""
    cells = [cell.strip() for line in section.splitlines() if line.startswith("| `")
             for cell in line.strip("|").split("|")]
    return [value(cell) for cell in cells if cell and "`" not in cell]


@pytest.mark.parametrize(("page", "element"), [(page, element) for page, found in ORACLES.items()
                                               for element in found])
def test_tables_of_formats_hold_every_value(page: str, element: str) -> None:
    text = dict(formats.pages())[f"formats/{page}.md"]
    found = values(text.split(f"## {element}\n")[1].split("\n## ")[0])
    oracle = ORACLES[page][element]
    codes = np.arange(1 << ml_dtypes.finfo(oracle).bits, dtype=np.uint8)
    every = codes.view(oracle).astype(np.float64)
    wanted = every if page == "fp4" else every[: len(every) // 2]  # the others: a sign's half
    np.testing.assert_array_equal(np.sort(found), np.sort(wanted))


def test_every_way_of_rounding_that_recipes_use_is_explained() -> None:
    text = dict(formats.pages())["formats/index.md"].split("## Rounding")[1]
    used = {operand.rounding.partition(":")[0] for recipe in NAMED
            for operand in recipe.operands.values()}
    assert {*MODES, *used} == set(re.findall(r"^\| `(\w+)` \|", text, re.M))


def test_every_recipe_says_when_and_has_a_section() -> None:
    text = dict(recipes.pages())
    for page, known in (("inference", named_recipes()), ("training", NAMED)):
        for recipe in known:
            assert recipe.when, f"{recipe.name} does not say when to use it"
            section = text[f"recipes/{page}.md"].split(f"\n## {recipe.name}\n")[1].split("\n## ")[0]
            assert recipe.when in section
            assert recipe.source in section


def pair(better: float, low: float, high: float, unit: str = "speed") -> peers.Pair:
    return peers.Pair(case="case", ours="mine", peer="theirs", unit=unit, better=better, low=low,
                      high=high)


def test_quartiles_around_one_are_even() -> None:
    assert pair(1.1, 0.99, 1.2).verdict == "even"
    assert pair(1.1, 1.01, 1.2).verdict == "ours"
    assert pair(0.9, 0.8, 0.99).verdict == "peer"
    assert peers.plain("", "", "", "size", 1.01).verdict == "even"
    assert peers.timed("", "", "", Ratio(0.5, 0.4, 0.6)).verdict == "peer"


def test_losses_are_said_as_wins_are(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [pair(0.5, 0.4, 0.6), pair(2.0, 1.9, 2.1), pair(4.0, 3.0, 5.0, "error")]
    monkeypatch.setattr(peers, "_COMPARED", (("Things", "casts", lambda: iter(found)),))
    ((_, text),) = peers.pages()
    lost, won = text.split("## Where peers win")[1].split("## Where ours win")
    assert "theirs is 2.00 times as fast as `mine`" in lost
    assert "mine" in won.split("##")[0] and "has 25 % of the error of theirs" in won
    # what is half as fast here and twice as fast there is even, whatever else is better
    assert "| speed | 1 | 0 | 1 | 1.00 |" in text and "| error | 1 | 0 | 0 | 4.00 |" in text


def test_a_loss_in_the_results_is_on_the_page() -> None:
    rows = peers.load("minilm_fidelity")["sections"]
    ours, peer = rows["ours int8-weight"]["mean"], rows["torchao int8 weight"]["mean"]
    (found,) = [each for each in peers.encoder() if each.ours == "int8-weight"]
    assert math.isclose(found.better, (1 - peer) / (1 - ours))


def test_training_is_compared_with_its_own_baseline() -> None:
    rows = peers.load("training_recipes")["sections"]
    found = {each.ours: each for each in peers.emulation()}
    assert set(found) == set(rows) - {"bf16", "mus-bf16"}
    taken = {key: statistics.median(each["wall"])
             for key, each in rows["mus-fp8"]["timings"].items()}
    assert found["mus-fp8"].better == pytest.approx(taken["mus-bf16"] / taken["mus-fp8"], rel=0.1)


def test_notes_are_about_sections() -> None:
    assert set(peers._NOTES) <= {title for title, _, _ in peers._COMPARED}


def test_an_api_that_hides_a_public_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    some = {"api/index": ("Title", "Lead.", ("scaleprop.compile",))}
    monkeypatch.setattr(api, "_PAGES", some)
    with pytest.raises(ValueError, match=r"no page of the API shows .*scaleprop\.api\.load"):
        list(api.pages())


def test_an_error_without_an_example_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "TROUBLES", {})
    with pytest.raises(ValueError, match="ConfigError has no example"):
        list(errors.pages())


def test_links_of_copied_documents_lead_into_the_site() -> None:
    assert copied.relinked("[a](docs/cuda.md)", "CONTRIBUTING.md", "contributing.md") \
        == "[a](cuda.md)"
    assert copied.relinked("[a](../benchmarks/results/casts.md#x)", "docs/cuda.md", "cuda.md") \
        == "[a](results/casts.md#x)"
    assert copied.relinked("[a](scaleprop/api.py)", "CONTRIBUTING.md", "contributing.md") \
        == "a (`scaleprop/api.py`)"
    with pytest.raises(ValueError, match=r"links to scaleprop/absent\.py"):
        copied.relinked("[a](scaleprop/absent.py)", "CONTRIBUTING.md", "contributing.md")


def test_described_fields_become_a_list() -> None:
    text = "What it is.\n\nname: the ``name``.\na, b: two,\n    on two lines.\n\nArgs:\n    x: y"
    assert fields.listed(text) == ("What it is.\n\n- `name`: the `name`.\n- `a`, `b`: two,\n"
                                   "    on two lines.\n\nArgs:\n    x: y")


def test_pipes_in_cells_are_escaped_but_in_code() -> None:
    assert markdown.table(("a",), [("x|y `a|b`",)]) == "| a |\n| --- |\n| x\\|y `a|b` |\n"
