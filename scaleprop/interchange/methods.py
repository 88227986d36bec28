"""What a ``quantization_config`` says of each module, by its ``quant_method``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from scaleprop.errors import ConfigError, FormatError
from scaleprop.interchange import layouts, schemes
from scaleprop.interchange.assigning import StoredWeight
from scaleprop.interchange.gptq import read_awq, read_gptq

# reads a module's weight, given its name, its class and its tensors by their names in it
Reader = Callable[[str, type[nn.Module], Mapping[str, Tensor]], StoredWeight]

_INPUTS = ("input_scale", "input_zero_point", "input_global_scale")
_GPTQ = ("qweight", "qzeros", "scales", "g_idx")


def method_of(settings: Any) -> tuple[str, tuple[str, ...], Reader]:
    """``quant_method``; the tensors that a weight may be stored as, first the one that none lacks;
    and what reads them.

    Raises:
        ConfigError: where the method is unknown, or says what is not read.
    """
    if not isinstance(settings, dict):
        raise ConfigError("config.json has no quantization_config. Remedy: load the model with "
                          "transformers, and compile it")
    method = str(settings.get("quant_method"))
    if method == "scaleprop":
        raise ConfigError("ScalepropConfig made these codes, in a model of transformers. Remedy: "
                          "load it with transformers' from_pretrained; scaleprop.compile keeps "
                          "its codes")
    if method not in _METHODS:
        raise ConfigError(f"quant_method {method!r} is unknown; known: {', '.join(_METHODS)}")
    return method, *_METHODS[method](settings)


def _compressed_tensors(settings: dict[str, Any]) -> tuple[tuple[str, ...], Reader]:
    for key in ("kv_cache_scheme", "transform_config", "sparsity_config", "moe_sparsity_config"):
        if settings.get(key):
            raise ConfigError(f"quantization_config has {key}: that is not read")
    status = settings.get("quantization_status", "compressed")
    if status != "compressed":
        raise ConfigError(f"quantization_status is {status!r}: its weights are no codes")
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(one, dict) for one in groups.values()):
        raise ConfigError("quantization_config has no config_groups that say how weights are "
                          "stored")
    whole = settings.get("format")

    def reader(module: str, kind: type[nn.Module], parts: Mapping[str, Tensor]) -> StoredWeight:
        group = _group(groups, module, kind)
        if group.get("output_activations"):
            raise FormatError("outputs are quantized: that is not read")
        args = _arguments(group, "weights")
        inputs = _arguments(group, "input_activations") if group.get("input_activations") else None
        compression = group.get("format") or (whole if whole != "mixed-precision" else None)
        tensor = layouts.read(parts, args, compression or schemes.compression(args, inputs))
        if not inputs:
            return StoredWeight(tensor)
        role = schemes.activation_role(inputs)
        scales = _input_scales(parts, inputs) if role.scaling == "static" else None
        return StoredWeight(tensor, role, scales)

    return ("weight_scale", *(name for name in layouts.NAMES if name != "weight_scale"),
            *_INPUTS), reader


def _arguments(group: Mapping[str, Any], what: str) -> dict[str, Any]:
    args = group.get(what)
    if not isinstance(args, dict):
        raise FormatError(f"its group says nothing of {what}")
    return args


def _group(groups: Mapping[str, Any], module: str, kind: type[nn.Module]) -> dict[str, Any]:
    """The first group that names the module, fits its name, or names its class, in that order."""
    classes = {base.__name__ for base in kind.__mro__}
    tests: tuple[Callable[[str], bool], ...] = (
        lambda target: target == module,
        lambda target: _fits(target, module),
        lambda target: target in classes,
    )
    for test in tests:
        for group in groups.values():
            if any(test(target) for target in _targets(group)):
                return group
    raise FormatError("no config group is for it")


def _targets(group: Mapping[str, Any]) -> list[str]:
    targets = group.get("targets", [])
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise FormatError(f"targets of a config group are {targets!r}, not a list of names")
    return targets


def _fits(target: str, module: str) -> bool:
    try:
        return target.startswith("re:") and bool(re.match(target[3:], module))
    except re.error as error:
        raise FormatError(f"target {target!r} of a config group is no pattern: {error}") from error


def _input_scales(parts: Mapping[str, Tensor], args: Mapping[str, Any]) -> tuple[float, ...]:
    name = "input_global_scale" if args.get("strategy") == "tensor_group" else "input_scale"
    if name not in parts or parts[name].numel() != 1:
        raise FormatError(f"its inputs are quantized with one static scale, and {name} is missing")
    if name == "input_global_scale":
        return (float(layouts.tensor_scale(parts[name])),)
    scale = float(parts[name].to(torch.float32))
    if args.get("symmetric", True):
        return (scale,)
    zero = parts.get("input_zero_point", torch.zeros(1))
    return (scale, float(zero.to(torch.float32)) + (1 << (args.get("num_bits", 8) - 1)))


def _gptq(settings: dict[str, Any]) -> tuple[tuple[str, ...], Reader]:
    if settings.get("dynamic"):
        raise ConfigError("quantization_config has 'dynamic', other settings for some modules: "
                          "that is not read")
    bits, size = settings.get("bits"), settings.get("group_size", 128)
    kind = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    versions = {"gptq": 1, "gptq_v2": 2}
    if kind not in versions or bits not in (2, 3, 4, 8) or settings.get("is_marlin_format"):
        raise ConfigError(f"a GPTQ checkpoint in format {kind!r} with {bits} bits is not read; "
                          f"known: {', '.join(versions)}, with 2, 3, 4 or 8 bits")

    def reader(module: str, owner: type[nn.Module], parts: Mapping[str, Tensor]) -> StoredWeight:
        tensor, order = read_gptq(parts, bits, size, versions[kind])
        return StoredWeight(tensor, order=order)

    return _GPTQ, reader


def _awq(settings: dict[str, Any]) -> tuple[tuple[str, ...], Reader]:
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    bits, size = settings.get("bits", settings.get("w_bit", 4)), settings.get(
        "group_size", settings.get("q_group_size", 128))  # fmt: skip
    if version != "gemm":
        raise ConfigError(f"an AWQ checkpoint of version {version!r} is not read; known: gemm")

    def reader(module: str, kind: type[nn.Module], parts: Mapping[str, Tensor]) -> StoredWeight:
        return StoredWeight(read_awq(parts, bits, size))

    return _GPTQ[:3], reader


_METHODS: Mapping[str, Callable[[dict[str, Any]], tuple[tuple[str, ...], Reader]]] = {
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
}
