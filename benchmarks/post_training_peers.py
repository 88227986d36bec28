"""The peers' rows of ``benchmarks.post_training``: the same models, data and measures.

    python -m benchmarks.post_training_peers                       # torchao and ONNX Runtime
    python -m benchmarks.post_training_peers --python DIR/bin/python    # and llm-compressor
    python -m benchmarks.post_training_peers --models lm --only torchao

Every peer quantizes all linears, as this project's recipes do, by its scheme that is nearest to
the recipe: blocks of 128 are blocks of 32 where 128 does not divide and the peer insists on it.
What a peer does not have is left out; what it has but cannot run here is a cell with the error.

torchao, GPTQ and MXFP4: asserts ask for a GPU or bfloat16, and nothing that follows needs either.
These cells are measured by a process without assertions (``PYTHONOPTIMIZE=1``), where waiting for
a GPU does nothing. GPTQ in INT8 is torchao's for weights, to which its dynamic activations are
added. NVFP4 products exist on GPUs alone: here torchao's NVFP4 tensors of weights and of
activations are dequantized by torchao and multiplied in float32, as its MXFP4 emulation does.

llm-compressor lives in an environment of its own: see ``benchmarks/llm_compressor_rows.py``. It
runs on the language model; its logits come back, and are judged here.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import io
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness, peers, post_training
from benchmarks.post_training import FORMATS, Task

Run = Callable[..., Any]
ROWS_SCRIPT = Path(__file__).with_name("llm_compressor_rows.py")
LLM_COMPRESSOR = ("nearest", "SmoothQuant", "AWQ", "rotation", "GPTQ", "GPTQ + rotation")
BLOCKS = (128, 32)


@dataclasses.dataclass(frozen=True)
class Row:
    """A cell that a peer can fill. unchecked: only where assertions are off."""

    fmt: str
    name: str
    build: Callable[[Task, Path], Run]
    unchecked: bool = False


# ------------------------------------------------------------------ torchao


def torchao_rows() -> list[Row]:
    """Rounding to nearest, SmoothQuant, AWQ, HQQ and GPTQ."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    int8 = Int8DynamicActivationInt8WeightConfig
    return [
        _torchao("W8A8", "nearest", lambda task: _everywhere(task, int8())),
        _torchao("W8A8", "SmoothQuant", lambda task: _smooth(task, int8())),
        _torchao("W8A8", "SmoothQuant static", lambda task: _smooth(task, _static_int8())),
        _torchao("W8A8", "PT2E dynamic", lambda task: _pt2e(task, True)),
        _torchao("W8A8", "PT2E static", lambda task: _pt2e(task, False)),
        _torchao("W8A8", "GPTQ", _gptq_int8, unchecked=True),
        _torchao("W4A8", "nearest", lambda task: _in_blocks(task, _int4_int8)),
        _torchao("W4A8", "nearest g32", lambda task: _everywhere(task, _int4_int8(32))),
        _torchao("W4A8", "HQQ", lambda task: _in_blocks(task, lambda size: _int4_int8(size, True))),
        _torchao("W4A8", "SmoothQuant", lambda task: _smooth(task, _int4_int8(32))),
        _torchao("W4", "nearest", lambda task: _in_blocks(task, _int4)),
        _torchao("W4", "nearest g32", lambda task: _everywhere(task, _int4(32))),
        _torchao("W4", "HQQ", _hqq),
        _torchao("W4", "AWQ", _awq),
        _torchao("W4", "GPTQ", _gptq_int4),
        _torchao("MXFP4", "nearest", lambda task: _everywhere(task, _mxfp4()), unchecked=True),
        _torchao("NVFP4", "nearest", _nvfp4),
        _torchao("NVFP4", "GPTQ", _gptq_nvfp4, unchecked=True),
    ]


def _torchao(
    fmt: str, method: str, build: Callable[[Task], Run], unchecked: bool = False
) -> Row:
    return Row(fmt, f"torchao {method}", lambda task, folder: build(task), unchecked)


