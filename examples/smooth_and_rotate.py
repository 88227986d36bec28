"""Smoothing and rotation on an architecture that no library knows: nothing is named, all is found.

    python -m examples.smooth_and_rotate [--short]     # writes demo/smooth_and_rotate/

A few channels of this model are large, as in trained Transformers, and cost W4A4 its accuracy.
Each method says where a transform goes; the engine follows the operators' rules through gates,
branches and regrouped channels until parameters absorb it, and the report says what they did.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import scaleprop

WIDTH, GROUPS = 128, 4
CHAINS: dict[str, list[str]] = {
    "rounding alone": [],
    "smooth": ["smooth{alpha=0.6}"],
    "rotate": ["fold-norms", "rotate"],
    "smooth, rotate": ["smooth{alpha=0.6}", "fold-norms", "rotate"],
}


class Mixer(nn.Module):
    """Two branches from one norm: a gated one, and one that shifts groups along the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.gate, self.value, self.shifted = (nn.Linear(WIDTH, 2 * WIDTH) for _ in range(3))
        self.out = nn.Linear(4 * WIDTH, WIDTH)
        with torch.no_grad():
            self.norm.weight[::31] *= 30  # outliers: a few channels of what the branches read

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, WIDTH] → the same."""
        y = self.norm(x)
        gated = nn.functional.silu(self.gate(y)) * self.value(y)
        groups = self.shifted(y).chunk(GROUPS, dim=-1)
        shifted = torch.cat([group.roll(step, dims=1) for step, group in enumerate(groups)], dim=-1)
        return x + self.out(torch.cat([gated, shifted], dim=-1))


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Each chain's signal-to-noise ratio against float32, in dB."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="two chains")
    parser.add_argument("--out", type=Path, default=Path("demo/smooth_and_rotate"))
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = nn.Sequential(Mixer(), Mixer()).eval()
    calibration, x = [torch.randn(4, 16, WIDTH) for _ in range(4)], torch.randn(8, 16, WIDTH)
    with torch.no_grad():
        expected = model(x)
    given.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, float] = {}
    for name in ("rounding alone", "smooth, rotate") if given.short else CHAINS:
        compiled = scaleprop.compile(model, x, recipe="int4-int4", calibration=calibration,
                                     backend="reference", passes=CHAINS[name])
        noise = (compiled(x) - expected).square().sum()
        found[name] = 10 * float(torch.log10(expected.square().sum() / noise))
        print(f"{name:16} {found[name]:5.1f} dB, {len(compiled.report.transforms)} transforms")
        compiled.report.save(given.out / f"{name.replace(', ', '-').replace(' ', '-')}.html")
    return found


if __name__ == "__main__":
    main()
