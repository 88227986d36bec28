"""Moments of norms, and of their gradients.

A norm leaves mean 0 and rms 1 before its gain. Its gradient is what is left of dy·γ without its
mean and without its part along the normalised value, divided by the deviation.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from scaleprop.rules.moments import (
    Answer,
    Call,
    Moments,
    added,
    moments_rule,
    product,
    summed,
)

aten: Any = torch.ops.aten

_PLAIN = Moments(0.0, 1.0)


def _standard(x: Moments, eps: float) -> Moments:
    """(x − mean)/√(σ² + ε)."""
    return Moments(0.0, math.sqrt(x.variance / (x.variance + eps)) if eps + x.variance else 0.0)


def _by_rms(x: Moments, eps: float) -> Moments:
    """x/√(rms² + ε)."""
    return x.times(1 / math.sqrt(x.rms**2 + eps)) if x.rms**2 + eps else x


def _scaled(call: Call, normal: Moments, weight: Any, bias: Any = None) -> Moments:
    """normal·γ + β."""
    gain = Moments.constant(1.0) if weight is None else call.of(weight)
    offset = Moments.constant(0.0) if bias is None else call.of(bias)
    return added(product(normal, gain), offset)


@moments_rule(
    aten.layer_norm.default, aten.group_norm.default, aten.instance_norm.default,
    aten.native_layer_norm.default, aten.native_group_norm.default,
)  # fmt: skip
def normalised(call: Call) -> Answer:
    """x̂·γ + β; with some, mean and reciprocal deviation come out too."""
    x, eps = call.maybe(call.node.args[0]), call["eps"]
    if x is None:
        several = isinstance(call.node.meta["val"], tuple | list)
        return (_scaled(call, _PLAIN, call["weight"], call["bias"]), None, None) if several else \
            _scaled(call, _PLAIN, call["weight"], call["bias"])
    result = _scaled(call, _standard(x, eps), call["weight"], call["bias"])
    if not isinstance(call.node.meta["val"], tuple | list):
        return result
    n = call.numel() / max(math.prod(call.node.meta["val"][1].shape), 1)
    mean = Moments(x.mean, math.sqrt(x.mean**2 + x.variance / n))
    return result, mean, _inverse(x, eps)


def _inverse(x: Moments, eps: float) -> Moments:
    """1/√(σ² + ε)."""
    return Moments.constant(1 / math.sqrt(max(x.variance + eps, 1e-300)))


@moments_rule(aten.rms_norm.default)
def by_rms(call: Call) -> Answer:
    """x/rms·γ; what comes in unknown comes out with rms 1."""
    x, eps = call.maybe(call.node.args[0]), call["eps"]
    eps = torch.finfo(call.node.meta["val"].dtype).eps if eps is None else eps
    return _scaled(call, _PLAIN if x is None else _by_rms(x, eps), call["weight"])


@moments_rule(aten._fused_rms_norm.default)
def by_rms_and_inverse(call: Call) -> Answer:
    """The same, and 1/rms."""
    x, eps = call.maybe(call.node.args[0]), call["eps"]
    eps = torch.finfo(call.node.meta["val"][0].dtype).eps if eps is None else eps
    if x is None:
        return _scaled(call, _PLAIN, call["weight"]), None
    inverse = Moments.constant(1 / math.sqrt(max(x.rms**2 + eps, 1e-300)))
    return _scaled(call, _by_rms(x, eps), call["weight"]), inverse


@moments_rule(aten._native_batch_norm_legit_functional.default)
def by_batch(call: Call) -> Answer:
    """x̂·γ + β, mean, reciprocal deviation, and the running mean and variance."""
    x, eps, rate = call.maybe("input"), call["eps"], call["momentum"]
    running = [call.maybe(name) for name in ("running_mean", "running_var")]
    if x is None:
        return _scaled(call, _PLAIN, call["weight"], call["bias"]), None, None, None, None
    if call["training"] is False:
        return _by_running(call, x), None, None, *running
    now = Moments(x.mean, abs(x.mean)), Moments.constant(x.variance)
    moved = [old and added(old.times(1 - rate), new.times(rate))
             for old, new in zip(running, now, strict=True)]
    return (_scaled(call, _standard(x, eps), call["weight"], call["bias"]), now[0],
            _inverse(x, eps), *moved)


@moments_rule(aten._native_batch_norm_legit_no_training.default)
def by_running(call: Call) -> Answer:
    """(x − running mean)/√(running variance + ε)·γ + β."""
    x = call.first()
    return _by_running(call, x), None, None


def _by_running(call: Call, x: Moments) -> Moments:
    mean, variance = call.of("running_mean"), call.of("running_var")
    centred = added(x, mean.times(-1))
    normal = centred.times(1 / math.sqrt(variance.mean + call["eps"]))
    return _scaled(call, normal, call["weight"], call["bias"])


@moments_rule(aten.native_layer_norm_backward.default)
def normalised_back(call: Call) -> Answer:
    """dx, dγ, dβ."""
    n = math.prod(call["normalized_shape"])
    return _gradients(call, call.maybe("rstd"), n, call.numel("input") / n)


@moments_rule(aten.native_group_norm_backward.default)
def grouped_back(call: Call) -> Answer:
    """dx, dγ, dβ."""
    n = call["C"] // call["group"] * call["HxW"]
    return _gradients(call, call.maybe("rstd"), n, call["N"] * call["HxW"])


@moments_rule(aten.native_batch_norm_backward.default)
def by_batch_back(call: Call) -> Answer:
    """dx, dγ, dβ."""
    shape = call.shape("input")
    n = math.prod(shape) / shape[1]
    if call["train"]:
        x = call.maybe("input")
        return _gradients(call, _inverse(x, call["eps"]) if x else None, n, n)
    inverse = Moments.constant(1 / math.sqrt(call.of("running_var").mean + call["eps"]))
    dx = product(product(call.of("grad_out"), _gain(call)), inverse)
    return dx, *_gradients(call, inverse, n, n)[1:]


def _gain(call: Call) -> Moments:
    weight = call["weight"]
    return Moments.constant(1.0) if weight is None else call.of(weight)


def _gradients(
    call: Call, inverse: Moments | None, n: float, rows: float
) -> tuple[Moments | None, Moments, Moments]:
    """dx, dγ, dβ: n elements are normalised together, each gain is used by ``rows`` of them."""
    dy, x = call.of("grad_out"), call.maybe("input")
    if inverse is None and x is not None:
        inverse = _inverse(x, 0.0)
    dx = None
    if inverse is not None:
        left = max(1 - 2 / n, 0.0) * product(dy, _gain(call)).variance
        dx = Moments(0.0, math.sqrt(left) * inverse.rms)
    spread = 1.0 if x is None or inverse is None else math.sqrt(x.variance) * inverse.rms
    return dx, Moments(0.0, math.sqrt(rows) * dy.rms * spread), summed(dy, rows)


@moments_rule(aten._fused_rms_norm_backward.default)
def by_rms_back(call: Call) -> Answer:
    """dx, dγ."""
    dy, x, inverse = call.of("grad_out"), call.of("input"), call.of("rstd")
    n = math.prod(call["normalized_shape"])
    through = product(dy, _gain(call))
    dx = Moments(through.mean * inverse.mean,
                 through.rms * inverse.rms * math.sqrt(max(1 - 1 / n, 0.0)))
    return dx, summed(product(dy, product(x, inverse)), call.numel("input") / n)
