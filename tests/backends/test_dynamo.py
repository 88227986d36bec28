"""``torch.compile(backend="scaleprop")``: the joint graph rewritten, the model's meaning kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import UnsupportedOperatorException

from scaleprop.backends.dynamo import Options, scaleprop
from scaleprop.backends.graphs import compile_joint
from scaleprop.errors import ConfigError, PassError

from .joint_graphs import Anywhere, compiled, step

INNER = ("eager", "inductor")


class Language(nn.Module):
    """Tied embeddings, attention, norms, cross-entropy."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True,
                                                activation="gelu")
        self.head = nn.Linear(width, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.layer(self.embed(ids)))
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids.roll(1, 1).flatten())


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    match name:
        case "linear":
            return nn.Linear(8, 4).double(), torch.randn(3, 8).double()
        case "sequential":
            layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 4))
            return layers.double(), torch.randn(3, 8).double()
        case "conv":
            layers = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
                                   nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(),
                                   nn.Linear(200, 5))
            return layers.double(), torch.randn(2, 3, 16, 16).double()
        case _:
            return Language().double(), torch.randint(0, 50, (2, 7))


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize(("name", "inner"), [
    ("linear", "eager"), ("sequential", "eager"), ("conv", "eager"), ("language", "eager"),
    ("conv", "inductor"), ("language", "inductor")])
def test_random_exponents_leave_loss_and_gradients(name: str, inner: Any):
    model, inputs = build(name)
    expected = step(model, inputs)
    rewritten = compiled(model, Anywhere(), inner, fullgraph=True)
    for got, want in zip(step(rewritten, inputs), expected, strict=True):
        assert torch.equal(got, want) if inner == "eager" else torch.allclose(
            got, want, rtol=1e-10, atol=1e-14)


def test_batch_norm_statistics_are_updated_once():
    model, inputs = build("conv")
    reference, _ = build("conv")
    torch.compile(model, backend=scaleprop, options={"recipe": "fp8", "inner": "eager"})(inputs)
    reference(inputs)
    assert torch.equal(model[1].running_var, reference[1].running_var)
    assert int(model[1].num_batches_tracked) == 1


@pytest.mark.parametrize(("name", "inner"), [("language", "eager"), ("sequential", "inductor")])
def test_fp32_is_what_torch_computes(name: str, inner: Any):
    model, inputs = build(name)
    expected = step(model, inputs)
    got = step(torch.compile(model, backend=scaleprop, options={
        "recipe": "fp32", "inner": inner}), inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("inner", INNER)
def test_fp8_gradients_point_where_the_exact_ones_do(inner: Any):
    torch.manual_seed(0)
    model, ids = Language(64), torch.randint(0, 50, (4, 16))
    expected = step(model, ids)
    got = step(torch.compile(model, backend=scaleprop, options={"recipe": "fp8", "inner": inner}),
               ids)
    assert abs(got[0] - expected[0]) < 5e-3 * expected[0]
    assert not torch.equal(got[0], expected[0])
    largest = max(b.norm() for b in expected[1:])
    for a, b in zip(got[1:], expected[1:], strict=True):
        if b.norm() < 1e-6 * largest:  # rounding noise
            continue
        cosine = torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)
        assert cosine > 0.99 and 0.95 < a.norm() / b.norm() < 1.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_small_gradients_of_half_precision_models_are_held_where_there_is_room(dtype: torch.dtype):
    """The cast of a gradient of 1e-5 wants 2^-32, which float16 does not have."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 8)).to(dtype)
    model, x = Scaled(body, 1e-2), torch.randn(64, 32).to(dtype)
    expected = step(model, x)
    got = step(torch.compile(model, backend=scaleprop, options={"recipe": "fp8", "inner": "eager"}),
               x)
    assert max(float(b.abs().max()) for b in expected[1:]) < 1e-3
    for a, b in zip(got, expected, strict=True):
        assert torch.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0) > 0.98
        assert 0.9 < a.double().norm() / b.double().norm() < 1.1


class Scaled(nn.Module):
    """A mean square, times a factor."""

    def __init__(self, body: nn.Module, factor: float) -> None:
        super().__init__()
        self.body, self.factor = body, factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).float().square().mean() * self.factor


def test_evaluation_without_gradients():
    torch.manual_seed(0)
    model, x = Scaled(build("sequential")[0].float(), 1.0), torch.randn(16, 8)
    quantized = torch.compile(model, backend=scaleprop, options={"recipe": "fp8"})
    with torch.no_grad():
        exact, got = model(x), quantized(x)
    assert 0 < abs(got - exact) < 1e-2 * exact


@pytest.mark.parametrize(
    ("options", "message"),
    [({"recipe": "fp7"}, "unknown training recipe 'fp7'"), ({"inner": "onnx"}, "inner='onnx'"),
     ({"receipt": "fp8"}, "unknown option 'receipt'")],
)
def test_wrong_options_are_named(options: dict[str, str], message: str):
    with pytest.raises(ConfigError, match=message):
        Options.of(options)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("error", [
    UnsupportedOperatorException(torch.ops.aten.mm.default), PassError("wrong"),
], ids=["torch's", "ours"])
def test_a_transform_that_fails_is_no_graph_break(error: Exception, inner: Any):
    """Dynamo would go on without it, and run the model as it is."""
    def fail(_: Any) -> None:
        raise error

    model, inputs = build("sequential")
    run = torch.compile(
        model, backend=lambda graph, given: compile_joint(graph, given, fail, inner))
    with pytest.raises(Exception, match=f"{type(error).__name__}: {error}"):
        run(inputs)
