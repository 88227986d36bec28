"""A model of three times the memory that its compilation may take.

    python -m benchmarks.larger_than_memory                       # 12 GiB under ulimit -v of 4 GiB
    python -m benchmarks.larger_than_memory --limit 1.5 --times 0.4 --width 1024  # small

A Llama's shards are written with random weights, one tensor at a time, to a temporary folder.
``scaleprop compile --from-safetensors`` then runs in a process whose address space is limited (the
kernel refuses what is above), is killed with SIGKILL when half of the weights are done, and runs
again. Peaks are the kernel's. Some of the results are compared with ``scaleprop.quantize`` of what
the safetensors library reads. A smaller model is compiled without a limit by several recipes: its
peaks, above those of next to nothing, are in units of its largest layer.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
import os
import random
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import scaleprop
from benchmarks import figures, harness
from scaleprop import storage
from scaleprop.storage import tensorfile

GIB = 1 << 30
CHECKED = 8  # weights compared
RECIPES = ("int4", "int8-dynamic", "fp8-weight", "mxfp4", "nvfp4")
UNLIMITED = 1 << 40
TINY, SMALLER = (128, 1, 64), (2048, 4, 1024)  # width, layers, vocabulary


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Llama. width: of its activations; layers: how many blocks."""

    width: int
    layers: int
    vocabulary: int = 32000

    @property
    def hidden(self) -> int:
        """Width inside the feed-forward blocks."""
        return self.width * 11 // 4 // 128 * 128

    def block(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of one block's tensors."""
        d, h = self.width, self.hidden
        return {**{f"self_attn.{name}_proj.weight": (d, d) for name in "qkvo"},
                "mlp.gate_proj.weight": (h, d), "mlp.up_proj.weight": (h, d),
                "mlp.down_proj.weight": (d, h), "input_layernorm.weight": (d,),
                "post_attention_layernorm.weight": (d,)}

    def shards(self) -> list[dict[str, tuple[int, ...]]]:
        """One a block, and those around them."""
        blocks = [{f"model.layers.{i}.{name}": shape for name, shape in self.block().items()}
                  for i in range(self.layers)]
        table = (self.vocabulary, self.width)
        return [{"model.embed_tokens.weight": table}, *blocks,
                {"model.norm.weight": (self.width,), "lm_head.weight": table}]

    @property
    def largest_layer(self) -> int:
        """Bytes of the largest shard, in bfloat16."""
        return max(map(_nbytes, self.shards()))

    @property
    def nbytes(self) -> int:
        """Bytes of all, in bfloat16."""
        return sum(map(_nbytes, self.shards()))

    @classmethod
    def of(cls, nbytes: float, width: int, vocabulary: int = 32000) -> Shape:
        """The shallowest of at least ``nbytes``."""
        empty = cls(width, 0, vocabulary).nbytes
        one = cls(width, 1, vocabulary).nbytes - empty
        return cls(width, max(1, math.ceil((nbytes - empty) / one)), vocabulary)


def _nbytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(2 * torch.Size(shape).numel() for shape in shapes.values())


def write_model(shape: Shape, folder: Path) -> None:
    """Random shards, their index and ``config.json``; one tensor in memory at a time."""
    places: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    shards = shape.shards()
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        empty = {name: torch.empty(size, dtype=torch.bfloat16, device="meta")
                 for name, size in shapes.items()}
        with (folder / file).open("wb") as out:
            out.write(tensorfile.header(empty, {"format": "pt"}))
            for size in shapes.values():
                values = torch.empty(size, dtype=torch.bfloat16)
                if len(size) == 1:
                    values.fill_(1)
                else:
                    values.normal_(0, size[-1] ** -0.5, generator=generator)
                out.write(values.view(torch.uint8).numpy().data)
        places |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_size": shape.width, "intermediate_size": shape.hidden,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.width // 64,
        "num_key_value_heads": shape.width // 64, "vocab_size": shape.vocabulary,
        "tie_word_embeddings": False}))


def memory_after_imports() -> int:
    """Bytes of address space that a process has taken once it could begin."""
    code = ("import scaleprop.streaming, transformers.models.llama.modeling_llama\n"
            "print(open('/proc/self/status').read())")
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=harness.ROOT)
    return _status(said.stdout, "VmPeak")


