"""The whole of scaleprop on a small model: compile, call, report, export, save, load.

    python -m examples.quickstart            # writes demo/quickstart/ (--out DIR)
    python -m examples.quickstart --short    # fewer recipes
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

import scaleprop


class Block(torch.nn.Module):
    """A pre-norm feed-forward block."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.up = torch.nn.Linear(width, 4 * width)
        self.down = torch.nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, width] → [batch, width]."""
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Compile with several recipes; returns each recipe's signal-to-noise ratio in dB."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("demo/quickstart"))
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(8, 256)
    with torch.no_grad():
        expected = model(x)

    found: dict[str, float] = {}
    recipes = ("int8-dynamic", "mxfp4", "fp8", "mxfp8")
    for recipe in recipes[:2] if given.short else recipes:
        compiled = scaleprop.compile(model, x, recipe=recipe)
        noise = (compiled(x) - expected).square().sum()
        found[recipe] = 10 * float(torch.log10(expected.square().sum() / noise))
        share = compiled.report.size_ratio
        print(f"{recipe:14} {found[recipe]:5.1f} dB, parameters {share:.3f}× of float32")

    # A static recipe takes its activation scales from data; one layer is kept in float32.
    batches = [torch.randn(8, 256) for _ in range(4)]
    compiled = scaleprop.compile(model, x, recipe="int8", calibration=batches, exclude=["down"])
    compiled.report.show()

    given.out.mkdir(parents=True, exist_ok=True)
    compiled.report.save(given.out / "report.html")
    compiled.export(given.out / "block.onnx")  # runs anywhere ONNX Runtime does
    compiled.save(given.out / "saved")
    loaded = scaleprop.load(given.out / "saved")
    torch.testing.assert_close(loaded(torch.ones(3, 256)), compiled(torch.ones(3, 256)))
    print(f"wrote {given.out}")
    return found


if __name__ == "__main__":
    main()
