"""Optional packages, and the extra of this distribution that installs each."""

from __future__ import annotations

from collections.abc import Mapping

# package as it is imported → extra
EXTRAS: Mapping[str, str] = {
    "onnx": "onnx", "onnx_ir": "onnx", "onnxruntime": "onnx", "ml_dtypes": "onnx",
    "click": "cli", "rich": "cli", "matplotlib": "report", "safetensors": "save",
    "transformers": "adapters", "pytorch_lightning": "adapters", "accelerate": "adapters",
    "triton": "cuda", "joblib": "sweep", "tensorboard": "monitor",
}  # fmt: skip


def install_command(package: str) -> str:
    """What a user types to get an optional package.

    >>> install_command("rich")
    'pip install "scaleprop[cli]"'
    """
    return f'pip install "scaleprop[{EXTRAS[package]}]"'
