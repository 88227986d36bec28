"""Saved models on disk: what others read, what damage is found, what is not written twice."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import scaleprop
from scaleprop import durable
from scaleprop.api import CompiledModel
from scaleprop.errors import ConfigError
from scaleprop.storage import tensorfile

SHARD = 600  # bytes: of 3 × 512 bytes of codes, one in each


class Tied(torch.nn.Module):
    """Linears, one of them used twice, and a bias of its own width."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(16, 32)
        self.second = torch.nn.Linear(32, 16)
        self.last = torch.nn.Linear(16, 32, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.second(self.first(x).relu()))


@pytest.fixture(scope="module")
def compiled() -> CompiledModel:
    torch.manual_seed(0)
    return scaleprop.compile(Tied(), torch.randn(3, 16), "int8-weight", "reference")


@pytest.fixture(scope="module")
def saved(compiled: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled.save(tmp_path_factory.mktemp("format") / "saved", shard_bytes=SHARD)


def parameters(compiled: CompiledModel) -> dict[str, torch.Tensor]:
    return dict(compiled.program.module.named_buffers()) | dict(
        compiled.program.module.named_parameters())


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_library_reads_every_shard_and_the_manifest_has_its_digests(
    compiled: CompiledModel, saved: Path
) -> None:
    shards = sorted(saved.glob("tensors-*.safetensors"))
    assert len(shards) >= 3
    found: dict[str, torch.Tensor] = {}
    for shard in shards:
        found |= safetensors.torch.load_file(shard)
    config = json.loads((saved / "config.json").read_text())
    want = {name: tensor for name, tensor in parameters(compiled).items()
            if name not in config["aliases"]}
    assert found.keys() == want.keys()
    digests: dict[str, str] = {}
    manifest = json.loads((saved / "manifest.json").read_text())
    for entry in manifest["tensors"].values():
        digests |= entry["tensors"]
    for name, tensor in want.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert as_bytes(found[name]) == as_bytes(tensor)
        assert digests[name] == hashlib.sha256(as_bytes(tensor)).hexdigest()


def test_our_reader_takes_the_librarys_files(tmp_path: Path) -> None:
    tensors = {"odd": torch.ones(3, dtype=torch.uint8), "none": torch.zeros(0, 2),
               "scalar": torch.tensor(2.5), "half": torch.randn(5).bfloat16(),
               "eight": torch.randn(7).to(torch.float8_e4m3fn)}
    path = tmp_path / "library.safetensors"
    safetensors.torch.save_file(tensors, path, {"made": "elsewhere"})
    for read in (tensorfile.mapped(path), tensorfile.stored(path)):
        assert {name: (t.shape, t.dtype) for name, t in read.items()} \
            == {name: (t.shape, t.dtype) for name, t in tensors.items()}
        for name, tensor in tensors.items():
            assert b"".join(map(bytes, tensorfile.chunks(read[name]))) == as_bytes(tensor)


def test_version_2_is_read(compiled: CompiledModel, saved: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(saved, old)
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(old.glob("tensors-*.safetensors")):
        tensors |= safetensors.torch.load_file(shard)
        shard.unlink()
    safetensors.torch.save_file(tensors, old / "tensors.safetensors")
    (old / "manifest.json").unlink()
    config = json.loads((old / "config.json").read_text())
    (old / "config.json").write_text(json.dumps({**config, "format_version": 2}))
    x = torch.randn(5, 16)
    assert torch.equal(scaleprop.load(old)(x), compiled(x))


@pytest.mark.parametrize("place", ["first", "last", "header", "text", "example"])
def test_one_damaged_byte_is_found_and_named(saved: Path, place: str, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    shard = folder / "tensors-00002.safetensors"
    entries = tensorfile.read_entries(shard)
    name, entry = next((n, e) for n, e in entries.items() if e.end - e.start > 1)
    path, at = {
        "first": (shard, entry.start), "last": (shard, entry.end - 1),
        "header": (shard, shard.read_bytes().index(name.encode())),
        "text": (folder / "graph.json", 40),
        "example": (folder / "example.safetensors", -1),
    }[place]
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConfigError) as refused:
        scaleprop.load(folder)
    assert str(path) in str(refused.value) and "damaged" in str(refused.value)
    if place in ("first", "last"):
        assert repr(name) in str(refused.value)
        scaleprop.load(folder, verify=False)  # as asked for


@pytest.mark.parametrize("remove", ["manifest.json", "tensors-00001.safetensors", "graph.json"])
def test_a_missing_file_is_named(saved: Path, remove: str, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    (folder / remove).unlink()
    with pytest.raises(ConfigError, match=remove):
        scaleprop.load(folder)


@pytest.mark.parametrize("change", [
    lambda m: {**m, "tensors": {}}, lambda m: {**m, "tensors": 3}, lambda m: {"files": {}},
    lambda m: {**m, "files": {"../config.json": ""}},
])
def test_a_damaged_manifest_is_refused(saved: Path, change: Any, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(change(manifest)))
    with pytest.raises(ConfigError):
        scaleprop.load(folder)


@pytest.mark.parametrize("name", ["config.json", "graph.json", "manifest.json"])
def test_texts_nested_too_deeply_are_refused(saved: Path, name: str, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    (folder / name).write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="recursion"):
        scaleprop.load(folder, verify=False)


def test_loaded_parameters_are_pages_that_may_be_written(saved: Path) -> None:
    before = contents(saved)
    loaded = scaleprop.load(saved)
    for tensor in parameters(loaded).values():
        tensor.zero_()
    assert contents(saved) == before


def test_no_tensor_is_copied_with_others(
    compiled: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of tensors that lie as they are stored, saving makes no copy at all."""
    made: list[int] = []
    for name in ("clone", "contiguous", "cpu"):
        original = getattr(torch.Tensor, name)

        def counted(tensor: torch.Tensor, *args: Any, _original: Any = original, **kwargs: Any):
            result = _original(tensor, *args, **kwargs)
            made.append(int(result.data_ptr() != tensor.data_ptr()))
            return result

        monkeypatch.setattr(torch.Tensor, name, counted)
    compiled.save(tmp_path / "saved")
    assert made and not any(made)


def test_a_killed_save_goes_on_with_finished_shards(
    compiled: CompiledModel, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, wrote = tensorfile.write, list[str]()

    def counted(path: Path, tensors: Any) -> Any:
        wrote.append(path.name)
        return write(path, tensors)

    monkeypatch.setattr(tensorfile, "write", counted)
    left = tmp_path / ".saved.saving"  # what a kill after two shards leaves, one of them damaged
    left.mkdir()
    for name in ("tensors-00001.safetensors", "tensors-00002.safetensors", "config.json"):
        shutil.copy(saved / name, left)
    damaged = bytearray((left / "tensors-00002.safetensors").read_bytes())
    damaged[-1] ^= 1
    (left / "tensors-00002.safetensors").write_bytes(damaged)
    (left / "tensors-00003.safetensors.part").write_bytes(b"half")
    again = compiled.save(tmp_path / "saved", shard_bytes=SHARD)
    assert "tensors-00001.safetensors.part" not in wrote
    assert wrote[0] == "tensors-00002.safetensors.part"
    assert contents(again) == contents(saved)
    assert os.listdir(tmp_path) == ["saved"]


def test_what_is_left_of_another_model_is_not_taken(
    compiled: CompiledModel, saved: Path, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    other = scaleprop.compile(Tied(), torch.randn(3, 16), "int8-weight", "reference")
    other.save(tmp_path / "other", shard_bytes=SHARD)
    os.rename(tmp_path / "other", tmp_path / ".saved.saving")
    again = compiled.save(tmp_path / "saved", shard_bytes=SHARD)
    assert contents(again)["tensors-00001.safetensors"] \
        == contents(saved)["tensors-00001.safetensors"]
    scaleprop.load(again)


def test_two_saves_to_one_place_do_not_meet(compiled: CompiledModel, tmp_path: Path) -> None:
    with durable.scratch(tmp_path / "saved", "saving") as held:  # as another process would
        (held / "theirs").touch()
        compiled.save(tmp_path / "saved")
        assert (held / "theirs").exists()
    assert os.listdir(tmp_path) == ["saved"]
    scaleprop.load(tmp_path / "saved")


def test_saving_over_the_folder_that_is_loaded(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    loaded = scaleprop.load(folder)  # its parameters are this folder's pages
    before = contents(folder)
    loaded.save(folder, shard_bytes=SHARD)
    assert contents(folder) == before


def test_saving_through_a_link_replaces_what_it_points_to(
    compiled: CompiledModel, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(saved, tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    for _ in range(2):
        compiled.save(tmp_path / "link", shard_bytes=SHARD)
        assert (tmp_path / "link").is_symlink() and contents(tmp_path / "real") == contents(saved)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    compiled.save(".", shard_bytes=SHARD)
    assert contents(tmp_path / "here") == contents(saved)
    assert sorted(os.listdir(tmp_path)) == ["here", "link", "real"]


@pytest.mark.parametrize("length", [250, 300])
def test_names_that_are_too_long_are_refused_in_words(
    compiled: CompiledModel, length: int, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="shorter name"):
        compiled.save(tmp_path / ("n" * length))
    assert not os.listdir(tmp_path)


def test_a_full_disk_is_said_and_leaves_the_older_model(
    compiled: CompiledModel, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    monkeypatch.setattr(tensorfile, "write", full)
    with pytest.raises(ConfigError, match=r"No space left.*Remedy: make room"):
        compiled.save(folder)
    assert contents(folder) == contents(saved) and os.listdir(tmp_path) == ["copy"]


def test_what_a_killed_write_left_is_deleted_by_the_next_one(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    code = ("import os, sys, pathlib; from scaleprop import durable\n"
            "durable.replace = lambda *_: os._exit(9)\n"
            "durable.write(pathlib.Path(sys.argv[1]), b'half')")
    assert subprocess.run([sys.executable, "-c", code, str(target)]).returncode == 9
    (left,) = tmp_path.iterdir()
    (tmp_path / ".a.json.mine.tmp").touch()
    with left.with_name(".a.json.0123abcd.tmp").open("w") as held:  # as a living process does
        fcntl.flock(held, fcntl.LOCK_EX)
        mask = os.umask(0o027)
        try:
            durable.write(target, b"whole")
        finally:
            os.umask(mask)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".a.json.0123abcd.tmp", ".a.json.mine.tmp", "a.json"]
    assert target.read_bytes() == b"whole" and target.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("shard_bytes", [0, -1])
def test_a_shard_has_bytes(compiled: CompiledModel, shard_bytes: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="shard_bytes"):
        compiled.save(tmp_path / "saved", shard_bytes=shard_bytes)
    assert not os.listdir(tmp_path)


def test_dtypes_that_files_cannot_hold_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'z'.*complex128"):
        tensorfile.write(tmp_path / "x", {"z": torch.zeros(2, dtype=torch.complex128)})


@pytest.mark.parametrize("data", [
    b"", b"\x08", (100).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]",
    (2).to_bytes(8, "little") + b"{}tail",
    *((len(text)).to_bytes(8, "little") + text.encode() + bytes(8) for text in (
        '{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
        '{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}',
        '{"a": {"dtype": "X9", "shape": [2], "data_offsets": [0, 8]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}',
        "[" * 100_000)),
], ids=lambda data: data[:12].hex())
def test_what_is_no_tensor_file_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"bad\.safetensors"):
        tensorfile.read_entries(path)


@pytest.mark.parametrize(("places", "why"), [
    ([(0, 8), (4, 12)], r"'1' overlaps the one before it: it begins at byte \d+, not \d+"),
    ([(0, 8), (0, 8)], "'1' overlaps"),
    ([(0, 8), (0, 4), (4, 8)], "'0' overlaps"),
    ([(0, 4), (8, 12)], "'1' leaves a hole before it"),
    ([(4, 8)], "'0' leaves a hole"),
    ([(8, 8), (0, 4)], "'0' leaves a hole"),
])
def test_tensors_lie_side_by_side(places: list[tuple[int, int]], why: str, tmp_path: Path) -> None:
    header = {str(index): {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
              for index, (start, end) in enumerate(places)}
    text = json.dumps(header).encode()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text
                     + bytes(max(end for _, end in places)))
    with pytest.raises(safetensors.SafetensorError):  # nor does the library take it
        safetensors.torch.load_file(path)
    with pytest.raises(ConfigError, match=why):
        tensorfile.read_entries(path)
