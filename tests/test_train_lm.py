"""The language model at its smallest size: its recipes, figures, pictures and files."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import scaleprop
from examples import language_model, train_lm
from examples.language_model import Run, Settings

TINY = train_lm.SHORT


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    """Operator by operator: nothing to compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language_model.scaleprop, "prepare_training",
                      functools.partial(scaleprop.prepare_training, inner="eager"))
        patch.setattr(language_model, "HELD_OUT", 4)
        yield


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    return torch.randint(300, (4000,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def found(text: torch.Tensor) -> list[Run]:
    return [run for name in ("fp32", "fp8") for run in train_lm.runs(name, 1, text, TINY)]


def by_hand(text: torch.Tensor) -> list[float]:
    """The same three steps, without the backend."""
    seen, _ = language_model.split(text)
    torch.manual_seed(0)
    model = language_model.Language(TINY)
    optimizer = torch.optim.AdamW(model.parameters(), TINY.rate, betas=(0.9, 0.95),
                                  weight_decay=language_model.DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, TINY.rate, TINY.steps, pct_start=0.1)
    losses = []
    for _, ids in zip(range(TINY.steps), language_model.batches(seen, 0, TINY), strict=False):
        loss = model(ids)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), language_model.CLIP)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


def test_recipes_train_from_the_same_start(found: list[Run], text: torch.Tensor):
    fp32, fp8 = found
    assert (fp32.recipe, fp8.recipe) == ("fp32", "fp8")
    assert fp32.training == pytest.approx(by_hand(text), abs=2e-4)
    assert fp8.training == pytest.approx(fp32.training, rel=5e-3)
    for run in found:
        assert len(run.training) == 3 and run.seconds_per_step > 0
        ((step, loss),) = run.validation
        assert step == 3 and abs(loss - math.log(300)) < 0.2


def test_batches_are_windows_of_the_text(text: torch.Tensor):
    ids = next(language_model.batches(torch.arange(1000), 3, TINY))
    assert ids.shape == (2, 17)
    assert torch.equal(ids - ids[:, :1], torch.arange(17).expand(2, 17))
    one, two = (next(language_model.batches(text, 5, TINY)) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, next(language_model.batches(text, 6, TINY)))
    seen, held_out = language_model.split(text)
    assert torch.equal(torch.cat([seen, held_out]), text) and len(held_out) == len(text) // 10


def run(recipe: str, seed: int, loss: float, seconds: float = 0.5) -> Run:
    return Run(recipe, seed, (4.0, 3.0), ((1, 9.9), (2, loss)), seconds)


def test_the_table_compares_with_float32_of_the_same_model():
    shown = language_model.table([run("fp32", 0, 2.0), run("fp32", 1, 4.0), run("fp8", 0, 2.0),
                            run("fp8", 1, 4.06), run("unit-fp32", 0, 5.0), run("unit-fp32", 1, 5.0),
                            run("unit-fp8", 0, 4.9), run("unit-fp8", 1, 4.9)])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines()]
    assert rows[0] == ["recipe", "seed 0", "seed 1", "mean", "against float32", "s a step"]
    assert rows[2:] == [["fp32", "2.0000", "4.0000", "3.0000", "+0.00%", "0.500"],
                        ["fp8", "2.0000", "4.0600", "3.0300", "+1.00%", "0.500"],
                        ["unit-fp32", "5.0000", "5.0000", "5.0000", "+0.00%", "0.500"],
                        ["unit-fp8", "4.9000", "4.9000", "4.9000", "-2.00%", "0.500"]]


def test_the_picture_has_every_recipe(found: list[Run], tmp_path: Path):
    pytest.importorskip("matplotlib")
    paths = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for path in paths:
        language_model.plot(found, path)
    text = paths[0].read_text()
    assert text == paths[1].read_text()
    for said in ("<!-- fp32 -->", "<!-- fp8 -->", "<!-- training -->", "<!-- validation -->"):
        assert said in text


def test_runs_are_saved(found: list[Run], tmp_path: Path):
    language_model.save(found, TINY, tmp_path / "runs.json")
    data = json.loads((tmp_path / "runs.json").read_text())
    assert Settings(**data["settings"]) == TINY
    for item, want in zip(data["runs"], found, strict=True):
        item["training"] = tuple(item["training"])
        item["validation"] = tuple(map(tuple, item["validation"]))
        assert Run(**item) == want


@pytest.mark.parametrize("recipe", ["u-mup-fp8", "bf16"])
def test_other_recipes_train(recipe: str, text: torch.Tensor):
    (run,) = train_lm.runs(recipe, 1, text, TINY)
    assert all(math.isfinite(loss) and loss < 8 for loss in run.training)


def test_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: torch.Tensor,
    tmp_path: Path,
):
    monkeypatch.setattr(language_model, "tokens", lambda vocabulary: text)
    path = tmp_path / "runs.json"
    (only,) = train_lm.main(["--short", "--steps", "2", "--recipes", "fp32", "--json", str(path)])
    assert only.recipe == "fp32" and len(only.training) == 2
    saved = json.loads(path.read_text())
    assert saved["runs"] and saved["settings"] == {**vars(TINY), "steps": 2}
    assert "4000 tokens" in (shown := capsys.readouterr().out) and "| fp32 |" in shown
    with pytest.raises(SystemExit):
        train_lm.main(["--recipes", "fp7"])
    assert "unknown recipes ['fp7']; known: fp32" in capsys.readouterr().err
