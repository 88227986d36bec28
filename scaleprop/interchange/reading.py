"""Read quantized checkpoints: codes and scales as they are, all else through ``transformers``.

    config.json's quant_method    layout
    compressed-tensors            ``layouts``
    gptq, awq                     ``gptq``

The model is built by transformers from ``config.json``, with the weights decoded, so that it can be
captured as any other; no quantizer runs, and nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scaleprop.errors import ConfigError, FormatError
from scaleprop.interchange.assigning import StoredWeight
from scaleprop.interchange.libraries import library
from scaleprop.interchange.methods import Reader, method_of
from scaleprop.interchange.names import checkpoint_names, parameter_name
from scaleprop.interchange.shards import ShardReader
from scaleprop.recipes import Recipe, Role

logger = logging.getLogger(__name__)

@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """A quantized checkpoint.

    model: with its weights decoded. weights: parameter of it → codes and scales. recipe: what most
    of them have.
    """

    model: nn.Module
    weights: Mapping[str, StoredWeight]
    recipe: Recipe


def read_checkpoint(directory: Path) -> Checkpoint:
    """The checkpoint in a folder.

    Raises:
        ConfigError: where files are missing, damaged or would have to be unpickled, or something is
            stored in a way that scaleprop has no words for, naming it.
        BackendUnavailable: where transformers or safetensors is missing.
    """
    config = _config(directory)
    try:
        method, leaves, reader = method_of(config.get("quantization_config"))
    except ConfigError as error:
        raise ConfigError(f"{directory}: {error}") from error
    tensors = ShardReader(directory)
    skeleton, build = _class(directory)
    weights, state = _read(tensors, leaves, reader, skeleton)
    if not weights:
        raise ConfigError(f"{directory} has no weight in codes, though its quant_method is "
                          f"{method}")
    modules = set(_modules(tensors, leaves))
    coded = {name for name in tensors.names if name.rpartition(".")[0] in modules}
    model = build(state, coded)
    return Checkpoint(model, _aliases(model, weights), _recipe(method, weights))


def read_model(directory: Path) -> nn.Module:
    """The model of a checkpoint, quantized or not, with its weights as numbers, in eval mode.

    Raises:
        ConfigError, BackendUnavailable: as ``read_checkpoint``.
    """
    if "quantization_config" in _config(directory):
        return read_checkpoint(directory).model
    tensors = ShardReader(directory)
    _, build = _class(directory)
    return build({name: tensors[name] for name in tensors.names}, set())


def decoded(directory: str | Path) -> nn.Module:
    """The model of a quantized checkpoint with its weights as numbers, in eval mode.

    Raises:
        ConfigError, BackendUnavailable: as ``scaleprop.from_pretrained``.
    """
    return read_checkpoint(Path(directory)).model


def _config(directory: Path) -> dict[str, Any]:
    file = directory / "config.json"
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{directory} is no checkpoint of transformers: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{file} holds no object")
    return config


def _class(directory: Path) -> tuple[nn.Module, Callable[[dict[str, Tensor], set[str]], nn.Module]]:
    """The model without memory, and how it is made of a state."""
    transformers = library("transformers", "from_pretrained")
    invalid = library("huggingface_hub.errors", "from_pretrained").StrictDataclassError
    try:
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, TypeError, AttributeError, invalid) as error:
        raise ConfigError(f"{directory}: transformers cannot read its config.json: {error}"
                          ) from error
    names = config.architectures or []
    kind = getattr(transformers, str(names[0]), None) if names else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ConfigError(f"{directory}: its architecture {names} is none of transformers' own")
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        skeleton: nn.Module = kind(config)

    def build(state: dict[str, Tensor], coded: set[str]) -> nn.Module:
        dtype = config.dtype or torch.float32
        model, info = kind.from_pretrained(None, config=config, state_dict=dict(state),
                                           dtype=dtype, output_loading_info=True)
        _check_loaded(directory, info, state, coded)
        model.name_or_path = model.config.name_or_path = str(directory)
        if model.can_generate() and (directory / "generation_config.json").is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
        return model.eval()

    return skeleton, build


def _check_loaded(
    directory: Path, info: Mapping[str, Any], state: Mapping[str, Tensor], coded: set[str]
) -> None:
    """Raise ``ConfigError`` where a parameter was not found, or a module's was not taken."""
    missing, mismatched = sorted(info["missing_keys"]), sorted(info["mismatched_keys"])
    if missing or mismatched:
        raise ConfigError(f"{directory} lacks {(missing or mismatched)[0]}, or has it in another "
                          f"shape: {len(missing)} parameters are missing, {len(mismatched)} differ")
    for name in sorted(info["unexpected_keys"]):
        # GPTQ's modules have biases of zeros where the model has none
        if name in coded and name in state and bool(state[name].any()):
            raise ConfigError(f"{directory} has {name}, which the model has no parameter for")
        logger.info("%s: %s is no parameter of the model", directory, name)


