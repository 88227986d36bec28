"""What may import what: light imports, inward dependencies, no cycles, no links, no model names."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "scaleprop"

# Each line may import from itself and from the lines above.
LAYERS = (
    ("errors", "extras", "durable", "memory", "_torch_compat"),
    ("formats",),
    ("ops",),
    ("rules",),
    ("report", "calibration.statistics", "calibration.channels", "calibration.sample", "recipes"),
    ("passes", "calibration", "signature"),
    ("backends",),
    ("fidelity", "graph_json", "storage", "analysis", "api", "optim", "qat", "training",
     "monitors", "unit_scaling", "sweeps", "adapters", "interchange", "streaming", ""),
    ("cli", "__main__"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

HEAVY = ("onnx", "onnx_ir", "onnxruntime", "onnxscript", "rich", "click", "matplotlib",
         "transformers", "accelerate", "pytorch_lightning", "triton", "torchao", "ml_dtypes",
         "joblib", "tensorboard", "compressed_tensors", "safetensors")
# torch._dynamo imports triton wherever that is installed
OPTIONAL = (*(name for name in HEAVY if name != "triton"), "scaleprop.backends.cuda")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def statements(body: list[ast.stmt], top_level: bool) -> Iterator[ast.stmt]:
    """Import statements; at top level, only those that run when the module is imported."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        elif top_level and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from statements(node.orelse, top_level)
        else:
            for field in ("body", "orelse", "finalbody"):
                yield from statements(getattr(node, field, []), top_level)
            for handler in getattr(node, "handlers", []):
                yield from statements(handler.body, top_level)


def imports(name: str, top_level: bool = False) -> set[str]:
    """The scaleprop modules that ``name`` imports."""
    found: set[str] = set()
    for node in statements(ast.parse(MODULES[name].read_text()).body, top_level):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module or "")
    return {target for target in found if target.split(".")[0] == "scaleprop"}


def rank(name: str) -> int:
    """The layer of a module: that of its longest prefix that has one."""
    parts = name.split(".")[1:]
    for length in range(len(parts), -1, -1):
        prefix = ".".join(parts[:length])
        if prefix in RANK and (prefix or not parts):
            return RANK[prefix]
    raise AssertionError(f"{name} is in no layer: add it to LAYERS")


def test_every_module_has_a_layer_and_imports_exist() -> None:
    for name in MODULES:
        rank(name)
        for target in imports(name):
            assert target in MODULES, f"{name} imports {target}, which does not exist"


@pytest.mark.parametrize("name", [name for name in MODULES if name != "scaleprop"])
def test_dependencies_point_inward(name: str) -> None:
    outward = sorted(target for target in imports(name) if rank(target) > rank(name))
    assert not outward, f"{name} imports from an outer layer: {outward}"


def test_no_import_cycles() -> None:
    graph: dict[str, set[str]] = {}
    for name in MODULES:
        edges = imports(name, top_level=True)
        for target in tuple(edges):  # importing a.b.c runs a.b first
            parents = [target.rsplit(".", n)[0] for n in range(1, target.count(".") + 1)]
            edges.update(parent for parent in parents if not name.startswith(f"{parent}."))
        graph[name] = {edge for edge in edges - {name} if edge in MODULES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def run(code: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)


def test_import_is_light() -> None:
    done = run(
        "import sys, scaleprop, scaleprop.report, scaleprop.cli, scaleprop.api\n"
        f"print(*(name for name in {OPTIONAL!r} if name in sys.modules))"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


@pytest.mark.parametrize("name", ["passes", "backends"])
def test_links_cannot_be_imported(name: str) -> None:
    done = run(f"import {name}")
    assert done.returncode == 1
    assert "ImportError" in done.stderr
    assert f"import 'scaleprop.{name}' instead" in done.stderr


@pytest.mark.parametrize("path", MODULES.values(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_model_or_module_names(path: Path) -> None:
    names = r"\b(llama|gpt2|bert|mistral|qwen|gemma|opt|whisper|q_proj|k_proj|v_proj|o_proj|" \
        r"out_proj|up_proj|gate_proj|down_proj|fc1|fc2|lm_head|embed_tokens|input_layernorm)\b"
    assert not re.findall(names, path.read_text(), re.IGNORECASE)
