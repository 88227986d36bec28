"""Models of transformers small enough to compile in a second, and what tests do with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from scaleprop.api import CompiledModel, _compiled
from scaleprop.interchange.assigning import AssignStored, OrderStored
from scaleprop.interchange.reading import Checkpoint
from scaleprop.passes.base import Program
from scaleprop.passes.capture import capture
from scaleprop.passes.pipeline import build
from scaleprop.recipes import Recipe, Role

IDS = torch.tensor([[5, 17, 3, 80, 41, 2, 9], [1, 1, 60, 7, 33, 95, 12]])


def llama(dtype: torch.dtype = torch.float32, tied: bool = False) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=96, max_position_embeddings=64, use_cache=False,
        tie_word_embeddings=tied)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # gains that are all 1 would hide a missing one
        if parameter.ndim == 1:
            parameter.data = 1 + torch.rand_like(parameter)
        parameter.data = parameter.data.to(dtype)  # buffers stay, as from_pretrained has them
    return model


def encoder() -> Any:
    from transformers import BertConfig, BertModel

    torch.manual_seed(1)
    config = BertConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                        num_attention_heads=4, vocab_size=96, max_position_embeddings=32)
    model = BertModel(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data = torch.rand_like(parameter) + name.endswith("weight")
    return model


def recipe(weight: str, activation: str | None = None, *, static: bool = False,
           embedding: str | None = None) -> Recipe:
    roles = {"fprop.w": Role(format=weight)}
    if activation is not None:
        roles["fprop.x"] = Role(format=activation, scaling="static" if static else "dynamic")
    if embedding is not None:
        roles["embedding"] = Role(format=embedding)
    return Recipe(name=f"{weight}-{activation}", description="of a test", roles=roles)


def captured(model: Any) -> Program:
    return capture(model, (), {"input_ids": IDS})


def compiled(program: Program, chosen: Recipe, backend: str = "reference") -> CompiledModel:
    """What ``scaleprop.compile`` makes of a model that is captured already."""
    data = [{"input_ids": IDS}] if chosen.needs_calibration else None
    return _compiled(program, build(chosen, calibration=data), chosen, backend, False)


def recompiled(program: Program, checkpoint: Checkpoint) -> CompiledModel:
    """``from_pretrained`` on the graph of a model that is captured already."""
    passes = (OrderStored(weights=checkpoint.weights),
              AssignStored(recipe=checkpoint.recipe, weights=checkpoint.weights))
    return _compiled(program, build(checkpoint.recipe, extra=passes), checkpoint.recipe,
                     "reference", False)


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def bits(tensor: Tensor) -> tuple[Any, ...]:
    """Shape, dtype and bytes: equal only bit for bit."""
    flat = tensor.detach().contiguous().reshape(-1)
    return tuple(tensor.shape), tensor.dtype, bytes(flat.view(torch.uint8).tolist())


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        bits(left[name]) == bits(right[name]) for name in left)
