"""What the benchmarks compare with: one builder per toolchain, all behind one signature.

ONNX rows become a file; torch rows a callable. A toolchain that fails raises, and the caller
turns that into a row with the error's text.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import nn

from benchmarks.workloads import Inputs, Workload

ORT_FP32 = "ORT fp32"
TORCH_FP32 = "torch.compile fp32"
DynamicShapes = Any

# Operators of ORT's optimised graph that multiply integers, and which of their inputs is the
# weight. MatMulNBits with accuracy_level 4 quantizes its activations to int8 first.
_INTEGER_KERNELS = {
    "MatMulIntegerToFloat": 1, "DynamicQuantizeMatMul": 1, "MatMulInteger": 1, "QGemm": 3,
    "QLinearMatMul": 3, "MatMulNBits": 1,
}
_SMALLEST_WEIGHT = 64  # elements; smaller constants combine partial sums, they are no linears
_FLOAT_KERNELS = {"MatMul": 1, "Gemm": 1, "FusedMatMul": 1, "FusedGemm": 1}


# ------------------------------------------------------------------ ONNX peers


def export_fp32(
    model: nn.Module, inputs: Inputs, path: Path, dynamic_shapes: DynamicShapes = None,
    external_data: bool = False,
) -> Path:
    """``torch.onnx.export(dynamo=True)`` with its defaults otherwise."""
    with quiet(), torch.no_grad():
        program = torch.onnx.export(model, inputs, dynamo=True, dynamic_shapes=dynamic_shapes,
                                    verbose=False)
        assert program is not None
        program.save(path, external_data=external_data)
    return path


def ort_quantize_dynamic(source: Path, path: Path, external_data: bool = False) -> Path:
    """``quantize_dynamic`` per channel with signed weights: its fastest setting here."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet():
        quantize_dynamic(source, path, per_channel=True, weight_type=QuantType.QInt8,
                         use_external_data_format=external_data)
    return path


def ort_quantize_static(
    source: Path, path: Path, calibration: Iterable[Inputs], constant_weights_only: bool,
    smooth: bool = False,
) -> Path:
    """``quantize_static`` in QDQ form, MatMul and Gemm only, u8 activations, s8 channel weights.

    constant_weights_only: leave attention's two products in float. smooth: SmoothQuant first.
    """
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = path.with_suffix(".prepared.onnx")
    with quiet():
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        names = [entry.name for entry in onnx.load(source, load_external_data=False).graph.input]
        quantize_static(
            prepared, path, reader(names, calibration), op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": constant_weights_only, "SmoothQuant": smooth},
        )
    prepared.unlink()
    return path


def ort_matmul_nbits(
    source: Path, path: Path, block_size: int, bits: int = 4, external_data: bool = False
) -> Path:
    """``MatMulNBitsQuantizer``, symmetric, with accuracy level 4 (int8 activations)."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    with quiet():
        quantizer = MatMulNBitsQuantizer(str(source), bits=bits, block_size=block_size,
                                         is_symmetric=True, accuracy_level=4)
        quantizer.process()
        quantizer.model.save_model_to_file(str(path), external_data)
    return path


def reader(names: list[str], calibration: Iterable[Inputs]) -> Any:
    """Calibration inputs as ORT's tools read them."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        """Feeds the calibration inputs one by one."""

        def __init__(self) -> None:
            self.feeds = iter([feed_of(names, batch) for batch in calibration])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    return Reader()


def feed_of(names: list[str], inputs: Inputs) -> dict[str, np.ndarray]:
    """Inputs as ORT takes them."""
    return {name: value.numpy() for name, value in zip(names, inputs, strict=True)}


