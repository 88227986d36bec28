"""Every rewrite is found by structure and keeps the function in float64."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from scaleprop.passes.assign import ATTENTION
from scaleprop.passes.base import PassManager
from scaleprop.passes.canonicalise import Canonicalise
from scaleprop.passes.capture import capture
from scaleprop.passes.cleanup import CleanUp

W = torch.linspace(-1, 1, 48).reshape(8, 6)  # [K, N]
B = torch.linspace(0, 1, 6)


def canonical(forward, *args, **tensors):
    """(program, operators without views) of a model that computes ``forward(self, *args)``."""
    torch.manual_seed(0)
    cls = type("Model", (nn.Module,), {"forward": forward})
    model = cls()
    for name, tensor in tensors.items():
        model.register_parameter(name, nn.Parameter(tensor.clone()))
    program = capture(model, args)
    program = PassManager([CleanUp(), Canonicalise(), CleanUp()], verify=True).run(program)
    found = [n.target for n in program.module.graph.nodes if n.op == "call_function"]
    return program, [str(op) for op in found if op is not torch.ops.aten.sym_size.int]


LINEARS = {
    "addmm": lambda s, x: torch.addmm(s.b, x, s.w),
    "mm": lambda s, x: torch.mm(x, s.w),
    "matmul": lambda s, x: x @ s.w,
    "matmul of a transpose": lambda s, x: x @ s.w.t().contiguous().t(),
    "matmul and bias": lambda s, x: x @ s.w + s.b,
    "bias first": lambda s, x: s.b + x @ s.w,
}


@pytest.mark.parametrize("forward", LINEARS.values(), ids=LINEARS)
def test_products_with_parameters_are_linears(forward):
    _, found = canonical(forward, torch.randn(3, 8), w=W, b=B)
    assert found == ["aten.linear.default"]


def test_conv1d_style_linear_loses_its_views():
    def forward(self, x):
        flat = torch.addmm(self.b, x.view(-1, x.shape[-1]), self.w)
        return flat.view(*x.shape[:-1], 6)

    program, found = canonical(forward, torch.randn(2, 3, 8), w=W, b=B)
    assert found == ["aten.linear.default"]
    weights = dict(program.module.named_buffers())
    assert {name: tuple(t.shape) for name, t in weights.items()} == {"w_t": (6, 8)}


def test_slices_of_a_parameter_become_their_own():
    def forward(self, x):
        return torch.nn.functional.linear(x, self.w.t()[:4], self.b[:4])

    program, found = canonical(forward, torch.randn(3, 8), w=W, b=B)
    assert found == ["aten.linear.default"]
    assert "w" not in dict(program.module.named_parameters())


def test_product_of_activations_stays():
    _, found = canonical(lambda s, x: x @ x.t() + s.b[:3], torch.randn(3, 8), b=B)
    assert "aten.matmul.default" in found and "aten.linear.default" not in found


def test_scaled_addmm_stays_and_says_why(caplog):
    caplog.set_level(logging.DEBUG, "scaleprop.passes.canonicalise")
    forward = lambda s, x: torch.addmm(s.b, x, s.w, alpha=2)  # noqa: E731
    _, found = canonical(forward, torch.randn(3, 8), w=W, b=B)
    assert found == ["aten.addmm.default"]
    assert "it scales its terms" in caplog.text


def rms(x, eps=1e-6):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


G = torch.linspace(0.5, 1.5, 8)
RMS_NORMS = {
    "plain": lambda s, x: rms(x),
    "weight": lambda s, x: rms(x) * s.g,
    "weight first": lambda s, x: s.g * rms(x.float()).to(x.dtype),
    "one plus weight": lambda s, x: rms(x) * (1.0 + s.g),
    "square by product": lambda s, x: x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * s.g,
    "power": lambda s, x: x * ((x**2).mean(-1, keepdim=True) + 1e-5) ** -0.5 * s.g,
}


@pytest.mark.parametrize("forward", RMS_NORMS.values(), ids=RMS_NORMS)
def test_rms_norm_spelled_out(forward):
    _, found = canonical(forward, torch.randn(2, 3, 8), g=G)
    assert [op for op in found if op != "aten.add.Tensor"] == ["aten.rms_norm.default"]


def layer_norm_by_variance(self, x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5) * self.g + self.b


def layer_norm_by_squares(self, x):
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt((centred**2).mean(-1, keepdim=True) + 1e-5) * self.g + self.b


@pytest.mark.parametrize("forward", [layer_norm_by_variance, layer_norm_by_squares])
def test_layer_norm_spelled_out(forward):
    _, found = canonical(forward, torch.randn(2, 3, 8), g=G, b=G - 1)
    assert found == ["aten.layer_norm.default"]


NOT_NORMS = {
    "unbiased": lambda s, x: (x - x.mean(-1, keepdim=True)) / torch.sqrt(
        x.var(-1, keepdim=True) + 1e-5),
    "other axis": lambda s, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6),
    "other tensor": lambda s, x: x.relu() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "epsilon outside": lambda s, x: x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-6),
    "cube": lambda s, x: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 9),
}  # fmt: skip


@pytest.mark.parametrize("forward", NOT_NORMS.values(), ids=NOT_NORMS)
def test_what_is_no_norm_stays(forward):
    _, found = canonical(forward, torch.rand(2, 3, 8) + 1)
    assert not {"aten.rms_norm.default", "aten.layer_norm.default"} & set(found)


def test_a_cast_ends_the_match_in_bfloat16():
    program, found = canonical(
        lambda s, x: s.g * rms(x.float()).to(x.dtype),
        torch.randn(2, 3, 8, dtype=torch.bfloat16),
        g=G.bfloat16(),
    )
    assert "aten.rms_norm.default" in found and "aten.mul.Tensor" in found
    x = torch.randn(5, 3, 8, dtype=torch.bfloat16)
    assert torch.equal(program.module(x), G.bfloat16() * rms(x.float()).bfloat16())


def test_eager_attention_is_labelled():
    def forward(self, q, k, v):
        scores = q @ k.transpose(-1, -2) * 0.5
        return torch.softmax(scores.masked_fill(scores > 9, -1e9), -1) @ v

    q = torch.randn(2, 4, 5, 8)
    program, _ = canonical(forward, q, q.clone(), q.clone())
    labels = [n.meta[ATTENTION] for n in program.module.graph.nodes if ATTENTION in n.meta]
    assert labels == ["queries × keys", "weights × values"]


def test_softmax_without_products_is_no_attention():
    program, _ = canonical(lambda s, x: (x @ s.w).softmax(-1), torch.randn(3, 8), w=W)
    assert not any(ATTENTION in n.meta for n in program.module.graph.nodes)


def test_convolutions_have_one_spelling(convnet):
    program = capture(convnet, (torch.randn(2, 3, 12, 12),))
    program = PassManager([CleanUp(), Canonicalise()], verify=True).run(program)
    found = [str(n.target) for n in program.module.graph.nodes]
    assert found.count("aten.conv2d.default") == 2
    assert found.count("aten.convolution.default") == 1  # the transposed one


def test_index_select_of_a_parameter_is_an_embedding():
    forward = lambda s, ids: torch.index_select(s.w, 0, ids)  # noqa: E731
    _, found = canonical(forward, torch.tensor([1, 2, 5]), w=W)
    assert found == ["aten.embedding.default"]
