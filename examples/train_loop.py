"""A training loop of one's own: accumulation, clipping, evaluation, a checkpoint.

    python -m examples.train_loop [--recipe fp8] [--short]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.data import DataLoader

import scaleprop
from examples import small_task
from examples.small_task import ACCUMULATED, BATCH, CLIP, RATE, STEPS, STOP, Measured, Options
from scaleprop.training import training_state


def start(given: Options) -> tuple[small_task.Classifier, torch.optim.AdamW]:
    """A model that trains by the recipe, and its optimizer."""
    model = small_task.classifier()
    scaleprop.prepare_training(model, given.recipe, inner=given.inner)
    return model, torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.0)


def train(model: small_task.Classifier, optimizer: torch.optim.AdamW, steps: range) -> list[float]:
    """Loss of each micro-batch."""
    batches = list(DataLoader(small_task.training_data(), BATCH))  # type: ignore[arg-type]
    losses: list[float] = []
    for step in steps:
        optimizer.zero_grad()
        for batch in batches[step * ACCUMULATED:(step + 1) * ACCUMULATED]:
            loss = model(**batch)["loss"]
            (loss / ACCUMULATED).backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    return losses


def evaluate(model: small_task.Classifier) -> float:
    """Mean loss on held-out data."""
    model.eval()
    with torch.no_grad():
        losses = [model(**batch)["loss"] for batch in DataLoader(small_task.held_out(), BATCH)]  # type: ignore[arg-type]
    model.train()
    return torch.stack(losses).mean().item()


def main(arguments: Sequence[str] | None = None) -> Measured:
    """Train, evaluate; then resume from the checkpoint that was written on the way."""
    given = small_task.options(__doc__, arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    model, optimizer = start(given)
    losses = train(model, optimizer, range(STOP))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "scaleprop": training_state(model).state_dict()}, given.out / "loop.pt")
    losses += train(model, optimizer, range(STOP, STEPS))
    evaluated = evaluate(model)
    print(f"{sum(len(graph.high) for graph in scaleprop.scale_report(model))} products of matrices "
          "stayed high; scale_report(model).show() says why")

    model, optimizer = start(given)
    saved = torch.load(given.out / "loop.pt")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    training_state(model).load_state_dict(saved["scaleprop"])
    measured = Measured(losses, train(model, optimizer, range(STOP, STEPS)), evaluated)
    measured.show(given.recipe)
    return measured


if __name__ == "__main__":
    main()
