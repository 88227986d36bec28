"""The engine: regions are complete, and everything in them is needed."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from torch.utils import _pytree as pytree

from scaleprop.errors import ConfigError, PassError
from scaleprop.passes.base import PassManager, relative_error, run_as_is, widened
from scaleprop.passes.canonicalise import Canonicalise
from scaleprop.passes.capture import capture
from scaleprop.passes.cleanup import CleanUp
from scaleprop.passes.rewrite import Rewriter
from scaleprop.passes.transforms.apply import apply
from scaleprop.passes.transforms.region import find_region
from scaleprop.passes.transforms.transform import (
    Centre,
    Permute,
    Rotate,
    Scale,
    Shift,
    givens_rotation,
    hadamard_rotation,
    random_rotation,
)
from scaleprop.rules import contraction_of
from tests.passes.transforms.toys import TOYS, WIDTH, shuffled

KINDS = ("scale", "sign", "shift", "permute", "rotate")


@functools.cache
def program(name: str):
    make, inputs = TOYS[name]
    captured = capture(shuffled(make()), inputs, {}, None)
    return widened(PassManager([CleanUp(), Canonicalise()]).run(captured))


def outputs(of):
    return [leaf for leaf in pytree.tree_leaves(run_as_is(of)) if isinstance(leaf, torch.Tensor)]


def error(changed, name):
    changed.module.graph.lint()
    changed.module.recompile()
    return max(relative_error(got, want)
               for got, want in zip(outputs(changed), outputs(program(name)), strict=True))


def sites(graph):
    """(value, axis) of everything that a linear or a convolution reads."""
    found = {}
    for node in graph.nodes:
        contraction = contraction_of(node)
        if contraction is not None and contraction.kind in ("linear", "conv"):
            found.setdefault(node.args[0], -1 if contraction.kind == "linear" else 1)
    return list(found.items())


def transform(region, generator, shared=False):
    """A random one of the region's kind."""
    blocks = region.size // region.block
    if region.kind in ("scale", "sign"):
        factors = torch.randn(region.size, generator=generator, dtype=torch.float64).exp()
        return Scale(region.shared(factors))
    if region.kind == "shift":
        shift = torch.randn(region.size, generator=generator, dtype=torch.float64)
        shift[torch.from_numpy(region.channels.pinned)] = 0.0
        return Shift(shift[torch.from_numpy(region.channels.representative[0])])
    if region.kind == "permute":
        return Permute(torch.stack([torch.randperm(region.block, generator=generator)
                                    for _ in range(blocks)]))
    if shared:
        return hadamard_rotation(region.block, generator)
    return Rotate(torch.stack([random_rotation(region.block, generator).matrix
                               for _ in range(blocks)]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TOYS)
def test_any_transform_anywhere_keeps_the_function(name, kind):
    generator = torch.Generator().manual_seed(7)
    for place in range(len(sites(program(name).module.graph))):
        rewriter = Rewriter(program(name), "test")
        value, axis = sites(rewriter.graph)[place]
        alone = (place + len(kind)) % 3 == 0
        readers = [user for user in value.users if contraction_of(user) is not None]
        size = value.meta["val"].shape[axis]
        block = size // 2 if kind in ("permute", "rotate") and place % 2 else None
        region = find_region(value, kind, axes=(axis,), block=block,
                             only_users=readers if alone else None)  # fmt: skip
        apply(rewriter, region, transform(region, generator, shared=alone), "test")
        assert error(rewriter.finish(), name) < 1e-12, (value, [str(c) for c in region.cuts])


def region_of(name, kind, target, **options):
    """The region of what the first operator with a parameter called ``target`` reads."""
    rewriter = Rewriter(program(name), "test")
    reader = next(node for node in rewriter.graph.nodes if contraction_of(node) is not None
                  and any(str(part.target) == target for part in node.all_input_nodes))
    axis = contraction_of(reader).operand("activation").axes[0]
    return rewriter, find_region(reader.args[0], kind, axes=(axis,), **options)


def absorbed(region):
    return {str(item.operand.target) for item in region.absorbed if item.operand is not None}


CASES = {
    # what a scale of the values reaches: one of two fused halves, and heads that are shared
    ("quirk", "scale", "mix.weight"): ({"mix.weight", "both.weight", "both.bias"}, 8),
    ("quirk", "scale", "dn.weight"): ({"dn.weight", "gu.weight"}, 32),
    ("quirk", "scale", "ask.weight"): ({"n1.gain", "ask.weight", "both.weight"}, 16),
    ("before", "scale", "down.weight"): ({"up.weight", "up.bias", "down.weight"}, 40),
    ("before", "shift", "up.weight"): ({"ln2.bias"}, 16),
    ("before", "centre", None): ({"tok.weight", "pos", "o.weight", "o.bias", "down.weight",
                                  "down.bias"}, 16),
    ("picture", "scale", "c1.weight"): ({"n0.weight", "n0.bias", "c1.weight", "short.weight"}, 8),
    ("picture", "scale", "deep.weight"): ({"n1.weight", "n1.bias", "deep.weight"}, 8),
    ("crossing", "scale", "k.weight"): ({"en.gain", "k.weight", "v.weight"}, 16),
}


@pytest.mark.parametrize("case", CASES)
def test_what_absorbs_a_transform(case):
    name, kind, target = case
    if target is None:
        rewriter = Rewriter(program(name), "test")
        norm = next(node for node in rewriter.graph.nodes if "layer_norm" in str(node.target))
        region = find_region(norm.args[0], kind)
    else:
        _, region = region_of(name, kind, target)
    expected, classes = CASES[case]
    assert region.is_free and absorbed(region) == expected
    assert len(set(region.channels.representative[0].tolist())) == classes


@pytest.mark.parametrize(("name", "kind", "target"), [
    ("quirk", "scale", "mix.weight"), ("quirk", "scale", "dn.weight"),
    ("quirk", "scale", "ask.weight"), ("before", "scale", "down.weight"),
    ("before", "shift", "up.weight"), ("picture", "scale", "c1.weight"),
    ("picture", "scale", "deep.weight"), ("crossing", "permute", "k.weight"),
])  # fmt: skip
def test_nothing_that_absorbs_can_be_left_out(name, kind, target):
    whole = region_of(name, kind, target)[1]
    parts = len(whole.absorbed) + len(whole.counters)
    assert parts > 1
    for missing in range(parts):
        rewriter, region = region_of(name, kind, target)
        kept = tuple(item for place, item in enumerate(region.absorbed) if place != missing)
        counters = tuple(item for place, item in enumerate(region.counters)
                         if place + len(region.absorbed) != missing)
        generator = torch.Generator().manual_seed(1)
        broken = dataclasses.replace(region, absorbed=kept, counters=counters)
        apply(rewriter, broken, transform(region, generator), "test")
        assert error(rewriter.finish(), name) > 1e-6, missing


def streams(rewriter):
    return [node.args[0] for node in rewriter.graph.nodes if "norm" in str(node.target)]


def test_a_stream_rotates_with_everything_that_writes_and_reads_it():
    rewriter = Rewriter(program("untied"), "test")
    for node in list(rewriter.graph.nodes):  # gains would stop it; another test folds them
        if "rms_norm" in str(node.target):
            node.args = (*node.args[:2], None, node.args[3])
    plain = rewriter.program.fork()
    plain.module.recompile()
    region = find_region(streams(rewriter)[0], "rotate")
    assert region.is_free and absorbed(region) == {
        "zebra.weight", "ask.weight", "both.weight", "mix.weight", "mix.bias", "gu.weight",
        "dn.weight", "out.weight"}  # fmt: skip
    for missing in (None, *range(len(region.absorbed))):
        other = Rewriter(plain, "test")
        region = find_region(streams(other)[0], "rotate")
        kept = tuple(item for place, item in enumerate(region.absorbed) if place != missing)
        apply(other, dataclasses.replace(region, absorbed=kept),
              random_rotation(WIDTH, torch.Generator().manual_seed(0)), "test")
        changed = other.finish()
        changed.module.recompile()
        found = relative_error(outputs(changed)[0], outputs(plain)[0])
        assert found < 1e-12 if missing is None else found > 1e-6


def test_a_tied_table_is_stored_twice_where_its_uses_differ():
    rewriter = Rewriter(program("quirk"), "test")
    head = next(node for node in rewriter.graph.nodes if "linear" in str(node.target)
                and str(node.args[1].target) == "out.weight")
    region = find_region(head.args[0], "scale")
    apply(rewriter, region, transform(region, torch.Generator().manual_seed(0)), "test")
    changed = rewriter.finish()
    tables = {str(node.target) for node in changed.module.graph.nodes
              if node.op == "get_attr" and "out.weight" in str(node.target)}
    assert len(tables) == 2 and error(changed, "quirk") < 1e-12


def test_a_gain_stops_a_rotation_and_says_so():
    rewriter = Rewriter(program("quirk"), "test")
    region = find_region(streams(rewriter)[0], "rotate")
    assert region.cuts and "gain" in str(region.cuts[0]) and "rms_norm" in str(region.cuts[0])
    assert region.runtime == len({cut.value for cut in region.cuts})


def test_attention_keeps_heads_apart():
    _, whole = region_of("quirk", "rotate", "mix.weight")
    assert not whole.is_free and any("for itself" in cut.reason or "only some" in cut.reason
                                     for cut in whole.cuts)
    _, heads = region_of("quirk", "rotate", "mix.weight", block=WIDTH // 4)
    assert heads.is_free and absorbed(heads) == {"mix.weight", "both.weight", "both.bias"}


@pytest.mark.parametrize("make", [
    lambda g: Scale(torch.randn(12, generator=g, dtype=torch.float64)),
    lambda g: Permute(torch.randperm(12, generator=g)),
    lambda g: random_rotation(12, g),
    lambda g: hadamard_rotation(24, g),
    lambda g: hadamard_rotation(20),
    lambda g: givens_rotation(6, torch.tensor([[[0, 3], [1, 2]], [[0, 1], [4, 5]]]),
                              torch.randn(2, 2, generator=g)),
    lambda g: random_rotation(8, g).then(hadamard_rotation(8, g)),
])  # fmt: skip
def test_inverses_are_exact(make):
    made = make(torch.Generator().manual_seed(0))
    back = made.inverse()
    if isinstance(made, Scale):
        assert torch.allclose(made.values * back.values, torch.ones(12, dtype=torch.float64))
    elif isinstance(made, Permute):
        assert torch.equal(made.order[back.order], torch.arange(12))
    else:
        identity = torch.eye(made.block, dtype=torch.float64)
        assert torch.allclose(made.matrix @ back.matrix, identity, atol=1e-12)


def test_what_is_no_transform_is_refused():
    with pytest.raises(ConfigError, match="not 0"):
        Scale(torch.tensor([1.0, 0.0]))
    with pytest.raises(ConfigError, match="orthogonal"):
        Rotate(torch.ones(2, 2))
    with pytest.raises(ConfigError, match="each once"):
        Permute(torch.tensor([0, 0]))
    with pytest.raises(ConfigError, match="disjoint"):
        givens_rotation(4, torch.tensor([[[0, 1], [1, 2]]]), torch.zeros(1, 2))
    with pytest.raises(ConfigError, match="finite"):
        Shift(torch.tensor([torch.nan]))


def test_a_transform_must_fit_its_region():
    rewriter, region = region_of("before", "scale", "down.weight")
    with pytest.raises(PassError, match="kind"):
        apply(rewriter, region, Shift(torch.zeros(40)), "test")
    with pytest.raises(PassError, match="40"):
        apply(rewriter, region, Scale(torch.ones(3, dtype=torch.float64)), "test")
    with pytest.raises(PassError, match="signs"):
        apply(rewriter, region, Scale(-torch.ones(40, dtype=torch.float64)), "test")
    _, heads = region_of("quirk", "scale", "mix.weight")
    with pytest.raises(PassError, match="channels that are one"):
        apply(rewriter, heads, Scale(torch.arange(1.0, 17.0).double()), "test")
    with pytest.raises(PassError, match="block"):
        _, rotated = region_of("before", "rotate", "down.weight")
        apply(rewriter, rotated, random_rotation(8, torch.Generator()), "test")


def test_centred_norms_become_rms_norms():
    rewriter = Rewriter(program("before"), "test")
    region = find_region(streams(rewriter)[0], "centre")
    apply(rewriter, region, Centre(WIDTH), "test")
    changed = rewriter.finish()
    names = [str(node.target) for node in changed.module.graph.nodes]
    assert "aten.layer_norm.default" not in names and names.count("aten.rms_norm.default") == 3
    assert error(changed, "before") < 1e-12