def block_of(linear: nn.Linear) -> int:
    """The largest of ``BLOCKS`` that divides its inputs."""
    return next(size for size in BLOCKS if linear.in_features % size == 0)


def _everywhere(task: Task, config: Any) -> nn.Module:
    return peers.torchao_quantized(task.model, config)


def _in_blocks(task: Task, config: Callable[[int], Any]) -> nn.Module:
    model = copy.deepcopy(task.model)
    _quantize_blocks(model, config)
    return model


def _quantize_blocks(model: nn.Module, config: Callable[[int], Any]) -> None:
    from torchao.quantization import quantize_

    linears = {name: block_of(module) for name, module in model.named_modules()
               if isinstance(module, nn.Linear)}
    for size in set(linears.values()):
        quantize_(model, config(size), lambda _, name, size=size: linears.get(name) == size)


def _int4(size: int) -> Any:
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup

    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(size),
                                mapping_type=MappingType.ASYMMETRIC)


def _int4_int8(size: int, hqq: bool = False) -> Any:
    from torchao.quantization import (
        Int8DynamicActivationIntxWeightConfig,
        MappingType,
        PerGroup,
    )
    from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

    kind = IntxChooseQParamsAlgorithm
    return Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=PerGroup(size),
        weight_mapping_type=MappingType.SYMMETRIC if hqq else MappingType.ASYMMETRIC,
        intx_choose_qparams_algorithm=kind.HQQ_SCALE_ONLY if hqq else kind.AFFINE)


def _packed_int4(size: int, hqq: bool = False) -> Any:
    """What its CPU kernel takes; the one INT4 here that AWQ can scale."""
    from torchao.prototype.quantization.int4.inference_workflow import (
        PrototypeInt4WeightOnlyConfig,
    )
    from torchao.quantization.quantize_.workflows import Int4ChooseQParamsAlgorithm as Kind

    return PrototypeInt4WeightOnlyConfig(
        group_size=size, int4_choose_qparams_algorithm=Kind.HQQ if hqq else Kind.TINYGEMM)


def _unpacked(model: nn.Module) -> nn.Module:
    """Weights as the kernel multiplies by them, activation scales included: its product with the
    identity. In float32 the kernel itself is some fifty times slower than a plain product."""
    for module in list(_linears(model)):
        identity = torch.eye(module.in_features)
        bias = module(torch.zeros_like(identity[:1]))
        found = (module(identity) - bias).t()
        module.weight = nn.Parameter(found.contiguous(), requires_grad=False)
    return model


def _hqq(task: Task) -> nn.Module:
    return _unpacked(_in_blocks(task, lambda size: _packed_int4(size, True)))


def _static_int8() -> Any:
    from torchao.quantization import Int8StaticActivationInt8WeightConfig, PerRow
    from torchao.quantization.granularity import PerTensor

    return Int8StaticActivationInt8WeightConfig(granularity=[PerTensor(), PerRow()])


def _mxfp4() -> Any:
    from torchao.prototype.mx_formats.inference_workflow import MXDynamicActivationMXWeightConfig
    from torchao.quantization.quantize_.common import KernelPreference

    fp4 = torch.float4_e2m1fn_x2
    return MXDynamicActivationMXWeightConfig(
        activation_dtype=fp4, weight_dtype=fp4, kernel_preference=KernelPreference.EMULATED)


def _step(name: str) -> Any:
    from torchao.quantization.quantize_.common.quantization_step import QuantizationStep

    return QuantizationStep(name)


def _calibrated(model: nn.Module, task: Task) -> nn.Module:
    for batch in task.calibration:
        model(*batch)
    return model


def _smooth(task: Task, base: Any) -> nn.Module:
    from torchao.prototype.smoothquant import SmoothQuantConfig
    from torchao.quantization import quantize_

    model = _calibrated(_everywhere(task, SmoothQuantConfig(base, _step("prepare"))), task)
    quantize_(model, SmoothQuantConfig(base, _step("convert")))
    return model


