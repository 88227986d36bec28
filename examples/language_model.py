"""The small Llama of ``examples/train_lm`` and of benchmarks: its text, training and results.

The text is what Python ships with, its tokens are learned from it in a few seconds. The recipes of
a seed start from the same weights and see the same batches in the same order. No loss scaling
anywhere. Validation text is the last tenth, which training never sees.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import statistics
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

import scaleprop
from scaleprop.recipes.training import TrainingRecipe

HELD_OUT = 32  # batches of validation text
EVERY = 40  # steps between validations
DECAY = 0.1
CLIP = 1.0  # of gradients' norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """One model and its training; ``rate``: the largest learning rate, of a one-cycle schedule."""

    vocabulary: int = 2048
    width: int = 256
    layers: int = 4
    context: int = 128
    batch: int = 8
    steps: int = 240
    rate: float = 2e-3


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a run differs: what its graphs become, and by which scheme the model is unit-scaled
    before; then gradients' sizes are no measure of anything, and are not clipped."""

    precision: str | TrainingRecipe
    scheme: Literal["unit", "u-mup", "mus"] | None = None

    def change(self, model: torch.nn.Module, ids: torch.Tensor) -> torch.nn.Module:
        """The model to train."""
        return scaleprop.unit_scale(model, (ids,), self.scheme) if self.scheme else model

    def groups(self, model: torch.nn.Module, rate: float) -> list[dict[str, Any]]:
        """What the optimizer is given."""
        if self.scheme:
            return scaleprop.parameter_groups(model, "adam", lr=rate, weight_decay=DECAY,
                                              decay="all")
        return [{"params": list(model.parameters()), "lr": rate, "weight_decay": DECAY}]


