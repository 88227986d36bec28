"""Gradients of a unit-scaled model are those of its own function, times known powers of two."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import scaleprop
from scaleprop.ops.scaling import scale_fwd_bwd

D = 8
Case = tuple[nn.Module, tuple[Any, ...]]


def plain(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The same function, differentiated by plain autograd."""
    module = copy.deepcopy(module)
    for part in module.modules():  # and what is checkpointed
        if isinstance(part, torch.fx.GraphModule):
            for node in part.graph.find_nodes(op="call_function", target=scale_fwd_bwd):
                node.target = operator.mul
                node.args = node.args[:2]
            part.recompile()
    return module


def loss_of(output: Any) -> torch.Tensor:
    """A scalar output itself, else all floats weighted with fixed random numbers."""
    leaves = [leaf for leaf in pytree.tree_leaves(output)
              if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    scalars = [leaf for leaf in leaves if leaf.numel() == 1]
    if scalars:
        return scalars[0].sum()
    generator = torch.Generator().manual_seed(7)
    return torch.stack([
        (leaf * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)).sum()
        for leaf in leaves]).sum()


def assert_exact(scaled: scaleprop.UnitScaled, *args: Any, **kwargs: Any) -> None:
    """Same loss; each gradient is plain autograd's times 2^potential."""
    reference = plain(scaled)
    losses = []
    for module in (scaled, reference):
        torch.manual_seed(3)
        losses.append(loss_of(module(*args, **kwargs)))
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    uses = scaled.meta["unit_scaling"].parameters
    expected = dict(reference.named_parameters())
    compared = 0
    for name, parameter in scaled.named_parameters():
        other = expected[name].grad
        assert (parameter.grad is None) == (other is None), name
        if other is None or parameter.grad is None:
            continue
        true = other * 2.0 ** uses[name].potential
        torch.testing.assert_close(parameter.grad, true, rtol=1e-8,
                                   atol=1e-11 * float(true.abs().max()) + 1e-30, msg=name)
        compared += bool(other.any())
    assert compared


class Wrap(nn.Module):
    """Layers, and a function of them and the input."""

    def __init__(self, run: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Any) -> Any:
        return self.run(self, x)


def two(run: Callable[..., Any], x: torch.Tensor | None = None) -> Case:
    """run(m, x) with linears a, b around."""
    return Wrap(run, a=nn.Linear(D, D), b=nn.Linear(D, D)), \
        (torch.randn(3, 5, D) if x is None else x,)


def heads(x: torch.Tensor, count: int) -> torch.Tensor:
    return x.unflatten(-1, (count, -1)).transpose(-2, -3)


def attention(**options: Any) -> Case:
    gqa = options.get("enable_gqa", False)

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = heads(m.q(x), 4), heads(m.k(x), 2 if gqa else 4), heads(m.v(x), 2 if gqa else 4)
        y = F.scaled_dot_product_attention(q, k, v, **options)
        return x + m.o(y.transpose(-2, -3).flatten(-2))

    width = D if not gqa else D // 2
    return Wrap(run, q=nn.Linear(D, D), k=nn.Linear(D, width), v=nn.Linear(D, width),
                o=nn.Linear(D, D)), (torch.randn(2, 5, D),)


def spelled(masked: bool) -> Case:
    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (heads(each(x), 2) for each in (m.q, m.k, m.v))
        scores = q @ k.mT / 2
        if masked:
            future = torch.ones(5, 5, dtype=torch.bool).triu(1)
            scores = scores + torch.zeros(5, 5, dtype=x.dtype).masked_fill(future, -torch.inf)
        y = scores.softmax(-1) @ v
        return x + m.o(y.transpose(-2, -3).flatten(-2))

    return Wrap(run, **{name: nn.Linear(D, D) for name in "qkvo"}), (torch.randn(2, 5, D),)


def tied() -> Case:
    model = Wrap(lambda m, i: F.cross_entropy(m.head(m.a(m.table(i)).relu()).flatten(0, 1),
                                              i.flatten()),
                 table=nn.Embedding(11, D), a=nn.Linear(D, D), head=nn.Linear(D, 11, bias=False))
    model.head.weight = model.table.weight  # type: ignore[union-attr]
    return model, (torch.randint(0, 11, (3, 4)),)


