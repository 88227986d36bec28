"""Training by recipe where programs are not plain: passes out of order, repeated, without
gradients; weights used twice; data that are no numbers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import scaleprop
from scaleprop.errors import ConfigError
from scaleprop.formats import fake_quantize
from scaleprop.recipes.training import Operand, TrainingRecipe
from scaleprop.recipes.training_named import training_recipe
from scaleprop.training import training_state

RECIPES = ("nvfp4", "mxfp4-quartet", "fp8-delayed", "ue5m3", "int4-cnn", "e5m7")
CARRIED = ("fp8-delayed", "ue5m3")  # amax, from step to step
ROWS, WIDTH = 32, 32


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 48)
        self.down = nn.Linear(48, WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(self.up(x).square()))


def prepared(
    recipe: str | TrainingRecipe, make: Callable[[], nn.Module] = Mlp, **options: Any
) -> nn.Module:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return scaleprop.prepare_training(make(), recipe, inner="eager", **options)


def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


def gradients(model: nn.Module) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def step(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    made = loss(model, x)
    made.backward()
    return [made.detach(), *gradients(model)]


def same(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))


# --- passes out of order --------------------------------------------------------------------------


@pytest.mark.parametrize("name", CARRIED)
def test_evaluation_leaves_carried_amax_alone(name: str, x: torch.Tensor):
    runs = []
    for evaluates in (False, True):
        model, run = prepared(name), []
        for size in (4.0, 1.0, 2.0):
            run += step(model, x * size)
            if evaluates:
                with torch.no_grad():
                    model(x * 100)
        runs.append(run)
    same(*runs)


def test_what_two_forward_passes_saw_is_kept_whichever_backward_comes_first(x: torch.Tensor):
    """Histories of ``delayed:3``: the largest magnitudes of three steps, for gradients as well."""
    one = Operand(format="e4m3[tensor]*f32", scaling="delayed:3")
    recipe = TrainingRecipe(name="one", description="", high=("head",),
                            operands={"fprop.x": one, "dgrad.dy": one})
    sizes = (1.0, 2.0)
    found = []
    for order in (None, (0, 1), (1, 0)):
        model = prepared(recipe)
        step(model, x)
        if order is None:
            for size in sizes:
                step(model, x * size)
        else:
            losses = [loss(model, x * size) for size in sizes]
            for place in order:
                losses[place].backward()
        step(model, x)
        found.append(training_state(model).state_dict())
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for key, value in other.items():  # scales of gradients may be of another step: roundings
            torch.testing.assert_close(value, found[0][key], rtol=0.1, atol=0)
    assert sum(value.count_nonzero() == 3 for value in found[1].values()) == 3


@pytest.mark.parametrize("name", CARRIED)
def test_a_resumed_run_may_evaluate_first(name: str, x: torch.Tensor):
    model = prepared(name)
    step(model, x * 4)
    saved = training_state(model).state_dict()
    want = step(model, x)
    model = prepared(name)
    training_state(model).load_state_dict(saved)
    with torch.no_grad():
        model(x)
    again = training_state(model).state_dict()
    assert again.keys() == saved.keys()
    same([again[key] for key in saved], list(saved.values()))
    same(step(model, x), want)


def test_a_state_goes_back_to_the_beginning(x: torch.Tensor):
    model = prepared("fp8-delayed")
    beginning = training_state(model).state_dict()
    want = step(model, x)
    step(model, x * 8)
    training_state(model).load_state_dict(beginning)
    same(step(model, x), want)


class Recomputed(nn.Module):
    """A prepared model under activation checkpointing."""

    def __init__(self, inside: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inside, self.reentrant = inside, reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inside, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp4-tetrajet", "fp8-delayed", "ue5m3"])
def test_a_recomputed_model_takes_the_same_steps(name: str, reentrant: bool, x: torch.Tensor):
    inputs = [(x * size).requires_grad_() for size in (1.0, 4.0, 2.0)]
    plain = prepared(name)
    want = [step(plain, each) for each in inputs]
    model = Recomputed(prepared(name), reentrant)
    for each, expected in zip(inputs, want, strict=True):
        same(step(model, each), expected)


class Around(nn.Module):
    """A model part of which is recomputed."""

    def __init__(self, recomputes: bool) -> None:
        super().__init__()
        self.inside, self.head, self.recomputes = Mlp(), nn.Linear(4, 4), recomputes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = checkpoint(self.inside, x, use_reentrant=False) if self.recomputes \
            else self.inside(x)
        return self.head(hidden)


@pytest.mark.parametrize("name", ["nvfp4", "fp8-delayed", "mxfp4-quartet"])
def test_a_part_is_recomputed_as_it_was(name: str, x: torch.Tensor):
    plain, around = ([each for size in (1.0, 4.0) for each in step(model, x * size)]
                     for recomputes in (False, True)
                     for model in [prepared(name, lambda: Around(recomputes))])  # noqa: B023
    same(plain, around)


def test_a_recipe_may_follow_another(x: torch.Tensor):
    model = prepared("ue5m3")
    for place, name in enumerate(("ue5m3", "fp8-delayed", "nvfp4")):
        scaleprop.prepare_training(model, name, inner="eager")
        got = step(model, x)
        state = training_state(model).state_dict()
        assert [int(value) for key, value in state.items() if key.endswith("step")] == [place]
        if name == "fp8-delayed":  # what another recipe carried is of no use to it
            same(got, step(prepared(name), x))


@pytest.mark.parametrize("name", CARRIED)
def test_a_skipped_backward_is_no_amax(name: str, x: torch.Tensor):
    model = prepared(name)
    step(model, x)
    loss(model, x * 2)
    found = step(model, x)
    assert all(value.isfinite().all() for value in found)


# --- which product is whose -----------------------------------------------------------------------


class Products(torch.autograd.Function):
    """A linear layer of the recipe ``mxfp8``: three products of factors in blocks of 32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return quantized(x, 1) @ quantized(w, 1).t()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:  # type: ignore[override]
        x, w = ctx.saved_tensors
        return (quantized(dy, 1) @ quantized(w, 0),
                quantized(dy, 0).t() @ quantized(x, 0))


