"""``prepare_training``: the same module, trained in low precision."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re
from html import escape
from pathlib import Path

import pytest
import torch
from torch import nn

import scaleprop
from scaleprop.errors import ConfigError
from scaleprop.passes.training.operands import Operands
from scaleprop.passes.training.rewrite import Quantized
from scaleprop.recipes.training import Operand
from scaleprop.training import ScaleReports


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


@pytest.mark.parametrize("recipe", ["fp8", "nvfp4"])
def test_the_report_is_saved(recipe: str, tmp_path: Path):
    torch.manual_seed(0)
    torch._dynamo.reset()
    blocks = [nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
              for _ in range(2)]
    model = scaleprop.prepare_training(nn.Sequential(*blocks, nn.Linear(32, 4)), recipe,
                                       inner="eager")
    model.scale_report().save(tmp_path / "none.html")
    assert "was not called since it was prepared" in (tmp_path / "none.html").read_text()
    model(torch.randn(16, 32)).square().mean().backward()
    reports = scaleprop.scale_report(model)
    for suffix in ("json", "html"):
        reports.save(tmp_path / f"r.{suffix}")
    data = json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)
    assert (data["schema"], data["schema_version"]) == ("scaleprop.training", 1)
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    (report,), (graph,) = reports, data["graphs"]
    assert graph["high"] == report.high and data["unread"] == []
    if recipe == "fp8":
        assert graph["products"] == report.products
        assert graph["casts"] == [dataclasses.asdict(cast) for cast in report.casts]
        shown = [(cast.value, cast.element) for cast in report.casts]
    else:
        assert graph["operands"] == [
            {**dataclasses.asdict(each.operand), "layer": each.layer, "role": each.role,
             "value": each.value, "axis": each.axis, "why": each.why}
            for each in report.quantized]
        shown = [(each.value, each.operand.format) for each in report.quantized]
    rows = re.findall(r'<tr id="t=[^"]*"><td><a>([^<]*)</a>.*?<td>.*?<td>([^<]*)', page)
    assert rows == shown
    assert all(escape(reason) in page for reason in report.high.values())
    assert graph["block"] == reports.graph_view().to_dict() | {"made": "graph 0"}
    assert re.search(r'data-node="primals_\d+"><title>[^<]*</title><a href="#t=primals_', page)


def test_other_files_are_refused_and_names_are_escaped(tmp_path: Path):
    nasty = "<b>&\"'</script>"
    report = Operands((Quantized(nasty, "fprop.x", nasty, 1, Operand(format="mxfp4"), nasty),),
                      {nasty: nasty})
    reports = ScaleReports((report, Operands((), {}, truncated=7)))
    reports.unread = (nasty,)
    reports.save(tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert nasty not in page and page.count(escape(nasty)) >= 6
    assert "7 values" in page and 'id="block"' not in page  # they have no outline
    for path, why in (("r.txt", "saved as .html or .json"), ("no/r.json", "create the folder")):
        with pytest.raises(ConfigError, match=why):
            reports.save(tmp_path / path)
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]


def test_complex_numbers_stay_as_they_are():
    torch.manual_seed(0)
    model, x = nn.Linear(4, 4, dtype=torch.cfloat), torch.randn(3, 4, dtype=torch.cfloat)
    exact = model(x).detach()
    scaleprop.prepare_training(model, "fp8", inner="eager")
    assert torch.allclose(model(x), exact)
    (report,) = scaleprop.scale_report(model)
    assert not report.products and "torch.complex64" in str(report.high)