def in_place(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.a(x)
    y += m.b(y.tanh())
    return y * 1.0


def in_place_activations(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.b(F.relu(F.silu(m.a(x), inplace=True), inplace=True))


def masked(m: Any, x: torch.Tensor) -> torch.Tensor:
    scores = torch.where(torch.eye(D, dtype=torch.bool), -torch.inf, m.a(x)[..., None, :])
    return m.b(scores.softmax(-1)[..., 0, :])


def chunked(m: Any, x: torch.Tensor) -> torch.Tensor:
    gate, value = m.a(x).chunk(2, -1)
    return m.b(torch.cat([F.silu(gate) * value, value], -1))


def relative(m: Any, x: torch.Tensor) -> torch.Tensor:
    steps = torch.arange(5)
    bias = m.bias((steps[None] - steps[:, None] + 4).clamp(0, 8))
    return m.b((m.a(x) @ x.mT + bias.squeeze(-1)).softmax(-1) @ x)


def entropy(**options: Any) -> Case:
    targets = torch.tensor([0, 1, -100, 3, 4, -100])
    return Wrap(lambda m, x: F.cross_entropy(m.a(x).tanh(), targets, **options),
                a=nn.Linear(D, 5)), (torch.randn(6, D),)


def conv_net() -> Case:
    layers = [nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
              nn.Conv2d(6, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 3)]
    return nn.Sequential(*layers), (torch.randn(3, 3, 8, 8),)


def conv1d(**options: Any) -> Case:
    return nn.Sequential(nn.Conv1d(4, 8, 3, **options), nn.GELU(), nn.Conv1d(8, 4, 1)), \
        (torch.randn(2, 4, 12),)


CASES: dict[str, Callable[[], Case]] = {
    "mlp": lambda: (nn.Sequential(nn.Linear(D, 16), nn.GELU(), nn.Linear(16, 4)),
                    (torch.randn(6, D),)),
    "root linear": lambda: (nn.Linear(D, 4), (torch.randn(6, D),)),
    "attention": lambda: spelled(masked=False),
    "mask added to scores": lambda: spelled(masked=True),
    "sdpa": lambda: attention(is_causal=True),
    "sdpa scale": lambda: attention(scale=0.3),
    "sdpa dropout": lambda: attention(dropout_p=0.2),
    "gqa": lambda: attention(enable_gqa=True),
    "tied": tied,
    "two heads": lambda: (Wrap(
        lambda m, x: (m.a(h := m.trunk(x).relu()), 100 * m.b(h).square()),
        trunk=nn.Linear(D, D), a=nn.Linear(D, 2), b=nn.Linear(D, 3)), (torch.randn(6, D),)),
    "in-place residual": lambda: two(in_place),
    "checkpoint": lambda: two(
        lambda m, x: m.b(checkpoint(lambda y: m.a(y).tanh(), x, use_reentrant=False))),
    "ignore_index": lambda: entropy(),
    "label smoothing": lambda: entropy(label_smoothing=0.1),
    "class weights": lambda: entropy(weight=torch.arange(1, 6).double()),
    "sum": lambda: entropy(reduction="sum"),
    "batch norm": conv_net,
    "conv1d stride": lambda: conv1d(stride=3, padding=2, dilation=2),
    "conv1d groups": lambda: conv1d(groups=4),
    "conv1d circular": lambda: conv1d(padding=1, padding_mode="circular"),
    "conv1d same": lambda: conv1d(padding="same"),
    "in-place activations": lambda: two(in_place_activations),
    "relu-sum": lambda: two(lambda m, x: m.b(m.a(x).relu()).relu().sum()),
    "log_softmax": lambda: two(lambda m, x: m.b(F.log_softmax(m.a(x), -1))),
    "exp of zeros": lambda: two(lambda m, x: m.b(torch.exp(m.a(x) * 0) * m.a(x))),
    "where": lambda: two(masked),
    "cat": lambda: two(lambda m, x: m.b(torch.cat([m.a(x)[..., :4].relu(), x[..., 4:]], -1))),
    "relative positions": lambda: (Wrap(relative, a=nn.Linear(D, D), b=nn.Linear(D, D),
                                        bias=nn.Embedding(9, 1)), (torch.randn(3, 5, D),)),
    "add alpha": lambda: two(lambda m, x: torch.add(m.a(x), m.b(m.a(x).relu()), alpha=0.3)),
    "self sum": lambda: two(lambda m, x: m.b((y := m.a(x)) + y)),
    "chunk": lambda: two(chunked),
}


@pytest.mark.parametrize("scheme", ["unit", "u-mup", "mus"])
@pytest.mark.parametrize("case", CASES)
def test_exact(case: str, scheme: Any) -> None:
    if scheme != "unit" and case not in ("sdpa", "tied", "two heads", "batch norm"):
        pytest.skip("schemes differ in constants only")
    torch.manual_seed(0)
    model, args = CASES[case]()
    model.double()
    args = tuple(a.double() if a.is_floating_point() else a for a in args)
    assert_exact(scaleprop.unit_scale(model, args, scheme, loss_fn=loss_of), *args)


@pytest.mark.parametrize("name", ["llama", "llama tied", "gpt2", "bert", "mixtral"])
def test_transformers(name: str) -> None:
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name.startswith("llama"):
        model = hf.LlamaForCausalLM(hf.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, use_cache=False,
            tie_word_embeddings="tied" in name))
    elif name == "gpt2":
        model = hf.GPT2LMHeadModel(hf.GPT2Config(
            vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16, use_cache=False))
    elif name == "mixtral":  # experts' weights in stacks
        model = hf.MixtralForCausalLM(hf.MixtralConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, use_cache=False))
    else:
        model = hf.BertForMaskedLM(hf.BertConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=16))
    ids = torch.randint(3, 32, (2, 8))
    kwargs = {"input_ids": ids, "labels": ids.clone()}
    scaled = scaleprop.unit_scale(model.double(), kwargs)
    assert_exact(scaled, **kwargs)
    for weight, use in scaled.scaling.parameters.items():
        matrix = scaled.get_parameter(weight).dim() > 1
        assert bool(use.roles) == matrix or "position" in weight or "token_type" in weight, weight
