"""Training by recipe: what graphs carry, against products written out by hand."""

from __future__ import annotations

import operator
import re
import zlib
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F

import scaleprop
from scaleprop import ops
from scaleprop.backends import dynamo, quantized
from scaleprop.errors import ConfigError
from scaleprop.formats import parse
from scaleprop.formats.random import random_bits, random_signs
from scaleprop.formats.rounding import parse_rounding
from scaleprop.formats.scaled import PLAIN
from scaleprop.ops import estimators
from scaleprop.ops.hadamard import hadamard
from scaleprop.ops.operands import eden_operand, quantize_operand
from scaleprop.passes.training.solved import solved
from scaleprop.recipes.training import Operand, TrainingRecipe
from scaleprop.recipes.training_named import NAMED, training_recipe, with_tail
from scaleprop.training import training_state

aten: Any = torch.ops.aten
RECIPES = [recipe for recipe in NAMED
           if recipe.operands and solved(recipe) is None and not recipe.convolutions]
AS_IT_IS = ("as it is", "nearest", None, (0, "none"), 1.0)
TOKENS, WIDTH, OUT = 96, 64, 80
# numerics.md, section 4
TRANSFORMER_ENGINE = torch.tensor([1.0, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1])


class Pair(nn.Module):
    """Two linear layers, so that one of them is no head, and has an input gradient; only functions
    that compilers round alike and that have no kinks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.randn(TOKENS, WIDTH))
        self.middle = nn.Linear(WIDTH, OUT, bias=False)
        self.head = nn.Linear(OUT, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.middle(x * self.embed).square()).square().mean()


def prepared(recipe: str | TrainingRecipe, inner: Any = "eager", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return scaleprop.prepare_training(Pair(), recipe, inner=inner, **options)


def step(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(x)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


class ByHand:
    """The middle layer's three products, each factor quantized as the recipe says."""

    name = "middle.weight"

    def __init__(self, recipe: TrainingRecipe, step: int = 0) -> None:
        self.operands, self.step = recipe.at(step), step

    def bits(self, x: torch.Tensor, role: str, width: int) -> torch.Tensor:
        stream = zlib.crc32(f"{self.name}/{role}".encode())
        return random_bits(x.shape, 0, stream, self.step, width)

    def rotated(self, x: torch.Tensor, role: str, axis: int, back: bool = False) -> torch.Tensor:
        operand = self.operands[role]
        if not operand.hadamard:
            return x
        signs = None
        if (operand.signs, operand.hadamard) == ("fixed", 16):
            signs = TRANSFORMER_ENGINE
        elif operand.signs != "none":
            signs = random_signs(operand.hadamard, 0, 0,
                                 self.step if operand.signs == "step" else 0)
        if not back:
            missing = -x.shape[axis] % operand.hadamard
            x = F.pad(x, (0, missing) if axis else (0, 0, 0, missing))
        return hadamard(x, operand.hadamard, signs, axis, transpose=back)

    def quantized(self, x: torch.Tensor, role: str, axis: int) -> torch.Tensor:
        """Dequantized, prescaling undone, in the rotated basis."""
        operand = self.operands.get(role)
        if operand is None:
            return x
        if operand.of == "quantized":  # in fprop's basis: both w [n, k] and x [t, k] along k
            x = self.quantized(x, f"fprop.{role[-1]}", 1)
        x = self.rotated(x, role, axis)
        x = estimators.forward(operand.estimator, x, operand.format, axis)
        if operand.rounding == "eden":
            blocks = x.index_select(axis, torch.arange(0, x.shape[axis], 16))  # a number a block
            values, outer = eden_operand(x, operand.format, axis, self.bits(blocks, role, 16),
                                         operand.hadamard)
            return values.float() * outer
        bits = None
        if operand.stochastic:
            bits = self.bits(x, role, parse_rounding(operand.rounding).bits)
        amax = None
        if operand.scaling.startswith("constant"):
            fmt = parse(operand.format)
            amax = torch.tensor(fmt.element.max * 2.0 ** int(operand.scaling.split(":")[1]))
        values, outer = quantize_operand(x, operand.format, axis, operand.rounding, bits, amax,
                                         operand.prescale, operand.headroom, torch.float32)
        return values * outer / operand.prescale

    def estimated(
        self, gradient: torch.Tensor, x: torch.Tensor, role: str, other: str
    ) -> torch.Tensor:
        """The gradient of ``x``; ``other``: what was multiplied by dy, in fprop's basis or not."""
        operand, again = self.operands.get(role), self.operands.get(other)
        if operand is None:
            return gradient
        rotated = again is not None and again.of == "quantized" and operand.hadamard
        if operand.estimator != "ste":
            gradient = gradient if rotated else self.rotated(gradient, role, 1)
            gradient = estimators.backward(operand.estimator, gradient, self.rotated(x, role, 1),
                                           operand.format, 1)
        elif not rotated:
            return gradient
        return self.rotated(gradient, role, 1, back=True)[:, :x.shape[1]]

    def step_of(self, model: Pair, x: torch.Tensor) -> list[torch.Tensor]:
        """Loss and gradients; autograd does what is left high."""
        work = self

        class Middle(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
                ctx.save_for_backward(x, w)
                return work.quantized(x, "fprop.x", 1) @ work.quantized(w, "fprop.w", 1).t()

            @staticmethod
            def backward(ctx: Any, dy: torch.Tensor) -> Any:
                x, w = ctx.saved_tensors
                dx = work.quantized(dy, "dgrad.dy", 1) @ work.quantized(w, "dgrad.w", 0)
                dw = work.quantized(dy, "wgrad.dy", 0).t() @ work.quantized(x, "wgrad.x", 0)
                return (work.estimated(dx, x, "fprop.x", "dgrad.w"),
                        work.estimated(dw, w, "fprop.w", "wgrad.x"))

        model.zero_grad()
        hidden = Middle.apply(x * model.embed, model.middle.weight)
        loss = model.head(hidden.square()).square().mean()
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def close(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 2e-6 * b.norm() + 1e-30


# without an estimator; in blocks that the sizes are no multiples of
UNESTIMATED = training_recipe("mxfp4-quartet").replace(
    name="ste", **{"fprop.x.estimator": "ste", "fprop.w.estimator": "ste"})
PADDED = training_recipe("mxfp4-quartet").replace(
    name="padded", **{"fprop.x.hadamard": 48, "fprop.w.hadamard": 48})


@pytest.mark.parametrize("recipe", [*RECIPES, UNESTIMATED, PADDED], ids=lambda r: r.name)
def test_a_step_is_the_products_written_out(recipe: TrainingRecipe, x: torch.Tensor):
    model = prepared(recipe)
    got = step(model, x)
    torch.manual_seed(0)
    close(got, ByHand(recipe).step_of(Pair(), x))
    exact = step(prepared("fp32"), x)
    # what is quantized is another step: the comparison above is of something
    assert (got[2] - exact[2]).norm() > 1e-4 * exact[2].norm()


def without(name: str, *parts: str) -> TrainingRecipe:
    """A named recipe whose factors of these products, or these factors, stay as they are."""
    recipe = training_recipe(name)
    return recipe.replace(name=f"{name} without {' and '.join(parts)}", operands={
        role: each for role, each in recipe.operands.items() if not role.startswith(parts)})


# what is in neither of two products is in the other, and quartet2's weights are its data: compiling
# all of it takes a minute
@pytest.mark.parametrize("recipe", [
    without("mxfp4-quartet", "wgrad"), without("nvfp4-quartet2", "dgrad", "fprop.w"),
    training_recipe("fp8-delayed")], ids=lambda recipe: recipe.name)
def test_inductor_gives_the_same_step_and_leaves_no_operator_whole(
    recipe: TrainingRecipe, x: torch.Tensor
):
    got, codes = run_and_get_code(step, prepared(recipe, "inductor"), x)
    close(got, step(prepared(recipe), x))
    assert len(codes) == 2  # forward and backward
    for code in codes:
        called = set(re.findall(r"(?:extern_kernels|torch\.ops|aten)\.[\w.]+(?=\()", code))
        assert called <= {"torch.ops.scaleprop.wide_mm.default", "extern_kernels.mm",
                          "extern_kernels.addmm", "extern_kernels.bmm"}  # products, all of them


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.Graph]:
    """The joint graphs, as they are after operands were quantized."""
    found: list[torch.fx.Graph] = []

    def spied(joint: torch.fx.GraphModule, *rest: Any) -> Any:
        made = quantized_operands(joint, *rest)
        copy = torch.fx.Graph()
        copy.output(copy.graph_copy(joint.graph, {}))
        found.append(copy)
        return made

    quantized_operands = quantized.quantize_operands
    monkeypatch.setattr(quantized, "quantize_operands", spied)
    return found


def read(node: Any) -> tuple[Any, ...]:
    """What a product's factor says of itself: format, rounding, axis of the matrix that is
    quantized, rotation and its signs, prescale."""
    turned = node.target is aten.permute.default
    node = node.args[0] if turned else node
    if node.target is aten._to_copy.default:
        return (str(node.kwargs["dtype"]), "nearest", None, (0, "none"), 1.0)
    if node.target is not operator.getitem:
        return AS_IT_IS
    made = node.args[0]
    value, format, axis = made.args[:3]
    rotation = (value.args[1], signs(value.args[2])) if value.target is ops.rotate else (0, "none")
    if made.target is ops.eden_operand:
        return (format, "eden", axis ^ turned, rotation, 1.0)
    return (format, made.args[3], None if _symmetric(format) else axis ^ turned, rotation,
            made.args[6])


def signs(node: Any) -> str:
    """Which signs a rotation reads: of the step that comes in, or of none."""
    if node is None or node.target is ops.fixed_signs:
        return "none" if node is None else "fixed"
    return "step" if node.args[0].op == "placeholder" else "fixed or layer"


def _symmetric(format: str) -> bool:
    """Whether the blocks of a transpose are the transpose of the blocks: no axis to tell."""
    shape = parse(format).granularity
    return shape.kind == "tensor" or (shape.kind == "tile" and shape.rows == shape.columns)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
def test_the_graph_carries_what_the_recipe_declares(
    recipe: TrainingRecipe, x: torch.Tensor, graphs: list[torch.fx.Graph]
):
    step(prepared(recipe), x)
    (graph,) = graphs
    found = [node.args[:2] for node in graph.find_nodes(op="call_function", target=ops.gemm)]
    wanted = []
    for product, kinds in (("fprop", "xw"), ("dgrad", ("dy", "w")), ("wgrad", ("dy", "x"))):
        pair = [recipe.operands.get(f"{product}.{kind}") for kind in kinds]
        if any(pair):
            wanted.append(tuple(_declared(each, place) for place, each in enumerate(pair)))
    assert sorted(map(str, (tuple(map(read, pair)) for pair in found))) == sorted(map(str, wanted))
    # nothing else is cast, and the head's products are as they were
    others = [node for node in graph.nodes
              if node.target in (aten.mm.default, aten.addmm.default)]
    assert len(others) == 6 - len(wanted)


def _declared(operand: Operand | None, place: int) -> tuple[Any, ...]:
    if operand is None:
        return AS_IT_IS
    if operand.format in PLAIN:
        return ("torch.bfloat16", "nearest", None, (0, "none"), 1.0)
    # a product sums over the second axis of its left factor, the first of its right one
    return (operand.format, operand.rounding, None if _symmetric(operand.format) else 1 - place,
            (operand.hadamard, operand.signs), operand.prescale)


SOLVED = [recipe for recipe in NAMED if recipe.operands and solved(recipe) is not None]


@pytest.mark.parametrize("recipe", SOLVED, ids=lambda r: r.name)
def test_the_graph_of_chosen_exponents_carries_what_the_recipe_declares(
    recipe: TrainingRecipe, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
):
    """All products but a head's, by the dtypes of their factors."""
    found: list[tuple[str, str]] = []

    def spied(joint: torch.fx.GraphModule, *rest: Any) -> Any:
        made = lowered(joint, *rest)
        found.extend(tuple(str(factor.meta["val"].dtype) for factor in node.args[:2])
                     for node in joint.graph.find_nodes(op="call_function", target=ops.gemm))
        return made

    lowered = dynamo.lower_products
    monkeypatch.setattr(dynamo, "lower_products", spied)
    step(prepared(recipe), x)
    dtypes = {role: "torch.bfloat16" if each.format in PLAIN else
              f"torch.{parse(each.format).element.native}".replace("torch.torch", "torch")
              for role, each in recipe.operands.items()}
    layer = [(dtypes[f"{product}.{left}"], dtypes[f"{product}.{right}"]) for product, left, right
             in (("fprop", "x", "w"), ("dgrad", "dy", "w"), ("wgrad", "dy", "x"))]
    layers = 1 if "head" in recipe.high else 2
    assert sorted(found) == sorted(layer * layers)
    if recipe.name != "bf16":
        assert layer == [("torch.float8_e4m3fn",) * 2, *[
            ("torch.float8_e5m2", "torch.float8_e4m3fn")] * 2]


def test_nvfp4_is_rotated_with_the_vector_of_transformer_engine(
    x: torch.Tensor, graphs: list[torch.fx.Graph]
):
    step(prepared("nvfp4", seed=7), x)
    turned = graphs[0].find_nodes(op="call_function", target=ops.rotate)
    assert {node.args[2].target for node in turned} == {ops.fixed_signs} and len(turned) == 2
    assert torch.equal(ops.fixed_signs(torch.tensor([5])), TRANSFORMER_ENGINE)


def test_a_seed_repeats_a_run_and_another_does_not(x: torch.Tensor):
    first = [step(model, x) for model in [prepared("nvfp4")] for _ in range(2)]
    again = [step(model, x) for model in [prepared("nvfp4")] for _ in range(2)]
    for a, b in zip(first, again, strict=True):
        assert all(torch.equal(*pair) for pair in zip(a, b, strict=True))
    assert not torch.equal(first[0][1], first[1][1])  # of other steps
    assert not torch.equal(step(prepared("nvfp4", seed=1), x)[1], first[0][1])


@pytest.mark.parametrize("name", ["nvfp4", "ue5m3", "fp8-delayed"])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(name: str, x: torch.Tensor):
    recipe = training_recipe(name)
    if name == "ue5m3":  # a held scale that changes in between
        recipe = recipe.replace(**{f"{role}.scaling": "held:3" for role in recipe.operands})
    sizes = [1.0, 3.0, 0.5, 2.0, 0.25, 1.0]
    model = prepared(recipe)
    whole = [step(model, x * size) for size in sizes]
    model = prepared(recipe)
    for size in sizes[:2]:
        step(model, x * size)
    saved = training_state(model).state_dict()
    model = prepared(recipe)
    training_state(model).load_state_dict(saved)
    for size, want in zip(sizes[2:], whole[2:], strict=True):
        got = step(model, x * size)
        assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


def test_evaluation_does_not_count_as_a_step(x: torch.Tensor):
    want = [step(model, x) for model in [prepared("nvfp4")] for _ in range(2)][1]
    model = prepared("nvfp4")
    step(model, x)
    with torch.no_grad():
        model(x)
        model(x)
    got = step(model, x)
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


def test_a_phase_begins_at_its_step(x: torch.Tensor):
    recipe = with_tail(training_recipe("fp4-all-the-way"), 2)
    model = prepared(recipe)
    got = [step(model, x) for _ in range(3)]
    for number, found in enumerate(got):
        torch.manual_seed(0)
        close(found, ByHand(recipe, number).step_of(Pair(), x))


@pytest.mark.parametrize(("scaling", "sizes", "used"), [
    # amax of inputs is amax(x) times these; the scale of each step is found by these
    ("held:2", [1, 4, 2, 8], [1, 1, 2, 2]),
    ("delayed:2", [1, 4, 2, 8, 1], [1, 1, 4, 4, 8]),
    ("static", [1, 4, 2], [1, 4, 4]),  # the first one, then as much as four times that
])
def test_scales_are_of_the_steps_they_should_be(
    scaling: str, sizes: list[int], used: list[int], x: torch.Tensor
):
    role = {"fprop.x": Operand(format="e4m3[tensor]*f32", scaling=scaling)}
    recipe = TrainingRecipe(name="one", description="", operands=role, high=("head",))
    model = prepared(recipe)
    for size, of in zip(sizes, used, strict=True):
        got = step(model, x * size)[0]
        value = x * size * model.embed
        largest = (x * model.embed).abs().max() * of
        data, outer = quantize_operand(value, "e4m3[tensor]*f32", 1, tensor_amax=largest.detach())
        hidden = (data.float() * outer) @ model.middle.weight.t()
        want = model.head(hidden.square()).square().mean()
        torch.testing.assert_close(got, want.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("scaling", "largest"), [
    ("constant:-9", 448 * 2.0**-9), ("delayed:2", None), ("held:2", None), ("static", None)])
def test_gradients_are_clipped_at_the_scale_that_forward_had(
    scaling: str, largest: float | None, x: torch.Tensor
):
    """The second step's data are eight times the first one's, whose amax is remembered."""
    role = {"fprop.x": Operand(format="e4m3[tensor]*f32", scaling=scaling, estimator="clipped")}
    model = prepared(TrainingRecipe(name="one", description="", operands=role))
    step(model, x)
    if largest is None:
        largest = float((x * model.embed).abs().max()) * (4 if scaling == "static" else 1)
    got = step(model, x * 8)[1]  # of what the layer's input was multiplied by
    assert torch.equal(got == 0, (x * 8 * model.embed).abs() > largest)


def test_the_state_of_another_run_is_refused(x: torch.Tensor):
    model = prepared("ue5m3")
    step(model, x)
    state = training_state(model)
    saved = state.state_dict()
    with pytest.raises(ConfigError, match="seed"):
        training_state(prepared("ue5m3", seed=3)).load_state_dict(saved)
    gone = next(name for name in saved if name.endswith("fprop.x"))
    with pytest.raises(ConfigError, match="of other operands: without"):
        state.load_state_dict({name: value for name, value in saved.items() if name != gone})
    with pytest.raises(ConfigError, match="was not given to"):
        training_state(Pair())


def test_the_report_lists_every_operand_and_why_the_head_is_high(
    x: torch.Tensor, capsys: pytest.CaptureFixture[str]
):
    model = prepared("nvfp4")
    step(model, x)
    (report,) = model.scale_report()
    assert {(each.layer, each.role) for each in report.quantized} == {
        ("middle.weight", role) for role in training_recipe("nvfp4").operands} - {
            ("middle.weight", "dgrad.w")}  # the same 16×16 blocks as fprop.w
    assert len(report.high) == 3
    model.scale_report().show()
    assert "middle.weight" in capsys.readouterr().out


def test_a_model_compiled_by_name_takes_a_recipe_too(x: torch.Tensor):
    want = step(prepared("nvfp4"), x)
    torch.manual_seed(0)
    model = Pair()
    compiled = torch.compile(model, backend="scaleprop", options={"recipe": "nvfp4",
                                                                  "inner": "eager"})
    got = step(compiled, x)
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
    assert len(training_state(model).state_dict()) == 2  # the seed, and one counter
