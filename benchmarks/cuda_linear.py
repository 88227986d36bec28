"""Linear layers in low precision on a CUDA device, in multiples of BF16.

    python -m benchmarks.cuda_linear [--only step] [--smoke]

Forward and backward of one layer of 8192 inputs, outputs and tokens through ``torch.compile(model,
backend="scaleprop")``, quantization included, against ``torch.compile`` of the BF16 layer and
torchao's float8 layer. Products of stored operands alone, of that size, against cuBLAS in BF16:
their error is ‖y − ŷ‖/‖ŷ‖, ŷ of the decoded operands in float32. A training step of a Llama of
about a billion parameters: loss, gradients and AdamW, 4 sequences of 2048 tokens.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

from benchmarks.cuda_harness import Row, Script, main
from benchmarks.cuda_timing import Bench, Build, Call, Skip, wrong
from scaleprop.backends.cuda import library, products, scaled
from scaleprop.formats import parse
from scaleprop.formats.quantize import quantize_parts
from scaleprop.formats.tensor import dequantize_parts
from scaleprop.recipes.training import Operand, TrainingRecipe
from scaleprop.recipes.training_named import training_recipe

FASTER, OF_TORCHAO, STEP_FASTER = 1.3, 0.95, 1.2
BF16, TORCHAO = "× BF16", "× torchao"
_ROW = Operand(format="e4m3[row]*f32")
FP8_ROW = TrainingRecipe(name="fp8-row", description="E4M3, a scale a row", high=(), operands={
    role: _ROW for role in ("fprop.x", "fprop.w", "dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x")})
# ours: torchao's of the same granularity
RECIPES = {"fp8": "tensorwise", "fp8-current": "tensorwise", "fp8-row": "rowwise"}
PRODUCTS: dict[str, tuple[str, str]] = {
    "INT8 token × INT8 channel": ("int8[row]*f32", "int8[row]*f32"),
    "FP8 row × FP8 row": ("e4m3[row]*f32", "e4m3[row]*f32"),
    "FP8 1×128 × FP8 128×128": ("e4m3[1x128]*f32", "e4m3[128x128]*f32"),
    "MXFP8 × MXFP8": ("mxfp8", "mxfp8"),
    "NVFP4 × NVFP4": ("nvfp4", "nvfp4"),
    "MXFP4 × MXFP4": ("mxfp4", "mxfp4"),
    "FP8 row × INT4": ("e4m3[row]*f32", "int4[1x128]*f32"),
}
CAPABILITY = (9, 0)  # taken for the library's in a try


def size_of(small: bool) -> int:
    return 128 if small else 8192


def rows(small: bool) -> list[Row]:
    """Layers, products, a step."""
    layers = [Row(name=f"layer, {name}", run=lambda bench, name=name: layer(bench, name),
                  bounds={BF16: FASTER, TORCHAO: OF_TORCHAO}) for name in RECIPES]
    alone = [Row(name=f"product, {name}", run=lambda bench, pair=pair: product(bench, *pair))
             for name, pair in PRODUCTS.items()]
    return [*layers, *alone,
            Row(name="training step, fp8", run=step, bounds={BF16: STEP_FASTER}, seconds=200)]


# ------------------------------------------------------------------ a layer


def recipe(name: str) -> TrainingRecipe:
    """The recipe with no layer kept high, since there is one alone."""
    return FP8_ROW if name == FP8_ROW.name else training_recipe(name).replace(high=())


def ours(bench: Bench, model: nn.Module, chosen: str | TrainingRecipe) -> Any:
    """Compiled by the backend's name; operator by operator in a try."""
    inner = "eager" if bench.small else "inductor"
    return torch.compile(model, backend="scaleprop", options={"recipe": chosen, "inner": inner})


def layer(bench: Bench, name: str) -> dict[str, Any]:
    """Forward and backward: three products of n³."""
    n = size_of(bench.small)
    model = nn.Linear(n, n, bias=False, device=bench.device, dtype=torch.bfloat16)
    x, dy = (torch.randn(n, n, device=bench.device).to(torch.bfloat16) for _ in range(2))
    x.requires_grad_()

    def stepping(compile: Callable[[nn.Module], Any]) -> Build:
        def build() -> Call:
            mine = copy.deepcopy(model)
            run = compile(mine)

            def call() -> tuple[Any, ...]:
                x.grad = mine.weight.grad = None
                y = run(x)
                y.backward(dy)
                return y.detach(), x.grad, mine.weight.grad

            return call

        return build

    def theirs(mine: nn.Module) -> Any:
        try:
            from torchao.float8 import Float8LinearConfig, convert_to_float8_training
        except ImportError as error:
            raise Skip(f"torchao: {error}") from error
        if bench.small:
            raise Skip("torchao's float8 layers need a device")
        config = Float8LinearConfig.from_recipe_name(RECIPES[name])
        return torch.compile(convert_to_float8_training(nn.Sequential(mine), config=config))

    found = bench.compare({
        "ours": stepping(lambda mine: ours(bench, mine, recipe(name))),
        "BF16": stepping(bench.compiled), "torchao": stepping(theirs)}, ("torchao",))
    errors = {f"error, {what}": [wrong(got, want)] * 3 for what, got, want in zip(
        ("y", "dx", "dw"), found.results["ours"], found.results["BF16"], strict=True)}
    if not all(0.0 < value[0] < 0.2 for value in errors.values()):
        raise ValueError(f"of the BF16 layer's results these are off by {errors}: 0 is BF16 itself")
    return found.result({
        BF16: found.faster("ours", "BF16"), TORCHAO: found.faster("ours", "torchao"),
        "TFLOP/s": found.rate("ours", 6e-12 * n**3),
        "BF16 TFLOP/s": found.rate("BF16", 6e-12 * n**3), **errors})


