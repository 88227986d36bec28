"""The reference backend runs the graph as it is written."""

import torch

from scaleprop.backends.reference import ReferenceBackend

from .small_programs import Block, Pictures, program


def test_runs_what_the_module_runs():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 64)
    made = program(Block(), (x,), "int8-dynamic")
    executable = ReferenceBackend().lower(made)
    with torch.no_grad():
        expected = made.module(x)
    (actual,) = executable([x])
    assert torch.equal(actual, expected)
    assert not actual.requires_grad


def test_other_sizes_and_other_outputs():
    torch.manual_seed(0)
    made = program(Pictures(), (torch.arange(6),), "int8-dynamic")
    logits, nothing = ReferenceBackend().lower(made)([torch.tensor([3, 1])])
    assert logits.shape == (2, 5)
    assert nothing is None


def test_later_changes_to_the_program_do_not_reach_it():
    torch.manual_seed(0)
    x = torch.randn(1, 4, 64)
    made = program(Block(), (x,), "int8-dynamic")
    executable = ReferenceBackend().lower(made)
    before = executable([x])[0]
    graph = made.module.graph
    output = graph.output_node()
    output.args = (made.placeholders[0],)
    made.module.recompile()
    assert torch.equal(executable([x])[0], before)


def test_lowerings_name_every_scaled_operator():
    made = program(Block(), (torch.randn(1, 4, 64),), "int8-dynamic")
    lowerings = ReferenceBackend().lower(made).lowerings
    assert sum(text == "float64 products and sum" for text in lowerings.values()) == 6
    assert "exact quantize" in lowerings.values()
