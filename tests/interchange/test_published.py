"""GPTQ and AWQ checkpoints: packed here by the published layouts, word by word, in numpy.

GPTQ: AutoGPTQ, ``auto_gptq/nn_modules/qlinear/qlinear_cuda.py`` (``QuantLinear.pack``); version 2:
GPTQModel, whose zero points are stored as they are. AWQ: AutoAWQ, ``awq/utils/packing_utils.py``
(``AWQ_ORDER``).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import scaleprop
from scaleprop.errors import ConfigError, FormatError
from scaleprop.interchange.gptq import read_awq, read_gptq
from scaleprop.interchange.reading import read_checkpoint
from scaleprop.passes.base import Program
from tests.interchange.tiny import IDS, llama, recompiled

Arrays = dict[str, np.ndarray]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(fields: np.ndarray, width: int) -> np.ndarray:
    """[R, C] of ``width`` bits → uint32 [R, C·width/32], one bit after the other."""
    rows, columns = fields.shape
    packed = np.zeros((rows, columns * width // 32), dtype=np.uint32)
    for column in range(columns):
        for bit in range(width):
            place = column * width + bit
            value = (fields[:, column] >> bit) & 1
            packed[:, place // 32] |= value.astype(np.uint32) << np.uint32(place % 32)
    return packed


def gptq(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, width: int, version: int,
         g_idx: np.ndarray | None = None) -> Arrays:
    """codes [K, N], zeros and scales [G, N]."""
    if version == 1:
        assert zeros.min() >= 1
        zeros = zeros - 1
    parts = {"qweight": words(codes.T, width).T.view(np.int32),
             "qzeros": words(zeros, width).view(np.int32), "scales": scales}
    return parts if g_idx is None else {**parts, "g_idx": g_idx.astype(np.int32)}


def awq(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> Arrays:
    def ordered(fields: np.ndarray) -> np.ndarray:
        rows, columns = fields.shape
        return fields.reshape(rows, columns // 8, 8)[..., list(AWQ_ORDER)].reshape(rows, columns)

    return {"qweight": words(ordered(codes), 4).view(np.int32),
            "qzeros": words(ordered(zeros), 4).view(np.int32), "scales": scales}


def drawn(k: int, n: int, groups: int, width: int, seed: int = 0) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << width, (k, n))
    zeros = rng.integers(1, 1 << width, (groups, n))
    return codes, zeros, (rng.random((groups, n)) * 0.01 + 0.001).astype(np.float16)


def numbers(codes: Any, zeros: Any, scales: Any, g_idx: np.ndarray) -> torch.Tensor:
    """[N, K], in float32: what the formula gives."""
    wide = (codes - zeros[g_idx]).astype(np.float32) * scales[g_idx].astype(np.float32)
    return torch.from_numpy(wide.T.copy())


def as_tensors(parts: Arrays) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(part)) for name, part in parts.items()}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("width", "group"), [(4, 32), (8, 32), (2, 64), (3, 32), (4, -1)])
def test_gptq(width: int, group: int, version: int):
    k, n = 128, 64
    size = k if group == -1 else group
    codes, zeros, scales = drawn(k, n, k // size, width)
    parts = as_tensors(gptq(codes, zeros, scales, width, version))
    tensor, order = read_gptq(parts, width, group, version)
    assert order is None
    assert torch.equal(tensor.dequantize(), numbers(codes, zeros, scales, np.arange(k) // size))
    assert tensor.scale.dtype == torch.float16
    assert tensor.format.zero_point
    assert torch.equal(tensor.codes().T.to(torch.int64), torch.from_numpy(codes))


def test_symmetric_gptq_has_no_zero_point():
    codes, _, scales = drawn(64, 32, 2, 4)
    zeros = np.full((2, 32), 8)
    tensor, _ = read_gptq(as_tensors(gptq(codes, zeros, scales, 4, 1)), 4, 32, 1)
    assert str(tensor.format) == "int4[1x32]*f16"
    assert torch.equal(tensor.dequantize(), numbers(codes, zeros, scales, np.arange(64) // 32))


@pytest.mark.parametrize("version", [1, 2])
def test_zero_points_of_0_and_all_ones(version: int):
    """GPTQModel's version 1 subtracts 1 from whole words: a field of 0 borrows from the next."""
    codes, _, scales = drawn(32, 16, 1, 4)
    zeros = np.tile(np.array([0, 5, 0, 0, 15, 1, 0, 8]), 2)[None]
    parts = as_tensors(gptq(codes, zeros, scales, 4, 2))
    if version == 1:
        parts["qzeros"] = (parts["qzeros"].long() - 0x11111111).to(torch.int32)
    tensor, _ = read_gptq(parts, 4, 32, version)
    assert torch.equal(tensor.dequantize(), numbers(codes, zeros, scales, np.zeros(32, int)))


