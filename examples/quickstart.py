"""The whole of scaleprop on a small model: compile, call, report, export, save, load.

    python -m examples.quickstart            # writes demo/quickstart/
    python -m examples.quickstart --short    # fewer recipes
"""

from __future__ import annotations

import sys
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


def main(folder: Path, short: bool) -> dict[str, float]:
    """Compile with several recipes; returns each recipe's signal-to-noise ratio in dB."""
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(8, 256)
    with torch.no_grad():
        expected = model(x)

    found: dict[str, float] = {}
    for recipe in ("int8-dynamic", "mxfp4") if short else ("int8-dynamic", "fp8", "mxfp8", "mxfp4"):
        compiled = scaleprop.compile(model, x, recipe=recipe)
        noise = (compiled(x) - expected).square().sum()
        found[recipe] = 10 * float(torch.log10(expected.square().sum() / noise))
        share = compiled.report.size_ratio
        print(f"{recipe:14} {found[recipe]:5.1f} dB, parameters {share:.3f}× of float32")

    # A static recipe takes its activation scales from data; one layer is kept in float32.
    batches = [torch.randn(8, 256) for _ in range(4)]
    compiled = scaleprop.compile(model, x, recipe="int8", calibration=batches, exclude=["down"])
    compiled.report.show()

    folder.mkdir(parents=True, exist_ok=True)
    compiled.report.save(folder / "report.html")
    compiled.export(folder / "block.onnx")  # runs anywhere ONNX Runtime does
    compiled.save(folder / "saved")
    loaded = scaleprop.load(folder / "saved")
    torch.testing.assert_close(loaded(torch.ones(3, 256)), compiled(torch.ones(3, 256)))
    print(f"wrote {folder}")
    return found


if __name__ == "__main__":
    main(Path("demo/quickstart"), "--short" in sys.argv)
