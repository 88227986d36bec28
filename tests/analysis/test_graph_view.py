"""Scales on pictures of blocks, against what plain PyTorch says of the same model."""

from __future__ import annotations

import base64
import copy
import dataclasses
import html
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import scaleprop
from scaleprop.analysis.training_view import prepared_view, training_view
from scaleprop.cli import main
from scaleprop.errors import ConfigError
from scaleprop.passes.outline import module_paths, stack_of
from scaleprop.passes.provenance import innermost_module
from scaleprop.passes.statistics.lines import module_of
from scaleprop.passes.training import Lowered
from scaleprop.report import Report, ScaleReport
from scaleprop.report.graph import Block, BlockEdge
from scaleprop.report.graph.model import power_of_two
from scaleprop.training import scale_report


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Linear(16, width)
        self.layers = nn.ModuleList([Layer(width), Layer(width)])
        self.head = nn.Linear(width, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Branches(nn.Module):
    """A residual of convolutions, whose skip has one where sizes differ."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(inner + self.skip(x))


EDGES = [("from add", "layer_norm"), ("layer_norm", "quantize"), ("quantize", "linear up"),
         ("up.weight", "linear up"), ("linear up", "gelu"), ("gelu", "quantize"),
         ("quantize", "linear down"), ("down.weight", "linear down"), ("from add", "add"),
         ("linear down", "add"), ("add", "to head")]


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture(scope="module")
def inputs() -> torch.Tensor:
    return torch.randn(6, 16, generator=torch.Generator().manual_seed(1))


def named(block: Block) -> dict[str, BlockEdge]:
    """Edges by what they join: ``linear up → gelu``."""
    what = {node.name: f"{node.label} {node.module}" if node.label in ("linear", "addmm")
            else node.label for node in block.nodes}
    found = {f"{what[edge.source]} → {what[edge.target]}": edge for edge in block.edges}
    assert len(found) == len(block.edges)
    return found


def seen(model: Model, inputs: torch.Tensor, path: str) -> torch.Tensor:
    """What a module of the float model returns."""
    found: list[torch.Tensor] = []
    module = model.get_submodule(path)
    handle = module.register_forward_hook(lambda _, __, value: found.append(value.detach()))
    with torch.no_grad():
        model(inputs)
    handle.remove()
    return found[0]


def numbers(edge: BlockEdge) -> tuple[float | None, float | None, float | None]:
    assert edge.forward is not None
    return edge.forward.value, edge.forward.low, edge.forward.high


def test_stored_scales_are_those_of_the_float_model(model: Model, inputs: torch.Tensor) -> None:
    compiled = scaleprop.compile(model, inputs, "int8", "reference", calibration=[inputs],
                                 exclude=["layers.1.down"])
    edges = named(compiled.graph_view("layers.0"))
    normed = seen(model, inputs, "layers.0.norm")
    scale = (max(float(normed.max()), 0) - min(float(normed.min()), 0)) / 255
    value, low, high = numbers(edges["quantize → linear up"])
    assert value == low == high == pytest.approx(scale, rel=1e-5)
    assert edges["quantize → linear up"].forward.text == power_of_two(value)  # type: ignore[union-attr]
    rows = model.get_parameter("layers.0.up.weight").detach().abs().amax(dim=1) / 127
    assert numbers(edges["up.weight → linear up"])[1:] == pytest.approx(
        (float(rows.min()), float(rows.max())), rel=1e-6)
    assert edges["layer_norm → quantize"].forward is None
    assert edges["layer_norm → quantize"].detail.startswith("high precision (float32)")
    high = named(compiled.graph_view("layers.1"))["gelu → linear down"]
    reasons = [record.reason for record in compiled.report.high if record.reason]
    assert any(reason in high.detail for reason in reasons)


def test_every_edge_of_a_block_is_drawn_once(model: Model, inputs: torch.Tensor) -> None:
    compiled = scaleprop.compile(model, inputs, "mxfp4", "reference")
    block = compiled.graph_view("layers.1")
    what = {node.name: f"{node.label} {node.module}" if node.label == "linear" else node.label
            for node in block.nodes}
    drawn = [(what[edge.source], what[edge.target]) for edge in block.edges]
    # the head's quantization reads the block's sum
    assert sorted(drawn) == sorted(EDGES)
    assert block.title == "layers.1: Layer, 2 of 2"
    assert block.made == "mxfp4, reference"


def test_dynamic_scales_are_the_median_on_the_example(model: Model, inputs: torch.Tensor) -> None:
    compiled = scaleprop.compile(model, inputs, "fp8", "reference", exclude=["first"])
    edge = named(compiled.graph_view("layers.0"))["quantize → linear up"]
    scales = seen(model, inputs, "layers.0.norm").abs().amax(dim=1) / 448
    assert numbers(edge) == (pytest.approx(float(scales.median()), rel=1e-5), None, None)
    assert f"least {float(scales.min()):.4g}"[:10] in edge.detail
    blocks = model.get_parameter("layers.0.up.weight").detach().unflatten(1, (-1, 32))
    fine = named(scaleprop.compile(model, inputs, "mxfp4-weight", "reference")
                 .graph_view("layers.0"))["up.weight → linear up"]
    _, low, high = numbers(fine)
    exponents = torch.log2(blocks.abs().amax(dim=2)).floor() - 2  # emax of E2M1; or one more
    assert low in [2.0**(float(exponents.min()) + up) for up in (0, 1)]
    assert high in [2.0**(float(exponents.max()) + up) for up in (0, 1)]


@pytest.mark.parametrize(("build", "sizes", "path", "kind"), [
    (Model, (6, 16), "layers.0", "Layer, 1 of 2"),
    (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), Branches(8, 16), Branches(16, 16),
                           Branches(16, 16)), (1, 3, 8, 8), "2", "Branches, 2 of 3"),
    (lambda: nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)), (2, 16), "",
     "Sequential"),
])
def test_the_most_typical_block_is_found(
    build: Callable[[], nn.Module], sizes: tuple[int, ...], path: str, kind: str
) -> None:
    compiled = scaleprop.compile(build().eval(), torch.randn(sizes), "int8-dynamic", "reference")
    block = compiled.graph_view()
    assert (block.path, block.what) == (path, kind)


def test_branches_have_their_quantizations(inputs: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Branches(4, 8), Branches(8, 8)).eval()
    compiled = scaleprop.compile(model, torch.randn(1, 4, 8, 8), "int8-dynamic", "reference")
    block = compiled.graph_view("0")
    labels = {node.name: node.label for node in block.nodes}
    assert sorted(labels.values()) == sorted([
        "input", "fake_quantize", "fake_quantize", "conv1.weight", "conv2.weight", "skip.weight",
        *["dequantize"] * 3, *["conv2d"] * 3, *["batch_norm"] * 2, *["relu"] * 2, "add", "to 1"])
    sums = [edge for edge in block.edges if labels[edge.target] == "add"]
    assert {labels[edge.source] for edge in sums} == {"batch_norm", "conv2d"}


def test_a_loaded_model_draws_the_same(
    model: Model, inputs: torch.Tensor, tmp_path: Path
) -> None:
    compiled = scaleprop.compile(model, inputs, "mxfp4", "reference")
    loaded = scaleprop.load(compiled.save(tmp_path / "saved"))
    before, after = compiled.graph_view("layers.1"), loaded.graph_view("layers.1")
    assert [(e.source, e.target, e.forward) for e in before.edges] == [
        (e.source, e.target, e.forward) for e in after.edges]
    assert after.title == before.title


def test_depth_puts_modules_in_boxes(model: Model, inputs: torch.Tensor) -> None:
    compiled = scaleprop.compile(model, inputs, "mxfp4", "reference")
    whole = compiled.graph_view("", depth=1)
    assert [node.label for node in whole.nodes if node.kind == "module"] == ["Layer", "Layer"]
    second = next(node for node in whole.nodes if node.module == "layers.1")
    assert "layer_norm" in second.detail
    everything = compiled.graph_view("")
    assert len(everything.nodes) > 20 > len(whole.nodes)
    with pytest.raises(ConfigError, match="depth=-1"):
        compiled.graph_view("", depth=-1)


def test_unknown_and_empty_blocks_are_refused(model: Model, inputs: torch.Tensor) -> None:
    compiled = scaleprop.compile(model, inputs, "mxfp4", "reference")
    with pytest.raises(ConfigError, match=r"block='layers.7'.*Known blocks: layers.0, layers.1;"):
        compiled.graph_view("layers.7")
    nothing = scaleprop.compile(nn.Flatten(), torch.randn(2, 3, 4), "mxfp4", "reference")
    with pytest.raises(ConfigError, match="nothing to draw"):
        nothing.graph_view()


def loss_fn(output: torch.Tensor) -> torch.Tensor:
    return output.square().mean()


def test_measured_sizes_are_those_of_autograd(model: Model, inputs: torch.Tensor) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    edges = named(training_view(model, inputs, loss_fn, "layers.0"))
    values: dict[str, torch.Tensor] = {}

    watched = copy.deepcopy(model)

    def keep(path: str) -> None:
        def hook(_: nn.Module, __: object, value: torch.Tensor) -> None:
            value.retain_grad()
            values[path] = value

        watched.get_submodule(path).register_forward_hook(hook)

    for path in ("layers.0.norm", "layers.0.up", "layers.0.down", "layers.0", "first"):
        keep(path)
    loss_fn(watched(inputs)).backward()
    values["weight"] = watched.get_parameter("layers.0.up.weight")
    for path, edge in {"layers.0.norm": "layer_norm → addmm up", "layers.0.up": "addmm up → gelu",
                       "layers.0.down": "addmm down → add", "layers.0": "add → to layers.1",
                       "first": "from addmm → add",
                       "weight": "up.weight → addmm up"}.items():
        found = edges[edge]
        assert found.forward is not None
        assert found.backward is not None
        gradient = values[path].grad
        assert gradient is not None
        for scale, value in ((found.forward, values[path]), (found.backward, gradient)):
            assert scale.value == pytest.approx(
                float(value.detach().double().square().mean().sqrt()), rel=1e-4)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_casts_of_training_are_those_of_the_report(model: Model, inputs: torch.Tensor) -> None:
    edges = named(prepared_view(model, inputs, loss_fn, "fp8", "layers.0"))
    weight = model.get_parameter("layers.0.up.weight").detach()
    for name, value in (("up.weight → addmm up", weight),
                        ("quantize → addmm up", seen(model, inputs, "layers.0.norm"))):
        scale = edges[name].forward
        assert scale is not None
        assert scale.format == "e4m3"
        assert scale.value is not None
        data = value.abs().max() / scale.value
        assert 2**-6 < data <= 448 / 2**2  # with a margin of two powers
        assert f"amax {float(value.abs().max()):.3g}"[:8] in edges[name].detail
    gradient = edges["addmm up → gelu"].backward
    assert gradient is not None
    assert (gradient.format, edges["addmm up → gelu"].forward) == ("e5m2", None)
    assert gradient.value is not None
    assert gradient.text == power_of_two(gradient.value)


def test_a_prepared_model_draws_what_it_was_compiled_to(inputs: torch.Tensor) -> None:
    torch.manual_seed(0)
    prepared = scaleprop.prepare_training(Model(), "mxfp8", inner="eager")
    with pytest.raises(ConfigError, match="0 graphs were compiled"):
        scale_report(prepared).graph_view()
    loss_fn(prepared(inputs)).backward()
    reports = scale_report(prepared)
    edges = named(reports.graph_view("layers.1"))
    assert edges["quantize → addmm down"].forward.text == "e4m3"  # type: ignore[union-attr]
    assert edges["addmm down → add"].backward is not None
    assert edges["gelu → quantize"].forward is None
    assert not isinstance(reports[0], Lowered)


def targets(page: str) -> tuple[dict[str, str], set[str]]:
    """Box → slug that it leads to; and all slugs of the page's rows and data."""
    links = {html.unescape(node): unquote(link) for node, link in re.findall(
        r'<g class="sg-node" data-node="([^"]+)"><title>[^<]*</title><a href="#t=([^"]+)">', page)}
    (packed,) = re.findall('<script type="application/octet-stream" id="data">(.*?)<', page)
    return links, set(json.loads(zlib.decompress(base64.b64decode(packed)))["ids"])


def test_reports_have_the_block(
    model: Model, inputs: torch.Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiled = scaleprop.compile(model, inputs, "mxfp4", "reference")
    assert compiled.report.block is None  # nothing was measured yet
    report = compiled.report.measured()
    assert report.block == compiled.graph_view()
    report.save(tmp_path / "r.json")
    assert Report.load(tmp_path / "r.json").block == report.block
    assert scaleprop.load(compiled.save(tmp_path / "saved")).report.block == report.block
    report.save(tmp_path / "r.html")
    links, slugs = targets((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert report.block is not None
    labels = {node.name: node.label for node in report.block.nodes}
    assert set(links.values()) <= slugs
    found = {labels[name]: slug for name, slug in links.items() if labels[name] != "linear"}
    assert found["up.weight"].endswith(":layers.0.up.weight")
    assert found["gelu"] == "gelu" and found["quantize"].startswith("scaled_mm")
    # without one: a report and a page all the same, and the reason in the log
    data = {key: value for key, value in report.to_dict().items() if key != "block"}
    Report.from_dict(data).save(tmp_path / "old.html")
    assert 'id="block"' not in (tmp_path / "old.html").read_text(encoding="utf-8")
    alone = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval()
    with caplog.at_level("DEBUG", logger="scaleprop.analysis.blocks"):
        for empty in (alone, nn.Flatten()):
            made = scaleprop.compile(empty, torch.randn(2, 16), "mxfp4", "reference")
            assert made.report.measured().block is None
    assert "none is there several times" in caplog.text and "nothing to draw" in caplog.text
    assert all(record.levelname == "DEBUG" for record in caplog.records)


def test_reports_of_a_step_have_the_block(
    model: Model, inputs: torch.Tensor, tmp_path: Path
) -> None:
    step = scaleprop.analyze(model, inputs, loss_fn=loss_fn)
    assert step.block == training_view(model, inputs, loss_fn)
    step.save(tmp_path / "s.json")
    assert ScaleReport.load(tmp_path / "s.json") == step
    old = {key: value for key, value in step.to_dict().items() if key != "block"}
    assert ScaleReport.from_dict(old) == dataclasses.replace(step, block=None)
    with pytest.raises(ConfigError, match=r"block\.nodes is 3, no array"):
        ScaleReport.from_dict({**old, "block": {**step.to_dict()["block"], "nodes": 3}})
    step.save(tmp_path / "s.html")
    links, slugs = targets((tmp_path / "s.html").read_text(encoding="utf-8"))
    assert all(slug == name for name, slug in links.items()) and set(links) <= slugs
    assert len(links) > 6
    # a compiled model's report with a step has both, and only the step's values are the step's
    compiled = scaleprop.compile(model, inputs, "mxfp4", "reference")
    compiled.report.with_scales(step).save(tmp_path / "both.html")
    page = (tmp_path / "both.html").read_text(encoding="utf-8")
    ids = re.findall(r'\bid="(block[^"]*)"', page)
    assert len(ids) == len(set(ids)) and {"block", "block-0-title", "block-1-title"} <= set(ids)
    (first, second) = page.split('<svg class="sg"')[1:]
    assert "data-node=\"gelu\"><title>" in first
    assert 'href="#t=gelu"' not in first and 'href="#t=gelu"' in second


MODULE = """
import torch
from tests.analysis.test_graph_view import Model, loss_fn as loss
def small():
    torch.manual_seed(0)
    return Model(), torch.randn(6, 16)
"""


def test_the_command_draws_and_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "drawn_models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    given = ["graph", "drawn_models:small", "--recipe", "mxfp4", "--backend", "reference"]
    assert main([*given, "--block", "layers.1", "-o", "b.svg", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["files"] == ["b.svg"]
    block = Block.from_dict(printed["block"])
    assert (tmp_path / "b.svg").read_text() == block.svg()
    assert main([*given, "--loss", "drawn_models:loss", "-o", "c.dot"]) == 0
    assert "← 2^" in (tmp_path / "c.dot").read_text()
    for wrong, why in ((["-o", "b.png"], "saved as .svg"),
                       (["-o", "no/b.svg"], "create the folder"),
                       (["-o", "b.svg", "--block", "x"], "Known blocks: layers.0"),
                       (["-o", "b.svg", "--training", "fp8"], "add --loss")):
        assert main([*given, *wrong]) == 2
        assert why in capsys.readouterr().err


def test_stored_rows_are_no_values_whatever_their_type() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 64)).eval()
    model[1].weight = model[0].weight  # one tensor, gathered from and multiplied by
    block = scaleprop.compile(model, torch.arange(8), "fp8", "reference").graph_view("")
    weight = model.get_parameter("0.weight").detach().abs().amax(dim=1) / 448
    edges = named(block)
    assert sorted(edges) == sorted([
        "1.weight → dequantize", "dequantize → quantize", "quantize → linear 1",
        "1.weight → linear 1", "linear 1 → output"])
    for name in ("1.weight → dequantize", "1.weight → linear 1"):
        assert numbers(edges[name])[1:] == pytest.approx((float(weight.min()), float(weight.max())))
        assert edges[name].forward.format == "e4m3[row]*f32"  # type: ignore[union-attr]


def test_names_that_no_xml_holds_are_written_as_python_does(inputs: torch.Tensor) -> None:
    block = training_view(nn.Sequential(Layer(16)), inputs, loss_fn, "")
    odd = dataclasses.replace(
        block, path="a\x01", nodes=tuple(dataclasses.replace(node, module=f"b\ud800<{node.module}")
                                         for node in block.nodes))
    texts = ["".join(each.itertext()) for each in ElementTree.fromstring(odd.svg().encode()).iter()]
    assert any(r"a\x01: Sequential" in text for text in texts)
    assert any(r"b\ud800<0" in text for text in texts)
    assert r"a\\x01: Sequential" in odd.dot() and odd.dot().encode()


def test_scales_that_are_no_numbers_are_not_called_zero(
    model: Model, inputs: torch.Tensor
) -> None:
    compiled = scaleprop.compile(model, inputs / 0, "int8-dynamic", "reference")
    edge = named(compiled.graph_view("layers.0"))["quantize → linear up"]
    assert edge.forward is not None
    assert edge.forward.value is None
    assert "not finite" in edge.detail


def test_an_unknown_recipe_is_refused_by_name(model: Model, inputs: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="unknown training recipe 'fp9'"):
        prepared_view(model, inputs, loss_fn, "fp9")


def test_modules_are_read_in_one_way() -> None:
    node = torch.fx.Graph().placeholder("x")
    node.meta["nn_module_stack"] = {
        "a": ("", "m.Model"), "b": ("L['self']._modules['layers'][0]", Layer),
        "c": ("_empty_nn_module_stack_from_metadata_hook", "")}
    assert stack_of(node) == (("", "m.Model"), ("layers.0", f"{__name__}.Layer"))
    assert module_paths(node) == ("layers.0",) and module_of(node) == innermost_module(node)


class Rounds(nn.Module):
    """Has a quantization of its own, which is read by more than products."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = torch.ops.scaleprop.fake_quantize(self.a(x), "int8[row]*f32", -1)
        return self.c(self.b(low)) + low


def test_quantizations_of_the_model_itself_are_drawn(inputs: torch.Tensor) -> None:
    edge = named(prepared_view(Rounds(), inputs, loss_fn, "fp8"))["fake_quantize → add"]
    assert edge.forward is not None
    assert (edge.forward.value, edge.forward.format) == (None, "int8[row]*f32")
    assert "by the model itself" in edge.detail
