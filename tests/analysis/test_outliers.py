"""The outlier detector finds what was planted, where it was planted, and nothing else."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import scaleprop
from scaleprop.analysis.outliers import Criteria, Detector
from scaleprop.calibration.feed import feed
from scaleprop.calibration.observer import Observer
from scaleprop.passes.base import PassManager
from scaleprop.passes.canonicalise import Canonicalise
from scaleprop.passes.capture import capture
from scaleprop.passes.cleanup import CleanUp
from scaleprop.report.outliers import OutlierTable
from tests.analysis.planted import Model, batches, plant_sink

FORMS = [(fused, causal) for fused in (True, False) for causal in (True, False)]
SPELLINGS = pytest.mark.parametrize(
    ("fused", "causal"), FORMS, ids=lambda value: str(value).lower())


def detect(model: nn.Module, data: list[torch.Tensor], **criteria: float) -> OutlierTable:
    program = PassManager([CleanUp(), Canonicalise()]).run(capture(model.eval(), (data[0],), {}))
    detector = Detector(program, Criteria(**criteria))
    feed(data, program, Observer(program.module, detector.watched, calls=detector.calls))
    return detector.table()


def found(table: OutlierTable) -> set[tuple[str, tuple[int, ...]]]:
    return {(outlier.kind, outlier.indices) for outlier in table.outliers}


@SPELLINGS
def test_nothing_stands_out_in_a_random_model(fused: bool, causal: bool):
    table = detect(Model(fused, causal), batches())
    assert table.outliers == () and table.notes == ()
    assert len(table.attention) == 2 and len(table.profiles) == 5 + 2 + 2 + 4  # with q, k
    assert all(1 < profile.kurtosis < 40 for profile in table.profiles)


@SPELLINGS
def test_a_channel_of_the_residual_stream_in_every_reader(fused: bool, causal: bool):
    model = Model(fused, causal)
    model.table.weight[:, 17] *= 50
    table = detect(model, batches())
    assert found(table) == {("activation channel", (17,)), ("weight column", (17,))}
    channels = table.of_kind("activation channel")
    norms = {profile.node for profile in table.profiles if profile.op.endswith("norm.default")}
    assert {outlier.node for outlier in channels} == norms and len(norms) == 5
    for outlier in channels:
        assert 10 < outlier.size < 30 and outlier.shares[0] > 0.9 and outlier.count == 1
        assert "planted.py:" in outlier.source and "aten.layer_norm" in outlier.op
    (column,) = table.of_kind("weight column")
    assert column.node == "table.weight" and 40 < column.size < 100


def test_a_row_of_a_weight_and_the_channel_that_it_makes():
    model = Model()
    model.layers[1].wide.weight[5] *= 50
    table = detect(model, batches())
    assert found(table) == {("activation channel", (5,)), ("weight row", (5,))}
    (row,) = table.of_kind("weight row")
    assert row.node == "layers.1.wide.weight" and 40 < row.size < 60 and row.shares[0] > 0.9
    (channel,) = table.of_kind("activation channel")
    assert "gelu" in channel.op and 0.3 < channel.shares[0] < 0.7  # half of gelu's are zero


@SPELLINGS
def test_a_sink_that_drains(fused: bool, causal: bool):
    model = Model(fused, causal)
    plant_sink(model)
    table = detect(model, batches(start=0))
    (sink,) = table.of_kind("attention sink")
    assert sink.indices == (0,) and sink.shares == (1.0,) and sink.size > 5
    assert sink.node == table.attention[1].node and sink.detail.endswith("a drain")
    assert table.attention[1].received[0] > 0.8 > 0.3 > table.attention[0].received[0]
    assert table.attention[1].value_norms[0] < 1 / 3
    assert not table.of_kind("activation token") + table.of_kind("activation channel")
    model.layers[1].k.weight[:, 3] = 0  # no key answers
    model.layers[1].q.bias.zero_()  # and no query asks
    assert not detect(model, batches(start=0)).of_kind("attention sink")


def test_attention_received_is_that_of_the_probabilities():
    """Against probabilities computed outside, for a mask that hides keys, and for heads that
    share keys."""
    class Masked(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor):
            return nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=0.7, enable_gqa=True)

    generator = torch.Generator().manual_seed(2)
    q = torch.randn(2, 4, 12, 8, generator=generator)
    k, v = (torch.randn(2, 2, 20, 8, generator=generator) for _ in range(2))
    mask = torch.randn(2, 1, 12, 20, generator=generator)
    mask[1, :, :, 15:] = torch.finfo(torch.float32).min
    mask[0, :, 3] = -torch.inf  # a query that may see nothing counts for nothing
    program = capture(Masked(), (q, k, v, mask), {})
    detector = Detector(program)
    feed([(q, k, v, mask)], program, Observer(program.module, {}, calls=detector.calls))
    (profile,) = detector.table().attention
    scores = q @ k.repeat_interleave(2, 1).mT * 0.7 + mask
    first = scores[0][:, [i for i in range(12) if i != 3]].softmax(-1).mean((0, 1))
    second = scores[1].softmax(-1).mean((0, 1))
    want = torch.where(torch.arange(20) < 15, (first + second) / 2, first)  # by who may be seen
    torch.testing.assert_close(torch.tensor(profile.received), want)
    norms = v.norm(dim=-1).mean(1)
    norms = norms / norms.median(1, keepdim=True).values
    torch.testing.assert_close(torch.tensor(profile.value_norms), norms.mean(0))


@pytest.mark.parametrize("cells", [2**22, 100], ids=["at once", "in blocks"])
def test_causal_attention_at_once_and_in_blocks(cells: int, monkeypatch: pytest.MonkeyPatch):
    class Causal(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    monkeypatch.setattr("scaleprop.analysis.attention._CELLS", cells)
    q, k, v = torch.randn(3, 2, 3, 17, 8, generator=torch.Generator().manual_seed(6))
    program = capture(Causal(), (q, k, v), {})
    detector = Detector(program)
    feed([(q, k, v)], program, Observer(program.module, {}, calls=detector.calls))
    hidden = torch.full((17, 17), -torch.inf).triu(1)
    want = (q @ k.mT / 8**0.5 + hidden).softmax(-1).mean((0, 1, 2))
    torch.testing.assert_close(torch.tensor(detector.table().attention[0].received), want)


def test_massive_activations_and_their_tokens():
    class Spiked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(256, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x * 2)

    data = [torch.randn(4, 64, 256, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    assert detect(Spiked(), data).outliers == ()
    for batch in data:
        batch[:, 6, 41] = 2000.0
    table = detect(Spiked(), data)
    assert found(table) == {("massive activation", (41,)), ("activation token", (6,)),
                            ("activation channel", (41,))}
    (massive,) = table.of_kind("massive activation")
    assert massive.size > 1000 and massive.shares == (1.0,) and "tokens 6" in massive.detail
    (token,) = table.of_kind("activation token")
    assert token.shares == (1.0,) and token.size > 100
    (channel,) = table.of_kind("activation channel")
    assert channel.shares[0] == pytest.approx(1 / 64, abs=0.002)
    assert not detect(Spiked(), data, element=1e5).of_kind("massive activation")


def test_channels_and_weights_of_convolutions():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 3))
    model.requires_grad_(False)
    images = [torch.randn(2, 3, 10, 10)]
    assert detect(model, images).outliers == ()
    model[1].weight[4] = 50
    model[3].weight[:, 9] *= 30
    model[3].weight[7] *= 40
    table = detect(model, images)
    by_kind = {outlier.kind: outlier.indices for outlier in table.outliers}
    assert by_kind == {"activation channel": (4,), "weight column": (9,), "weight row": (7,)}
    assert {profile.layer for profile in table.profiles} == {"conv"}


@pytest.mark.parametrize("data", [[torch.zeros(2, 16, 64)], [torch.randn(1, 3, 64)]])
def test_what_says_nothing_is_not_judged(data: list[torch.Tensor]):
    assert detect(nn.Linear(64, 8), data).of_kind("activation channel") == ()


def test_sequences_may_change_their_length_and_short_ones_are_named():
    data = [*batches(), batches()[0][:, :20], batches()[1][:, :3]]
    table = detect(Model(), data)
    assert table.outliers == () and table.attention[0].keys == 32
    assert len(table.notes) == 2 and "2 sequences have fewer than 8 queries" in table.notes[0]


def test_analyze_tells_and_nothing_is_changed(tmp_path):
    model = Model()
    model.table.weight[:, 17] *= 50
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = scaleprop.analyze(model, batches()[0], batches())
    assert report.outliers == detect(model, batches())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    report.save(tmp_path / "r.json")
    assert scaleprop.Report.load(tmp_path / "r.json").to_dict() == report.to_dict()
    with pytest.raises(scaleprop.errors.ConfigError, match="passes have no use with loss_fn"):
        scaleprop.analyze(model, batches()[0], loss_fn=torch.sum, passes=["clean-up"])


def test_bounds_are_options():
    model = Model()
    model.table.weight[:, 17] *= 50
    assert detect(model, batches(), channel=100, weight=100).outliers == ()
    assert {field.name for field in dataclasses.fields(Criteria)} >= {"element", "token", "drain"}