def _awq(task: Task) -> nn.Module:
    """Scales are searched in bfloat16, where its kernel is fast; all else is float32."""
    from torchao.prototype.awq import AWQConfig

    searched = copy.deepcopy(task.model).bfloat16()
    _quantize_blocks(searched, lambda size: AWQConfig(_packed_int4(size), _step("prepare")))
    halves = [tuple(x.bfloat16() if x.is_floating_point() else x for x in batch)
              for batch in task.calibration]
    _calibrated(searched, dataclasses.replace(task, calibration=halves))
    _quantize_blocks(searched, lambda size: AWQConfig(_packed_int4(size), _step("convert")))
    model = copy.deepcopy(task.model)
    scales = [_weight(module).act_pre_scale.float() for module in _linears(searched)]
    for module, scale in zip(_linears(model), scales, strict=True):
        module.weight.div_(scale)
    _quantize_blocks(model, _packed_int4)
    for module, scale in zip(_linears(model), scales, strict=True):
        _weight(module).act_pre_scale = scale
    return _unpacked(model)


def _pt2e(task: Task, dynamic: bool) -> nn.Module:
    with peers.quiet():
        return peers.pt2e_module(task.model, task.example, task.calibration, dynamic)


def _gptq(task: Task, base: Any) -> nn.Module:
    from torchao.prototype.gptq.api import GPTQConfig
    from torchao.quantization import quantize_

    torch.cuda.synchronize = lambda device=None: None
    model = _calibrated(_everywhere(task, GPTQConfig("observe", base)), task)
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):  # it counts aloud
        quantize_(model, GPTQConfig("convert", base), _is_linear)
    return model


def _is_linear(module: nn.Module, _: str) -> bool:
    return isinstance(module, nn.Linear)


def _gptq_int4(task: Task) -> nn.Module:
    from torchao.quantization import Int4WeightOnlyConfig

    return _gptq(task, Int4WeightOnlyConfig(group_size=BLOCKS[-1]))


def _gptq_int8(task: Task) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    model = _gptq(task, Int8WeightOnlyConfig(granularity=PerRow()))
    for module in _linears(model):
        _weight(module).act_quant_kwargs = QuantizeTensorToInt8Kwargs(granularity=PerRow())
    return model


def _gptq_nvfp4(task: Task) -> nn.Module:
    from torchao.prototype.mx_formats.inference_workflow import (
        NVFP4DynamicActivationNVFP4WeightConfig,
    )

    return _nvfp4_inputs(_gptq(task, NVFP4DynamicActivationNVFP4WeightConfig()))


def _nvfp4(task: Task) -> nn.Module:
    from torchao.prototype.mx_formats.inference_workflow import NVFP4WeightOnlyConfig

    return _nvfp4_inputs(_everywhere(task, NVFP4WeightOnlyConfig()))


def _nvfp4_inputs(model: nn.Module) -> nn.Module:
    """Weights are dequantized before a product; quantize what they meet."""
    for module in _linears(model):
        _weight(module).act_quant_kwargs = None
        module.register_forward_pre_hook(_rounded_to_nvfp4)
    return model