# ------------------------------------------------------------------ products


def product(bench: Bench, x_name: str, w_name: str) -> dict[str, Any]:
    """Ours of decoded operands, those of the library and of units for blocks where these take the
    formats, and cuBLAS's of BF16."""
    n = size_of(bench.small)
    x, w = (torch.randn(n, n, device=bench.device).to(torch.bfloat16) for _ in range(2))
    formats = parse(x_name), parse(w_name)
    left, right = (quantize_parts(each, fmt) for each, fmt in zip((x, w), formats, strict=True))
    capability = CAPABILITY if bench.small else torch.cuda.get_device_capability()
    kind = library.kind_of(*formats, n, n, capability)

    def kernel(fp8: bool) -> Build:
        return lambda: lambda: products.multiply(left, right, None, *formats, n, torch.bfloat16,
                                                 fp8=fp8)

    builds: dict[str, Build] = {
        "ours": kernel(True), "BF16": lambda: lambda: x @ w.t()}
    if products.way_of(*formats, n, True) != products.way_of(*formats, n):
        builds["ours, as BF16"] = kernel(False)
    if kind is not None:
        builds["library"] = lambda: lambda: library.multiply(kind, left, right, *formats, None,
                                                             torch.bfloat16)
    if scaled.takes(*formats, capability):
        builds["block units"] = lambda: lambda: scaled.multiply(left, right, None, *formats, n,
                                                                torch.bfloat16)
    if x_name.startswith("int8"):
        builds["torch._int_mm"] = lambda: lambda: torch._int_mm(left[0], right[0].t())
    peers = {"library", "block units", "ours, as BF16", "torch._int_mm"}
    found = bench.compare(builds, peers)
    exact = [dequantize_parts(parts, fmt, each.shape) for parts, fmt, each in (
        (left, formats[0], x), (right, formats[1], w))]  # fmt: skip
    want = exact[0] @ exact[1].t()
    error = wrong(found.results["ours"], want)
    if not error < 0.01:
        raise ValueError(f"the product is off by {error:.2g}")
    tera = 2e-12 * n**3
    return found.result({
        BF16: found.faster("ours", "BF16"), "TFLOP/s": found.rate("ours", tera),
        "BF16 TFLOP/s": found.rate("BF16", tera),
        **{f"× {name}": found.faster("ours", name) for name in sorted(peers & builds.keys())},
        "error": [error] * 3})


# ------------------------------------------------------------------ a training step


class Loss(nn.Module):
    """A language model's loss alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, labels=ids, use_cache=False).loss


def billion(small: bool) -> nn.Module:
    """A Llama of 1.1 billion random parameters in bfloat16, or a tiny one."""
    import transformers as hf

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128} if small else {
                 "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                 "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000}
    config = hf.LlamaConfig(**sizes, max_position_embeddings=4096, tie_word_embeddings=False)
    return hf.LlamaForCausalLM(config).to(torch.bfloat16)


def step(bench: Bench) -> dict[str, Any]:
    """Loss, gradients and AdamW of a Llama."""
    tokens = (1, 32) if bench.small else (4, 2048)
    ids = torch.randint(128 if bench.small else 32000, tokens, device=bench.device)
    with torch.device(bench.device):
        model = Loss(billion(bench.small)).train()
    count = sum(p.numel() for p in model.parameters())

    def training(compile: Callable[[nn.Module], Any]) -> Build:
        def build() -> Call:
            mine = copy.deepcopy(model)
            run = compile(mine)
            optimizer = torch.optim.AdamW(mine.parameters(), lr=1e-5, fused=not bench.small)

            def call() -> Tensor:
                optimizer.zero_grad()
                loss = run(ids)
                loss.backward()
                optimizer.step()
                return loss.detach()

            return call

        return build

    found = bench.compare({
        "ours": training(lambda mine: ours(bench, mine, "fp8")), "BF16": training(bench.compiled)},
        cold=False, held=False, rounds=11)
    losses = [float(found.results[name]) for name in ("ours", "BF16")]
    if not abs(losses[0] - losses[1]) < 0.02 * losses[1]:
        raise ValueError(f"the loss is {losses[0]:.4f}, in BF16 {losses[1]:.4f}")
    flops = 6.0 * count * ids.numel()
    return found.result({
        BF16: found.faster("ours", "BF16"), "tokens/s": found.rate("ours", ids.numel()),
        "TFLOP/s of products": found.rate("ours", 1e-12 * flops)}, losses=losses, parameters=count)


SCRIPT = Script(name="cuda_linear", doc=__doc__ or "", rows=rows, rounds=21)


if __name__ == "__main__":
    sys.exit(main(SCRIPT))
