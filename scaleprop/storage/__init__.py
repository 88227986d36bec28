"""Saved models, format 3: folders of JSON and safetensors; nothing is pickled.

    config.json                recipe, signature, dimensions, records, notes, tied names
    graph.json                 the nodes in order, see ``graph_json``
    tensors-00001.safetensors  parameters and buffers, in shards of at most ``shard_bytes`` (a
                               larger tensor has one of its own)
    example.safetensors        the example inputs, and the unquantized model's outputs on them
    manifest.json              SHA-256 of the JSON files, of each shard's header and of each tensor

Tensors are written one at a time. The folder is filled beside its destination, flushed to the disk
and takes its place in one rename; a killed save goes on with the shards that it had finished.
Format 2, which has one ``tensors.safetensors`` and no manifest, is read as well.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
from torch.utils import _pytree as pytree

from scaleprop import durable
from scaleprop import ops as _ops  # registers scaleprop::*, which saved graphs name
from scaleprop.errors import ConfigError
from scaleprop.graph_json import graph_from_json, graph_to_json
from scaleprop.passes.base import Program
from scaleprop.passes.values import propagate_values
from scaleprop.recipes import Recipe
from scaleprop.report.graph.model import Block
from scaleprop.report.plain import (
    plain,
    record_from_plain,
    record_to_plain,
    transforms_from,
    trials_from,
)
from scaleprop.report.records import TensorRecord, TransformRecord
from scaleprop.report.scales import ScaleReport
from scaleprop.storage import tensorfile
from scaleprop.storage.reading import Folder
from scaleprop.storage.writing import EXAMPLES, fill, shards

if TYPE_CHECKING:
    from scaleprop.api import CompiledModel

FORMAT_VERSION = 3
SHARD_BYTES = 1 << 29
_READ = (2, 3)

del _ops


@dataclasses.dataclass(frozen=True)
class Known:
    """What the report of a compiled model has of it; scales: None before it was measured, and then
    so is block."""

    records: tuple[TensorRecord, ...]
    transforms: tuple[TransformRecord, ...]
    scales: ScaleReport | None
    block: Block | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedModel:
    """What a saved directory holds: a compiled model that no backend has seen."""

    program: Program
    recipe: Recipe
    backend: str
    baseline: tuple[Any, ...]
    nbytes_before: int
    scales: ScaleReport | None = None
    block: Block | None = None

    @property
    def known(self) -> Known:
        """What its report has."""
        return Known(self.program.records, self.program.transforms, self.scales, self.block)


def save(
    compiled: CompiledModel | SavedModel, directory: Path, shard_bytes: int = SHARD_BYTES
) -> Path:
    """Write ``compiled`` to ``directory``, which must not exist or be a saved model.

    Of a symbolic link, what it points to is replaced.

    Raises:
        ConfigError: where the directory holds something else or cannot be written, or
            ``shard_bytes`` is no positive number.
        UnsupportedOpError: where the graph holds what JSON cannot name.
    """
    check_replaceable(directory)
    if shard_bytes < 1:
        raise ConfigError(f"shard_bytes={shard_bytes}: a shard has at least 1 byte")
    program = compiled.program
    tensors, aliases = _unique({**dict(program.module.named_parameters()),
                                **dict(program.module.named_buffers())})
    texts = {"config.json": json.dumps(_config(compiled, aliases), indent=1),
             "graph.json": json.dumps(graph_to_json(program.module.graph))}
    examples = _indexed("example", program.example_leaves) | _indexed("baseline", compiled.baseline)
    files = {**shards(tensors, shard_bytes), EXAMPLES: examples}
    make_parents(directory)
    place = directory.resolve()
    try:
        with durable.scratch(place, "saving") as folder:
            fill(folder, FORMAT_VERSION, texts, files)
            durable.install(folder, place)
    except OSError as error:
        raise not_written(directory, error) from error
    return directory


def not_written(directory: Path, error: OSError) -> ConfigError:
    """What to raise where ``directory`` cannot be written."""
    remedy = {errno.ENOSPC: "make room on that disk", errno.EDQUOT: "make room on that disk",
              errno.EBUSY: "a folder in it: it is a mount point",
              errno.ENAMETOOLONG: "a shorter name"}.get(error.errno or 0, "choose another path")
    return ConfigError(f"cannot write {directory}: {error.strerror or error}. Remedy: {remedy}")


def _config(compiled: CompiledModel | SavedModel, aliases: Mapping[str, str]) -> dict[str, Any]:
    program, known = compiled.program, compiled.known
    return {
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
        "records": [record_to_plain(record) for record in known.records],
        "transforms": [plain(dataclasses.asdict(record)) for record in known.transforms],
        "scales": None if known.scales is None else known.scales.to_dict(),
        "block": None if known.block is None else known.block.to_dict(),
        "trials": [plain(dataclasses.asdict(trial)) for trial in program.trials],
        "example": [_constant(leaf) for leaf in program.example_leaves],
        "baseline": [_constant(leaf) for leaf in compiled.baseline],
        "aliases": dict(aliases),
    }


def _constant(leaf: Any) -> dict[str, Any] | None:
    return None if isinstance(leaf, torch.Tensor) else {"constant": leaf}


def make_parents(directory: Path) -> None:
    """Make the folder that ``directory`` is to be in.

    Raises:
        ConfigError: where it cannot be made, or nothing can be written to it.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write {directory}: {error}") from error
    if not os.access(directory.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"cannot write {directory}: nothing can be made in {directory.parent}")


