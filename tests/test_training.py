"""``prepare_training``: the same module, trained in low precision."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import scaleprop
from scaleprop.errors import ConfigError


def model_and_inputs() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)), torch.randn(8, 16)


def test_the_backend_has_a_name():
    model, x = model_and_inputs()
    options = {"recipe": "fp8", "inner": "eager"}
    got = torch.compile(model, backend="scaleprop", options=options)(x)
    assert 0 < (got - model(x)).abs().max() < 0.1


def test_a_model_compiled_by_name_has_a_report_and_fp8():
    model, x = model_and_inputs()
    with pytest.raises(ConfigError, match=r"not given to scaleprop\.prepare_training, nor called"):
        scaleprop.scale_report(model)
    compiled = torch.compile(model, backend="scaleprop", options={"inner": "eager"})
    compiled(x).square().mean().backward()
    for asked in (model, compiled):
        (report,) = scaleprop.scale_report(asked)
        assert sorted(report.products.values()) == ["fprop", "wgrad"]


def test_a_mode_is_refused():
    model, x = model_and_inputs()
    with pytest.raises(Exception, match=r"ConfigError: .*no mode 'max-autotune'\. Remedy"):
        torch.compile(model, backend="scaleprop", mode="max-autotune")(x)


def test_graph_breaks_and_sizes_are_torch_compiles():
    class Breaks(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return super().forward(x)

    x = torch.randn(8, 16)
    scaleprop.prepare_training(Breaks(16, 4), "fp8", inner="eager")(x)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        scaleprop.prepare_training(Breaks(16, 4), "fp8", inner="eager", fullgraph=True)(x)
    model, x = model_and_inputs()
    scaleprop.prepare_training(model, "fp8", inner="eager", dynamic=True)
    for length in (8, 5, 13):
        model(torch.randn(length, 16)).sum().backward()
    assert len(scaleprop.scale_report(model)) == 1


def test_the_module_stays_what_it_was():
    model, x = model_and_inputs()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    exact = model(x).detach()
    prepared = scaleprop.prepare_training(model, "fp8", inner="eager")
    assert prepared is model and prepared.state_dict().keys() == before.keys()
    result = prepared(x)
    assert 0 < (result - exact).abs().max() < 0.1
    for copied in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        assert torch.equal(copied.state_dict()["0.weight"], before["0.weight"])
        assert torch.equal(nn.Sequential.forward(copied, x), exact)


def test_the_report_says_what_each_graph_became():
    model, x = model_and_inputs()
    scaleprop.prepare_training(model, "fp8", inner="eager")
    assert scaleprop.scale_report(model) == ()
    model(x).square().mean().backward()
    (report,) = scaleprop.scale_report(model)
    assert sorted(report.products.values()) == ["fprop", "wgrad"]  # the last layer stays high
    assert {cast.kind for cast in report.casts} == {"x", "w", "dy"}
    # the loss is computed outside: nothing is known of the gradient that comes in
    assert all((cast.exponent is None) == (cast.kind == "dy") for cast in report.casts)
    assert len(report.high) == 3 and not report.unruled


def test_training_follows_float32():
    losses: dict[str, list[float]] = {}
    for recipe in ("fp32", "fp8"):
        model, x = model_and_inputs()
        scaleprop.prepare_training(model, recipe, inner="eager")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses[recipe] = []
        for _ in range(30):
            loss = (model(x) - x[:, :4]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[recipe].append(loss.item())
    assert losses["fp32"][-1] < 0.2 * losses["fp32"][0]
    for exact, low in zip(losses["fp32"], losses["fp8"], strict=True):
        assert abs(low - exact) < 0.05 * exact + 0.01


def test_refusals_are_named():
    model, _ = model_and_inputs()
    with pytest.raises(ConfigError, match="unknown training recipe 'fp7'"):
        scaleprop.prepare_training(model, "fp7")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Sequential was not given to"):
        scaleprop.scale_report(model)


def test_the_report_is_a_method_and_is_shown(capsys):
    model, x = model_and_inputs()
    keys = model.state_dict().keys()
    scaleprop.prepare_training(model, "fp8", inner="eager")
    assert model.state_dict().keys() == keys
    model(x).square().mean().backward()
    assert model.scale_report() == scaleprop.scale_report(model)
    model.scale_report().show()
    shown = capsys.readouterr().out
    assert "products in low precision" in shown and "at run time" in shown
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ConfigError, match="was not given to"):
            copied.scale_report()


def test_complex_numbers_stay_as_they_are():
    torch.manual_seed(0)
    model, x = nn.Linear(4, 4, dtype=torch.cfloat), torch.randn(3, 4, dtype=torch.cfloat)
    exact = model(x).detach()
    scaleprop.prepare_training(model, "fp8", inner="eager")
    assert torch.allclose(model(x), exact)
    (report,) = scaleprop.scale_report(model)
    assert not report.products and "torch.complex64" in str(report.high)
