"""Quantized graphs mean what the formats say, tensor by tensor."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from scaleprop.errors import CalibrationError
from scaleprop.formats import error_statistics, fake_quantize, parse, quantize
from scaleprop.passes.base import PROVENANCE
from scaleprop.passes.capture import capture
from scaleprop.passes.error import weight_error
from scaleprop.passes.operators import DEQUANTIZE, FAKE_QUANTIZE, QUANTIZE, SCALED_MM
from scaleprop.passes.pipeline import build
from scaleprop.recipes import Role, named_recipe, named_recipes


def quantized(model, args, recipe, **options):
    plan = named_recipe(recipe)
    if plan.needs_calibration:
        options.setdefault("calibration", [args])
    return build(plan, verify=True, **options).run(capture(model, args))


def nodes(program, target):
    return [n for n in program.module.graph.nodes if n.target is target]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


SHIPPED = [r.name for r in named_recipes() if not r.name.endswith("compensated")]


@pytest.mark.parametrize("name", SHIPPED)
def test_linear_means_fake_quantized_operands(name):
    torch.manual_seed(0)
    model = nn.Linear(72, 24)  # K is no multiple of any block
    x = torch.randn(5, 72)
    program = quantized(model, (x,), name)
    roles = named_recipe(name).roles
    w_format = parse(roles["fprop.w"].format)
    searched = w_format.replace(rule="mse") if roles["fprop.w"].clipping == "mse" else w_format
    w_hat = fake_quantize(model.weight.detach(), searched)
    x_hat = fake_quantize(x, roles["fprop.x"].format) if "fprop.x" in roles else x
    with torch.no_grad():
        close(program.module(x), (x_hat.double() @ w_hat.double().t()).float() + model.bias)
    (mm,) = nodes(program, SCALED_MM)
    assert mm.args[4] == str(w_format)
    assert mm.args[3] == (str(parse(roles["fprop.x"].format)) if "fprop.x" in roles else "f32")


@pytest.mark.parametrize("name", ["int8-dynamic", "mxfp4", "fp8"])
def test_one_quantization_serves_all_readers(mlp, name):
    x = torch.randn(3, 64)
    program = quantized(mlp, (x,), name)
    assert len(nodes(program, QUANTIZE)) == 2
    assert len(nodes(program, QUANTIZE)[0].users) == 2


def test_static_scales_are_buffers_from_calibration(mlp):
    data = [torch.randn(4, 64) * k for k in (1, 3)]
    program = quantized(mlp, (data[0],), "int8", calibration=data)
    whole = torch.cat(data)
    _, scale, zero_point = quantize(whole, "int8[tensor]*f32+zp").parts
    buffers = dict(program.module.named_buffers())
    assert torch.equal(buffers["x_scale"], scale)
    assert torch.equal(buffers["x_zero_point"], zero_point)
    first = nodes(program, QUANTIZE)[0]
    assert [n.target for n in first.args[5]] == ["x_scale", "x_zero_point"]
    kinds = {r.scale_kind for r in program.records if r.role == "fprop.x"}
    assert kinds == {"static"}


def test_static_scale_of_a_whole_tensor_under_block_scales(mlp):
    data = [torch.randn(4, 64) * k for k in (1, 3)]
    roles = {"fprop.w": Role(format="nvfp4"), "fprop.x": Role(format="nvfp4", scaling="static")}
    program = quantized(mlp, (data[0],), named_recipe("nvfp4").replace(roles=roles),
                        calibration=data)
    first = nodes(program, QUANTIZE)[0]
    assert [n.target for n in first.args[5]] == ["x_tensor_scale"]
    scale = dict(program.module.named_buffers())["x_tensor_scale"]
    assert scale == torch.cat(data).abs().max() / (448 * 6)
    gate = nodes(program, SCALED_MM)[0]
    x = torch.randn(3, 64)
    w_hat = fake_quantize(mlp.gate.weight, "nvfp4")
    want = F.linear(fake_quantize(x, "nvfp4", scales=[scale]), w_hat, mlp.gate.bias)
    seen = {}

    class Look(torch.fx.Interpreter):
        def run_node(self, n):
            seen[n.name] = super().run_node(n)
            return seen[n.name]

    Look(program.module).run(x, enable_io_processing=False)
    torch.testing.assert_close(seen[gate.name], want, rtol=1e-5, atol=1e-6)


def test_static_without_calibration_names_recipe_and_remedy(mlp):
    manager = build(named_recipe("int8"))
    message = r"static and was not calibrated\. Remedy: pass calibration=.*int8-dynamic"
    with pytest.raises(CalibrationError, match=message):
        manager.run(capture(mlp, (torch.randn(2, 64),)))


def test_tied_table_and_head_are_stored_once(tied, ids):
    program = quantized(tied, (ids,), "int8-dynamic")
    names = [name for name, _ in program.module.named_buffers() if "data" in name]
    assert names.count("head.weight_data") == 1 and not any("embed" in n for n in names)
    head = nodes(program, SCALED_MM)[-1]
    lookup = nodes(program, DEQUANTIZE)[0].args[0][0]
    assert head.args[1][0].target == lookup.args[0].target == "head.weight_data"
    assert not any(p.shape == (40, 32) for p in program.module.parameters())


def test_tied_weights_in_two_formats_are_stored_twice(tied, ids):
    program = quantized(tied, (ids,), "int4-g32")
    tables = {n: t.dtype for n, t in program.module.named_buffers() if "head.weight_data" in n}
    assert list(tables.values()) == [torch.int8, torch.uint8]


def test_embedding_looks_up_rows(tied, ids):
    program = quantized(tied, (ids,), "mxfp8-weight", include=("embed",))
    table = fake_quantize(tied.embed.weight.detach(), "mxfp8")
    (lookup,) = nodes(program, DEQUANTIZE)
    assert [str(n.target) for n in lookup.args[0]] == ["aten.index.Tensor"] * 2
    tied.embed.weight = nn.Parameter(table)
    close(program.module(ids)["hidden"][0], tied(ids)["hidden"][0])


def test_convolutions(convnet):
    x = torch.randn(2, 3, 12, 12)
    program = quantized(convnet, (x,), "int8-dynamic", include=("stem", "grouped"))
    assert len(nodes(program, FAKE_QUANTIZE)) == 2
    for conv in (convnet.stem, convnet.grouped):
        flat = conv.weight.detach().flatten(1)
        conv.weight.data = fake_quantize(flat, "int8[row]*f32").view_as(conv.weight)
        conv.register_forward_pre_hook(lambda m, a: (fake_quantize(a[0], "int8+zp"),))
    with torch.no_grad():
        close(program.module(x), convnet(x))


def test_convolutions_are_weight_only_elsewhere(convnet):
    program = quantized(convnet, (torch.randn(2, 3, 12, 12),), "mxfp4")
    assert not nodes(program, FAKE_QUANTIZE)
    formats = {r.operand: r.format for r in program.records if r.role == "fprop.w"}
    assert formats["stem.weight"] == "e4m3[row]*f32" and formats["head.weight"] == "mxfp4:even"


def test_records_measure_the_weights(mlp):
    program = quantized(mlp, (torch.randn(2, 64),), "int4-g32")
    record = next(r for r in program.records if r.operand == "gate.weight")
    q = quantize(mlp.gate.weight.detach(), "int4[1x32]*f32+zp")
    sqnr, saturated, underflowed = error_statistics(mlp.gate.weight.detach(), q)
    assert record.sqnr_db == pytest.approx(sqnr, abs=1e-6)
    assert (record.saturated, record.underflowed) == pytest.approx((saturated, underflowed))
    assert record.nbytes == q.nbytes == 48 * (32 + 2 * (4 + 1))
    assert record.nbytes_high == 48 * 64 * 4
    assert "conftest.py" in record.source


def test_mse_clipping_has_less_error(mlp):
    with torch.no_grad():
        mlp.gate.weight[0, 0] = 1.0  # an outlier among ±0.125
    found = {}
    for options in ("quantize-weights{clipping=amax}", "quantize-weights{clipping=mse}"):
        program = quantized(mlp, (torch.randn(2, 64),), "int4-g32", extra=[options])
        record = next(r for r in program.records if r.operand == "gate.weight")
        found[options] = record.sqnr_db
        assert record.format == "int4[1x32]*f32+zp"
    low, high = found.values()
    assert high > low + 0.05


@pytest.mark.parametrize("fmt", ["int8", "int8[row]*f32", "mxfp4", "nvfp4", "nvfp4_2d", "int4+zp"])
def test_error_in_chunks_equals_error_at_once(fmt):
    x = torch.randn(1000, 400, generator=torch.Generator().manual_seed(0))
    q = quantize(x, fmt)
    want = error_statistics(x, q)
    assert list(weight_error(x, q).values()) == pytest.approx(want, rel=1e-9)


def test_error_of_large_weights_is_sampled_closely():
    x = torch.randn(4000, 1024, generator=torch.Generator().manual_seed(0))
    q = quantize(x, "int4[1x32]*f32")
    assert weight_error(x, q)["sqnr_db"] == pytest.approx(error_statistics(x, q)[0], abs=0.02)


def test_error_of_zeros():
    zeros = torch.zeros(4, 32)
    assert weight_error(zeros, quantize(zeros, "mxfp8"))["sqnr_db"] == math.inf


def test_new_nodes_carry_provenance_values_and_lines(tied, ids):
    program = quantized(tied, (ids,), "mxfp8")
    for node in program.module.graph.nodes:
        if getattr(node.target, "namespace", "") == "scaleprop":
            made = node.meta[PROVENANCE]
            assert made.by in ("quantize-weights", "quantize-activations")
            assert made.why and made.source
            assert "conftest.py" in node.meta["stack_trace"]
            assert "val" in node.meta
    mm = nodes(program, SCALED_MM)[0]
    assert len({str(s) for s in mm.meta["val"].shape[:2]}) == 2  # still symbolic


def test_shapes_stay_dynamic(tied, ids):
    program = quantized(tied, (ids,), "mxfp8")
    other = torch.randint(0, 40, (5, 3))
    assert program.module(other)["logits"].shape == (5, 3, 40)
    assert program.records[0].shape == (40, 32)
    shapes = {r.shape for r in program.records if r.role == "fprop.x"}
    assert shapes == {("batch", "sequence", 32)}


def test_excluded_layers_are_untouched(mlp):
    x = torch.randn(3, 64)
    program = quantized(mlp, (x,), "mxfp4", exclude=("*",))
    assert torch.equal(program.module(x), mlp(x))
    assert {n for n, _ in program.module.named_parameters()} == {
        n for n, _ in mlp.named_parameters()}  # fmt: skip


def test_model_is_not_changed(tied, ids):
    before = {n: t.clone() for n, t in tied.state_dict().items()}
    quantized(tied, (ids,), "int8")
    after = tied.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_bfloat16_models_stay_bfloat16():
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8)).bfloat16()
    x = torch.randn(4, 32, dtype=torch.bfloat16)
    program = quantized(model, (x,), "int8-weight")
    assert program.module(x).dtype == torch.bfloat16
    assert nodes(program, SCALED_MM)[0].args[3] == "bf16"
    similarity = F.cosine_similarity(program.module(x).float(), model(x).float())
    assert similarity.min() > 0.999


def test_activation_only_recipe(mlp):
    recipe = named_recipe("fp8").replace(roles={"fprop.x": Role(format="e4m3[row]*f32")})
    x = torch.randn(3, 64)
    program = build(recipe).run(capture(mlp, (x,)))
    assert nodes(program, SCALED_MM)[0].args[3:5] == ("e4m3[row]*f32", "f32")
    x_hat = fake_quantize(x, "e4m3[row]*f32")
    gate = nodes(program, SCALED_MM)[0]
    assert gate.args[1][0].target == "gate.weight"
    hidden = F.silu(F.linear(x_hat, mlp.gate.weight, mlp.gate.bias)) * F.linear(
        x_hat, mlp.up.weight)  # fmt: skip
    want = F.linear(fake_quantize(hidden, "e4m3[row]*f32"), mlp.down.weight, mlp.down.bias)
    torch.testing.assert_close(program.module(x), want, rtol=0.02, atol=0.02)


def test_stochastic_weights_are_reproducible(mlp):
    role = Role(format="mxfp4", rounding="stochastic")
    recipe = named_recipe("mxfp4-weight").replace(roles={"fprop.w": role})
    x = torch.randn(3, 64)
    program = capture(mlp, (x,))
    first, again = (build(recipe).run(program).module(x) for _ in range(2))
    seeded = build(recipe, extra=["quantize-weights{seed=1}"]).run(program).module(x)
    assert torch.equal(first, again) and not torch.equal(first, seeded)


@pytest.mark.parametrize("model, x", [
    (nn.Linear(32, 8), torch.ones(0, 32)),
    (nn.Embedding(3, 32), torch.zeros(0, dtype=torch.long)),
    *((nn.Linear(k, n), torch.ones(2, k)) for k, n in ((32, 0), (0, 32))),
])
@pytest.mark.parametrize("name", ["int8-dynamic", "int4", "mxfp4", "nvfp4", "fp8"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_empty_weights_and_inputs(model, x, name):
    out = quantized(model, (x,), name).module(x)
    assert out.shape == model(x).shape
    close(out, model(x).detach())  # of what is not empty, the bias alone is left
