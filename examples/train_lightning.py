"""A Lightning ``Trainer`` with scaleprop's precision plugin.

    python -m examples.train_lightning [--recipe fp8] [--short]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from examples import small_task
from examples.small_task import ACCUMULATED, BATCH, CLIP, RATE, STEPS, STOP, Measured, Options
from scaleprop.adapters.lightning import Precision


class Task(LightningModule):
    """The model, its loss and its optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.model = small_task.classifier()
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        loss = self.model(**batch)["loss"]
        self.losses.append(loss.item())
        return loss

    def train_dataloader(self) -> DataLoader[Any]:
        """STOP steps' samples an epoch: Lightning does not go on in the middle of one."""
        size = STOP * ACCUMULATED * BATCH
        return DataLoader(small_task.training_data()[self.current_epoch * size:][:size], BATCH)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(small_task.held_out(), BATCH)  # type: ignore[arg-type]

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        self.log("held_out", self.model(**batch)["loss"], batch_size=BATCH)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), RATE, weight_decay=0.0)


def trainer(given: Options, folder: Path) -> Trainer:
    """A trainer that saves its state after every epoch."""
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True,
                           enable_version_counter=False)
    return Trainer(
        accelerator="cpu", max_epochs=STEPS // STOP, reload_dataloaders_every_n_epochs=1,
        accumulate_grad_batches=ACCUMULATED,
        gradient_clip_val=CLIP, plugins=[Precision(given.recipe, inner=given.inner)],
        callbacks=[keep], logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder)


def main(arguments: Sequence[str] | None = None) -> Measured:
    """Train, evaluate; then resume from the checkpoint that was written on the way."""
    given = small_task.options(__doc__, arguments)
    folder = given.out / "lightning"
    task, straight = Task(), trainer(given, folder)
    straight.fit(task)
    (found,) = straight.validate(task, verbose=False)
    resumed = Task()
    trainer(given, folder).fit(resumed, ckpt_path=str(folder / "epoch=0.ckpt"))
    measured = Measured(task.losses, resumed.losses, found["held_out"])
    measured.show(given.recipe)
    return measured


if __name__ == "__main__":
    main()
