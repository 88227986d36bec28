"""StableClip against Stable-SPAM's formulas, one number at a time in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from scaleprop import optim
from scaleprop.errors import ConfigError


class Reference:
    """The three formulas of the paper for one parameter, with Python's numbers."""

    def __init__(self, theta: float = 0.999, gamma1: float = 0.7, gamma2: float = 0.9) -> None:
        self.theta, self.gamma1, self.gamma2 = theta, gamma1, gamma2
        self.t = self.threshold = self.m = self.v = 0.0

    def clip(self, g: list[float]) -> list[float]:
        self.t += 1
        largest = max(abs(x) for x in g)
        self.threshold = self.theta * self.threshold + (1 - self.theta) * largest
        limit = self.threshold / (1 - self.theta**self.t)
        if largest > limit * (1 + 1e-9):
            g = [x * limit / largest if abs(x) > limit else x for x in g]
        norm = math.sqrt(sum(x * x for x in g))
        self.m = self.gamma1 * self.m + (1 - self.gamma1) * norm
        self.v = self.gamma2 * self.v + (1 - self.gamma2) * norm * norm
        mean = self.m / (1 - self.gamma1**self.t)
        square = self.v / (1 - self.gamma2**self.t)
        factor = mean / (math.sqrt(square) + 1e-8) / norm if norm else 1.0
        return [x * factor for x in g]


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((3, 5), (7,), ())]


def gradient(shape: torch.Size, step: int, generator: torch.Generator) -> Tensor:
    g = torch.randn(shape, generator=generator) * 10.0 ** (step % 3)
    if step % 4 == 3 and g.ndim:
        g.view(-1)[step % g.numel()] *= 300
    return g


@pytest.mark.parametrize("decays", [(0.999, 0.7, 0.9), (0.5, 0.0, 0.99)])
def test_gradients_are_those_of_the_formulas(decays: tuple[float, float, float]) -> None:
    params, generator = parameters(), torch.Generator().manual_seed(0)
    theta, gamma1, gamma2 = decays
    clip = optim.StableClip(params, theta=theta, gamma1=gamma1, gamma2=gamma2)
    references = [Reference(*decays) for _ in params]
    for step in range(30):
        expected = []
        for index, (p, r) in enumerate(zip(params, references, strict=True)):
            p.grad = None if index == 1 and step % 5 == 2 else gradient(p.shape, step, generator)
            expected.append(None if p.grad is None else r.clip(p.grad.view(-1).tolist()))
        clip.step()
        for p, e in zip(params, expected, strict=True):
            assert (p.grad is None) == (e is None)
            if p.grad is not None:
                assert p.grad.view(-1).tolist() == pytest.approx(e, rel=2e-5)
    assert clip.steps == 30 and clip.count.tolist() == [30, 24, 30]


def test_a_spike_ends_at_the_usual_maximum_and_the_norm_at_the_usual_norm() -> None:
    (param,) = [torch.nn.Parameter(torch.zeros(100))]
    clip = optim.StableClip([param], gamma1=0.9, gamma2=0.999)
    for _ in range(50):
        param.grad = torch.full((100,), 0.5)
        clip.step()
    # all norms were 5: every gradient becomes one of norm 5/5 = 1, as AdaGN has it
    assert float(param.grad.norm()) == pytest.approx(1.0, rel=1e-6)
    param.grad = torch.full((100,), 0.5)
    param.grad[3] = 5000.0
    clip.step()
    spike = float(param.grad[3] / param.grad[0])
    theta = 0.999
    running = (0.5 * (1 - theta**50) * theta + (1 - theta) * 5000.0) / (1 - theta**51)
    assert spike == pytest.approx(running / 0.5, rel=1e-4)
    assert spike < 300  # of 10000


def test_zeros_stay_zeros_and_nothing_is_learned_from_nan_and_inf() -> None:
    params = [torch.nn.Parameter(torch.zeros(4)) for _ in range(3)]
    clip = optim.StableClip(params)
    for p in params:
        p.grad = torch.tensor([1.0, 2.0, 3.0, 4.0])
    params[2].grad = torch.zeros(4)
    clip.step()
    before = copy.deepcopy(clip.state_dict())
    params[0].grad = torch.tensor([1.0, math.inf, 2.0, -1.0])
    params[1].grad = torch.tensor([1.0, math.nan, 2.0, -1.0])
    params[2].grad = torch.zeros(4)
    clip.step()
    assert params[0].grad.tolist() == [1.0, math.inf, 2.0, -1.0]
    assert params[1].grad.isnan().tolist() == [False, True, False, False]
    assert params[2].grad.tolist() == [0.0] * 4
    for name in ("threshold", "mean", "square", "count"):
        assert torch.equal(getattr(clip, name)[:2], before[name][:2])


