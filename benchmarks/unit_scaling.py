"""How many factors of matrix products have a size that 8-bit floats hold without a scale?

    python -m benchmarks.unit_scaling [--only llama,vit] [--scheme unit]

Each model is a random-weight architecture with its own loss. Its compiled joint graph is run once
on random data, as it is and unit-scaled (on other data), and the RMS of every factor of every
product (matrix products, convolutions, attention, forward and backward, saved values among them)
is measured. A factor counts where its RMS lies in [1/8, 8].
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from benchmarks import harness
from scaleprop import _torch_compat as compat
from scaleprop import unit_scale
from scaleprop.backends.graphs import compile_joint, given_inputs
from scaleprop.passes.training.roles import gradient_values
from scaleprop.passes.unit.forward import rms
from scaleprop.rules import contraction_behind

RESULTS = Path(__file__).parent / "results" / "unit_scaling.json"
LOW, HIGH = 1 / 8, 8.0
LEAST = {"forward_after": 0.95, "backward_after": 0.9}

aten: Any = torch.ops.aten
# operator → the places of its factors
FACTORS: dict[Any, tuple[int, ...]] = {
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
    aten.convolution.default: (0, 1),
    aten.convolution_backward.default: (0, 1, 2),
    aten._scaled_dot_product_flash_attention_for_cpu.default: (0, 1, 2),
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: (0, 1, 2, 3),
}
# unit-scaling 0.3.5, its own figures where it runs (workarounds applied): forward, backward
PEER = {"llama": (0.87, 0.43), "vit": (0.89, 0.54), "gpt2": (0.46, 0.23), "bert": None,
        "resnet": (0.62, 0.50)}


def _text(config: Any, head: Callable[[Any], torch.nn.Module]) -> tuple[torch.nn.Module, Any]:
    ids = torch.randint(3, config.vocab_size, (4, 128))
    return head(config), {"input_ids": ids, "labels": ids.clone()}


def _images(model: torch.nn.Module, size: int) -> tuple[torch.nn.Module, Any]:
    return model, {"pixel_values": torch.randn(8, 3, size, size),
                   "labels": torch.randint(0, 2, (8,))}


def _llama() -> tuple[torch.nn.Module, Any]:
    return _text(hf.LlamaConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=704, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False), hf.LlamaForCausalLM)


def _gpt2() -> tuple[torch.nn.Module, Any]:
    return _text(hf.GPT2Config(vocab_size=1024, n_embd=256, n_layer=4, n_head=4, n_positions=128,
                               use_cache=False), hf.GPT2LMHeadModel)


def _bert() -> tuple[torch.nn.Module, Any]:
    return _text(hf.BertConfig(vocab_size=1024, hidden_size=256, intermediate_size=1024,
                               num_hidden_layers=4, num_attention_heads=4), hf.BertForMaskedLM)


def _vit() -> tuple[torch.nn.Module, Any]:
    return _images(hf.ViTForImageClassification(hf.ViTConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
        image_size=64, patch_size=8)), 64)


def _resnet() -> tuple[torch.nn.Module, Any]:
    return _images(hf.ResNetForImageClassification(hf.ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 128], depths=[2, 2, 2], layer_type="basic")), 64)


MODELS = {"llama": _llama, "vit": _vit, "gpt2": _gpt2, "bert": _bert, "resnet": _resnet}


class _Factors(torch.fx.Interpreter):
    """Notes the RMS of every product's factors."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self._backward = gradient_values(module.graph)
        self.sizes: dict[str, list[float]] = {"forward": [], "backward": []}

    def run_node(self, n: torch.fx.Node) -> Any:
        places = FACTORS.get(n.target)
        behind = contraction_behind(n)
        if places is None and behind is not None and behind.kind != "embedding":
            raise KeyError(f"{n.target} multiplies, and is not among FACTORS")
        if places is not None:
            phase = "backward" if n in self._backward else "forward"
            found = [self.env[n.args[place]] for place in places]  # type: ignore[index]
            self.sizes[phase].extend(rms(value) for value in found)
        return super().run_node(n)


def factor_sizes(model: torch.nn.Module, kwargs: Mapping[str, Any]) -> dict[str, list[float]]:
    """RMS of every factor, forward and backward, of one training step's graphs."""
    sizes: dict[str, list[float]] = {"forward": [], "backward": []}

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        def look(joint: torch.fx.GraphModule) -> None:
            factors = _Factors(joint)
            values = given_inputs(joint.graph, inputs)[1]
            with torch.no_grad(), compat.without_modes():
                factors.run(*values, enable_io_processing=False)
            for phase, found in factors.sizes.items():
                sizes[phase].extend(found)

        return compile_joint(graph, inputs, look, "eager")

    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend=backend)
    torch.manual_seed(0)
    compiled(**kwargs).loss.backward()
    return sizes


def share(sizes: Sequence[float]) -> float:
    """Of factors in range."""
    return sum(LOW <= size <= HIGH for size in sizes) / len(sizes)


def measure(name: str, scheme: str) -> dict[str, Any]:
    """One model, as it is and unit-scaled."""
    torch.manual_seed(0)
    model, kwargs = MODELS[name]()
    model.train()
    before = factor_sizes(model, kwargs)
    _, others = MODELS[name]()
    after = factor_sizes(unit_scale(model, kwargs, scheme), others)  # type: ignore[arg-type]
    return {"model": name, "scheme": scheme, "factors": sum(map(len, after.values())),
            **{f"{phase}_{when}": share(sizes[phase]) for when, sizes in
               (("before", before), ("after", after)) for phase in ("forward", "backward")},
            "worst": [min(min(found) for found in after.values()),
                      max(max(found) for found in after.values())],
            "peer": PEER[name]}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    return harness.markdown_table(
        ["model", "scheme", "factors", "forward", "unit-scaled", "backward", "unit-scaled",
         "smallest, largest", "peer (unit-scaling)"],
        [[row["model"], row["scheme"], row["factors"],
          *(f"{row[key]:.0%}" for key in ("forward_before", "forward_after", "backward_before",
                                          "backward_after")),
          f"{row['worst'][0]:.2f}, {row['worst'][1]:.2f}",
          "fails" if row["peer"] is None else " / ".join(f"{part:.0%}" for part in row["peer"])]
         for row in rows])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 where a share is less than ``LEAST``."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(MODELS))
    parser.add_argument("--scheme", default="unit")
    parser.add_argument("--results", type=Path, help="a folder; by default this one's own, for "
                                                     "a run of all models")
    options = parser.parse_args(arguments)
    rows = [measure(name, options.scheme) for name in options.only.split(",")]
    print(table(rows))
    if options.results or options.only == parser.get_default("only"):
        path = options.results / RESULTS.name if options.results else RESULTS
        found = {"machine": harness.machine(), "rows": rows}
        path.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(row[key] < least for row in rows for key, least in LEAST.items()))


if __name__ == "__main__":
    sys.exit(main())