def _rounded_to_nvfp4(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    (x,) = inputs
    rows = x.reshape(-1, x.shape[-1])
    scale = per_tensor_amax_to_scale(x.abs().max())
    return (NVFP4Tensor.to_nvfp4(rows, per_tensor_scale=scale).dequantize(x.dtype).view_as(x),)


def _weight(module: nn.Linear) -> Any:
    """One of torchao's tensors."""
    return module.weight


def _linears(model: nn.Module) -> Iterable[nn.Linear]:
    return (module for module in model.modules() if isinstance(module, nn.Linear))


# ------------------------------------------------------------------ ONNX Runtime


def ort_rows() -> list[Row]:
    """W8A8 of ``quantize_dynamic`` and ``quantize_static``; 4-bit weights of ``MatMulNBits``,
    whose accuracy level 4 also quantizes activations, to INT8 in blocks. RTN is another rounding to
    nearest; so is GPTQ there (1.31): it takes a column of an upper triangular factor where a row is
    meant, and no error reaches a later weight."""
    return [
        _ort("W8A8", "quantize_dynamic", lambda task, source, path:
             peers.ort_quantize_dynamic(source, path)),
        *(_ort("W8A8", f"quantize_static{text}", lambda task, source, path, only=only:
               peers.ort_quantize_static(source, path, task.calibration, only))
          for text, only in (("", False), (", linears only", True))),
        _ort("W8A8", "SmoothQuant", lambda task, source, path: peers.ort_quantize_static(
            source, path, task.calibration, True, smooth=True)),
        *(_ort(fmt, method, lambda task, source, path, make=make, level=level:
               make(task, source, path, level))
          for fmt, level in (("W4", 0), ("W4A8", 4)) for method, make in _algorithms().items()
          if fmt == "W4" or method not in ("HQQ", "GPTQ")),  # HQQ's nodes have no level
    ]  # fmt: skip


def _ort(fmt: str, method: str, build: Callable[[Task, Path, Path], Path]) -> Row:
    def call(task: Task, folder: Path) -> Run:
        source = folder / "float32.onnx"
        if not source.exists():
            peers.export_fp32(task.model, task.example, source)
        running = peers.session(build(task, source, folder / "quantized.onnx"), 1)
        return lambda *inputs: torch.as_tensor(peers.ort_call(running, inputs)()[0])

    return Row(fmt, f"ORT {method}", call)


def _algorithms() -> Mapping[str, Callable[[Task, Path, Path, int], Path]]:
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    def named(config: Callable[[Task, Path], Any], paired: bool = True) -> Any:
        def call(task: Task, source: Path, path: Path, level: int) -> Path:
            size = _paired_block(task.model) if paired else BLOCKS[0]
            return _matmul_nbits(source, path, size, config(task, source), level)

        return call

    return {
        "nearest": named(lambda task, source: None, paired=False),
        "HQQ": named(lambda task, source: nbits.HQQWeightOnlyQuantConfig(block_size=BLOCKS[0]),
                     paired=False),
        "RTN": named(lambda task, source: nbits.RTNWeightOnlyQuantConfig()),
        "k-quant": named(lambda task, source: nbits.KQuantWeightOnlyQuantConfig()),
        "GPTQ": named(lambda task, source: nbits.GPTQWeightOnlyQuantConfig(
            peers.reader(_names(source), task.calibration))),
    }


def _paired_block(model: nn.Module) -> int:
    """The largest size for which no weight has an odd number of blocks: these algorithms pack two
    zero points of a row in a byte."""
    return next(size for size in BLOCKS
                if all(math.ceil(module.in_features / size) % 2 == 0 for module in _linears(model)))


def _names(source: Path) -> list[str]:
    return [entry.name for entry in peers.session(source, 1).get_inputs()]


def _matmul_nbits(source: Path, path: Path, size: int, config: Any, level: int) -> Path:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    with peers.quiet(), contextlib.redirect_stdout(io.StringIO()):  # a progress bar
        quantizer = MatMulNBitsQuantizer(str(source), bits=4, block_size=size, is_symmetric=False,
                                         accuracy_level=level, algo_config=config)
        quantizer.process()
        quantized: Any = quantizer.model
        quantized.save_model_to_file(str(path), False)
    return path


# ------------------------------------------------------------------ llm-compressor


def llm_compressor_rows(
    task: Task, cells: Sequence[str], python: Path, folder: Path
) -> Iterable[tuple[str, dict[str, Any]]]:
    """Each of ``cells``, "format|method", and what it gave, as they come."""
    seen: list[Tensor] = []

    def record(ids: Tensor) -> Tensor:
        seen.append(ids.clone())
        return task.model(ids)

    task.measure(record)
    language: Any = task.model.model
    language.save_pretrained(folder / "model")
    torch.save(seen, folder / "evaluation.pt")
    torch.save([ids for (ids,) in task.calibration], folder / "calibration.pt")
    with (folder / "log").open("w") as log, subprocess.Popen(
        [python, ROWS_SCRIPT, folder, *cells], stdout=subprocess.PIPE, stderr=log, text=True,
    ) as process:
        assert process.stdout is not None
        for line in filter(lambda line: line.startswith("{"), process.stdout):
            found = json.loads(line)
            if "refused" in found:
                yield found["cell"], {"refused": found["refused"]}
                continue
            path = Path(found["logits"])
            logits = iter(torch.load(path))
            path.unlink()
            yield found["cell"], task.measure(lambda ids, it=logits: next(it))
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)