def test_narrow_gradients_keep_their_dtype_and_layout() -> None:
    wide, narrow = parameters(), parameters(torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    clips = optim.StableClip(wide), optim.StableClip(narrow)
    for step in range(6):
        for w, n in zip(wide, narrow, strict=True):
            n.grad = gradient(n.shape, step, generator).bfloat16()
            w.grad = n.grad.float()
        for clip in clips:
            clip.step()
    for w, n in zip(wide, narrow, strict=True):
        assert n.grad is not None and n.grad.dtype == torch.bfloat16 and w.grad is not None
        torch.testing.assert_close(n.grad.float(), w.grad, rtol=2e-2, atol=0)


@pytest.mark.parametrize("kind", ["adam", "scaled", "bfloat16"])
def test_moments_begin_anew(kind: str) -> None:
    """After a reset the next step is that of a fresh optimizer: lr·sign(g) for Adam."""
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    param = torch.nn.Parameter(torch.ones(300, dtype=dtype))
    optimizer = torch.optim.Adam([param], lr=0.125)
    if kind == "scaled":
        optim.scaled_state(optimizer, "fp16")
    if kind == "bfloat16":
        optim.stochastic_weights(optimizer)
    clip = optim.StableClip([param], optimizer, reset_every=5)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 11):
        param.grad = torch.randn(300, generator=generator).to(dtype)
        before = param.detach().float().clone()
        clip.step()
        sign = param.grad.float().sign()
        optimizer.step()
        change = (param.detach().float() - before) / -0.125
        fresh = torch.allclose(change, sign, atol=0.1 if kind == "bfloat16" else 1e-3)
        assert fresh == (step in (1, 5, 10))
        assert float(optimizer.state[param]["step"]) == (step if step < 5 else step % 5 + 1)


def test_saved_and_resumed_it_clips_the_same() -> None:
    first, second = parameters(), parameters()
    clip, resumed = optim.StableClip(first), optim.StableClip(second)
    generator = torch.Generator().manual_seed(2)
    for step in range(8):
        for p, q in zip(first, second, strict=True):
            p.grad = gradient(p.shape, step, generator)
            q.grad = p.grad.clone()
        clip.step()
        if step == 3:
            resumed.load_state_dict(copy.deepcopy(clip.state_dict()))
        if step > 3:
            resumed.step()
            assert all(torch.equal(p.grad, q.grad) for p, q in zip(first, second, strict=True))
    assert clip.steps == resumed.steps == 8


def test_it_steadies_training_with_spikes() -> None:
    """SGD on ‖w - 1‖² where every tenth gradient has an element 10⁴ times too large: how far the
    farthest weight is from 1, at worst and at the end."""
    worst, ends = {}, {}
    for clipped in (False, True):
        generator = torch.Generator().manual_seed(0)
        w = torch.nn.Parameter(torch.zeros(50))
        optimizer = torch.optim.SGD([w], lr=0.02)
        clip, distances = optim.StableClip([w]), []
        for step in range(400):
            w.grad = 2 * (w.detach() - 1)
            if step % 10 == 9:
                w.grad[int(torch.randint(50, (), generator=generator))] *= 1e4
            if clipped:
                clip.step()
            optimizer.step()
            distances.append(float((w.detach() - 1).abs().max()))
        worst[clipped], ends[clipped] = max(distances), distances[-1]
    assert worst[True] < 1.0 and ends[True] < 0.75
    assert worst[False] > 100


def test_empty_and_no_gradients() -> None:
    params = [torch.nn.Parameter(torch.zeros(0, 3)), torch.nn.Parameter(torch.zeros(2))]
    clip = optim.StableClip(params)
    clip.step()
    params[0].grad, params[1].grad = torch.zeros(0, 3), torch.ones(2)
    clip.step()
    assert params[1].grad.tolist() == pytest.approx([2**-0.5] * 2)


def test_what_makes_no_sense_is_refused() -> None:
    params = parameters()
    for nothing in ([], [{"params": params}]):
        with pytest.raises(ConfigError, match="pass at least one"):
            optim.StableClip(nothing)
    with pytest.raises(ConfigError, match=r"resets a torch\.optim\.Optimizer, not"):
        optim.StableClip(params, torch.nn.Linear(2, 2))
    for options in ({"theta": 1.0}, {"gamma1": -0.1}, {"gamma2": math.nan}, {"reset_every": 0},
                    {"eps": -1.0}):
        with pytest.raises(ConfigError, match="decays are in"):
            optim.StableClip(params, **options)
    with pytest.raises(ConfigError, match="Adagrad"):
        optim.StableClip(params, torch.optim.Adagrad(params))
    with pytest.raises(ConfigError, match="pass the same ones"):
        optim.StableClip(params[:2]).load_state_dict(optim.StableClip(params).state_dict())
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigError, match="dense"):
        optim.StableClip(embedding.parameters()).step()


def test_tensor_subclasses_are_refused() -> None:
    class Odd(Tensor):
        @staticmethod
        def __new__(cls) -> Odd:
            return torch.ones(2, 32).as_subclass(cls)

    with pytest.raises(ConfigError, match="plain tensors"):
        optim.StableClip([Odd()])
