"""Solving layer by layer: what a layer sees, what is stored, how runs go on, what is refused."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import scaleprop
from scaleprop.calibration import moments
from scaleprop.errors import CalibrationError, ConfigError, PassError, PreconditionError
from scaleprop.formats import parse, quantize
from scaleprop.passes import solve_weights
from scaleprop.passes.assign import AssignFormats
from scaleprop.passes.calibrate import Calibrate
from scaleprop.passes.canonicalise import Canonicalise
from scaleprop.passes.capture import capture
from scaleprop.passes.cleanup import CleanUp
from scaleprop.passes.compensation import compensated
from scaleprop.passes.pipeline import build, parse_pass
from scaleprop.passes.quantize_weights import QuantizeWeights
from scaleprop.passes.solve_weights import SolveWeights
from scaleprop.passes.solving.solved import solved_of
from scaleprop.recipes import Recipe, Role, named_recipe

FORMATS = ("int4[1x32]*f32+zp", "int4[row]*f32", "int8[row]*f32", "mxfp4", "nvfp4",
           "e2m1[1x32]*f32")  # fmt: skip


class Chain(nn.Module):
    """A table, two linears that read one value, one that reads both, a convolution, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(60, 64)
        self.left = nn.Linear(64, 96)
        self.right = nn.Linear(64, 96, bias=False)
        self.back = nn.Linear(96, 64)
        self.mix = nn.Conv1d(64, 64, 3, padding=1)
        self.head = nn.Linear(64, 10)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        y = x + self.back(F.silu(self.left(x)) * self.right(x))
        z = self.mix(y.transpose(1, 2)).transpose(1, 2)
        return self.head(torch.tanh(z))


@pytest.fixture
def chain() -> Chain:
    torch.manual_seed(0)
    model = Chain().eval()
    with torch.no_grad():  # correlated inputs, as in trained models
        model.table.weight.copy_(torch.randn(60, 6) @ torch.randn(6, 64))
    return model


def batches(seed: int = 1, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 60, (2, 30 + n), generator=generator) for n in range(count)]


def recipe_of(fmt: str, **also: Role) -> Recipe:
    return Recipe(name="r", description="", roles={"fprop.w": Role(format=fmt), **also})


def prepared(model: nn.Module, recipe: Recipe, *inputs: Any) -> Any:
    program = capture(model, inputs or (batches()[0],), {})
    for step in (CleanUp(), Canonicalise(), AssignFormats(recipe=recipe),
                 Calibrate(data=batches())):  # fmt: skip
        program = step.run(program).program
    return program


def solved_weights(program: Any) -> dict[str, Any]:
    """Parameter → what was solved for it."""
    return {str(node.args[1].target): found for node in program.module.graph.nodes
            if (found := solved_of(node)) is not None}  # fmt: skip


def error(matrix: Tensor, approximation: Tensor, moment: Tensor) -> float:
    d = matrix.double() - approximation.double()
    return float(((d @ moment) * d).sum())


def second_moment(values: list[Tensor]) -> Tensor:
    rows = torch.cat([value.reshape(-1, value.shape[-1]) for value in values]).double()
    return rows.t() @ rows


@pytest.mark.parametrize(("fmt", "act_order"),
                         [*((fmt, False) for fmt in FORMATS), ("mxfp4", True)])
@torch.no_grad()
def test_every_layer_is_closer_than_nearest(chain: Chain, fmt: str, act_order: bool):
    """On the second moment of what the layer sees: the quantized layers before it."""
    program = prepared(chain, recipe_of(fmt))
    options = SolveWeights(data=batches(), act_order=act_order, clipping="mse")
    found = solved_weights(options.run(program).program)
    assert sorted(found) == ["back.weight", "head.weight", "left.weight", "right.weight"]
    quantized = Chain().eval()  # the same network, layer by layer by hand
    quantized.load_state_dict(chain.state_dict())
    for name, reader in (("left", quantized.table), ("right", quantized.table),
                         ("back", lambda ids: _hidden(quantized, ids)),
                         ("head", lambda ids: _last(quantized, ids))):  # fmt: skip
        moment = second_moment([reader(ids) for ids in batches()])
        layer = getattr(quantized, name)
        want = compensated(layer.weight, fmt, moment, clipping="mse", act_order=act_order)
        got = found[f"{name}.weight"].dequantize()
        nearest = quantize(layer.weight, parse(fmt).replace(rule="mse")).dequantize()
        gained = error(layer.weight, got, moment)
        assert gained < 0.97 * error(layer.weight, nearest, moment)
        assert gained < 1.01 * error(layer.weight, want.dequantize(), moment)
        layer.weight.copy_(got)