def onnx_peers(workload: Workload, source: Path) -> dict[str, Callable[[Path], Path]]:
    """Row name → builder of its file, for everything but the float32 export itself."""
    calibration = workload.calibration
    return {
        "ORT quantize_dynamic": lambda path: ort_quantize_dynamic(source, path),
        "ORT quantize_static": lambda path: ort_quantize_static(source, path, calibration, False),
        "ORT quantize_static, linears only":
            lambda path: ort_quantize_static(source, path, calibration, True),
        "MatMulNBits 4-bit g32": lambda path: ort_matmul_nbits(source, path, 32),
        "MatMulNBits 4-bit g128": lambda path: ort_matmul_nbits(source, path, 128),
    }


# ------------------------------------------------------------------ running and auditing ONNX


def session(path: Path, threads: int, optimized: Path | None = None) -> ort.InferenceSession:
    """A stock CPU session. The one setting that is not a default stops the thread pool's spinning
    when a run ends; without it an idle session slows every other candidate down."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def ort_call(running: ort.InferenceSession, inputs: Inputs) -> Callable[[], Any]:
    """A call without arguments, on inputs converted beforehand."""
    feeds = feed_of([entry.name for entry in running.get_inputs()], inputs)
    return lambda: running.run(None, feeds)


def file_bytes(path: Path) -> int:
    """Size of a model with its external data."""
    model = onnx.load(path, load_external_data=False)
    external = {entry.value for tensor in model.graph.initializer
                for entry in tensor.external_data if entry.key == "location"}
    return path.stat().st_size + sum((path.parent / name).stat().st_size for name in external)


@dataclasses.dataclass(frozen=True)
class KernelAudit:
    """What runs for the products with a constant weight, in the graph as ORT optimised it."""

    integer: int
    floating: int
    kinds: Mapping[str, int]

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
        return f"{self.integer} of {self.integer + self.floating} ({kinds})"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**dataclasses.asdict(self), "text": str(self)}


def audit(path: Path, scratch: Path) -> KernelAudit:
    """Count integer and float products with constant weights after ORT's own optimisation."""
    session(path, 1, optimized=scratch)
    graph = onnx.load(scratch).graph
    constants = {tensor.name: math.prod(tensor.dims) * (len(tensor.dims) > 1)
                 for tensor in graph.initializer}
    derived = _derived_from_constants(graph, constants)
    kinds: dict[str, int] = {}
    for node in graph.node:
        place = {**_INTEGER_KERNELS, **_FLOAT_KERNELS}.get(node.op_type)
        if place is not None and node.input[place] in derived:
            kinds[_kind(node)] = kinds.get(_kind(node), 0) + 1
    scratch.unlink()
    integer = sum(count for kind, count in kinds.items() if kind.split()[0] in _INTEGER_KERNELS
                  and "float activations" not in kind)
    return KernelAudit(integer, sum(kinds.values()) - integer, kinds)


def _derived_from_constants(graph: onnx.GraphProto, constants: Mapping[str, int]) -> set[str]:
    """Names of matrices that no input reaches: weights, also those dequantized at run time.

    constants: elements by name, 0 for what is no matrix.
    """
    known = set(constants)
    for node in graph.node:  # topologically sorted
        if node.op_type == "Constant" or (
            node.input and all(name in known or not name for name in node.input)
        ):
            known.update(node.output)
    return known - {name for name, elements in constants.items() if elements < _SMALLEST_WEIGHT}


def _kind(node: onnx.NodeProto) -> str:
    if node.op_type != "MatMulNBits":
        return node.op_type
    values = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
    exact = "" if values.get("accuracy_level", 0) == 4 else ", float activations"
    return f"MatMulNBits {values.get('bits', 4)}-bit{exact}"


# ------------------------------------------------------------------ torch peers


def torch_peers(workload: Workload) -> dict[str, Callable[[], Callable[..., torch.Tensor]]]:
    """Row name → builder of a compiled callable; the builder does not run it yet."""
    # TORCHINDUCTOR_FREEZING is read when torch._inductor is imported: the benchmark sets it.
    assert os.environ.get("TORCHINDUCTOR_FREEZING") == "1"
    return {
        TORCH_FP32: lambda: torch.compile(workload.model),
        "torch.compile bf16": lambda: compile_bf16(workload.model),
        "torchao PT2E static": lambda: pt2e(workload, dynamic=False),
        "torchao PT2E static + bf16": lambda: autocast(pt2e(workload, dynamic=False)),
        "torchao PT2E dynamic": lambda: pt2e(workload, dynamic=True),
    }


