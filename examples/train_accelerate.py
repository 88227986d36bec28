"""Accelerate's loop, with scaleprop's ``prepare`` in place of the accelerator's.

    accelerate launch -m examples.train_accelerate [--recipe fp8] [--short]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from examples import small_task
from examples.small_task import ACCUMULATED, BATCH, CLIP, RATE, STEPS, STOP, Measured, Options
from scaleprop.adapters.accelerate import prepare


class Run:
    """An accelerator with what it prepared."""

    def __init__(self, given: Options) -> None:
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)
        model = small_task.classifier()
        optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.0)
        self.model, self.optimizer, self.train_data, self.test_data = prepare(
            self.accelerator, model, optimizer, DataLoader(small_task.training_data(), BATCH),  # type: ignore[arg-type]
            DataLoader(small_task.held_out(), BATCH), recipe=given.recipe, inner=given.inner)  # type: ignore[arg-type]

    def train(self, steps: range) -> list[float]:
        """Loss of each micro-batch."""
        losses: list[float] = []
        batches: list[Any] = list(self.train_data)
        for batch in batches[steps.start * ACCUMULATED:steps.stop * ACCUMULATED]:
            with self.accelerator.accumulate(self.model):
                loss = self.model(**batch)["loss"]
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), CLIP)
                self.optimizer.step()
                self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def evaluate(self) -> float:
        """Mean loss on held-out data."""
        self.model.eval()
        with torch.no_grad():
            losses = [self.model(**batch)["loss"] for batch in self.test_data]
        self.model.train()
        return torch.stack(losses).mean().item()


def main(arguments: Sequence[str] | None = None) -> Measured:
    """Train, evaluate; then resume from the checkpoint that was written on the way."""
    given = small_task.options(__doc__, arguments)
    folder = str(given.out / "accelerate")
    run = Run(given)
    losses = run.train(range(STOP))
    run.accelerator.save_state(folder)
    losses += run.train(range(STOP, STEPS))
    evaluated = run.evaluate()
    run = Run(given)
    run.accelerator.load_state(folder)
    measured = Measured(losses, run.train(range(STOP, STEPS)), evaluated)
    measured.show(given.recipe)
    return measured


if __name__ == "__main__":
    main()
