"""Train a small Llama on the standard library's source, in float32 and in FP8, side by side.

    python -m examples.train_lm [--steps 300] [--seeds 1] [--recipes fp32,fp8]

Characters are bytes, so nothing is downloaded and no tokenizer is trained. Both runs see the same
batches from the same initial weights. No loss scaling anywhere.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import transformers

import scaleprop

CONTEXT = 128
BATCH = 16
HELD_OUT = 40  # batches of validation text


def corpus() -> torch.Tensor:
    """The standard library's modules as one tensor of bytes."""
    folder = Path(sysconfig.get_path("stdlib"))
    texts = [path.read_bytes() for path in sorted(folder.glob("*.py"))]
    return torch.frombuffer(bytearray(b"\n".join(texts)), dtype=torch.uint8)


class Language(torch.nn.Module):
    """A Llama that returns its own loss: the whole step is one graph."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=256, hidden_size=width, intermediate_size=width * 8 // 3 // 32 * 32,
            num_hidden_layers=layers, num_attention_heads=width // 64,
            num_key_value_heads=width // 64, max_position_embeddings=CONTEXT, use_cache=False))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids=ids[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def batches(text: torch.Tensor, seed: int) -> Iterator[torch.Tensor]:
    """Random windows, [BATCH, CONTEXT + 1]."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - CONTEXT - 1, (BATCH, 1), generator=draw)
        yield text[starts + torch.arange(CONTEXT + 1)].long()


def train(recipe: str, seed: int, steps: int, width: int, layers: int) -> tuple[float, float]:
    """Validation loss after training, and seconds a step."""
    torch.manual_seed(seed)
    torch._dynamo.reset()
    text = corpus()
    split = len(text) * 9 // 10
    model = Language(width, layers)
    scaleprop.prepare_training(model, recipe)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95),
                                  weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    data = batches(text[:split], seed)
    for step in range(steps):
        if step == 2:
            started = time.perf_counter()  # compiled by now
        loss = model(next(data))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"{recipe} seed {seed} step {step}: {loss.item():.4f}", flush=True)
    seconds = (time.perf_counter() - started) / max(steps - 2, 1)
    held_out = batches(text[split:], 0)
    with torch.no_grad():
        losses = [model(next(held_out)) for _ in range(HELD_OUT)]
    return float(torch.stack(losses).mean()), seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and compare."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--recipes", default="fp32,fp8")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args(arguments)
    for seed in range(options.seeds):
        for recipe in options.recipes.split(","):
            loss, seconds = train(recipe, seed, options.steps, options.width, options.layers)
            print(f"{recipe} seed {seed}: validation loss {loss:.4f}, {seconds:.3f} s a step",
                  flush=True)


if __name__ == "__main__":
    main()