def quantized(x: torch.Tensor, axis: int) -> torch.Tensor:
    return fake_quantize(x, training_recipe("mxfp8").operands["fprop.x"].format, axis)


def by_hand(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return Products.apply(x, w)  # type: ignore[return-value]


Linear = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
SHARED: dict[str, Callable[[Linear, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "one after another": lambda f, x, w: f(f(x, w).square(), w),
    "of two inputs, summed": lambda f, x, w: f(x, w) + f(x * 2 + 1, w),
    "of one input, multiplied": lambda f, x, w: f(x, w) * f(x, w).cos(),
    "of data and of what needs a gradient": lambda f, x, w: f(f(x.detach(), w).square(), w),
}


class Shared(nn.Module):
    """One weight in several products, and a head."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 6)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor, linear: Linear = nn.functional.linear) -> torch.Tensor:
        return self.head(SHARED[self.way](linear, x * self.scale, self.weight))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("way", SHARED)
def test_a_weight_may_be_used_again(way: str, frozen: bool, x: torch.Tensor):
    def make() -> Shared:
        made = Shared(way)
        made.weight.requires_grad_(not frozen)
        return made

    model = prepared("mxfp8", make)
    got = step(model, x)
    torch.manual_seed(0)
    plain = make()
    made = plain(x, by_hand).square().mean()
    made.backward()
    for a, b in zip(got, [made.detach(), *gradients(plain)], strict=True):
        assert (a - b).norm() <= 2e-6 * b.norm()
    (report,) = model.scale_report()  # type: ignore[operator]
    assert {each.layer for each in report.quantized} == {"weight", "weight:1"}
    assert not any("not found" in why for why in report.high.values())


def test_models_of_a_class_compiled_by_name_have_states_of_their_own(x: torch.Tensor):
    torch._dynamo.reset()
    want = [step(prepared("fp8-delayed"), x * 8)]
    model = prepared("fp8-delayed")
    want += [step(model, x), step(model, x)]
    torch._dynamo.reset()
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Mlp())
    loud, quiet = (torch.compile(each, backend="scaleprop", options={
        "recipe": "fp8-delayed", "inner": "eager"}) for each in models)
    for runs, size, expected in ((quiet, 1, want[1]), (loud, 8, want[0]), (quiet, 1, want[2])):
        same(step(runs, x * size), expected)
    for each, steps in zip(models, (0, 1), strict=True):
        state = training_state(each).state_dict()
        assert [int(value) for key, value in state.items() if key.endswith("step")] == [steps]
        assert scaleprop.scale_report(each)


def test_parts_compiled_by_name_have_no_one_state(x: torch.Tensor):
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.last(x)

    torch._dynamo.reset()
    model = Broken()
    step(torch.compile(model, backend="scaleprop", options={  # type: ignore[arg-type]
        "recipe": "nvfp4", "inner": "eager"}), x)
    with pytest.raises(ConfigError, match=r"2 parts .*prepare_training"):
        training_state(model)


class Scaled(nn.Module):
    """torch.addmm that multiplies its bias and its product."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.weight, self.bias = (nn.Parameter(torch.randn(shape))
                                  for shape in ((WIDTH, WIDTH), (WIDTH,)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.addmm(self.bias, self.first(x), self.weight, beta=0.5, alpha=3.0))


@pytest.mark.parametrize("name", ["fp8", "mxfp8"])
def test_a_product_with_alpha_and_beta_is_as_it_was_and_listed(name: str, x: torch.Tensor):
    model = prepared(name, Scaled)
    got = step(model, x)
    torch.manual_seed(0)
    for a, b in zip(got, step(Scaled(), x), strict=True):
        assert (a - b).norm() <= 0.2 * b.norm()
    (report,) = model.scale_report()  # type: ignore[operator]
    assert "addmm with alpha or beta" in report.high.values()


# --- what was and was not done --------------------------------------------------------------------


def test_what_forward_did_not_quantize_is_listed(x: torch.Tensor):
    recipe = training_recipe("mxfp4-tetrajet").replace(name="half", **{"fprop.x": None})
    model = prepared(recipe)
    step(model, x)
    (report,) = model.scale_report()  # type: ignore[operator]
    why = {each.role: each.why for each in report.quantized}
    assert "of the data instead" in why.pop("wgrad.x")
    assert set(why.values()) == {""}


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.whole, self.groups = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.groups(self.whole(x).square()).mean((2, 3)))


def test_a_convolution_is_listed_once_as_it_is():
    model = prepared("int4-cnn", Convolutions)
    step(model, torch.randn(2, 3, 8, 8))
    (report,) = model.scale_report()  # type: ignore[operator]
    assert {each.layer for each in report.quantized} == {"whole.weight", "head.weight"}
    assert len(report.high) == 2
    assert all("groups" in why for why in report.high.values())


def test_truncation_is_reported_and_leaves_no_weights_to_deploy(
    x: torch.Tensor, capsys: pytest.CaptureFixture[str]
):
    model = prepared("e5m7")
    step(model, x)
    (report,) = reports = model.scale_report()  # type: ignore[operator]
    assert report.truncated > 10
    reports.show()
    assert "values truncated" in capsys.readouterr().out
    for name in ("e5m7", "fp8"):
        model = prepared(name)
        step(model, x)
        with pytest.raises(ConfigError, match="Remedy: a recipe with scales of the data"):
            scaleprop.training.deployable(model)


# --- data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", RECIPES)
def test_what_is_no_number_shows_and_leaves_amax_alone(name: str, value: float, x: torch.Tensor):
    model = prepared(name)
    step(model, x)
    before = training_state(model).state_dict()
    bad = x.clone()
    bad[3, 5] = value
    assert not step(model, bad)[0].isfinite()
    assert all(each.isfinite().all() for each in training_state(model).state_dict().values())
    if name == "ue5m3":  # held: of the first step alone
        after = training_state(model).state_dict()
        same([after[key] for key in before if "/" in key],
             [value for key, value in before.items() if "/" in key])


@pytest.mark.parametrize("name", RECIPES)
def test_no_rows_are_no_error(name: str, x: torch.Tensor):
    model = prepared(name)
    step(model, x)
    model(x[:0]).sum().backward()
    assert all(not value.any() for value in gradients(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", RECIPES)
def test_gradients_have_the_dtype_of_parameters(name: str, dtype: torch.dtype, x: torch.Tensor):
    model = prepared(name, lambda: Mlp().to(dtype))
    found = step(model, x.to(dtype))
    torch.manual_seed(0)
    want = step(Mlp(), x)
    for a, b in zip(found, want, strict=True):
        assert a.dtype == dtype
        assert nn.functional.cosine_similarity(a.float().flatten(), b.flatten(), 0) > 0.7


def test_copies_are_plain_models(x: torch.Tensor):
    model = prepared("nvfp4")
    step(model, x)
    torch.manual_seed(0)
    want = Mlp()(x)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(made(x), want)
        with pytest.raises(ConfigError, match="was not given to"):
            training_state(made)


class Grouped(nn.Module):
    """Attention whose queries share keys and values by twos."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.pairs = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.out, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query = self.queries(x).unflatten(-1, (4, 8)).transpose(1, 2)
        key, value = self.pairs(x).unflatten(-1, (4, 8)).transpose(1, 2).chunk(2, 1)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True,
                                                           enable_gqa=True)
        return self.head(self.out(mixed.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("dynamic", [None, True])
def test_sizes_change_and_the_steps_are_counted_on(dynamic: bool | None):
    carried = Operand(format="e4m3[tensor]*f32", scaling="delayed:4")
    current = training_recipe("fp8-current")
    recipe = current.replace(name="all", operands={
        **dict.fromkeys(current.operands, carried), "attention.x": carried})
    model, plain = prepared(recipe, Grouped, dynamic=dynamic), Grouped()
    plain.load_state_dict(model.state_dict())
    for place, (batch, tokens) in enumerate(((2, 16), (3, 16), (2, 24))):
        x = torch.randn(batch, tokens, WIDTH)
        for a, b in zip(step(model, x), step(plain, x), strict=True):
            assert (a - b).norm() < 0.2 * b.norm() + 1e-4
        state = training_state(model).state_dict()
        assert [int(value) for key, value in state.items() if key.endswith("step")] == [place]
        histories = [value for key, value in state.items() if "/" in key]
        assert all(value.count_nonzero() == place + 1 for value in histories)
