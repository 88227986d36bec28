"""Attention's weights as powers of √2: one number at a time, masks, and what stays."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import scaleprop
from scaleprop.errors import ConfigError
from scaleprop.passes.methods.quantize_softmax import QuantizeSoftmax

from .small import assigned


def slow(p: float, bits: int, per_octave: int) -> float:
    """RepQ-ViT's quantizer, of one number."""
    if p == 0:
        return 0.0
    k = round(-per_octave * math.log2(p))
    return 0.0 if k >= 2**bits else 2.0 ** (-k / per_octave)


class Attention(nn.Module):
    """Identity projections, so that weights come out; fused, or spelt out."""

    def __init__(self, fused: bool, causal: bool = False, mask: Tensor | None = None) -> None:
        super().__init__()
        self.fused, self.causal = fused, causal
        self.mask: Tensor | None
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        v = torch.eye(x.shape[-2]).expand(x.shape[0], -1, -1)
        if self.fused:
            return F.scaled_dot_product_attention(x, x, v, attn_mask=self.mask,
                                                  is_causal=self.causal, scale=1.5)  # fmt: skip
        return (x @ x.transpose(-1, -2) * 1.5).softmax(-1) @ v


X = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
MASK = torch.ones(7, 7, dtype=torch.bool).tril().roll(-1, 0)
MASK[-1] = False  # a query that may attend to nothing
CASES = {
    "explicit": Attention(False), "fused": Attention(True),
    "causal": Attention(True, causal=True), "mask": Attention(True, mask=MASK),
    "added": Attention(True, mask=torch.randn(7, 7, generator=torch.Generator().manual_seed(1))),
}  # fmt: skip


@pytest.mark.parametrize("model", CASES.values(), ids=CASES)
@pytest.mark.parametrize(("bits", "base", "per_octave"), [(4, "sqrt2", 2), (3, "2", 1)])
def test_each_weight_is_a_power(model, bits, base, per_octave):
    model = model.eval()
    with torch.no_grad():
        weights = model(X)
    found = QuantizeSoftmax(bits=bits, base=base).run(assigned(model, [X], "int8-token"))
    got = found.program.module(X)
    got = got[0] if isinstance(got, tuple) else got
    want = weights.double().apply_(lambda p: slow(p, bits, per_octave))
    # two spellings of a softmax differ in the last bit, which may move a number to the next power
    share = (got.double() - want).abs() > 1e-6
    assert int(share.sum()) <= 1 and bool((want > 0).any()) and bool((want == 0).any())
    assert bool((got[weights == 0] == 0).all())


def test_finer_powers_cost_less():
    model = CASES["fused"].eval()
    with torch.no_grad():
        weights = model(X)

    def noise(**options):
        found = QuantizeSoftmax(**options).run(assigned(model, [X], "int8-token"))
        got = found.program.module(X)
        return float((got[0] if isinstance(got, tuple) else got).sub(weights).square().sum())

    assert noise(bits=5) < noise(bits=4, base="2")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights = (self.q(x) @ self.k(x).transpose(-1, -2)).softmax(-1)
        return weights @ self.v(x), weights


def test_it_compiles_and_returned_weights_stay():
    model, x = Block().eval(), torch.randn(2, 6, 8)
    plain, rounded = (
        scaleprop.compile(model, x, recipe="int8-weight", backend="onnxruntime", passes=passes)(x)
        for passes in ((), ("quantize-softmax",)))  # fmt: skip
    torch.testing.assert_close(rounded[1], plain[1])
    assert 1e-4 < float((rounded[0] - plain[0]).abs().max()) < 0.5


def test_shared_heads_inside_the_operator_stay():
    class Shared(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x[:, :1], x[:, :1], enable_gqa=True)

    x = torch.randn(1, 2, 4, 8)
    found = QuantizeSoftmax().run(assigned(Shared().eval(), [x], "int8-token"))
    assert not found.modified and any("heads are shared" in note for note in found.notes)


def test_refusals():
    with pytest.raises(ConfigError, match=r"1\.\.8"):
        QuantizeSoftmax(bits=9)
    with pytest.raises(ConfigError, match="known: sqrt2, 2"):
        QuantizeSoftmax(base="3")  # type: ignore[arg-type]