def test_groups_of_channels_far_apart():
    codes, zeros, scales = drawn(64, 32, 2, 4)
    g_idx = np.random.default_rng(3).permutation(np.arange(64) // 32)
    tensor, order = read_gptq(as_tensors(gptq(codes, zeros, scales, 4, 1, g_idx)), 4, 32, 1)
    assert order is not None
    expected = numbers(codes, zeros, scales, g_idx)
    assert torch.equal(tensor.dequantize(), expected[:, order])
    assert not torch.equal(tensor.dequantize(), expected)


def test_awq():
    codes, zeros, scales = drawn(64, 32, 2, 4)
    tensor = read_awq(as_tensors(awq(codes, zeros, scales)), 4, 32)
    assert torch.equal(tensor.dequantize(), numbers(codes, zeros, scales, np.arange(64) // 32))
    assert torch.equal(tensor.zero_point, torch.from_numpy(zeros.T).to(torch.uint8))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda parts: parts.update(g_idx=torch.zeros(64, dtype=torch.int32)), "other sizes"),
        (lambda parts: parts.update(g_idx=torch.zeros(3, dtype=torch.int32)), r"\[3\]"),
        (lambda parts: parts.update(scales=parts["scales"][:1]), "scales"),
        (lambda parts: parts.update(scales=parts["scales"].double()), "float64"),
        (lambda parts: parts.update(qzeros=parts["qzeros"][:, :1]), "hold no 32"),
        (lambda parts: parts.pop("qzeros"), "qzeros"),
    ],
)
def test_damaged_gptq_is_refused(change: Callable[[Any], Any], why: str):
    parts = as_tensors(gptq(*drawn(64, 32, 2, 4), 4, 1))
    change(parts)
    with pytest.raises(FormatError, match=why):
        read_gptq(parts, 4, 32, 1)


# ---- whole checkpoints ---------------------------------------------------------------------------


def checkpoint(folder: Path, settings: dict[str, Any], pack: Callable[..., Arrays],
               g_idx: bool = False) -> dict[str, torch.Tensor]:
    """A folder with every linear but the head in codes; its weights as numbers."""
    model = llama()
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": [type(model).__name__], "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    state = dict(model.state_dict())
    expected = dict(state)
    for index, (name, module) in enumerate(model.named_modules()):
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        n, k = module.weight.shape
        codes, zeros, scales = drawn(k, n, k // 32, 4, index)
        groups = np.arange(k) // 32
        if g_idx:
            groups = np.random.default_rng(index).permutation(groups)
        parts = as_tensors(pack(codes, zeros, scales, *([groups] if g_idx else [])))
        del state[f"{name}.weight"]
        state |= {f"{name}.{leaf}": part for leaf, part in parts.items()}
        state[f"{name}.bias"] = torch.zeros(n, dtype=torch.float16)  # as AutoGPTQ has them
        expected[f"{name}.weight"] = numbers(codes, zeros, scales, groups)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return expected


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}


def gptq_1(*given: Any) -> Arrays:
    codes, zeros, scales, *groups = given
    return gptq(codes, zeros, scales, 4, 1, *groups)


@pytest.mark.parametrize(
    ("settings", "pack", "g_idx"),
    [({**GPTQ, "desc_act": True}, gptq_1, True), (AWQ, awq, False)], ids=["gptq", "awq"])
def test_a_checkpoint_becomes_a_scaled_graph(
    settings: dict[str, Any], pack: Callable[..., Arrays], g_idx: bool, program: Program,
    tmp_path: Path,
):
    state = checkpoint(tmp_path, settings, pack, g_idx)
    model = llama()
    model.load_state_dict(state)
    if g_idx:
        compiled = scaleprop.from_pretrained(tmp_path, {"input_ids": IDS}, verify=True)
    else:
        compiled = recompiled(program, read_checkpoint(tmp_path))
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    actual = compiled(input_ids=IDS).logits
    assert float((actual - expected).norm() / expected.norm()) < 2e-6
    formats = {record.format for record in compiled.report.records if record.role == "fprop.w"}
    assert formats == {"int4[1x32]*f16+zp", None}  # the head stays high
    orders = [node for node in compiled.program.module.graph.nodes
              if node.target is torch.ops.aten.index_select.default]
    assert len(orders) == 7 * g_idx


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dynamic": {"-:head": {}}}, "dynamic"),
        ({"bits": 5}, "5 bits"),
        ({"checkpoint_format": "marlin"}, "'marlin'"),
        ({"quant_method": "awq", "version": "gemv"}, "'gemv'"),
        ({"quant_method": "bitsandbytes"}, "unknown; known: compressed-tensors, gptq, awq"),
    ],
)
def test_settings_that_are_not_read(change: dict[str, Any], why: str, tmp_path: Path):
    checkpoint(tmp_path, {**GPTQ, **change}, gptq_1)
    with pytest.raises(ConfigError, match=why):
        scaleprop.interchange.decoded(tmp_path)


def test_a_bias_that_the_model_has_no_place_for(tmp_path: Path):
    checkpoint(tmp_path, GPTQ, gptq_1)
    state = load_file(tmp_path / "model.safetensors")
    name = next(name for name in state if name.endswith("q_proj.bias"))
    state[name] += 1
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=f"{name}, which the model has no parameter for"):
        scaleprop.interchange.decoded(tmp_path)
