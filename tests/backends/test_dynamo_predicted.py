"""Exponents chosen without running anything: from the inputs' sizes, by the operators' rules."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

import scaleprop
from scaleprop.backends import dynamo
from scaleprop.errors import ConfigError
from scaleprop.passes.statistics.peaks import predicted_amax
from scaleprop.passes.training.statistics import measured_amax


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2)
                   for part in self.qkv(self.norm(x)).chunk(3, -1))
        places = torch.arange(x.shape[1])  # a mask that integers lead to
        mask = torch.where(places[:, None] >= places, 0.0, -torch.inf)
        found = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        x = x + self.out(found.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(x)))


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(64, 32), nn.Linear(32, 64, bias=False)
        self.blocks = nn.Sequential(Block(32), Block(32))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.blocks(self.table(ids)))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def model_and_ids() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Language(), torch.randint(0, 64, (8, 24))


def gradients(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    model(ids).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_a_step_without_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = model_and_ids()
    exact = gradients(model, ids)
    usual = copy.deepcopy(model)
    scaleprop.prepare_training(usual, "fp8", inner="eager")
    measured = gradients(usual, ids)
    monkeypatch.setitem(dynamo._SIZES, "measured", None)  # what is not asked for is not called
    scaleprop.prepare_training(model, "fp8", inner="eager", exponents="predicted")
    found = gradients(model, ids)
    (report,) = scaleprop.scale_report(model)
    assert report.casts and all(cast.exponent is not None for cast in report.casts)
    cosine = torch.cosine_similarity(found, exact, 0)
    assert 1 - cosine < 1.5 * (1 - torch.cosine_similarity(measured, exact, 0))
    assert found.norm() / exact.norm() == pytest.approx(1, abs=0.05)


def test_predictions_are_near_what_is_measured() -> None:
    model, ids = model_and_ids()
    ratios: list[float] = []

    def look(joint: torch.fx.GraphModule, inputs: Any, chosen: Any) -> Any:
        measured = measured_amax(joint, inputs, chosen)
        predicted = predicted_amax(joint, inputs, chosen)
        assert predicted.keys() <= measured.keys()
        ratios.extend(math.log2(predicted[node] / measured[node]) for node in predicted)
        return measured

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dynamo._SIZES, "measured", look)
        scaleprop.prepare_training(model, "fp8", inner="eager")
        gradients(model, ids)
    assert len(ratios) > 20
    assert max(map(abs, ratios)) < 4  # binades: a format has room for more
    assert sum(abs(ratio) < 1 for ratio in ratios) > 0.6 * len(ratios)


def test_parameters_are_looked_at() -> None:
    model, ids = model_and_ids()
    scaleprop.prepare_training(model, "fp8", inner="eager", exponents="predicted")
    gradients(model, ids)
    (report,) = scaleprop.scale_report(model)
    weights = [cast.amax for cast in report.casts if cast.kind == "w"]
    own = [float(p.abs().max()) for name, p in model.named_parameters() if name.endswith("weight")]
    assert weights and all(any(amax == size for size in own) for amax in weights)


def test_unknown_ways_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"exponents='guessed'.*known: measured, predicted"):
        scaleprop.prepare_training(nn.Linear(2, 2), exponents="guessed")
