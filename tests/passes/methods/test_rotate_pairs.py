"""Pairwise rotations: pairs, matrices and operators against single turns; what they are for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import scaleprop
from scaleprop.errors import ConfigError
from scaleprop.passes.methods.rotate_pairs import RotatePairs, tournament
from scaleprop.passes.pipeline import parse_pass
from scaleprop.passes.transforms.base import TransformPass, Work
from scaleprop.passes.transforms.transform import GivensRounds, givens_rotation

from .small import calibrated, change_in_float64, error, gated, images, pictures, tokens


@pytest.mark.parametrize(("size", "block", "rounds"), [(12, 6, 3), (12, 12, 20), (15, 5, 4),
                                                      (6, 3, 9), (2, 2, 5), (3, 1, 2)])
def test_pairs_are_disjoint_within_blocks_and_never_repeat(
    size: int, block: int, rounds: int
) -> None:
    pairs = tournament(size, block, rounds, torch.Generator().manual_seed(0)).tolist()
    assert len(pairs) == min(rounds, block - 1 + block % 2)
    seen = set()
    for turn in pairs:
        places = [place for pair in turn for place in pair]
        assert len(set(places)) == len(places) == size - size // block * (block % 2)
        for a, b in turn:
            assert a // block == b // block
            assert frozenset((a, b)) not in seen
            seen.add(frozenset((a, b)))


def turns(size: int, block: int, rounds: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    pairs = tournament(size, block, rounds, generator)
    return pairs, torch.randn(pairs.shape[:2], generator=generator, dtype=torch.float64)


def turned(v: list[float], pairs: torch.Tensor, angles: torch.Tensor) -> list[float]:
    """Pair by pair."""
    v = list(v)
    for round_pairs, round_angles in zip(pairs.tolist(), angles.tolist(), strict=True):
        for (a, b), t in zip(round_pairs, round_angles, strict=True):
            v[a], v[b] = (v[a] * math.cos(t) - v[b] * math.sin(t),
                          v[a] * math.sin(t) + v[b] * math.cos(t))
    return v


def test_matrices_and_rounds_are_single_turns() -> None:
    pairs, angles = turns(12, 6, 4)
    v = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = torch.tensor(turned(v.tolist(), pairs, angles), dtype=torch.float64)
    rounds = GivensRounds.of(12, pairs, angles)
    rotation = givens_rotation(12, pairs, angles, 6)
    assert rotation.matrix.shape == (2, 6, 6)
    torch.testing.assert_close(rounds(v), want)
    torch.testing.assert_close(rounds.inverse()(want), v)
    torch.testing.assert_close((v.view(2, 1, 6) @ rotation.matrix).flatten(), want)
    torch.testing.assert_close(givens_rotation(12, pairs, angles).matrix,
                               torch.block_diag(*rotation.matrix))
    with pytest.raises(ConfigError, match="one block"):
        givens_rotation(12, torch.tensor([[[0, 7]]]), torch.zeros(1, 1), 6)
    with pytest.raises(ConfigError, match="disjoint"):
        GivensRounds.of(4, torch.tensor([[[0, 1], [1, 2]]]), torch.zeros(1, 2))


class Fixed(TransformPass):
    """Turns given pairs of what a linear reads."""

    name = "fixed-pairs"
    size, block, count = 64, 64, 1

    def transform(self, work: Work) -> None:
        (site,) = work.sites()
        region = work.region(site, "rotate", block=self.block)
        assert region is not None
        work.apply(region, givens_rotation(self.size, *turns(self.size, self.block, self.count),
                                           self.block), "test")


@pytest.mark.parametrize(("size", "block", "rounds", "operator"), [
    (64, 64, 1, "index_select"), (64, 64, 8, "matmul"), (64, 16, 4, "bmm")])
@pytest.mark.parametrize("backend", ["reference", "onnxruntime"])
def test_run_time_forms(
    size: int, block: int, rounds: int, operator: str, backend: str
) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(size, 5).eval(), torch.randn(2, 3, size)
    method = Fixed()
    for name, value in (("size", size), ("block", block), ("count", rounds)):
        object.__setattr__(method, name, value)
    dims = ({1: torch.export.Dim("tokens", min=2, max=9)},)
    found = scaleprop.compile(model, (x,), recipe="int8-weight", passes=[method],  # type: ignore[list-item]
                              dynamic_shapes=dims, backend=backend, verify=backend == "reference")
    assert operator in found.program.module.code
    plain = scaleprop.compile(model, (x,), recipe="int8-weight", dynamic_shapes=dims,
                              backend=backend)
    longer = torch.randn(2, 7, size)
    torch.testing.assert_close(found(longer), plain(longer), rtol=0, atol=0.02)


def test_the_function_stays() -> None:
    for model, inputs in ((gated(False), tokens()), (images(), pictures())):
        method = RotatePairs(steps=8, group=16)
        program = calibrated(model, inputs, "int4-int4", method)
        assert change_in_float64(program, method) < 1e-10


def test_it_learns_what_lowers_the_error() -> None:
    model, inputs = gated(False), tokens()
    plain = error(model, inputs, "int4-int4")
    assert error(model, inputs, "int4-int4", "rotate-pairs{steps=60}") < plain / 4


def test_weights_alone() -> None:
    """What the paper is about: 4-bit weights, activations in high precision."""
    torch.manual_seed(0)
    model, rows = nn.Linear(64, 32).eval(), [torch.randn(128, 64) for _ in range(4)]
    with torch.no_grad():
        model.weight[:, [3, 40]] *= 12
    plain = error(model, rows, "int4")
    scaled, turned_only = (error(model, rows, "int4", f"rotate-pairs{{{text}}}")
                           for text in ("", "scales=false"))
    assert scaled < 0.7 * plain
    assert turned_only < 0.9 * plain


def test_nothing_is_done_where_nothing_helps() -> None:
    torch.manual_seed(0)
    rows = [torch.randint(0, 2, (64, 16)) * 2.0 - 1]
    model = nn.Linear(16, 8).eval()
    with torch.no_grad():
        model.weight.copy_(torch.randint(0, 2, (8, 16)) * 2.0 - 1)
    method = RotatePairs(steps=10)
    result = method.run(calibrated(model, rows, "int4-int4", method))
    assert not result.modified
    (record,) = result.program.transforms
    assert "lowers" in (record.refused or "")


@pytest.mark.parametrize("bad", ["rounds=0", "group=0", "steps=0", "rows=0", "rate=0.0"])
def test_bad_options(bad: str) -> None:
    with pytest.raises(ConfigError, match=bad.partition("=")[0]):
        parse_pass(f"rotate-pairs{{{bad}}}")
