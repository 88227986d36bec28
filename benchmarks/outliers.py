"""Models with outliers in their channels, which compute what they computed without.

What trained models of some size do by themselves: a few channels of what norms give are 20 to 100
times as large as the others, in the same places in all layers, and the weights that read them are
as much smaller. Each norm's gain (and bias) takes the factor, each reader's weight its inverse; a
sum that reads the norm divides by it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

SHARE = 0.01  # of the channels
LEAST, MOST = 20.0, 100.0


def factors(width: int, seed: int = 0) -> Tensor:
    """[width]: 1, and for ``SHARE`` of the channels numbers from 20 to 100, even in logarithm."""
    generator = torch.Generator().manual_seed(seed)
    count = max(round(width * SHARE), 1)
    places = torch.randperm(width, generator=generator)[:count]
    exponents = torch.rand(count, generator=generator)
    found = torch.ones(width)
    found[places] = LEAST * (MOST / LEAST) ** exponents
    return found


@torch.no_grad()
def inject(norm: nn.Module, readers: Iterable[nn.Module], sums: Iterable[nn.Module],
           factor: Tensor) -> None:
    """Multiply what ``norm`` gives by ``factor``, and undo it in all that read it.

    readers: linears. sums: modules that add their second argument to something of their own.
    """
    norm.weight.mul_(factor)
    if getattr(norm, "bias", None) is not None:
        norm.bias.mul_(factor)
    for reader in readers:
        reader.weight.div_(factor)
    for module in sums:
        module.register_buffer("outliers", factor.clone())
        module.register_forward_pre_hook(_divided)


def _divided(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    hidden, residual, *rest = arguments
    return hidden, residual / module.outliers, *rest


def into_llama(model: nn.Module) -> None:
    """Pre-norm: what each norm gives is read by linears alone."""
    base, factor = model.model, factors(model.config.hidden_size)
    for layer in base.layers:
        attention, mlp = layer.self_attn, layer.mlp
        inject(layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj), (),
               factor)
        inject(layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj), (), factor)
    inject(base.norm, (model.lm_head,), (), factor)


def into_bert(encoder: nn.Module) -> None:
    """Post-norm: what each norm gives is read by linears and by the next sum; the last one's is
    what the model returns, and stays."""
    factor = factors(encoder.config.hidden_size)
    layers = list(encoder.encoder.layer)
    before = encoder.embeddings.LayerNorm
    for layer in layers:
        attention = layer.attention.self
        inject(before, (attention.query, attention.key, attention.value),
               (layer.attention.output,), factor)
        inject(layer.attention.output.LayerNorm, (layer.intermediate.dense,), (layer.output,),
               factor)
        before = layer.output.LayerNorm