def _hidden(model: Chain, ids: Tensor) -> Tensor:
    x = model.table(ids)
    return F.silu(model.left(x)) * model.right(x)


def _last(model: Chain, ids: Tensor) -> Tensor:
    y = model.table(ids) + model.back(_hidden(model, ids))
    return torch.tanh(model.mix(y.transpose(1, 2)).transpose(1, 2))


def spied_moments(monkeypatch: pytest.MonkeyPatch, program: Any, **options: Any) -> list[Tensor]:
    """H of each group, in order."""
    seen: list[Tensor] = []
    real = moments.SecondMoment.total

    def total(self: moments.SecondMoment) -> Tensor:
        seen.append(real(self))
        return seen[-1]

    with monkeypatch.context() as patch:
        patch.setattr(moments.SecondMoment, "total", total)
        SolveWeights(data=batches(), **options).run(program)
    return seen


@torch.no_grad()
def test_a_layer_sees_tables_convolutions_weights_and_activations_as_quantized(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
):
    by_row = Role(format="int4[row]*f32")
    roles = {"fprop.x": Role(format="int8", scaling="static"), "conv.w": by_row,
             "conv.x": Role(format="int8"), "embedding": by_row}  # fmt: skip
    recipe = recipe_of("int3[row]*f32", **roles)
    program = prepared(chain, recipe)
    seen = spied_moments(monkeypatch, program)
    final = QuantizeWeights().run(SolveWeights(data=batches()).run(program).program).program
    by_hand = Chain().eval()
    by_hand.load_state_dict(chain.state_dict())
    buffers = dict(final.module.named_buffers())

    def static(value: Tensor, name: str) -> Tensor:
        known = program.statistics[name]
        scale = torch.tensor(max(abs(known.min), abs(known.max)) / 127)
        return torch.clamp(torch.round(value / scale), -127, 127) * scale

    def rows(matrix: Tensor, top: int) -> Tensor:
        scale = matrix.abs().amax(1, keepdim=True) / top
        return torch.clamp(torch.round(matrix / scale), -top, top) * scale

    by_hand.table.weight.copy_(rows(by_hand.table.weight, 7))
    by_hand.mix.weight.copy_(rows(by_hand.mix.weight.reshape(64, -1), 7).reshape(64, 64, 3))
    for name in ("left", "right", "back"):
        layer = getattr(by_hand, name)
        codes, scale = buffers[f"{name}.weight_data"], buffers[f"{name}.weight_scale"]
        fmt = "int3[row]*f32"
        stored = scaleprop.formats.ScaledTensor.from_parts([codes, scale], fmt, layer.weight.shape)
        layer.weight.copy_(stored.dequantize())
    linears = [n for n in program.module.graph.nodes if n.target is torch.ops.aten.linear.default]
    names = [node.args[0].name for node in linears]
    want: list[list[Tensor]] = [[], [], []]
    for ids in batches():
        x = by_hand.table(ids)
        xq = static(x, names[0])
        want[0].append(xq)
        h = F.silu(by_hand.left(xq)) * by_hand.right(xq)
        want[1].append(static(h, names[2]))
        y = x + by_hand.back(want[1][-1])
        per_batch = y.transpose(1, 2)
        scale = per_batch.abs().amax() / 127
        per_batch = torch.clamp(torch.round(per_batch / scale), -127, 127) * scale
        want[2].append(static(torch.tanh(by_hand.mix(per_batch).transpose(1, 2)), names[3]))
    for got, values in zip(seen, want, strict=True):
        moment = second_moment(values)
        assert float((got - moment).norm() / moment.norm()) < 1e-4
    plain = spied_moments(monkeypatch, program, activations=False)
    assert float((plain[2] - seen[2]).norm() / seen[2].norm()) > 1e-4


