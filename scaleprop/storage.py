"""Saved models: ``config.json``, ``graph.json``, ``tensors.safetensors``, ``example.safetensors``.

Nothing is pickled. A directory is written under a temporary name and renamed when complete; an
older version is renamed aside first and deleted last, so a crash leaves a complete one.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
from torch.utils import _pytree as pytree

from scaleprop import ops as _ops  # registers scaleprop::*, which saved graphs name
from scaleprop.errors import BackendUnavailable, ConfigError
from scaleprop.extras import install_command
from scaleprop.graph_json import graph_from_json, graph_to_json
from scaleprop.passes.base import Program
from scaleprop.passes.values import propagate_values
from scaleprop.recipes import Recipe
from scaleprop.report.records import TensorRecord, transforms_from, trials_from

if TYPE_CHECKING:
    from scaleprop.api import CompiledModel

FORMAT_VERSION = 2

del _ops


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedModel:
    """What a saved directory holds, before it is lowered."""

    program: Program
    recipe: Recipe
    backend: str
    baseline: tuple[Any, ...]
    nbytes_before: int


def save(compiled: CompiledModel, directory: Path) -> Path:
    """Write ``compiled`` to ``directory``, which must not exist or be a saved model.

    Raises:
        ConfigError: where the directory holds something else or cannot be written.
        UnsupportedOpError: where the graph holds what JSON cannot name.
    """
    program = compiled.program
    if not _replaceable(directory):
        raise ConfigError(f"{directory} exists and is not a saved model; choose another path")
    leaves = program.example_leaves
    config = {
        "format_version": FORMAT_VERSION,
        "backend": compiled.backend,
        "recipe": compiled.recipe.to_dict(),
        "arguments": list(program.arguments),
        "in_spec": pytree.treespec_dumps(program.in_spec),
        "out_spec": pytree.treespec_dumps(program.out_spec),
        "dynamic_axes": {name: {str(axis): dim for axis, dim in axes.items()}
                         for name, axes in program.dynamic_axes.items()},
        "guards": list(program.guards),
        "nbytes_before": compiled.nbytes_before,
        "tolerance": program.tolerance,
        "notes": list(program.notes),
        "records": [dataclasses.asdict(record) for record in program.records],
        "transforms": [dataclasses.asdict(record) for record in program.transforms],
        "trials": [dataclasses.asdict(trial) for trial in program.trials],
        "example": [None if isinstance(leaf, torch.Tensor) else {"constant": leaf}
                    for leaf in leaves],
        "baseline": [None if isinstance(leaf, torch.Tensor) else {"constant": leaf}
                     for leaf in compiled.baseline],
    }
    tensors, aliases = _unique({**dict(program.module.named_parameters()),
                                **dict(program.module.named_buffers())})
    config["aliases"] = aliases
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise ConfigError(f"cannot write {directory}: {error}") from error
    try:
        graph = graph_to_json(program.module.graph)
        (scratch / "graph.json").write_text(json.dumps(graph))
        (scratch / "config.json").write_text(json.dumps(config, indent=1))
        _write_tensors(scratch / "tensors.safetensors", tensors)
        _write_tensors(scratch / "example.safetensors", _indexed("example", leaves)
                       | _indexed("baseline", compiled.baseline))
        _install(scratch, directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return directory


def _replaceable(directory: Path) -> bool:
    """Whether nothing is lost there but a model that ``save`` wrote.

    Other libraries keep a ``config.json`` too: ours has a ``format_version`` and a graph.
    """
    if not directory.exists():
        return not directory.is_symlink()
    if not directory.is_dir():
        return False
    if not any(directory.iterdir()):
        return True
    try:
        config = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return (isinstance(config, dict) and "format_version" in config
            and (directory / "graph.json").is_file())


def _install(scratch: Path, directory: Path) -> None:
    """Rename ``scratch`` to ``directory``; what was there is kept aside until that is done."""
    if not directory.exists():
        os.replace(scratch, directory)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old.", dir=directory.parent))
    os.replace(directory, aside)  # onto an empty folder
    try:
        os.replace(scratch, directory)
    except BaseException:
        os.replace(aside, directory)
        raise
    shutil.rmtree(aside)


def load(directory: Path) -> SavedModel:
    """Read what ``save`` wrote.

    Raises:
        ConfigError: where a file is missing, damaged, or of another version.
    """
    try:
        config = json.loads((directory / "config.json").read_text())
        nodes = json.loads((directory / "graph.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{directory} is not a saved model: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{directory} is not a saved model: its config.json holds no object")
    if config.get("format_version") != FORMAT_VERSION:
        raise ConfigError(
            f"{directory} was saved by another version of scaleprop: its format_version is "
            f"{config.get('format_version')!r}, this one reads {FORMAT_VERSION}; compile and save "
            f"again"
        )
    try:
        return _restored(directory, config, nodes)
    except ConfigError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{directory} is damaged: {type(error).__name__}: {error}") from error


def _restored(directory: Path, config: dict[str, Any], nodes: Any) -> SavedModel:
    tensors = _read_tensors(directory / "tensors.safetensors")
    tensors |= {name: tensors[first] for name, first in config["aliases"].items()}
    stored = _read_tensors(directory / "example.safetensors")
    in_spec, out_spec = (_spec(config[key]) for key in ("in_spec", "out_spec"))
    args, kwargs = pytree.tree_unflatten(_leaves("example", config, stored), in_spec)
    axes = {name: {int(axis): dim for axis, dim in sizes.items()}
            for name, sizes in config["dynamic_axes"].items()}
    program = Program(
        module=_module(graph_from_json(nodes), tensors),
        in_spec=in_spec, out_spec=out_spec, example_args=tuple(args), example_kwargs=kwargs,
        arguments=tuple(config["arguments"]),
        dynamic_axes=axes, guards=tuple(config["guards"]),
        records=tuple(_record(entry) for entry in config["records"]),
        transforms=transforms_from(config.get("transforms", ())),
        trials=trials_from(config.get("trials", ())),
        tolerance=config["tolerance"], notes=tuple(config["notes"]),
    )
    propagate_values(program)
    return SavedModel(
        program=program, recipe=Recipe.from_dict(config["recipe"]), backend=config["backend"],
        baseline=tuple(_leaves("baseline", config, stored)),
        nbytes_before=config["nbytes_before"],
    )


def _record(entry: dict[str, Any]) -> TensorRecord:
    entry["shape"] = tuple(entry["shape"])
    return TensorRecord(**entry)


def _spec(text: str) -> pytree.TreeSpec:
    try:
        return pytree.treespec_loads(text)
    except NotImplementedError as error:
        raise ConfigError(f"{error}; import the package that defines this type before loading"
                          ) from error


def _module(graph: torch.fx.Graph, tensors: Mapping[str, torch.Tensor]) -> torch.fx.GraphModule:
    """A module that holds ``tensors`` under their dotted names, as buffers."""
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        owner = root
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, torch.nn.Module())
            owner = owner.get_submodule(part)
        owner.register_buffer(leaf, tensor)
    return torch.fx.GraphModule(root, graph)


def _unique(
    tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors stored once, and the other names of those that are tied."""
    first: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        owner = first.setdefault(key, name) if tensor.numel() else name
        if owner != name:
            aliases[name] = owner
    return {name: t for name, t in tensors.items() if name not in aliases}, aliases


def _indexed(kind: str, leaves: Sequence[Any]) -> dict[str, torch.Tensor]:
    return {f"{kind}.{i}": leaf for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}


def _leaves(kind: str, config: Mapping[str, Any], stored: Mapping[str, torch.Tensor]) -> list[Any]:
    return [stored[f"{kind}.{i}"] if entry is None else entry["constant"]
            for i, entry in enumerate(config[kind])]


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    # clone: safetensors refuses tensors that share memory, as views of one parameter do
    flat = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    _safetensors("safetensors.torch").save_file(flat, path)


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return _safetensors("safetensors.torch").load_file(path)
    except (OSError, _safetensors("safetensors").SafetensorError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _safetensors(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BackendUnavailable(
            f"saving and loading need safetensors: {install_command('safetensors')}"
        ) from error