RECIPES: Mapping[str, Recipe] = {
    "fp32": Recipe("fp32"),
    "bf16": Recipe("bf16"),
    "fp8": Recipe("fp8"),
    "unit-fp32": Recipe("fp32", "unit"),
    "unit-fp8": Recipe("fp8-unscaled", "unit"),  # every cast as it is
    "u-mup-fp32": Recipe("fp32", "u-mup"),  # --rate 1 is a good one at every width
    "u-mup-fp8": Recipe("fp8-unscaled", "u-mup"),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What one training gave. Losses are nats a token; validation: (step, loss), the last one of
    all ``HELD_OUT`` batches."""

    recipe: str
    seed: int
    training: tuple[float, ...]
    validation: tuple[tuple[int, float], ...]
    seconds_per_step: float


class Language(torch.nn.Module):
    """A Llama that returns its own loss: the whole step is one graph."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        heads = max(settings.width // 64, 1)
        self.model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=settings.vocabulary, hidden_size=settings.width,
            intermediate_size=settings.width * 8 // 3 // 32 * 32,
            num_hidden_layers=settings.layers, num_attention_heads=heads,
            num_key_value_heads=heads, max_position_embeddings=settings.context, use_cache=False))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids=ids[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def tokens(vocabulary: int) -> torch.Tensor:
    """The standard library's modules, one after another, in tokens learned from their bytes."""
    import tokenizers

    folder = Path(sysconfig.get_path("stdlib"))
    texts = [path.read_text("utf-8", "replace") for path in sorted(folder.glob("*.py"))]
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.train_from_iterator(texts[::4], tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    return torch.tensor([token for found in model.encode_batch(texts) for token in found.ids])


def batches(text: torch.Tensor, seed: int, settings: Settings) -> Iterator[torch.Tensor]:
    """Random windows, [batch, context + 1]."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - settings.context - 1, (settings.batch, 1),
                               generator=draw)
        yield text[starts + torch.arange(settings.context + 1)]


def prepared(
    recipe: Recipe, seeds: int, text: torch.Tensor, settings: Settings
) -> tuple[torch.nn.Module, list[dict[str, torch.Tensor]]]:
    """A model to train by one recipe, and the weights that each seed starts from. They share
    compiled code: the exponents that fp8 fixes for the first one's first batch are those of all."""
    torch._dynamo.reset()
    models: list[torch.nn.Module] = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        models.append(recipe.change(Language(settings), next(batches(text, seed, settings))))
    starts = [copy.deepcopy(model.state_dict()) for model in models]
    return scaleprop.prepare_training(models[0], recipe.precision), starts


def split(text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What training sees, and the last tenth."""
    return text.tensor_split([len(text) * 9 // 10])  # type: ignore[return-value]


def train(
    model: torch.nn.Module, recipe: Recipe, run: tuple[str, int], text: torch.Tensor,
    held_out: torch.Tensor, settings: Settings,
) -> Run:
    """Train ``model`` where it is, and validate on the way. run: its name and its seed."""
    name, seed = run
    groups = recipe.groups(model, settings.rate)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in groups], settings.steps, pct_start=0.1)
    data = batches(text, seed, settings)
    training: list[torch.Tensor] = []
    validation: list[tuple[int, float]] = []
    times: list[float] = []
    for step in range(1, settings.steps + 1):
        ids = next(data)
        started = time.perf_counter()
        loss = model(ids)
        optimizer.zero_grad()
        loss.backward()
        if recipe.scheme is None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        times.append(time.perf_counter() - started)
        training.append(loss.detach())
        if step % EVERY == 0 or step == settings.steps:
            count = HELD_OUT if step == settings.steps else HELD_OUT // 4
            validation.append((step, validate(model, held_out, count, settings)))
            print(f"{name} seed {seed} step {step}: {validation[-1][1]:.4f}", flush=True)
    return Run(name, seed, tuple(round(float(loss), 4) for loss in training), tuple(validation),
               statistics.median(times))


def validate(
    model: torch.nn.Module, text: torch.Tensor, count: int, settings: Settings
) -> float:
    """The mean loss of ``count`` batches, always the same ones."""
    held_out = batches(text, 0, settings)
    # gradients stay on: the training graph runs again, and no second one is compiled
    return sum(float(model(next(held_out)).detach()) for _ in range(count)) / count


def table(found: Sequence[Run]) -> str:
    """Validation losses in Markdown, each recipe's mean against float32's of the same model."""
    by_recipe: dict[str, list[Run]] = {}
    for run in found:
        by_recipe.setdefault(run.recipe, []).append(run)
    seeds = [run.seed for run in next(iter(by_recipe.values()))]
    lines = ["| recipe | " + " | ".join(f"seed {seed}" for seed in seeds)
             + " | mean | against float32 | s a step |", "|---" * (len(seeds) + 4) + "|"]
    means = {name: statistics.fmean(run.validation[-1][1] for run in of_recipe)
             for name, of_recipe in by_recipe.items()}
    exact = {RECIPES[name].scheme: mean for name, mean in means.items()
             if RECIPES[name].precision == "fp32"}
    for name, of_recipe in by_recipe.items():
        losses = [run.validation[-1][1] for run in of_recipe]
        mean, other = means[name], exact.get(RECIPES[name].scheme)
        against = "–" if other is None else f"{mean / other - 1:+.2%}"
        seconds = statistics.median(run.seconds_per_step for run in of_recipe)
        lines.append(f"| {name} | " + " | ".join(f"{loss:.4f}" for loss in losses)
                     + f" | {mean:.4f} | {against} | {seconds:.3f} |")
    return "\n".join(lines)


def plot(found: Sequence[Run], path: Path) -> None:
    """Training and validation losses over steps, one colour a recipe, one line a seed."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "scaleprop"  # the same picture for the same numbers
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    names = list(dict.fromkeys(run.recipe for run in found))
    for run in found:
        place = names.index(run.recipe)
        look = {"color": f"C{place}", "linewidth": 1, "linestyle": "-" if place % 2 == 0 else ":",
                "label": run.recipe if run.seed == 0 else None}
        left.plot(range(1, len(run.training) + 1), run.training, **look)
        right.plot(*zip(*run.validation, strict=True), marker=".", **look)
    for axes, title in ((left, "training"), (right, "validation")):
        axes.set(xlabel="step", ylabel="loss, nats a token", title=title)
        axes.legend()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def save(found: Sequence[Run], settings: Settings, path: Path) -> None:
    """Settings and every run as JSON."""
    path.write_text(json.dumps({"settings": dataclasses.asdict(settings),
                                "runs": [dataclasses.asdict(run) for run in found]}) + "\n")
