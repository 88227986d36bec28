"""Backends by name: lazy, with errors that say what to do."""

import subprocess
import sys

import pytest
import torch

from scaleprop.backends import registry
from scaleprop.backends.reference import ReferenceBackend
from scaleprop.errors import BackendUnavailable, ConfigError


def test_known_name():
    assert isinstance(registry.backend_named("reference"), ReferenceBackend)


def test_unknown_name_lists_the_choices():
    with pytest.raises(ConfigError, match=r"'inductr' \(did you mean 'inductor'\?\); known: onnxr"):
        registry.backend_named("inductr")


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    def fail(name: str):
        raise ModuleNotFoundError(f"No module named {name!r}", name="onnxruntime.capi")

    monkeypatch.setattr(registry.importlib, "import_module", fail)
    with pytest.raises(BackendUnavailable, match=r'pip install "scaleprop\[onnx\]"'):
        registry.backend_named("onnxruntime")


def test_a_broken_import_of_our_own_is_not_hidden(monkeypatch: pytest.MonkeyPatch):
    def fail(name: str):
        raise ModuleNotFoundError("No module named 'scaleprop.nothing'", name="scaleprop.nothing")

    monkeypatch.setattr(registry.importlib, "import_module", fail)
    with pytest.raises(ModuleNotFoundError, match=r"scaleprop\.nothing"):
        registry.backend_named("inductor")


def test_asking_for_one_backend_imports_no_other():
    code = ("import sys; from scaleprop.backends.registry import backend_named; "
            "backend_named('reference'); "
            "print([m for m in ('onnxruntime', 'torch._inductor.compile_fx') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_cuda_without_a_device(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")
    monkeypatch.setattr("scaleprop.backends.cuda.backend.interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailable, match="backend='inductor'"):
        registry.backend_named("cuda").lower(None)  # type: ignore[arg-type]
