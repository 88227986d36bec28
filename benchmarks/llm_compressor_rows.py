"""What a language model gives after llm-compressor quantized it; run by another interpreter.

    python3.11 -m venv DIR
    DIR/bin/pip install torch==2.13.0 llmcompressor==0.14.0
    python -m benchmarks.post_training_peers --python DIR/bin/python

llm-compressor pins an older transformers than this project takes, so it lives by itself, and this
file imports nothing of the project. ``benchmarks.post_training_peers`` leaves a folder with a
saved ``model``, and tensors of token ids in ``calibration.pt`` and ``evaluation.pt``. For each
cell, "format|method", one line of JSON comes back: the file of its logits, or what it refused.

All linears are quantized, the output projection with them, by the scheme that is nearest to this
project's recipe of that format: blocks of 128, and of 32 where 128 does not divide. Where the
recipe searches the scale of a weight, so does the scheme's observer. SmoothQuant is told that the
output projection reads the last norm too; AWQ's search cannot run that one, and leaves it to
SmoothQuant.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from torch import Tensor, nn

_BLOCKS = (128, 32)
_TOKEN = {"num_bits": 8, "strategy": "token", "symmetric": True, "dynamic": True}
_BLOCK = {"num_bits": 4, "strategy": "group", "symmetric": False}
_ROW = {"num_bits": 4, "strategy": "channel", "symmetric": True, "observer": "memoryless_mse"}
_TENSOR = {"num_bits": 4, "strategy": "tensor", "symmetric": True, "dynamic": False}

# Weights and inputs by format; a name is one of the library's presets.
FORMATS: Mapping[str, str | dict[str, Any]] = {
    "W8A8": "W8A8",
    "W4A8": {"weights": _BLOCK, "input_activations": _TOKEN},
    "W4A4": {"weights": _ROW, "input_activations": {**_TOKEN, "num_bits": 4}},
    "W4A4 static": {"weights": _ROW, "input_activations": _TENSOR},
    "W4": {"weights": _BLOCK},
    "MXFP4": "MXFP4",
    "NVFP4": "NVFP4",
}
_SEARCHED = ("NVFP4",)  # presets whose recipe searches weights' scales
_HEAD = (["re:.*lm_head"], "re:model.norm")
_SMOOTHED = [
    (["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"], "re:.*input_layernorm"),
    (["re:.*gate_proj", "re:.*up_proj"], "re:.*post_attention_layernorm"),
]


def groups(model: nn.Module, fmt: str) -> dict[str, QuantizationScheme]:
    """The scheme of each set of linears; sets differ in their blocks alone."""
    chosen = FORMATS[fmt]
    if isinstance(chosen, str):
        scheme = preset_name_to_scheme(chosen, ["Linear"])
        if fmt in _SEARCHED and scheme.weights is not None:
            scheme.weights.observer = "memoryless_mse"
        return {"all": scheme}
    if chosen["weights"]["strategy"] != "group":
        return {"all": QuantizationScheme(targets=["Linear"], **chosen)}
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            block = next(size for size in _BLOCKS if module.in_features % size == 0)
            names.setdefault(block, []).append(name)
    return {f"blocks of {block}": QuantizationScheme(
        targets=targets, **{**chosen, "weights": {**chosen["weights"], "group_size": block}})
        for block, targets in names.items()}


def recipe(model: nn.Module, fmt: str, method: str) -> list[Any]:
    """The modifiers of one cell, in their order; of "float32" those that quantize nothing."""
    solver = GPTQModifier if "GPTQ" in method else QuantizationModifier
    found: list[Any] = []
    if method == "SmoothQuant":
        found.append(SmoothQuantModifier(mappings=[*_SMOOTHED, _HEAD]))
    if "rotat" in method:
        # of all channels before the down projection it has no Hadamard matrix, but of blocks
        found += [SpinQuantModifier(rotations=["R1", "R2"]),
                  SpinQuantModifier(rotations=["R4"], transform_block_size=_BLOCKS[-1])]
    if method == "AWQ":
        pairs = [(norm, readers) for readers, norm in _SMOOTHED]
        pairs += [("re:.*v_proj", ["re:.*o_proj"]), ("re:.*up_proj", ["re:.*down_proj"])]
        found += [AWQModifier(mappings=[AWQMapping(*pair) for pair in pairs]),
                  SmoothQuantModifier(mappings=[_HEAD])]
    return found if fmt == "float32" else [*found, solver(config_groups=groups(model, fmt))]


class _Batches(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Calibration windows, one batch an item."""

    def __init__(self, batches: Sequence[Tensor]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return {"input_ids": self.batches[place]}


def logits(folder: Path, cell: str) -> list[Tensor]:
    """What the model of one cell, or of "float32", gives for every evaluation batch."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    if cell != "float32":
        loader = torch.utils.data.DataLoader(_Batches(torch.load(folder / "calibration.pt")),
                                             batch_size=None)
        unused = transformers.PreTrainedTokenizerFast(  # but asked for, with any data
            tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()))
        model = oneshot(model=model, dataset=loader, processor=unused,
                        recipe=recipe(model, *cell.split("|")))
    with torch.no_grad():
        return [model(input_ids=ids).logits for ids in torch.load(folder / "evaluation.pt")]


def main(arguments: Sequence[str] | None = None) -> None:
    """One line for each cell, as it comes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("cells", nargs="+", help='"format|method", or "float32"')
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    # AWQ pins what it keeps in memory, which needs a GPU and changes no figure
    IntermediatesCache.pin_memory = lambda self, *places: None
    for place, cell in enumerate(options.cells):
        path = options.folder / f"logits-{place}.pt"
        try:
            torch.save(logits(options.folder, cell), path)
            found = {"logits": str(path)}
        except Exception as error:  # noqa: BLE001 - any failure of a tool is a finding, shown
            first = (str(error).strip().splitlines() or ["no message"])[0]
            found = {"refused": f"{type(error).__name__}: {first}"}
        print(json.dumps({"cell": cell, **found}), flush=True)


if __name__ == "__main__":
    main()
