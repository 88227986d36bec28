"""Scaled optimizer state is computed fast in three ways, all the same bits as the reference."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from scaleprop.optim import FORMATS, batches, entries, kernels, pieces, state, storage
from tests.test_optim import BOUNDS, OPTIMIZERS, attached

CHUNK = 512


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CHUNK", CHUNK)
    monkeypatch.setattr(pieces, "CHUNKS", 1)


def same_bits(left: Any, right: Any) -> bool:
    """One NaN is as good as another, which vector instructions write otherwise."""
    if isinstance(left, Tensor):
        left, right = left.detach().contiguous(), right.detach().contiguous()
        if left.is_floating_point():
            wrong = left.isnan()
            if not torch.equal(wrong, right.isnan()):
                return False
            zero = torch.zeros((), dtype=left.dtype)
            left, right = torch.where(wrong, zero, left), torch.where(wrong, zero, right)
        return left.dtype == right.dtype and left.shape == right.shape and torch.equal(
            left.view(-1).view(torch.uint8), right.view(-1).view(torch.uint8))
    return all(same_bits(a, b) for a, b in zip(left, right, strict=True))


def samples(unsigned: bool) -> Iterator[Tensor]:
    """Float32 of many sizes and spreads, with zeros, NaN, ±Inf, wrong signs, the largest number."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((), (1,), (255,), (CHUNK,), (3, 5, 40), (4 * CHUNK + 256 + 3,)):
        x = torch.randn(shape, generator=generator)
        x = x.abs() if unsigned else x
        wide = x * torch.exp2(torch.rand(shape, generator=generator) * -90)
        yield from (x, x * 0.0, x * 1e-30, x * 2.0**-135, x * 1e30, -x, wide, wide * 1e-25,
                    wide * 2.0**40, x * (x > 0.5), wide * (x > 0.5))
        for bad in (torch.nan, torch.inf, -torch.inf, torch.finfo(torch.float32).max):
            sick = x.clone()
            sick.view(-1)[x.numel() // 2] = bad
            yield sick


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("name", FORMATS)
def test_kernels_equal_the_reference(name: str, seed: int | None, small_chunks: None) -> None:
    fmt = FORMATS[name]
    for x in samples(fmt.unsigned):
        slow, fast = (None if seed is None else torch.Generator().manual_seed(seed)
                      for _ in range(2))
        want = storage.encode_state(x, fmt, slow)
        assert same_bits(kernels.encode_state(x, fmt, fast), want)
        if slow is not None and fast is not None:
            assert torch.equal(slow.get_state(), fast.get_state())
        assert same_bits(kernels.decode_state(*want, fmt, torch.float32),
                         storage.decode_state(*want, fmt, torch.float32))


@pytest.mark.parametrize("name", FORMATS)
def test_every_code_at_every_exponent(name: str) -> None:
    fmt = FORMATS[name]
    bits = 8 * fmt.storage.itemsize
    codes = torch.arange(1 << bits).to(torch.uint8 if bits == 8 else torch.int16)
    codes = codes.view(fmt.storage)
    for specials in (True, False):
        if not specials:
            codes = codes[storage.values_of(codes, fmt, torch.float32).isfinite()]
        # that amax of float32 may give, subnormal or the largest
        for exponent in range(-149 - fmt.top, 129 - fmt.top, 5 if bits == 16 else 1):
            blocks = -(-codes.numel() // fmt.block) if fmt.block else 1
            scale = torch.full((blocks,), exponent, dtype=torch.int16)
            want = storage.decode_state(codes, scale, fmt, torch.float32)
            assert same_bits(kernels.decode_state(codes, scale, fmt, torch.float32), want)


@pytest.mark.parametrize("name", FORMATS)
def test_subnormals_that_are_taken_for_zero(name: str) -> None:
    """Then codes are no longer read as subnormal numbers."""
    fmt = FORMATS[name]
    x = torch.exp2(-torch.arange(80.0))
    stored = storage.encode_state(x, fmt)
    want = storage.decode_state(*stored, fmt, torch.float32)
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor keeps subnormal numbers")
        got = kernels.decode_state(*stored, fmt, torch.float32), *kernels.encode_state(x, fmt)
    finally:
        torch.set_flush_denormal(False)
    assert same_bits(got, (want, *stored))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("name", FORMATS)
def test_batches_equal_the_reference(name: str, seed: int | None, dtype: torch.dtype) -> None:
    fmt = FORMATS[name]
    given = [x.to(dtype) for x in samples(fmt.unsigned)]
    slow, fast = (None if seed is None else torch.Generator().manual_seed(seed) for _ in range(2))
    want = [storage.encode_state(x, fmt, slow) for x in given]
    bits = None if fast is None else [
        storage.random_bits(batches.rows_of(x, fmt), fast) for x in given]
    got = batches.encode_states(given, fmt, bits)
    assert same_bits(got, want)
    assert len({tensor.untyped_storage().data_ptr() for pair in got for tensor in pair}) \
        == 2 * len(given)  # saving one saves no other
    assert same_bits(batches.decode_states(want, fmt, dtype),
                     [storage.decode_state(*pair, fmt, dtype) for pair in want])


# --- steps ---------------------------------------------------------------------------------------

OTHERS: dict[str, Any] = {
    "adam-decay": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1, maximize=True),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "sgd-plain": lambda p: torch.optim.SGD(p, lr=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "asgd": lambda p: torch.optim.ASGD(p, lr=1e-2),
    "muon": lambda p: torch.optim.Muon([q for q in p if q.ndim == 2]),
    "adafactor": lambda p: torch.optim.Adafactor(p),
}


def stepped(
    make: Any, kind: str, steps: int = 4, **options: Any
) -> tuple[torch.optim.Optimizer, list[Tensor]]:
    """Steps on parameters smaller and larger than a chunk."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(2 * CHUNK + 37,), (8,), (3, 300), (CHUNK,), (40, 64), (3,), (2, 3, 20, 20)]
    params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    params[-1] = torch.nn.Parameter(
        params[-1].detach().to(memory_format=torch.channels_last))
    optimizer = make(params)
    attached(optimizer, kind, **options)
    for step in range(steps):
        for place, param in enumerate(params):
            param.grad = torch.randn(param.shape, generator=generator).clone(
                memory_format=torch.preserve_format).mul_(0.1)
            if place % 3 == 1 and step == 1:
                param.grad = None
        optimizer.step()
    return optimizer, params


@pytest.mark.parametrize("kind", [*BOUNDS, "fp16-random"])
@pytest.mark.parametrize("name", [*OPTIMIZERS, *OTHERS])
def test_pieces_equal_a_whole_step(
    name: str, kind: str, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    make: Callable[..., Any] = (OPTIMIZERS | OTHERS)[name]
    kind, _, random = kind.partition("-")

    def run() -> tuple[torch.optim.Optimizer, list[Tensor]]:
        options = {"generator": torch.Generator().manual_seed(5)} if random else {}
        return stepped(make, kind, **options)

    optimizer, params = run()
    with monkeypatch.context() as patch:
        patch.setattr(entries, "encode_state",
                      lambda x, fmt, generator, **_: storage.encode_state(x, fmt, generator))
        patch.setattr(entries, "decode_state", storage.decode_state)
        patch.setattr(state, "in_cache", lambda *_: False)
        reference, wanted = run()
    assert same_bits(params, wanted)
    assert set(optimizer.state) <= set(params)
    for got, want in zip(params, wanted, strict=True):
        left, right = optimizer.state.get(got, {}), reference.state.get(want, {})
        assert left.keys() == right.keys()
        assert all(same_bits(left[key], right[key]) if isinstance(right[key], Tensor)
                   else left[key] == right[key] for key in right)


@pytest.mark.parametrize("kind", [*BOUNDS, "fp16-random"])
def test_steps_on_other_devices_equal_those_on_a_cpu(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, _, random = kind.partition("-")

    def run() -> tuple[list[Tensor], dict[str, Any]]:
        options = {"generator": torch.Generator().manual_seed(5)} if random else {}
        optimizer, params = stepped(OPTIMIZERS["amsgrad"], kind, **options)
        return params, optimizer.state_dict()["state"]

    params, saved = run()
    monkeypatch.setattr(entries, "ALONE", frozenset())
    others, other = run()
    assert same_bits(params, others)
    for index, key in itertools.chain.from_iterable(
            [(index, key) for key in entry] for index, entry in saved.items()):
        assert same_bits(saved[index][key], other[index][key])


def test_parameters_are_cut_into_pieces(
    small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more than a chunk is decoded for the optimizer at a time."""
    sizes: list[int] = []
    inner = torch.optim.AdamW.step.__wrapped__  # type: ignore[attr-defined]

    def spy(self: Any) -> Any:
        sizes.append(sum(p.numel() for group in self.param_groups for p in group["params"]))
        return inner(self)

    monkeypatch.setattr(torch.optim.AdamW.step, "__wrapped__", spy)
    _, params = stepped(OPTIMIZERS["adamw"], "fp16", steps=1)
    odd = params[-1].numel()  # not contiguous: whole
    assert sum(sizes) == sum(p.numel() for p in params)
    assert odd in sizes and max(size for size in sizes if size != odd) == CHUNK


def test_a_step_that_fails_between_pieces(
    small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer, params = stepped(OPTIMIZERS["adamw"], "fp16")
    before = {key: value.clone() for key, value in optimizer.state[params[0]].items()}
    inner, calls = torch.optim.AdamW.step.__wrapped__, itertools.count()  # type: ignore[attr-defined]

    def fails(self: Any) -> Any:
        if self.param_groups[0]["params"][0].data_ptr() == params[0].data_ptr() + 4 * CHUNK:
            next(calls)
            raise RuntimeError("half way")
        return inner(self)

    monkeypatch.setattr(torch.optim.AdamW.step, "__wrapped__", fails)
    with pytest.raises(RuntimeError, match="half way"):
        optimizer.step()
    assert next(calls) == 1 and set(optimizer.state) == set(params)
    assert optimizer.param_groups[0]["params"] == params
    assert all(same_bits(optimizer.state[params[0]][key], value) for key, value in before.items())
