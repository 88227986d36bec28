"""``scaleprop doctor``: what is installed, what the processor can do, and whether backends run."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any, Literal

from scaleprop.backends.registry import BACKENDS
from scaleprop.errors import BackendUnavailable
from scaleprop.extras import EXTRAS, install_command

# /proc/cpuinfo flag → what it means for low precision.
CPU_FEATURES = {
    "avx2": "256-bit vectors",
    "avx512f": "512-bit vectors",
    "avx512_vnni": "8-bit integer dot products, 512-bit",
    "avx_vnni": "8-bit integer dot products, 256-bit",
    "avx512_bf16": "bfloat16 dot products",
    "amx_int8": "8-bit integer tiles",
    "amx_bf16": "bfloat16 tiles",
    "asimddp": "8-bit integer dot products",
    "i8mm": "8-bit integer matrix products",
}


@dataclasses.dataclass(frozen=True)
class SelfTest:
    """One backend on a tiny model: ``ok``, ``missing`` (with what would install it), ``failed``."""

    backend: str
    status: Literal["ok", "missing", "failed"]
    detail: str


def examine() -> dict[str, Any]:
    """Everything that ``scaleprop doctor`` prints, as plain data."""
    return {
        "scaleprop": version("scaleprop"),
        "python": platform.python_version(),
        "torch": version("torch"),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "cpu": cpu(),
        "packages": packages(),
        "onnxruntime_providers": onnxruntime_providers(),
        "cuda_devices": cuda_devices(),
        "self_test": [dataclasses.asdict(self_test(backend)) for backend in BACKENDS],
    }


def version(package: str) -> str | None:
    """The installed version; None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def packages() -> list[dict[str, str | None]]:
    """Optional packages: version (None where missing) and the command that installs them."""
    return [{"name": name, "version": version(name), "install": install_command(name)}
            for name in EXTRAS]


def cpu(path: Path = Path("/proc/cpuinfo")) -> dict[str, Any]:
    """The processor's name, and those of ``CPU_FEATURES`` that it has; None where unknown."""
    if not path.is_file():
        return {"model": platform.processor() or None, "features": None}
    fields: dict[str, str] = {}
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip().lower(), value.strip())
    flags = set(fields.get("flags", fields.get("features", "")).split())
    return {
        "model": fields.get("model name"),
        "features": [name for name in CPU_FEATURES if name in flags],
    }


def onnxruntime_providers() -> list[str] | None:
    """ONNX Runtime's execution providers; None where it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    return list(onnxruntime.get_available_providers())


def cuda_devices() -> list[dict[str, Any]]:
    """Every CUDA device: name, compute capability, and what becomes of each operation there."""
    import torch

    if not torch.cuda.is_available():
        return []
    from scaleprop.backends.cuda.devices import support

    found: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        found.append({"name": torch.cuda.get_device_name(index),
                      "capability": ".".join(map(str, capability)),
                      "support": [dataclasses.asdict(each) for each in support(capability)]})
    return found


def self_test(backend: str) -> SelfTest:
    """Compile two small linears to 8-bit integers on ``backend``; compare with the reference."""
    import torch

    from scaleprop.api import compile as compile_model

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 32))
    try:
        compiled = compile_model(model, torch.randn(4, 64), recipe="int8-dynamic", backend=backend)
        return SelfTest(backend, "ok", str(compiled.verify()))
    except BackendUnavailable as error:
        return SelfTest(backend, "missing", str(error))
    except Exception as error:  # noqa: BLE001 - whatever fails is what the user asks about
        return SelfTest(backend, "failed", f"{type(error).__name__}: {error}")


def show(found: dict[str, Any]) -> None:
    """Print what ``examine`` found."""
    from scaleprop.cli.output import print_pairs, print_table

    cpu, providers = found["cpu"], found["onnxruntime_providers"]
    features = "unknown" if cpu["features"] is None else ", ".join(cpu["features"]) or "none known"
    print_pairs({
        "scaleprop": found["scaleprop"] or "not installed",
        "python": found["python"],
        "torch": found["torch"] or "not installed",
        "platform": found["platform"],
        "processor": f"{cpu['model'] or 'unknown'}, {found['cores']} cores",
        "features": features,
        "onnxruntime": ", ".join(providers) if providers else "not installed",
        "CUDA": ", ".join(device["name"] for device in found["cuda_devices"]) or "no device",
    })
    for device in found["cuda_devices"]:
        print_table((f"{device['name']}, {device['capability']}", "how", "detail"),
                    [tuple(row.values()) for row in device["support"]])
    print_table(
        ("package", "version"),
        [(row["name"], row["version"] or f"missing: {row['install']}")
         for row in found["packages"]],
    )
    print_table(
        ("backend", "self-test", "detail"),
        [(test["backend"], test["status"], test["detail"]) for test in found["self_test"]],
    )
