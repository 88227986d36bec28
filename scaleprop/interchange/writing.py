"""Write a compiled model as a ``save_pretrained`` folder with compressed-tensors weights.

What compressed-tensors has words for is written bit for bit: the codes and scales of the graph's
linears, and every parameter that a transform changed. What it has none for is an error. Weights of
embeddings and convolutions are written decoded, in the model's dtype: that loses nothing, and few
loaders take codes there.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from scaleprop.adapters.modules import ScaledWeight
from scaleprop.errors import ConfigError
from scaleprop.interchange.libraries import library
from scaleprop.interchange.names import checkpoint_names
from scaleprop.interchange.plan import Plan, plan
from scaleprop.interchange.programs import REMEDY
from scaleprop.interchange.shards import PRODUCER, ShardWriter, new_folder, parse_size
from scaleprop.interchange.verifying import check_same_function

if TYPE_CHECKING:
    from scaleprop.api import CompiledModel

logger = logging.getLogger(__name__)

METHOD = "compressed-tensors"
_MIXED = "mixed-precision"
_OTHERS = ("adapter_config.json", "quantize_config.json", "quant_config.json")  # of what it was
_TEXTS = (".json", ".txt", ".model", ".jinja")  # of tokenizers and processors


def save_pretrained(
    compiled: CompiledModel, directory: Path, like: nn.Module, *, tokenizer: Any = None,
    max_shard_size: int | str = "5GB", check: bool = True,
) -> Path:
    """See ``CompiledModel.save_pretrained``."""
    limit = parse_size(max_shard_size)
    if not isinstance(like, library("transformers", "save_pretrained").PreTrainedModel):
        raise ConfigError(f"like is a {type(like).__name__}: pass the transformers model that was "
                          "compiled")
    if any(isinstance(module, ScaledWeight) for module in like.modules()):
        raise ConfigError("like was loaded with ScalepropConfig: its weights are codes, and no "
                          "parameters. Remedy: pass as like= the model loaded without it, or "
                          "like.dequantize(): the compiled model's codes are written all the same; "
                          "or like.save_pretrained, which writes it for ScalepropConfig to load")
    found = plan(compiled.program, like)
    if not found.coded:
        raise ConfigError("no linear has a weight in codes: nothing that compressed-tensors "
                          "describes. Remedy: like.save_pretrained writes the model as it is")
    if check:
        check_same_function(compiled.program, like, found.decoded(like))
    names = _names(like, found)
    with new_folder(directory) as folder:
        _write_config(folder, like, found, names)
        _write_tokenizer(folder, like, tokenizer)
        writer = ShardWriter(folder, limit)
        for name in found.written:
            if name not in found.coded:
                writer.add(names[name], found.dense[name])
                continue
            module = names[name].removesuffix("weight")
            for leaf, tensor in found.coded[name].tensors().items():
                writer.add(module + leaf, tensor)
        writer.finish()
    logger.info("%s: %d weights in codes, %d parameters as numbers", directory, len(found.coded),
                len(found.dense))
    return directory


def _names(like: nn.Module, plan: Plan) -> Mapping[str, str]:
    names = checkpoint_names(like, list(plan.ties))
    missing = [name for name in plan.ties if name not in names]
    if missing:
        raise ConfigError(f"checkpoints of {type(like).__name__} hold {missing[0]} in another form "
                          f"(split, or joined with others), which codes cannot follow. {REMEDY}")
    return names


def quantization_config(
    plan: Plan, model: nn.Module, names: Mapping[str, str]
) -> dict[str, Any]:
    """What ``config.json`` says: groups of modules and their schemes, and what stays high."""
    linears = {f"{path}.weight" for path, module in model.named_modules(remove_duplicate=False)
               if isinstance(module, nn.Linear)}  # fmt: skip
    groups: dict[str, list[str]] = {}
    for name, weight in plan.coded.items():
        groups.setdefault(weight.key, []).append(name)
    described: dict[str, Any] = {}
    # One group is all of "Linear"; of several the modules are named, as vLLM looks for the class
    # before it looks for the parts of fused modules.
    for index, members in enumerate(sorted(groups.values(), key=len, reverse=True)):
        example = plan.coded[members[0]]
        named = _modules(members, names)
        described[f"group_{index}"] = {
            "targets": named if len(groups) > 1 else ["Linear"],
            "weights": example.weights,
            "input_activations": example.activations,
            "output_activations": None,
            "format": example.compression,
        }
    formats = {weight.compression for weight in plan.coded.values()}
    ignore = _modules([name for name in linears if name in names and name not in plan.coded], names)
    return {
        "quant_method": METHOD,
        "format": formats.pop() if len(formats) == 1 else _MIXED,
        "quantization_status": "compressed",
        "config_groups": described,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "producer": f"{PRODUCER} {_version()}",
    }


def _modules(parameters: Iterable[str], names: Mapping[str, str]) -> list[str]:
    """Their modules, as the checkpoint has them (vLLM), and as the model has (transformers)."""
    return sorted({name.removesuffix(".weight")
                   for parameter in parameters for name in (parameter, names[parameter])})


def _write_config(folder: Path, like: Any, plan: Plan, names: Mapping[str, str]) -> None:
    config = copy.deepcopy(like.config)
    config.architectures = [type(like).__name__]
    config.dtype = str(like.dtype).removeprefix("torch.")
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if plan.untied:
        for part in {id(part): part for part in (config, config.get_text_config())}.values():
            part.tie_word_embeddings = False
    _saved(config, folder, "config", "move what it names to like.generation_config")
    file = folder / "config.json"
    data = json.loads(file.read_text())
    data["quantization_config"] = quantization_config(plan, like, names)
    file.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")
    if like.can_generate():
        _saved(like.generation_config, folder, "generation_config",
               "change what it names, or like.generation_config = GenerationConfig()")


def _saved(settings: Any, folder: Path, name: str, remedy: str) -> None:
    try:
        settings.save_pretrained(folder)
    except ValueError as error:
        raise ConfigError(f"transformers refuses to write like.{name}: {str(error).strip()}\n"
                          f"Remedy: {remedy}") from error


def _write_tokenizer(folder: Path, like: Any, tokenizer: Any) -> None:
    """Those given; else the files beside the checkpoint that the model came from."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        return
    source = Path(like.name_or_path) if like.name_or_path else None
    for file in sorted(source.iterdir()) if source is not None and source.is_dir() else ():
        taken = ((folder / file.name).exists() or file.name in _OTHERS
                 or file.name.endswith(".index.json"))
        if file.suffix in _TEXTS and file.is_file() and not taken:
            shutil.copyfile(file, folder / file.name)


def _version() -> str:
    try:
        return version("scaleprop")
    except PackageNotFoundError:
        return "from source"