def _modules(tensors: ShardReader, leaves: tuple[str, ...]) -> Iterator[str]:
    """Modules with a weight in codes: those that have the first of ``leaves``."""
    for name in tensors.names:
        module, _, leaf = name.rpartition(".")
        if leaf == leaves[0]:
            yield module


def _read(
    tensors: ShardReader, leaves: tuple[str, ...], reader: Reader, skeleton: nn.Module
) -> tuple[dict[str, StoredWeight], dict[str, Tensor]]:
    """Parameter → its codes, and the state with all weights decoded, by names of the checkpoint."""
    known = checkpoint_names(skeleton, list(skeleton.state_dict()))
    parameters = dict(skeleton.named_parameters(remove_duplicate=False))
    weights: dict[str, StoredWeight] = {}
    state: dict[str, Tensor] = {}
    for module in _modules(tensors, leaves):
        name = parameter_name(f"{module}.weight", skeleton, known)
        if name is None:
            raise ConfigError(f"{module} has a weight in codes, and the model has no parameter for "
                              "it alone: codes cannot be joined or split")
        owner = type(skeleton.get_submodule(name.rpartition(".")[0]))
        parts = {leaf: tensors[f"{module}.{leaf}"] for leaf in leaves
                 if f"{module}.{leaf}" in tensors}  # fmt: skip
        try:
            kept = reader(module, owner, parts)
        except FormatError as error:
            raise ConfigError(f"{module}: {error}") from error
        if kept.tensor.shape != parameters[name].shape:
            raise ConfigError(f"{module} holds {list(kept.tensor.shape)}, and the model's weight "
                              f"is {list(parameters[name].shape)}")
        weights[name] = kept
        state[f"{module}.weight"] = _numbers(kept)
    taken = {f"{module}.{leaf}" for module in _modules(tensors, leaves) for leaf in leaves}
    state |= {name: tensors[name] for name in tensors.names if name not in taken}
    return weights, state


def _numbers(kept: StoredWeight) -> Tensor:
    sorted_columns = kept.tensor.dequantize(torch.float32)
    if kept.order is None:
        return sorted_columns
    numbers = torch.empty_like(sorted_columns)
    numbers[:, kept.order] = sorted_columns
    return numbers


def _aliases(model: nn.Module, weights: Mapping[str, StoredWeight]) -> dict[str, StoredWeight]:
    """By every name that a weight has; each was of the parameter's dtype."""
    named = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, StoredWeight] = {}
    for name, kept in weights.items():
        tensor = dataclasses.replace(kept.tensor, dtype=named[name].dtype)
        same = dataclasses.replace(kept, tensor=tensor)
        found |= {other: same for other, parameter in named.items() if parameter is named[name]}
    return found


def _recipe(method: str, weights: Mapping[str, StoredWeight]) -> Recipe:
    pairs = Counter((str(kept.tensor.format), kept.activation) for kept in weights.values())
    (weight, activation), _ = pairs.most_common(1)[0]
    roles = {"fprop.w": Role(format=weight)}
    if activation is not None:
        roles["fprop.x"] = activation
    return Recipe(name=method, roles=roles,
                  description=f"as a {method} checkpoint has them, most weights in {weight}")
