"""Small models, and programs made of them, for the tests of backends."""

from typing import Any

from torch import Tensor, nn

from scaleprop.passes.base import Program
from scaleprop.passes.capture import capture
from scaleprop.passes.pipeline import build
from scaleprop.recipes import named_recipe


class Mlp(nn.Module):
    """Two linears with a GELU between them."""

    def __init__(self, width: int = 64, hidden: int = 160) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class Block(nn.Module):
    """Pre-LN attention with separate projections, and a ReLU feed-forward."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=i < 2) for i in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for f in (self.q, self.k, self.v))
        z = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(z)
        return x + self.down(self.up(self.norm2(x)).relu())


class Pictures(nn.Module):
    """Embedding rows as pictures through a convolution: the operators that are not linears."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 3 * 8 * 8)
        self.convolution = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> dict[str, Any]:
        pictures = self.table(ids).view(-1, 3, 8, 8)
        features = self.convolution(pictures).relu().mean((2, 3))
        return {"logits": self.head(features), "nothing": None}


def program(model: nn.Module, inputs: tuple[Tensor, ...], recipe: str,
            dynamic_shapes: Any = None) -> Program:
    """``model`` after the passes of a recipe, calibrated on its own inputs."""
    plan = named_recipe(recipe)
    captured = capture(model.eval(), inputs, {}, dynamic_shapes)
    calibration = [inputs] if plan.needs_calibration else None
    return build(plan, calibration=calibration).run(captured)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
