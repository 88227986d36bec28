"""DDP on this machine's processes, against one process.

    python -m examples.train_ddp [--ranks 2] [--recipe fp8] [--short]

Ranks agree on the scales: with DDP, as with one process, a value has one exponent.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch.nn.parallel import DistributedDataParallel

from examples import small_ranks
from examples.small_ranks import STEPS, Options


def replicated(given: Options, folder: Path) -> list[float]:
    """Every rank has the whole model."""
    model = DistributedDataParallel(small_ranks.by_block(given))
    return small_ranks.train(model, small_ranks.adamw(model), range(STEPS))


def main(arguments: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Losses by what trained."""
    return small_ranks.compare(__doc__, arguments, "DDP", replicated)


if __name__ == "__main__":
    main()