@torch.no_grad()
def test_without_sequential_it_is_compensated_rounding(chain: Chain):
    """Both see what the unquantized network makes: the same codes, one calibration at a time."""
    recipe = recipe_of("int4[1x32]*f32+zp")
    program = prepared(chain, recipe)
    found = solved_weights(SolveWeights(data=batches(), sequential=False).run(program).program)
    compiled = scaleprop.compile(chain, batches()[0], recipe=recipe, backend="reference",
                                 calibration=batches(),
                                 passes=["quantize-weights{rounding=compensated}"])  # fmt: skip
    buffers = dict(compiled.program.module.named_buffers())
    for name, solved in found.items():
        assert torch.equal(solved.data, buffers[f"{name}_data"])
    other = solved_weights(SolveWeights(data=batches()).run(program).program)
    assert torch.equal(other["left.weight"].data, found["left.weight"].data)
    assert not torch.equal(other["back.weight"].data, found["back.weight"].data)


@pytest.mark.parametrize("fmt", ["int4[1x32]*f32+zp", "nvfp4", "nvfp4_2d"])
@torch.no_grad()
def test_codes_and_scales_are_stored_as_solved(chain: Chain, fmt: str):
    program = SolveWeights(data=batches(), act_order=True).run(
        prepared(chain, recipe_of(fmt))).program
    result = QuantizeWeights().run(program)
    assert any("4 weights as solve-weights solved them" in note for note in result.notes)
    buffers = dict(result.program.module.named_buffers())
    names = ["data", "scale", *(["tensor_scale"] if parse(fmt).two_level else []), "zero_point"]
    for parameter, solved in solved_weights(program).items():
        for part, name in zip(solved.parts, names, strict=False):
            assert torch.equal(bits(buffers[f"{parameter}_{name}"]), bits(part))


def test_one_moment_is_alive_and_values_die_when_read(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
):
    alive: list[weakref.ref] = []
    peaks: list[int] = []
    real = moments.SecondMoment.__init__

    def counting(self: Any, size: int) -> None:
        real(self, size)
        alive.append(weakref.ref(self._sum))
        gc.collect()
        peaks.append(sum(ref() is not None for ref in alive))

    monkeypatch.setattr(moments.SecondMoment, "__init__", counting)
    totals: list[weakref.ref] = []
    real_total = moments.SecondMoment.total

    def total(self: Any) -> Tensor:
        gc.collect()
        assert not any(ref() is not None for ref in totals)  # no earlier group's H
        value = real_total(self)
        totals.append(weakref.ref(value))
        return value

    monkeypatch.setattr(moments.SecondMoment, "total", total)
    held: list[int] = []
    real_run = solve_weights.Walk.run

    def run(self: Any, node: Any, replaced: Any = None) -> None:
        real_run(self, node, replaced)
        held.append(max(sum(made.op != "get_attr" for made in batch.env)
                        for batch in self._batches))  # fmt: skip

    monkeypatch.setattr(solve_weights.Walk, "run", run)
    program = prepared(chain, recipe_of("int4[row]*f32"))
    SolveWeights(data=batches()).run(program)
    assert peaks == [1, 1, 1] and len(totals) == 3
    assert max(held) <= 4  # the residual, two gates, and what is made of one of them


def run_in(directory: Path, model: nn.Module, **options: Any) -> tuple[dict[str, Any], str]:
    program = prepared(model, recipe_of("mxfp4"))
    result = SolveWeights(data=batches(), resume=str(directory), **options).run(program)
    return solved_weights(result.program), "; ".join(result.notes)


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return all(torch.equal(bits(a), bits(b)) for name in left
               for a, b in zip(left[name].parts, right[name].parts, strict=True))  # fmt: skip


def bits(part: Tensor) -> Tensor:
    return part.reshape(-1).view(torch.uint8)