# ------------------------------------------------------------------ command line


def cell(row: Row, task: Task, folder: Path) -> dict[str, Any]:
    """Figures, or the error of a tool that failed."""
    try:
        return task.measure(row.build(task, folder))
    except Exception as error:  # noqa: BLE001 - any failure of a tool is a finding, shown
        first = (str(error).strip().splitlines() or ["no message"])[0]
        return {"refused": f"{type(error).__name__}: {first}"}


def _measure(name: str, task: Task, options: argparse.Namespace) -> None:
    """The rows of this process: those whose assertions are as it is."""
    rows = [row for row in (*torchao_rows(), *ort_rows())
            if row.name.startswith(options.only) and row.unchecked is not __debug__]
    with tempfile.TemporaryDirectory() as folder:
        for row in rows:
            key = f"{name}|{row.fmt}|{row.name}"
            if options.redo or key not in post_training.read(options.results):
                _keep(options.results, key, cell(row, task, Path(folder)))


def _llm_compressor(name: str, task: Task, options: argparse.Namespace) -> None:
    """The rows of the other interpreter."""
    known = post_training.read(options.results)
    keys = {f"{fmt}|{method}": f"{name}|{fmt}|llm-compressor {method}"
            for fmt in FORMATS for method in LLM_COMPRESSOR}
    # it takes the mean off embeddings before RMS norms too, which is another function
    keys["float32|rotation"] = f"{name}|float32|llm-compressor rotation"
    cells = [each for each, key in keys.items() if options.redo or key not in known]
    if not cells:
        return
    with tempfile.TemporaryDirectory() as folder:
        for each, found in llm_compressor_rows(task, cells, options.python, Path(folder)):
            _keep(options.results, keys[each], found)


def _keep(path: Path, key: str, found: dict[str, Any]) -> None:
    print(key, found.get("value", found.get("refused")), flush=True)
    post_training.keep(path, key, found)


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing; ``benchmarks.post_training`` writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", default=",".join(post_training.MODELS))
    parser.add_argument("--folder", type=Path, default=harness.ROOT / "demo")
    parser.add_argument("--results", type=Path, default=post_training.RESULTS)
    parser.add_argument("--python", type=Path, help="the interpreter that has llm-compressor")
    parser.add_argument("--only", default="", help="start of the rows' names, as torchao")
    parser.add_argument("--quick", action="store_true", help="few sentences and windows")
    parser.add_argument("--redo", action="store_true", help="measure again what is there")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in options.models.split(","):
        task = post_training.MODELS[name](options.quick, options.folder)
        _measure(name, task, options)
        wanted = __debug__ and options.python and "llm-compressor".startswith(options.only)
        if wanted and name.startswith("lm"):
            _llm_compressor(name, task, options)
    if __debug__:  # once more, for the rows whose assertions must be off
        given = sys.argv[1:] if arguments is None else list(arguments)
        subprocess.run([sys.executable, "-m", "benchmarks.post_training_peers", *given], check=True,
                       cwd=harness.ROOT, env={**os.environ, "PYTHONOPTIMIZE": "1"})


if __name__ == "__main__":
    main()
