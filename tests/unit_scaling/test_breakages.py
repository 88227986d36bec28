"""What breaks in unit scaling elsewhere, and is not among ``test_gradients``' cases: each is
unit-scaled, and its gradients are its own function's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import scaleprop
from scaleprop.errors import CaptureError
from tests.unit_scaling.test_gradients import Case, D, Wrap, assert_exact, entropy, plain, two


def gelu_by_hand(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3))))


def integer_sums(m: Any, x: torch.Tensor) -> torch.Tensor:
    places = torch.arange(5) + 1
    ids = (places + places[:, None]).clamp(0, 10) + (x[0, :, 0] > 0).long()
    return m.a(m.table(ids)).sum(0) + x


def masked_twice(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Scores of the second layer depend on the first layer's."""
    mask = torch.zeros(5, 5, dtype=x.dtype).masked_fill(
        torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf)
    for _ in range(2):
        y = F.layer_norm(x, (D,))
        x = x + m.b(((m.a(y) @ y.mT) + mask).softmax(-1) @ y)
    return x


def lowest_masked(m: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    scores = (m.a(x) @ x.mT).masked_fill(hidden, torch.finfo(torch.float32).min)
    return m.b(scores.softmax(-1) @ x)


def one_label(m: Any, x: torch.Tensor) -> torch.Tensor:
    labels = torch.where(torch.arange(5) == 2, 1, -100)
    return F.cross_entropy(m.b(m.a(x).relu())[0], labels)


CASES: dict[str, Callable[[], Case]] = {
    "plain sum": lambda: two(lambda m, x: m.a(x) + m.b(x)),
    "plain sum of three": lambda: two(lambda m, x: m.b(m.a(x) + x + 1)),
    "integer sums to a lookup": lambda: (Wrap(
        integer_sums, a=nn.Linear(D, D), table=nn.Embedding(12, D)), (torch.randn(3, 5, D),)),
    "tanh gelu by hand": lambda: two(lambda m, x: m.b(gelu_by_hand(m.a(x)))),
    "tanh gelu by hand in a residual": lambda: two(
        lambda m, x: m.a(x) + m.b(gelu_by_hand(m.a(x)))),
    "tanh gelu": lambda: two(lambda m, x: m.b(F.gelu(m.a(x), approximate="tanh"))),
    "masks of two layers": lambda: two(masked_twice),
    "lowest numbers": lambda: two(lowest_masked),
    "one label of five": lambda: two(one_label),
    "weights and smoothing": lambda: entropy(
        weight=torch.arange(1, 6).double(), label_smoothing=0.2),
    "checkpoint with dropout": lambda: two(lambda m, x: m.b(checkpoint(
        lambda y: F.dropout(m.a(y), 0.3).tanh(), x, use_reentrant=False))),
    "cat of streams": lambda: two(lambda m, x: torch.cat([m.a(x), m.b(m.a(x)), x * 0], -1)),
    "conv1d reflect": lambda: (nn.Sequential(
        nn.Conv1d(4, 8, 3, padding=2, padding_mode="reflect"), nn.ReLU(), nn.Conv1d(8, 4, 1)),
        (torch.randn(2, 4, 12),)),
}


def in_double(build: Callable[[], Case]) -> Case:
    torch.manual_seed(0)
    model, args = build()
    return model.double(), tuple(a.double() if a.is_floating_point() else a for a in args)


@pytest.mark.parametrize("case", CASES)
def test_exact(case: str):
    model, args = in_double(CASES[case])
    assert_exact(scaleprop.unit_scale(model, args), *args)


def test_padding_happens_once():
    model, args = in_double(CASES["conv1d reflect"])
    assert scaleprop.unit_scale(model, args)(*args).shape == model(*args).shape == (2, 4, 14)


def test_a_mean_is_over_the_labels_that_count():
    """The loss is that of the model's own logits: ignored labels divide nothing."""

    def run(m: Any, x: torch.Tensor) -> Any:
        logits = m.a(x)
        return F.cross_entropy(logits, labels), logits

    labels = torch.tensor([-100, -100, 2, -100, 0, -100, -100, -100])
    x = torch.randn(8, D, dtype=torch.float64)
    scaled = scaleprop.unit_scale(Wrap(run, a=nn.Linear(D, 5)).double(), (x,))
    loss, logits = scaled(x)
    torch.testing.assert_close(loss, F.cross_entropy(logits[[2, 4]], labels[[2, 4]]),
                               rtol=1e-12, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_region_around_a_scaled_module(reentrant: bool):
    model, (x,) = in_double(lambda: two(lambda m, x: m.b(m.a(x).relu())))
    scaled = scaleprop.unit_scale(model, (x,))
    x.requires_grad_()
    found = []
    for call in (scaled, lambda x: checkpoint(scaled, x, use_reentrant=reentrant)):
        scaled.zero_grad()
        x.grad = None
        call(x).square().mean().backward()
        found.append([x.grad, *(p.grad.clone() for p in scaled.parameters())])
    assert all(map(torch.equal, *found))


def test_two_heads_turn_no_gradient_of_the_trunk():
    """Cosine with plain autograd of the scaled function ≥ 0.9999, where losses differ 1000-fold."""

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        shared = m.trunk(x).relu()
        labels = torch.arange(6) % 5
        return F.cross_entropy(m.left(shared), labels) + 1000 * m.right(shared).square().mean()

    torch.manual_seed(0)
    model = Wrap(run, trunk=nn.Linear(D, 32), left=nn.Linear(32, 5), right=nn.Linear(32, 1))
    x = torch.randn(6, D)
    scaled = scaleprop.unit_scale(model, (x,))
    reference = plain(scaled)
    for each in (scaled, reference):
        each(x).backward()
    for name, parameter in scaled.named_parameters():
        got, want = (p.grad.double().flatten() for p in (parameter, reference.get_parameter(name)))
        assert torch.cosine_similarity(got, want, dim=0) >= 0.9999, name


def test_a_part_of_a_value_is_written_or_refused():
    """Columns that are set to zero have no gradient in what reads them."""

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x).tanh()
        y[..., 0] = 0
        return m.b(y)

    model, (x,) = two(run)
    try:
        scaled = scaleprop.unit_scale(model, (x,))
    except CaptureError:
        return
    scaled(x).square().mean().backward()
    assert not scaled.b.weight.grad[:, 0].any() and not scaled.a.weight.grad[0].any()
    assert scaled.b.weight.grad[:, 1:].all()


def _vision(hf: Any, name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    if name == "vit":
        model = hf.ViTForImageClassification(hf.ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
            image_size=8, patch_size=4, num_labels=3))
    else:
        model = hf.ResNetForImageClassification(hf.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3,
            layer_type="basic"))
    return model, {"pixel_values": torch.randn(2, 3, 8 if name == "vit" else 32, 8 if name == "vit"
                                               else 32), "labels": torch.tensor([0, 2])}


def _language(hf: Any, name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    ids = torch.randint(3, 32, (2, 6))
    sizes: dict[str, Any] = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False}
    if name == "t5":
        return hf.T5ForConditionalGeneration(hf.T5Config(
            vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, use_cache=False,
            decoder_start_token_id=0)), {"input_ids": ids, "labels": ids.clone()}
    if name == "mixtral":
        model = hf.MixtralForCausalLM(hf.MixtralConfig(
            **sizes | {"num_hidden_layers": 1}, num_local_experts=2, num_experts_per_tok=1))
        model.set_experts_implementation("batched_mm")  # the grouped product knows no float64
    else:
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, attn_implementation="eager"))
    return model, {"input_ids": ids, "labels": ids.clone()}


@pytest.mark.parametrize("name", ["llama eager", "mixtral", "t5", "vit", "resnet"])
def test_transformers(name: str):
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, given = (_vision if name in ("vit", "resnet") else _language)(hf, name)
    given = {key: value.double() if value.is_floating_point() else value
             for key, value in given.items()}
    scaled = scaleprop.unit_scale(model.double(), given)
    assert_exact(scaled, **given)