def _status(text: str, key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", text)
    return int(found[1]) * 1024 if found else 0


@dataclasses.dataclass(frozen=True)
class Run:
    """One process: bytes are peaks; done_before: weights that it found done."""

    seconds: float
    peak_rss: int
    peak_vm: int
    killed: bool
    done_before: int


def compile_limited(
    source: Path, out: Path, recipe: str, limit: int, kill_after: int | None = None
) -> Run:
    """``scaleprop compile`` under ``ulimit -v``; killed once ``kill_after`` weights are done."""
    command = [sys.executable, "-m", "scaleprop", "compile", "--from-safetensors", str(source),
               "--recipe", recipe, "--out", str(out), "--verbose", "--json"]
    limited = f"ulimit -v {limit // 1024}; exec {shlex.join(command)}"
    scratch = out.parent / f".{out.name}.compiling"
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        # each thread may otherwise reserve address space for a heap of its own, or not
        process = subprocess.Popen(["bash", "-c", limited], stdout=subprocess.DEVNULL, stderr=log,
                                   cwd=harness.ROOT, env={**os.environ, "MALLOC_ARENA_MAX": "1"})
        peak_rss = peak_vm = 0
        killed = False
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak_vm = max(peak_vm, _status(status, "VmPeak"))
            peak_rss = max(peak_rss, _status(status, "VmHWM"))
            if kill_after and not killed \
                    and len(list(scratch.glob("*.safetensors"))) >= kill_after:
                process.kill()
                killed = True
            time.sleep(0.05)
        seconds = time.perf_counter() - started
        log.seek(0)
        said = log.read()
    if process.returncode and not killed:
        raise SystemExit(said[-3000:])
    before = re.search(r"(\d+) weights were done already", said)
    return Run(seconds, peak_rss, peak_vm, killed, int(before[1]) if before else 0)


def differences(source: Path, out: Path, recipe: str, seed: int = 0) -> tuple[list[str], list[str]]:
    """Weights that were compared, and those that are not what ``quantize`` makes of the source."""
    import safetensors

    fmt = scaleprop.Recipe.from_dict(json.loads((out / "config.json").read_text())["recipe"]
                                     ).roles["fprop.w"].format
    places = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    written = {name: path for path in sorted(out.glob("tensors-*.safetensors"))
               for name in tensorfile.read_entries(path)}
    names = random.Random(seed).sample([name for name in sorted(places) if "proj" in name],
                                       CHECKED)
    wrong: list[str] = []
    for name in names:
        with safetensors.safe_open(source / places[name], "pt") as file:
            want = scaleprop.quantize(file.get_tensor(name), fmt).parts
        kinds = ["data", "scale", *(["zero_point"] if "+zp" in fmt else [])]
        for kind, part in zip(kinds, want, strict=True):
            with safetensors.safe_open(written[f"{name}_{kind}"], "pt") as file:
                if not torch.equal(file.get_tensor(f"{name}_{kind}"), part):
                    wrong.append(f"{name}_{kind}")
    return names, wrong


def layers_needed(folder: Path) -> dict[str, float]:
    """Recipe → peak address space above that of next to nothing, in units of the largest layer."""
    shapes = {"tiny": Shape(*TINY), "smaller": Shape(*SMALLER)}
    for name, shape in shapes.items():
        (folder / name).mkdir()
        write_model(shape, folder / name)
    found: dict[str, float] = {}
    for recipe in RECIPES:
        peaks = {name: compile_limited(folder / name, folder / f"{name}-{recipe}", recipe,
                                       UNLIMITED).peak_vm for name in shapes}
        found[recipe] = (peaks["smaller"] - peaks["tiny"]) / shapes["smaller"].largest_layer
    return found


def measure(limit: int, shape: Shape, recipe: str, folder: Path) -> dict[str, Any]:
    """Write the model, compile it twice (killed, resumed), and check what came of it."""
    source, out = folder / "model", folder / "compiled"
    source.mkdir()
    write_model(shape, source)
    weights = 7 * shape.layers + 2
    runs = [compile_limited(source, out, recipe, limit, kill_after=weights // 2)]
    assert not out.exists()
    runs.append(compile_limited(source, out, recipe, limit))
    names, wrong = differences(source, out, recipe)
    importlib.import_module("transformers.modeling_outputs")  # the type of what the model returns
    storage.load(out)  # compares every checksum
    return {
        "limit": limit, "model_bytes": shape.nbytes, "largest_layer": shape.largest_layer,
        "layers": shape.layers, "width": shape.width, "recipe": recipe, "weights": weights,
        "after_imports": memory_after_imports(),
        "compiled_bytes": sum(path.stat().st_size for path in out.iterdir()),
        "runs": [dataclasses.asdict(run) for run in runs],
        "compared": names, "different": wrong, "left_over": sorted(
            path.name for path in folder.iterdir() if path.name not in ("model", "compiled")),
        "machine": harness.machine(),
    }


def markdown(found: Mapping[str, Any]) -> str:
    """The figures for people."""
    rows = [("limit of address space (ulimit -v)", found["limit"]),
            ("of it taken by imports", found["after_imports"]),
            ("model", found["model_bytes"]), ("largest layer", found["largest_layer"]),
            ("compiled", found["compiled_bytes"])]
    lines = [f"`{found['recipe']}`, {found['layers']} blocks of width {found['width']}, bfloat16.",
             "", "| what | GiB |", "|---|---:|",
             *(f"| {name} | {size / GIB:.2f} |" for name, size in rows), "",
             "| run | seconds | weights done before | peak address space, GiB | "
             "peak resident, GiB |", "|---|---:|---:|---:|---:|"]
    for run in found["runs"]:
        name = "killed (SIGKILL) half way" if run["killed"] else "run again"
        lines.append(f"| {name} | {run['seconds']:.0f} | {run['done_before']} of "
                     f"{found['weights']} | {run['peak_vm'] / GIB:.2f} | "
                     f"{run['peak_rss'] / GIB:.2f} |")
    width, layers, vocabulary = SMALLER
    lines += ["", f"{figures.equal_weights(found)} of {len(found['compared'])} weights compared "
              "are what `scaleprop.quantize` makes of the source, bit for bit; every checksum "
              f"holds; {len(found['left_over'])} files are left over.", "",
              f"Peak address space above that of next to nothing, {layers} blocks of width "
              f"{width}, {vocabulary} words:", "", "| recipe | layers |", "|---|---:|",
              *(f"| `{recipe}` | {needed:.2f} |" for recipe, needed in found["needed"].items())]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write ``results/larger_than_memory.{json,md}``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--limit", type=float, default=4.0, help="GiB of address space")
    parser.add_argument("--times", type=float, default=3.0, help="the model, in units of that")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--recipe", default="int4")
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    given = parser.parse_args(arguments)
    shape = Shape.of(given.limit * given.times * GIB, given.width)
    with tempfile.TemporaryDirectory(prefix="larger-") as folder:
        found = measure(int(given.limit * GIB), shape, given.recipe, Path(folder))
        found["needed"] = layers_needed(Path(folder))
    target = given.results / "larger_than_memory"
    target.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    target.with_suffix(".md").write_text(markdown(found))
    print(markdown(found))


if __name__ == "__main__":
    main()