def test_an_interrupted_run_goes_on_with_the_same_bits(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole, _ = run_in(tmp_path / "whole", chain)
    calls: list[str] = []
    real = solve_weights.compensated_by

    def interrupted(*args: Any) -> Any:
        calls.append("solved")
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(solve_weights, "compensated_by", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path / "part", chain)
    files = sorted(path.name for path in (tmp_path / "part").iterdir())
    assert len(files) == 2 and all(name.endswith(".safetensors") for name in files)
    calls.append("further")  # past the interruption
    resumed, notes = run_in(tmp_path / "part", chain)
    assert calls.count("solved") == 3 + 2  # the two that were there are not solved again
    assert "4 weights solved in 3 groups; 2 of them as an earlier run left them" in notes
    assert same(whole, resumed)
    again, notes = run_in(tmp_path / "part", chain)
    assert "4 of them as an earlier run left" in notes and calls.count("solved") == 5
    assert same(whole, again)


def test_what_was_solved_from_other_weights_data_or_options_is_solved_again(
    chain: Chain, tmp_path: Path
):
    first, _ = run_in(tmp_path, chain)
    for change in ({"damping": 0.1}, {"act_order": True}, {"strategy": "norm"}):
        changed, notes = run_in(tmp_path, chain, **change)
        assert "0 of them as an earlier run left" in notes and "4 files there were made" in notes
        assert not same(first, changed)
        kept, notes = run_in(tmp_path, chain, **change)
        assert "4 of them" in notes and same(kept, changed)
    with torch.no_grad():
        chain.back.weight[0, 0] += 0.5
    _, notes = run_in(tmp_path, chain, strategy="norm")
    assert "2 of them" in notes and "2 files there" in notes  # back, and what sees it
    for path in tmp_path.iterdir():
        path.write_bytes(b"not a safetensors file")
    with pytest.raises(ConfigError, match=r"cannot be read.*delete it"):
        run_in(tmp_path, chain)


def test_a_directory_that_cannot_be_made_is_refused(chain: Chain, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="resume="):
        run_in(tmp_path / "file" / "below", chain)


class Shared(nn.Module):
    """One weight on two values, the second made from the first."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(48, 48)
        self.once = nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.once(self.twice(torch.tanh(self.twice(x))))


@torch.no_grad()
def test_a_shared_weight_is_solved_once_from_the_sum():
    torch.manual_seed(0)
    model = Shared().eval()
    data = [torch.randn(40, 6) @ torch.randn(6, 48) for _ in range(2)]
    program = capture(model, (data[0],), {})
    for step in (CleanUp(), Canonicalise(), AssignFormats(recipe=recipe_of("int4[row]*f32"))):
        program = step.run(program).program
    done = SolveWeights(data=data).run(program)
    assert "2 weights solved in 3 groups" in done.notes
    nodes = [solved_of(node) for node in done.program.module.graph.nodes if solved_of(node)]
    assert len(nodes) == 3 and nodes[0] is nodes[1]
    first = second_moment(data)
    second = second_moment([torch.tanh(model.twice(x)) for x in data])
    want = compensated(model.twice.weight, "int4[row]*f32", first + second)
    assert nodes[0] is not None and torch.equal(nodes[0].codes(), want.codes())
    stored = QuantizeWeights().run(done.program).program
    buffers = [name for name, _ in stored.module.named_buffers() if "twice" in name]
    assert sorted(buffers) == ["twice.weight_data", "twice.weight_scale"]


def test_a_tied_table_keeps_its_own_rounding(tied: Any, ids: Tensor):
    recipe = recipe_of("int4[row]*f32", embedding=Role(format="int4[row]*f32"))
    compiled = scaleprop.compile(tied, {"ids": ids}, recipe=recipe, backend="reference",
                                 calibration=[{"ids": ids}], passes=["solve-weights"])
    buffers = dict(compiled.program.module.named_buffers())
    tables = [value for name, value in buffers.items() if "_data" in name and
              value.shape[0] == 40]  # fmt: skip
    assert len(tables) == 2 and not torch.equal(*tables)
    nearest = quantize(tied.embed.weight, "int4[row]*f32").data
    assert sum(torch.equal(table, nearest) for table in tables) == 1


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["nvfp4-weight", "mxfp8-weight-compensated"])
def test_end_to_end(chain: Chain, recipe: str):
    def distance(*passes: str, calibrated: bool = True) -> float:
        data = iter(batches()) if calibrated else None  # an iterator, which can be read once
        compiled = scaleprop.compile(chain, batches()[0], recipe=recipe, backend="reference",
                                     passes=passes, calibration=data)  # fmt: skip
        return sum(float((compiled(x) - chain(x)).square().mean()) for x in batches(7, 4))

    nearest = distance("quantize-weights{rounding=nearest}", calibrated=False)
    assert distance("solve-weights") < 0.95 * nearest
    assert distance("solve-weights{act_order=true, clipping=mse}") < 0.95 * nearest


def test_its_place_and_options_in_the_pipeline():
    manager = build(named_recipe("int8"), calibration=batches(), progress=True,
                    extra=["solve-weights{act_order=true}", "solve-weights{strategy=norm}",
                           "quantize-weights{clipping=mse}"])  # fmt: skip
    names = [step.name for step in manager.passes]
    assert names[-5:-2] == ["calibrate", "solve-weights", "quantize-weights"]
    solver = manager.passes[-4]
    assert isinstance(solver, SolveWeights) and solver.progress and solver.data is not None
    assert solver.act_order and solver.strategy == "norm" and solver.clipping == "mse"
    calibrate = next(step for step in manager.passes if isinstance(step, Calibrate))
    assert calibrate.moments is False  # no H of all layers at once
    placed = build(named_recipe("int8"), calibration=batches(), extra=[SolveWeights()]).passes[-4]
    assert isinstance(placed, SolveWeights) and placed.data is not None


BAD = {
    "{strategy=best}": "strategy",
    "{damping=-1}": "damping",
    "{damping=much}": "damping",
    "{r_min=2}": "r_min",
    "{r_max=0, r_min=0}": "r_max must be positive",
    "{strategy=first-n}": "takes first=",
    "{strategy=first-n, first=0}": "takes first=",
    "{first=3}": "takes first=",
    "{resume=3}": "resume=3",
    "{act_order=maybe}": "act_order",
    "{data=x}": "calibration=",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_options(text: str):
    with pytest.raises(ConfigError, match=BAD[text]):
        parse_pass(f"solve-weights{text}")


def test_what_is_refused(chain: Chain):
    def compiled(recipe: Recipe | str, *passes: str, data: Any = None) -> Any:
        return scaleprop.compile(chain, batches()[0], recipe=recipe, backend="reference",
                                 passes=passes, calibration=data)  # fmt: skip

    with pytest.raises(CalibrationError, match=r"solve-weights.*calibration="):
        compiled("int4", "solve-weights")
    with pytest.raises(ConfigError, match=r"contradicts solve-weights"):
        compiled("int4", "solve-weights", "quantize-weights{rounding=nearest}", data=batches())
    with pytest.raises(PassError, match=r"node 'linear.*static_groups=true"):
        compiled(recipe_of("nvfp4_2d"), "solve-weights", data=batches())
    with pytest.raises(CalibrationError, match="empty"):
        compiled("int4", "solve-weights", data=[])
    with pytest.raises(CalibrationError, match="not one Tensor"):
        compiled("int4", "solve-weights", data=batches()[0])
    with torch.no_grad():
        chain.left.weight[3, 5] = torch.nan
    with pytest.raises(PassError, match=r"node 'linear.*NaN or Inf in a weight"):
        compiled("int4", "solve-weights", data=batches())
    with torch.no_grad():
        chain.left.weight[3, 5] = 0
        chain.table.weight[batches()[1][0, 0]] = torch.inf
    with pytest.raises(CalibrationError, match=r"node 'embedding.*NaN or Inf in calibration batch"):
        compiled("int4", "solve-weights", data=batches())


def test_passes_out_of_order_are_refused(chain: Chain):
    program = capture(chain, (batches()[0],), {})
    with pytest.raises(PreconditionError, match="assign-formats"):
        SolveWeights(data=batches()).requires(program)
    solved = SolveWeights(data=batches()).run(prepared(chain, recipe_of("mxfp4"))).program
    for node in solved.module.graph.nodes:
        if solved_of(node) is not None:
            assignment = node.meta["scaleprop.assignment"]
            node.meta["scaleprop.assignment"] = dataclasses.replace(
                assignment, weight=Role(format="nvfp4"))  # fmt: skip
    with pytest.raises(PreconditionError, match="right before quantize-weights"):
        QuantizeWeights().run(solved)


def test_functions_see_outputs_and_the_given_program_stays_as_it_was(chain: Chain):
    program = prepared(chain, recipe_of("mxfp4"))
    outputs: list[Tensor] = []

    def loop(model: Any) -> None:
        outputs.extend(model(x) for x in batches())

    by_function = solved_weights(SolveWeights(data=loop).run(program).program)
    torch.testing.assert_close(outputs, [chain(x).detach() for x in batches()])
    assert same(by_function, solved_weights(SolveWeights(data=batches()).run(program).program))
    assert not solved_weights(program)


def test_nothing_to_solve_and_progress(chain: Chain, capsys: pytest.CaptureFixture[str]):
    program = prepared(chain, Recipe(name="r", description="", roles={}))
    result = SolveWeights(data=batches()).run(program)
    assert not result.modified and "nothing to solve" in result.notes[0]
    SolveWeights(data=batches(), progress=True).run(prepared(chain, recipe_of("mxfp4")))
    assert capsys.readouterr().out == ""
