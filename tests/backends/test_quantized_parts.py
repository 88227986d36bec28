"""Training by recipe of models that torch.compile takes in parts, or not at all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import scaleprop
from scaleprop.errors import ConfigError
from scaleprop.recipes.training import Operand, TrainingRecipe
from scaleprop.training import training_state

ROWS, WIDTH = 32, 32


def prepared(recipe: str | TrainingRecipe, make: Callable[[], nn.Module]) -> nn.Module:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return scaleprop.prepare_training(make(), recipe, inner="eager")


def step(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    made = model(x).square().mean()
    made.backward()
    return [made.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def same(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).square())


class Loop(nn.Module):
    """A graph break inside a loop: Dynamo takes blocks one by one, all by one graph."""

    def __init__(self, growth: float = 2.0) -> None:
        super().__init__()
        self.growth = growth
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        for block in self.blocks[1:]:
            block.load_state_dict(self.blocks[0].state_dict())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = []
        for place, block in enumerate(self.blocks):
            found.append(block(x * self.growth**place))
            torch._dynamo.graph_break()
        return torch.stack(found)


@pytest.mark.filterwarnings("ignore")
def test_blocks_that_share_a_graph_have_steps_scales_and_numbers_of_their_own(x: torch.Tensor):
    one = Operand(format="e4m3[tensor]*f32", scaling="delayed:3")
    recipe = TrainingRecipe(name="one", description="", high=(), operands={
        "fprop.x": one, "fprop.w": Operand(format="mxfp4:rceil", rounding="stochastic:16")})
    model = prepared(recipe, Loop)
    for size in (1.0, 2.0):
        step(model, x * size)
    saved = training_state(model).state_dict()
    for place in range(3):
        assert saved[f"blocks.{place}.up.weight|step"] == 1
        history = saved[f"blocks.{place}.up.weight#0|up.weight/fprop.x"]
        assert torch.equal(history[:2], x.abs().max() * 2.0**place * torch.tensor([1.0, 2.0]))
    want = step(model, x * 4)
    fresh = prepared(recipe, Loop)
    training_state(fresh).load_state_dict(saved)
    same(step(fresh, x * 4), want)
    first, second, third = prepared(recipe, lambda: Loop(growth=1.0))(x)  # the same but for bits
    assert not torch.equal(first, second) and not torch.equal(second, third)


class Recurrent(nn.Module):
    """Dynamo takes nothing of a recurrent layer, nor of the function that calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.LSTM(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x)[0])


@pytest.mark.parametrize(("make", "unread"), [
    (Recurrent, ("layer.weight_ih_l0", "layer.weight_hh_l0", "head.weight")), (Block, ()),
    (Loop, ())])
@pytest.mark.parametrize("name", ["nvfp4", "fp8"])
def test_what_was_not_compiled_is_said_and_listed(
    make: Callable[[], nn.Module], unread: tuple[str, ...], name: str, x: torch.Tensor,
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
):
    model = prepared(name, make)
    assert model.scale_report().unread == ()  # type: ignore[operator]
    for _ in range(2):
        step(model, x)
    reports = model.scale_report()  # type: ignore[operator]
    assert reports.unread == unread
    said = [record.message for record in caplog.records if "no graph reads" in record.message]
    assert len(said) == bool(unread) and all(each in "".join(said) for each in unread)
    reports.show()
    assert ("not compiled, as it was" in capsys.readouterr().out) == bool(unread)


def test_weights_of_blocks_that_share_a_graph_are_not_deployed(x: torch.Tensor):
    model = prepared("mxfp8", Loop)
    step(model, x)
    with pytest.raises(ConfigError, match="share a graph, in which"):
        scaleprop.training.deployable(model)


def test_a_fused_layer_of_which_nothing_is_known_is_listed():
    """What torch's encoder layers run in evaluation."""
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 48, batch_first=True).eval()
    model = scaleprop.prepare_training(layer, "mxfp8", inner="eager")
    with torch.no_grad():
        model(torch.randn(2, 8, WIDTH))
    (report,) = model.scale_report()
    assert not report.quantized
    assert ["of which nothing is known" in why for why in report.high.values()] == [True]
