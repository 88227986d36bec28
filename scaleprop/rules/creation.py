"""Operators that make tensors from constants, or from another tensor's shape alone."""

from __future__ import annotations

from typing import Any

import torch

from scaleprop.rules.base import Homogeneity, Rule, register

aten: Any = torch.ops.aten

for _op in (
    aten.full.default,
    aten.zeros.default,
    aten.ones.default,
    aten.empty.memory_format,
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.scalar_tensor.default,
    aten.eye.default,
    aten.rand.default,
    aten.randn.default,
    aten.randint.default,
    aten.randint.low,
    aten.randperm.default,
    aten.empty_strided.default,
):
    register(Rule(op=_op, family="creation", homogeneity=Homogeneity()))

for _op in (
    aten.full_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.empty_like.default,
    aten.rand_like.default,
    aten.randn_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.bernoulli.p,
):
    register(Rule(op=_op, family="creation", homogeneity=Homogeneity({0: 0})))
