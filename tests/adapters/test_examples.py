"""Every adapter's example trains as the plain loop does, checkpoints and all."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path

import pytest
import torch

from examples import small_task, train_loop
from examples.small_task import ACCUMULATED, STOP, Measured

RECIPES = ("fp32", "fp8")
LIBRARIES = {"train_hf_trainer": "transformers", "train_lightning": "pytorch_lightning",
             "train_accelerate": "accelerate"}


def run(name: str, recipe: str, folder: Path) -> Measured:
    torch._dynamo.reset()
    module = importlib.import_module(f"examples.{name}")
    return module.main(["--recipe", recipe, "--short", "--out", str(folder)])


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Measured]:
    return {recipe: run("train_loop", recipe, tmp_path_factory.mktemp("loop"))
            for recipe in RECIPES}


def steps(losses: list[float], count: int) -> torch.Tensor:
    """Losses of ``count`` optimizer steps, also where there is one for each micro-batch."""
    return torch.tensor(losses).view(count, -1).mean(1)


def assert_same(found: list[float], expected: list[float]) -> None:
    count = len(expected) // ACCUMULATED
    torch.testing.assert_close(steps(found, count), steps(expected, count), rtol=1e-5, atol=0)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", LIBRARIES)
def test_adapters_train_as_the_plain_loop(
    name: str, recipe: str, loop: dict[str, Measured], tmp_path: Path
) -> None:
    pytest.importorskip(LIBRARIES[name])
    found, expected = run(name, recipe, tmp_path), loop[recipe]
    assert_same(found.losses, expected.losses)
    assert_same(found.resumed, expected.resumed)
    assert found.evaluated == pytest.approx(expected.evaluated, rel=1e-5)


def plain() -> list[float]:
    """The losses of the same training without scaleprop, in float64."""
    model = small_task.classifier().double()
    optimizer = torch.optim.AdamW(model.parameters(), small_task.RATE, weight_decay=0.0)
    data = small_task.training_data()
    losses: list[float] = []
    for start in range(0, len(data), small_task.BATCH):
        rows = data[start:start + small_task.BATCH]
        loss = model(torch.stack([row["x"] for row in rows]).double(),
                     torch.stack([row["labels"] for row in rows]))["loss"]
        (loss / ACCUMULATED).backward()
        losses.append(loss.item())
        if len(losses) % ACCUMULATED == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), small_task.CLIP)
            optimizer.step()
            optimizer.zero_grad()
    return losses


def test_the_plain_loop_trains(loop: dict[str, Measured]) -> None:
    expected = torch.tensor(plain())
    assert expected[-4:].mean() < 0.8 * expected[:4].mean()
    for recipe, tolerance in zip(RECIPES, (1e-4, 0.05), strict=True):
        losses = torch.tensor(loop[recipe].losses, dtype=expected.dtype)
        torch.testing.assert_close(losses, expected, rtol=tolerance, atol=0)
        assert loop[recipe].resumed == pytest.approx(
            loop[recipe].losses[STOP * ACCUMULATED:], rel=1e-6 if recipe == "fp32" else 0.02)
    assert loop["fp32"].losses != loop["fp8"].losses


def test_a_resumed_loop_rounds_by_the_same_random_numbers(tmp_path: Path) -> None:
    found = run("train_loop", "nvfp4", tmp_path)
    assert found.resumed == found.losses[STOP * ACCUMULATED:]


def test_gradients_in_fp8_point_where_they_do_in_float64() -> None:
    torch._dynamo.reset()
    options = small_task.options("", ["--inner", "eager"])
    model, _ = train_loop.start(options)
    exact = small_task.classifier().double()
    rows = small_task.training_data()[:64]
    x, labels = (torch.stack([row[key] for row in rows]) for key in ("x", "labels"))
    model(x, labels)["loss"].backward()
    exact(x.double(), labels)["loss"].backward()
    pairs = list(zip(model.parameters(), exact.parameters(), strict=True))
    assert any(not torch.equal(low.grad.double(), high.grad) for low, high in pairs)  # type: ignore[union-attr]
    for low, high in pairs:
        assert low.grad is not None and high.grad is not None
        cosine = torch.cosine_similarity(low.grad.double().flatten(), high.grad.flatten(), 0)
        assert cosine > 0.99


def test_samples_can_be_learnt() -> None:
    labels = [int(row["labels"]) for row in small_task.training_data()]
    counts = [labels.count(kind) for kind in range(small_task.CLASSES)]
    assert min(counts) > len(labels) / small_task.CLASSES / 2
    assert all(not torch.equal(a["x"], b["x"])
               for a, b in itertools.product(small_task.training_data()[:8], small_task.held_out()))
