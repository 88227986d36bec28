"""Compiled programs: the same numbers as the reference, nothing opaque, nothing overwritten."""

import functools
import re
from collections.abc import Iterator

import pytest
import sympy
import torch
from torch import nn
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

from scaleprop.backends.inductor import InductorBackend, InductorExecutable
from scaleprop.backends.reference import ReferenceBackend
from scaleprop.errors import ConfigError
from scaleprop.passes.base import Program

from .small_programs import Block, Mlp, Pictures, program, relative_error

RECIPES = ("int8", "int8-dynamic", "int8-token", "fp8", "mxfp4")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Compiled:
    """A program, its code and what it should compute."""

    def __init__(self, recipe: str) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(2, 6, 64)
        self.program: Program = program(Block(), (self.x,), recipe)
        made, self.code = run_and_get_code(self._compile)
        assert isinstance(made, InductorExecutable)
        self.executable: InductorExecutable = made
        self.reference = ReferenceBackend().lower(self.program)

    def _compile(self) -> InductorExecutable:
        with config.patch(force_disable_caches=True):
            return InductorBackend().lower(self.program)


@functools.cache
def compiled_by(recipe: str) -> Compiled:
    return Compiled(recipe)


@pytest.fixture(params=RECIPES)
def compiled(request: pytest.FixtureRequest) -> Compiled:
    return compiled_by(request.param)


@pytest.mark.parametrize("shape", [(2, 6, 64), (1, 1, 64), (3, 17, 64)])
def test_equals_the_reference_at_any_size(compiled: Compiled, shape: tuple[int, ...]):
    torch.manual_seed(1)
    x = torch.randn(shape)
    (actual,), (expected,) = compiled.executable([x]), compiled.reference([x])
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert relative_error(actual, expected) < 2e-6