def check_replaceable(
    directory: Path, ours: Callable[[Path, Any], bool] | None = None, what: str = "a saved model"
) -> None:
    """Raise ``ConfigError`` where something is lost but what scaleprop wrote, and where the name is
    too long for the hidden ones beside it.

    ours: whether a folder with this ``config.json`` is ``what``; default: that ``save`` wrote it.
    """
    try:
        free = _replaceable(directory, ours or _is_saved)
        place = directory.resolve()
        (place.parent / f".{place.name}.compiling.99").exists()
    except OSError as error:
        raise not_written(directory, error) from error
    if not free:
        raise ConfigError(f"{directory} exists and is not {what}; choose another path")


def _replaceable(directory: Path, ours: Callable[[Path, Any], bool]) -> bool:
    if not directory.exists():
        return not directory.is_symlink()
    if not directory.is_dir():
        return False
    if not any(directory.iterdir()):
        return True
    try:
        config = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return ours(directory, config)


def _is_saved(directory: Path, config: Any) -> bool:
    """Other libraries keep a ``config.json`` too: ours has a ``format_version`` and a graph."""
    return (isinstance(config, dict) and "format_version" in config
            and (directory / "graph.json").is_file())


def load(directory: Path, verify: bool = True) -> SavedModel:
    """Read what ``save`` wrote. Tensors are the files' own pages, read when they are touched.

    verify: compare every file and tensor with its SHA-256 first, which reads all of them.

    Raises:
        ConfigError: where a file is missing, damaged (naming it, and the tensor), or of another
            version.
    """
    config = _json(directory, "config.json")
    if not isinstance(config, dict):
        raise ConfigError(f"{directory} is not a saved model: its config.json holds no object")
    if config.get("format_version") not in _READ:
        raise ConfigError(
            f"{directory} was saved by another version of scaleprop: its format_version is "
            f"{config.get('format_version')!r}, this one reads {' and '.join(map(str, _READ))}; "
            "compile and save again"
        )
    if config["format_version"] == FORMAT_VERSION:
        folder = Folder(directory, verify)
        tensors, examples = folder.tensors(), folder.examples()
    else:
        tensors, examples = (tensorfile.mapped(directory / f"{name}.safetensors")
                             for name in ("tensors", "example"))
    nodes = _json(directory, "graph.json")
    try:
        return _restored(config, nodes, tensors, examples)
    except ConfigError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{directory} is damaged: {type(error).__name__}: {error}") from error


def _json(directory: Path, name: str) -> Any:
    try:
        return json.loads((directory / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{directory} is not a saved model: {error}") from error


def _restored(
    config: dict[str, Any], nodes: Any, tensors: dict[str, torch.Tensor],
    stored: Mapping[str, torch.Tensor],
) -> SavedModel:
    tensors |= {name: tensors[first] for name, first in config["aliases"].items()}
    in_spec, out_spec = (_spec(config[key]) for key in ("in_spec", "out_spec"))
    args, kwargs = pytree.tree_unflatten(_leaves("example", config, stored), in_spec)
    axes = {name: {int(axis): dim for axis, dim in sizes.items()}
            for name, sizes in config["dynamic_axes"].items()}
    program = Program(
        module=_module(graph_from_json(nodes), tensors),
        in_spec=in_spec, out_spec=out_spec, example_args=tuple(args), example_kwargs=kwargs,
        arguments=tuple(config["arguments"]),
        dynamic_axes=axes, guards=tuple(config["guards"]),
        records=tuple(map(record_from_plain, config["records"])),
        transforms=transforms_from(config.get("transforms", ())),
        trials=trials_from(config.get("trials", ())),
        tolerance=config["tolerance"], notes=tuple(config["notes"]),
    )
    propagate_values(program)
    return SavedModel(
        program=program, recipe=Recipe.from_dict(config["recipe"]), backend=config["backend"],
        baseline=tuple(_leaves("baseline", config, stored)),
        nbytes_before=config["nbytes_before"],
        scales=None if config.get("scales") is None else ScaleReport.from_dict(config["scales"]),
        block=None if config.get("block") is None else Block.from_dict(config["block"]),
    )


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
