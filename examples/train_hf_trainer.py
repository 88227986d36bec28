"""Hugging Face ``Trainer`` with scaleprop's callback.

    python -m examples.train_hf_trainer [--recipe fp8] [--short]
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import Trainer, TrainingArguments

from examples import small_task
from examples.small_task import ACCUMULATED, BATCH, CLIP, RATE, STEPS, STOP, Measured, Options
from scaleprop.adapters.transformers import Callback


def trainer(given: Options) -> Trainer:
    """A trainer whose model trains by the recipe."""
    arguments = TrainingArguments(
        output_dir=str(given.out / "trainer"), use_cpu=True, max_steps=STEPS, learning_rate=RATE,
        weight_decay=0.0, lr_scheduler_type="constant", max_grad_norm=CLIP,
        per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATED, train_sampling_strategy="sequential",
        save_steps=STOP, logging_steps=1, disable_tqdm=True, report_to="none")
    return Trainer(model=small_task.classifier(), args=arguments,
                   train_dataset=small_task.training_data(),  # type: ignore[arg-type]
                   eval_dataset=small_task.held_out(),  # type: ignore[arg-type]
                   callbacks=[Callback(given.recipe, inner=given.inner)])


def logged(finished: Trainer) -> list[float]:
    """Loss of each step: the mean of its micro-batches."""
    return [entry["loss"] for entry in finished.state.log_history if "loss" in entry]


def main(arguments: Sequence[str] | None = None) -> Measured:
    """Train, evaluate; then resume from the checkpoint that was written on the way."""
    given = small_task.options(__doc__, arguments)
    straight = trainer(given)
    straight.train()
    evaluated = straight.evaluate()["eval_loss"]
    resumed = trainer(given)
    resumed.train(resume_from_checkpoint=str(given.out / "trainer" / f"checkpoint-{STOP}"))
    measured = Measured(logged(straight), logged(resumed)[STOP:], evaluated)
    measured.show(given.recipe)
    return measured


if __name__ == "__main__":
    main()