class Encoder(nn.Module):
    """Two post-LN layers with fused projections; the sums are normalised, and one is returned."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = total = self.norms[0](x)
        for qkv, out, norm in zip(self.qkv, self.out, self.norms[1:], strict=True):
            q, k, v = qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
            total = x + out(mixed.transpose(1, 2).flatten(2))
            x = norm(total)
        return x, total


@pytest.mark.parametrize("recipe", ["int8", "int8-dynamic"])
def test_residuals_added_in_place(recipe: str):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 64)
    made = program(Encoder(), (x,), recipe)
    executable, code = run_and_get_code(lambda: InductorBackend().lower(made))
    assert "\n".join(code).count("'sum'") == 2
    for inputs in (x, torch.randn(1, 9, 64)):
        kept = inputs.clone()
        for _ in range(2):
            for actual, expected in zip(executable([inputs]), ReferenceBackend().lower(made)(
                    [inputs]), strict=True):
                assert relative_error(actual, expected) < 2e-6
        assert torch.equal(inputs, kept)


def test_bfloat16_results_leave_the_linear_narrow_through_slices():
    torch.manual_seed(0)
    made = program(Encoder(), (torch.randn(2, 6, 64),), "int8")
    graph = InductorBackend("bfloat16").lower(made).graph
    kernels = [node.meta["val"] for node in graph.nodes if "qlinear" in str(node.target)]
    assert [result.dtype for result in kernels if result.shape[-1] == 192] == [torch.bfloat16] * 2


def test_input_is_read_only(compiled: Compiled):
    x = compiled.x.clone()
    (first,) = compiled.executable([x])
    (second,) = compiled.executable([x])
    assert torch.equal(x, compiled.x)
    assert torch.equal(first, second)
    assert first.data_ptr() not in (x.data_ptr(), second.data_ptr())


def test_other_layouts_of_the_input(compiled: Compiled):
    torch.manual_seed(2)
    x = torch.randn(64, 5, 2).permute(2, 1, 0)
    (actual,) = compiled.executable([x])
    (expected,) = compiled.executable([x.contiguous()])
    assert torch.equal(actual, expected)


def test_nothing_opaque_is_left(compiled: Compiled):
    targets = {str(node.target) for node in compiled.executable.graph.nodes
               if node.op == "call_function"}
    assert not [target for target in targets if target.startswith("scaleprop")]
    called = set(re.findall(r"torch\.ops\.(\w+)\.(\w+)", "\n".join(compiled.code)))
    called = {name for name in called if name[0] != "inductor"}  # memory helpers
    allowed = {("onednn", "qlinear_pointwise"), ("mkldnn", "_linear_pointwise"),
               ("aten", "_scaled_dot_product_flash_attention_for_cpu")}
    assert called <= allowed


def test_lowerings_name_every_linear(compiled: Compiled):
    linears = [node.name for node in compiled.program.module.graph.nodes
               if str(node.target).startswith("scaleprop.scaled_mm")]
    assert len(linears) == 6
    assert all(compiled.executable.lowerings[name].startswith("oneDNN") for name in linears)


def test_static_int8_runs_relu_and_quantization_inside_the_linear():
    lowerings = compiled_by("int8").executable.lowerings.values()
    assert "oneDNN qlinear u8×s8 static+relu+quantize" in lowerings
    assert "oneDNN qlinear u8×s8 static+add" in lowerings
    assert sum(text == "oneDNN qlinear u8×s8 static, 3 merged" for text in lowerings) == 3


@pytest.mark.parametrize("recipe", ["int4", "int4-int8", "int8-weight", "mxfp8", "nvfp4"])
def test_weights_dequantized_when_compiled(recipe: str):
    torch.manual_seed(0)
    x = torch.randn(7, 64)
    made = program(Mlp(), (x,), recipe)
    executable, reference = InductorBackend().lower(made), ReferenceBackend().lower(made)
    assert relative_error(executable([x])[0], reference([x])[0]) < 2e-6
    assert all("oneDNN linear f32" in text for text in executable.lowerings.values()
               if text != "fused C++")


@pytest.mark.parametrize("recipe", ["int8-dynamic", "mxfp8"])
def test_convolution_embedding_and_nested_outputs(recipe: str):
    torch.manual_seed(0)
    made = program(Pictures(), (torch.arange(6),), recipe)
    executable, reference = InductorBackend().lower(made), ReferenceBackend().lower(made)
    ids = torch.tensor([49, 0, 7])
    (actual, nothing), (expected, _) = executable([ids]), reference([ids])
    assert nothing is None
    assert relative_error(actual, expected) < 2e-6


@pytest.mark.parametrize(("model", "recipe", "bound"), [
    (Block, "int8-dynamic", 1e-2), (Mlp, "mxfp4", 5e-2)])
def test_bfloat16_where_asked_for(model: type[nn.Module], recipe: str, bound: float):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 64)
    made = program(model(), (x,), recipe)
    executable, reference = InductorBackend("bfloat16").lower(made), ReferenceBackend().lower(made)
    (actual,), (expected,) = executable([x]), reference([x])
    assert actual.dtype == torch.float32
    assert 0 < relative_error(actual, expected) < bound


def test_sizes_that_the_code_does_not_cover_are_compiled_once():
    torch.manual_seed(0)
    made = program(Mlp(), (torch.randn(7, 64),), "int8-dynamic")
    executable, reference = InductorBackend().lower(made), ReferenceBackend().lower(made)
    general = executable._general
    (symbol,) = general.traced.symbols
    executable._general = type(general)(general.traced, general.run, (sympy.Gt(symbol, 4),))
    for rows in (9, 3, 3):
        x = torch.randn(rows, 64)
        assert relative_error(executable([x])[0], reference([x])[0]) < 2e-6
    assert executable._by_sizes[9,] is executable._general
    assert executable._by_sizes[3,] is not executable._general
    assert len(executable._by_sizes) == 2


def test_wrong_inputs_are_named():
    made = program(Mlp(), (torch.randn(7, 64),), "int8-dynamic", dynamic_shapes={})
    executable = InductorBackend().lower(made)
    with pytest.raises(ConfigError, match=r"input 0 has size 5 on axis 0, .* fixed at 7"):
        executable([torch.randn(5, 64)])
    with pytest.raises(ConfigError, match=r"torch\.float64 of 2 axes; .* torch\.float32"):
        executable([torch.randn(7, 64, dtype=torch.float64)])
    with pytest.raises(ConfigError, match="None"):
        executable([None])


def test_unknown_compute():
    with pytest.raises(ConfigError, match="'float16'; known: float32, bfloat16"):
        InductorBackend("float16").lower(None)  # type: ignore[arg-type]


def test_no_global_setting_is_changed():
    before = config.save_config_portable()
    made = program(Mlp(), (torch.randn(7, 64),), "int8-dynamic")
    InductorBackend().lower(made)([torch.randn(4, 64)])
    assert config.save_config_portable() == before
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
