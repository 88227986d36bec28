"""Models compiled from files, a layer at a time: the bytes that ``compile`` and ``save`` write."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import scaleprop
import scaleprop.formats
from scaleprop.cli.app import run
from scaleprop.errors import ConfigError
from scaleprop.storage import tensorfile
from scaleprop.storage.stored import StoredTensor
from scaleprop.streaming import compile_from_safetensors
from scaleprop.streaming.shelf import SMALL

WIDTH = 256  # weights of 64 KiB and more stay on disk
SHARD = 200_000


class Tiny(torch.nn.Module):
    """Two blocks, a table that is tied to the last product, a constant that no file has."""

    positions: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(300, WIDTH)
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.LayerNorm(WIDTH), torch.nn.Linear(WIDTH, WIDTH),
                                torch.nn.GELU(), torch.nn.Linear(WIDTH, WIDTH))
            for _ in range(2))
        self.turned = torch.nn.Parameter(torch.randn(WIDTH, WIDTH) / 16)  # [K, N]: is transposed
        self.head = torch.nn.Linear(WIDTH, 300, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("positions", torch.linspace(0, 1, WIDTH), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids) + self.positions
        for block in self.blocks:
            x = x + block(x)
        return self.head(torch.matmul(x, self.turned))


def inputs() -> torch.Tensor:
    return torch.arange(12).reshape(2, 6)


def batches() -> list[torch.Tensor]:
    return [torch.randint(0, 300, (2, 6), generator=torch.Generator().manual_seed(i))
            for i in range(2)]


@pytest.fixture(scope="module")
def model() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


@pytest.fixture(scope="module")
def folder(model: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files and their index; the tied weight once."""
    found = tmp_path_factory.mktemp("files")
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "head.weight"}
    names = list(state)
    places: dict[str, str] = {}
    for number, part in enumerate((names[:7], names[7:])):
        file = f"model-{number}.safetensors"
        safetensors.torch.save_file({name: state[name] for name in part}, found / file)
        places |= dict.fromkeys(part, file)
    (found / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(("recipe", "options"), [
    ("int8-dynamic", {}), ("int4", {"exclude": ["head"]}), ("mxfp4", {}), ("nvfp4", {}),
    ("int8", {"calibration": batches()}),
])
def test_the_folder_is_what_compile_and_save_write(
    model: Tiny, folder: Path, recipe: str, options: dict[str, Any], tmp_path: Path
) -> None:
    whole = scaleprop.compile(model, inputs(), recipe, "reference", **options)
    want = whole.save(tmp_path / "whole", shard_bytes=SHARD)
    report = compile_from_safetensors(folder, tmp_path / "layers", inputs(), recipe, "reference",
                                      model=Tiny, shard_bytes=SHARD, **options)
    assert contents(tmp_path / "layers") == contents(want)
    assert sorted(os.listdir(tmp_path)) == ["layers", "whole"]
    assert report.nbytes_after == whole.nbytes and len(report.records) == len(whole.report.records)
    assert "no backend has run it" in report.notes[-1]


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes of large tensors that are loaded and alive: [now, the most at any time]."""
    counted, load = [0, 0], StoredTensor.load

    def counting(tensor: StoredTensor) -> torch.Tensor:
        values = load(tensor)
        if (size := values.nbytes) > SMALL:
            counted[0] += size
            counted[1] = max(counted)
            weakref.finalize(values.untyped_storage(),
                             lambda: counted.__setitem__(0, counted[0] - size))
        return values

    monkeypatch.setattr(StoredTensor, "load", counting)
    yield counted


def test_at_most_two_weights_are_in_memory(
    folder: Path, held: list[int], tmp_path: Path
) -> None:
    compile_from_safetensors(folder, tmp_path / "out", inputs(), "int8", "reference", model=Tiny,
                             calibration=batches())
    largest = 300 * WIDTH * 4
    assert largest <= held[1] <= 2 * largest
    assert held[0] == 0


def test_a_killed_compilation_does_nothing_twice(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scaleprop.passes import quantize_weights

    out, made = tmp_path / "out", list[str]()
    quantize = quantize_weights.quantize

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append("a weight")
        if len(made) == stop:
            raise KeyboardInterrupt
        return quantize(*args, **kwargs)

    def compiled() -> None:
        compile_from_safetensors(folder, out, inputs(), "int4", "reference", model=Tiny)

    monkeypatch.setattr(quantize_weights, "quantize", counted)
    stop = 0
    compiled()
    want, every = contents(out), len(made)
    shutil.rmtree(out)
    made.clear()
    stop = every // 2 + 1
    with pytest.raises(KeyboardInterrupt):
        compiled()
    assert os.listdir(tmp_path) == [".out.compiling"]
    stop = 0
    compiled()
    assert len(made) == every + 1  # the one that was cut short
    assert contents(out) == want and os.listdir(tmp_path) == ["out"]


def test_files_that_changed_are_compiled_anew(model: Tiny, folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    out = tmp_path / "out"
    broken: Callable[..., Any] = lambda: (_ for _ in ()).throw(OSError("no space"))  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scaleprop.streaming.storage.save", lambda *_: broken())
        with pytest.raises(OSError, match="no space"):
            compile_from_safetensors(source, out, inputs(), "int4", "reference", model=Tiny)
    assert (tmp_path / ".out.compiling").is_dir()  # a failure after hours costs none of them
    changed = dict(safetensors.torch.load_file(source / "model-0.safetensors"))
    changed["blocks.0.1.weight"] = changed["blocks.0.1.weight"] * 2
    safetensors.torch.save_file(changed, source / "model-0.safetensors")
    other = Tiny()
    other.load_state_dict({**model.state_dict(), **changed, "head.weight": model.table.weight})
    compile_from_safetensors(source, out, inputs(), "int4", "reference", model=Tiny)
    want = scaleprop.compile(other, inputs(), "int4", "reference").save(tmp_path / "want")
    assert contents(out) == contents(want)


def altered(state: dict[str, torch.Tensor], what: str) -> dict[str, torch.Tensor]:
    name = "blocks.1.1.weight"
    if what == "missing":
        del state[name]
    elif what == "extra":
        state["strange.weight"] = torch.ones(2)
    elif what == "shape":
        state[name] = torch.zeros(2, 3)
    elif what == "dtype":
        state[name] = state[name].half()
    elif what == "tied":
        state["head.weight"] = state["table.weight"] + 1
    return state


@pytest.mark.parametrize(("what", "says"), [
    ("missing", r"lacks 'blocks\.1\.1\.weight'"), ("extra", r"has 'strange\.weight'"),
    ("shape", r"'blocks\.1\.1\.weight' has shape \[2, 3\]"),
    ("dtype", r"'blocks\.1\.1\.weight' is torch\.float16"),
    ("tied", r"'table\.weight' and 'head\.weight' are one parameter"),
])
def test_files_that_do_not_fit_are_named(
    model: Tiny, what: str, says: str, tmp_path: Path
) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()
             if name != "head.weight"}
    files = tmp_path / "files"
    files.mkdir()
    safetensors.torch.save_file(altered(state, what), files / "model.safetensors")
    with pytest.raises(ConfigError, match=says) as refused:
        compile_from_safetensors(files, tmp_path / "out", inputs(), model=Tiny)
    assert "Remedy" in str(refused.value) and os.listdir(tmp_path) == ["files"]


def test_left_over_tensors_can_be_ignored_and_a_tied_one_stored_twice(
    model: Tiny, tmp_path: Path
) -> None:
    files = tmp_path / "files"
    files.mkdir()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file({**state, "old.scale": torch.ones(1)}, files / "a.safetensors")
    compile_from_safetensors(files, tmp_path / "out", inputs(), "int8-weight", "reference",
                             model=Tiny, ignore=["old.*"])
    want = scaleprop.compile(model, inputs(), "int8-weight", "reference").save(tmp_path / "want")
    assert contents(tmp_path / "out") == contents(want)


@pytest.mark.parametrize(("options", "says"), [
    ({"recipe": "auto"}, "whole models"),
    ({"passes": ["smooth"], "calibration": [inputs()]}, "'smooth'.*several whole weights"),
    ({"recipe": "int4-g32-compensated", "calibration": [torch.ones(1)]}, "second moment"),
    ({"model": lambda: 3}, "int; expected"),
    ({"model": lambda: float(Tiny().turned.sum())}, "no values while it runs"),
    ({"model": None}, r"config\.json"),
    ({"example_inputs": None}, "no example inputs"),
])
def test_what_needs_the_whole_model_is_refused_before_any_work(
    folder: Path, options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    given = {"example_inputs": inputs(), "model": Tiny, **options}
    with pytest.raises(ConfigError, match=says):
        compile_from_safetensors(folder, tmp_path / "out", **given)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(("spoil", "says"), [
    (lambda f: (f / "model-1.safetensors").unlink(), r"model-1\.safetensors"),
    (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "weight_map"),
    (lambda f: (f / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../a.safetensors"}}'), "no file of its folder"),
    (lambda f: (f / "model.safetensors.index.json").write_text(
        '{"weight_map": {"lost": "model-0.safetensors"}}'), "'lost'"),
    (lambda f: [path.unlink() for path in f.iterdir()], "no safetensors files"),
])
def test_spoilt_folders_are_named(
    folder: Path, spoil: Callable[[Path], Any], says: str, tmp_path: Path
) -> None:
    files = tmp_path / "files"
    shutil.copytree(folder, files)
    spoil(files)
    with pytest.raises(ConfigError, match=says):
        compile_from_safetensors(files, tmp_path / "out", inputs(), model=Tiny)


def test_a_transformers_folder_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1, vocab_size=300,
                         tie_word_embeddings=True)
    whole = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    whole.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    assert run(["compile", "--from-safetensors", str(tmp_path / "model"), "--recipe", "int8-weight",
                "--backend", "reference", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == [str(out)]
    compiled = scaleprop.load(out)
    weights = dict(compiled.program.module.named_buffers())
    for name, weight in whole.state_dict().items():
        if "proj" in name:
            data, scale = weights[f"{name}_data"], weights[f"{name}_scale"]
            assert (data.float() * scale - weight.float()).abs().max() <= 0.51 * scale.max()
    ids = torch.arange(8)[None]
    got, want = compiled(input_ids=ids), whole(ids, use_cache=False).logits
    cosine = torch.cosine_similarity(got.logits.flatten().float(), want.flatten().float(), dim=0)
    assert cosine > 0.99


@pytest.mark.parametrize(("arguments", "says"), [
    ([], "--out FOLDER"), (["--out", "m.onnx"], "--out FOLDER"),
    (["--out", "out", "--verify"], "--verify"), (["--out", "out", "x.pt2"], "factory"),
])
def test_the_command_refuses_what_it_cannot_do(
    arguments: list[str], says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["compile", "--from-safetensors", str(folder), *arguments]) == 2
    assert says in capsys.readouterr().err


def test_a_stored_tensor_is_computed_with_like_any_other(tmp_path: Path) -> None:
    values = torch.randn(6, 4)
    tensorfile.write(tmp_path / "a.safetensors", {"w": values})
    stored = tensorfile.stored(tmp_path / "a.safetensors")["w"]
    x = torch.randn(3, 4)
    assert torch.equal(torch.nn.functional.linear(x, stored), torch.nn.functional.linear(x, values))
    assert torch.equal(stored[1:3].t(), values[1:3].t()) and type(stored + 0) is torch.Tensor
    (tmp_path / "a.safetensors").unlink()
    assert stored.shape == (6, 4) and stored.dtype == torch.float32 and stored.nbytes == 96
    with pytest.raises(ConfigError, match=r"a\.safetensors"):
        stored + 1


@pytest.mark.parametrize("recipe", ["nvfp4", "int4-fp8", "mxfp4", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_rows_at_a_time_give_the_bits_of_all_at_once(
    recipe: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scaleprop.passes import quantize_weights

    monkeypatch.setattr(quantize_weights, "_CHUNK", 7 * WIDTH)  # rows of a piece, times their width
    torch.manual_seed(0)
    model = torch.nn.Linear(WIDTH, 64, bias=False).to(dtype)
    with torch.no_grad():
        model.weight *= torch.logspace(-6, 3, 64)[:, None]
        model.weight[5] = 0
    compiled = scaleprop.compile(model, torch.ones(2, WIDTH, dtype=dtype), recipe, "reference")
    role = compiled.recipe.roles["fprop.w"]
    fmt = scaleprop.formats.parse(role.format)
    searched = fmt.replace(rule="mse") if role.clipping == "mse" else fmt
    want = scaleprop.quantize(model.weight, searched).parts
    found = dict(compiled.program.module.named_buffers())
    names = ["weight_data", "weight_scale", *(["weight_tensor_scale"] if fmt.two_level else []),
             *(["weight_zero_point"] if fmt.zero_point else [])]
    for name, part in zip(names, want, strict=True):
        assert torch.equal(found[name].reshape(-1).view(torch.uint8),
                           part.reshape(-1).view(torch.uint8)), name