def compile_bf16(model: nn.Module) -> Callable[..., torch.Tensor]:
    """The model in bfloat16, float inputs converted inside the timed call."""
    compiled = torch.compile(copy.deepcopy(model).bfloat16())

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        return compiled(*(x.bfloat16() if x.is_floating_point() else x for x in inputs)).float()

    return call


def pt2e(workload: Workload, dynamic: bool) -> Callable[..., torch.Tensor]:
    """torchao's PT2E flow with the x86 quantizer's default configuration, compiled."""
    with quiet(), torch.no_grad():
        converted = pt2e_module(workload.model, workload.inputs, workload.calibration, dynamic)
    return torch.compile(converted)


def pt2e_module(
    model: nn.Module, inputs: Inputs, calibration: Iterable[Inputs], dynamic: bool,
    dynamic_shapes: DynamicShapes = None,
) -> nn.Module:
    """The converted module of PT2E, not compiled."""
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    exported = torch.export.export(model, inputs, dynamic_shapes=dynamic_shapes).module()
    # a linear whose result nobody reads (MiniLM's pooler) makes the quantizer raise IndexError
    exported.graph.eliminate_dead_code()
    exported.recompile()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_dynamic=dynamic))
    prepared = prepare_pt2e(exported, quantizer)
    for batch in calibration:
        prepared(*batch)
    converted = convert_pt2e(prepared)
    return move_exported_model_to_eval(converted)


def autocast(run: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Run under CPU autocast to bfloat16."""
    def call(*inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return run(*inputs)

    return call


def torchao_quantized(model: nn.Module, config: Any) -> nn.Module:
    """A copy of ``model`` after torchao's ``quantize_``."""
    from torchao.quantization import quantize_

    quantized = copy.deepcopy(model)
    with quiet():
        quantize_(quantized, config)
    return quantized


# ------------------------------------------------------------------ ours


def ours(workload: Workload, recipe: str, backend: str, **options: Any) -> Any:
    """``scaleprop.compile`` on a workload; calibration is given to the recipes that want it."""
    import scaleprop
    from scaleprop.recipes import named_recipe

    if named_recipe(recipe).needs_calibration:
        options["calibration"] = list(workload.calibration)
    return scaleprop.compile(workload.model, workload.inputs, recipe=recipe, backend=backend,
                             **options)


def ours_inductor(workload: Workload, recipe: str, compute: Literal["float32", "bfloat16"]) -> Any:
    """Ours through Inductor; ``compute``: what attention and other plain products run in."""
    from scaleprop.backends.inductor import InductorBackend

    compiled = ours(workload, recipe, "inductor")
    if compute == "float32":
        return compiled
    executable = InductorBackend(compute).lower(compiled.program)
    return dataclasses.replace(compiled, executable=executable)


def ours_onnx(workload: Workload, recipe: str, path: Path) -> Path:
    """Our ONNX file; it is then run by the same stock session as the peers' files."""
    ours(workload, recipe, "onnxruntime").export(path)
    return path


# ------------------------------------------------------------------ helpers


def sqnr_db(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """10·log10(Σ expected² / Σ (actual − expected)²), in decibels."""
    want, got = expected.double(), actual.double()
    noise = (got - want).square().sum()
    if noise == 0:
        return float("inf")
    return float(10 * torch.log10(want.square().sum() / noise))


class quiet:
    """Keep the toolchains' progress messages and warnings out of the tables."""

    def __enter__(self) -> None:
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("ignore")
        self._level = logging.root.manager.disable
        logging.disable(logging.WARNING)

    def __exit__(self, *exc: object) -> None:
        logging.disable(self._level)
        self._warnings.__exit__(None, None, None)


def batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Items in lists of ``size``; the last may be shorter."""
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
