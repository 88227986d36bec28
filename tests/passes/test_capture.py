"""Capture keeps function, signature, names, ties and modes, or says by name what it cannot."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.export import Dim, export

from scaleprop.errors import CaptureError, source_line
from scaleprop.passes.capture import capture


def ops(program) -> set[str]:
    return {str(n.target) for n in program.module.graph.nodes if n.op == "call_function"}


def test_keeps_function_structure_and_composites(tied, ids):
    program = capture(tied, (ids,))
    other = ids.repeat(3, 2)[:, :9]
    out, want = program.module(other), tied(other)
    assert torch.equal(out["logits"], want["logits"])
    assert out["cache"] is None
    assert torch.equal(out["hidden"][0], want["hidden"][0])
    assert {"aten.linear.default", "aten.layer_norm.default", "aten.embedding.default",
            "aten.scaled_dot_product_attention.default"} <= ops(program)  # fmt: skip


def test_default_dimensions_are_batch_and_sequence(tied, ids):
    assert capture(tied, (ids,)).dynamic_axes == {"ids": {0: "batch", 1: "sequence"}}


def test_size_one_is_not_specialised(tied, ids):
    program = capture(tied, (ids[:1],))
    assert torch.equal(program.module(ids)["logits"], tied(ids)["logits"])
    assert torch.equal(program.module(ids[:1])["logits"], tied(ids[:1])["logits"])
    assert program.notes == ()


def test_equal_sizes_stay_independent(tied):
    program = capture(tied, (torch.zeros(4, 4, dtype=torch.int64),))
    ids = torch.ones(3, 5, dtype=torch.int64)
    assert torch.allclose(program.module(ids)["logits"], tied(ids)["logits"])


def test_images_are_dynamic_in_the_batch_only(convnet):
    program = capture(convnet, (torch.randn(1, 3, 12, 12),))
    assert program.dynamic_axes == {"image": {0: "batch"}}
    x = torch.randn(5, 3, 12, 12)
    assert torch.allclose(program.module(x), convnet(x), atol=1e-6)


def test_keyword_inputs_in_any_order(tied, ids):
    mask = torch.ones_like(ids)
    program = capture(tied, (), {"mask": mask, "ids": ids})
    want = tied(ids, mask)["logits"]
    assert torch.allclose(program.module(ids=ids, mask=mask)["logits"], want, atol=1e-6)


def test_training_mode_and_parameters_are_restored(tied, ids):
    tied.train()
    tied.norm.eval()
    before = {name: p.clone() for name, p in tied.named_parameters()}
    program = capture(tied, (ids,))
    assert tied.training and tied.drop.training and not tied.norm.training
    assert all(torch.equal(p, before[name]) for name, p in tied.named_parameters())
    assert not tied._forward_hooks
    tied.eval()  # captured in eval mode: no dropout
    assert torch.equal(program.module(ids)["logits"], tied(ids)["logits"])


def test_tied_weights_stay_one_tensor(tied, ids):
    program = capture(tied, (ids,))
    tables = [n for n in program.module.graph.nodes
              if n.op == "get_attr" and n.meta["val"].shape == (40, 32) and n.users]  # fmt: skip
    assert len(tables) == 1
    assert program.module.head.weight is tied.embed.weight


def test_nodes_know_their_module_and_the_users_line(tied, ids):
    nodes = {str(n.target): n for n in capture(tied, (ids,)).module.graph.nodes}
    node = nodes["aten.layer_norm.default"]
    assert [path for path, _ in node.meta["nn_module_stack"].values()][-1] == "norm"
    assert "conftest.py" in source_line(node) and "forward" in source_line(node)


def test_named_dims_are_honoured_and_named(tied, ids):
    batch, length = Dim("rows"), Dim("steps", max=64)
    program = capture(tied, (ids,), dynamic_shapes={"ids": {0: batch, 1: length}})
    assert program.dynamic_axes == {"ids": {0: "rows", 1: "steps"}}
    tuple_form = capture(tied, (ids,), dynamic_shapes=((batch, None),))
    assert tuple_form.dynamic_axes == {"ids": {0: "rows"}}


def test_empty_dynamic_shapes_fix_every_size(tied, ids):
    program = capture(tied, (ids,), dynamic_shapes={})
    assert program.dynamic_axes == {}
    assert all(isinstance(s, int) for s in program.placeholders[0].meta["val"].shape)


def test_impossible_dim_is_an_error_with_torchs_message(mlp):
    shapes = {"x": {0: Dim("n"), 1: Dim("width")}}
    with pytest.raises(CaptureError, match=r"(?s)width.*Remedy: fix the named dimensions"):
        capture(mlp, (torch.randn(2, 64),), dynamic_shapes=shapes)


def test_fixed_dimension_is_a_note(mlp):
    program = capture(mlp, (torch.randn(2, 64),))
    assert program.dynamic_axes == {"x": {0: "batch"}}
    assert program.notes == ("input 'x' axis 1 is fixed at 64: the model's code depends on it",)


def test_independent_batches_get_their_own_name():
    class Similarity(nn.Module):
        def forward(self, a, b):
            return a @ b.t()

    program = capture(Similarity(), (torch.randn(2, 8), torch.randn(2, 8)))
    assert program.dynamic_axes["a"][0] == "batch"
    assert program.dynamic_axes["b"][0] == "batch_1"
    assert program.module(torch.ones(5, 8), torch.ones(3, 8)).shape == (5, 3)


@dataclasses.dataclass
class Pair:
    left: torch.Tensor
    right: torch.Tensor | None = None


class Box:
    """A plain object with tensors and settings, like a key-value cache."""

    def __init__(self) -> None:
        self.layers = []
        self.dtype = torch.float32


class Structured(nn.Module):
    def forward(self, pair, scale=2.0):
        box = Box()
        box.layers.append(pair.left * scale)
        return Pair(pair.left + 1, None), box, [pair.left, 3]


def test_dataclasses_and_plain_objects_in_and_out():
    program = capture(Structured(), (Pair(torch.ones(2, 3)),))
    pair, box, (same, three) = program.module(Pair(torch.zeros(4, 3)))
    assert isinstance(pair, Pair) and isinstance(box, Box)
    assert pair.right is None and box.dtype == torch.float32 and three == 3
    assert torch.equal(pair.left, torch.ones(4, 3))
    assert torch.equal(same, torch.zeros(4, 3))
    assert torch.equal(box.layers[0], torch.zeros(4, 3))


def test_views_of_inputs_are_right():
    class View(nn.Module):
        def forward(self, x):
            return x, x.t(), x[:, :2]

    x = torch.randn(3, 4)
    for got, want in zip(capture(View(), (x,)).module(x), View()(x), strict=True):
        assert torch.equal(got, want)


def test_writing_to_a_buffer_is_an_error():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("steps", torch.zeros(1))

        def forward(self, x):
            self.steps.add_(1)
            return x * self.steps

    with pytest.raises(CaptureError, match=r"writes to its buffer 'steps'.*Remedy: clone"):
        capture(Counter(), (torch.ones(2),))


def test_writing_to_an_input_is_an_error():
    class InPlace(nn.Module):
        def forward(self, x):
            return x.mul_(2)

    x = torch.ones(2, 3)
    with pytest.raises(CaptureError, match="writes to its input 'x'"):
        capture(InPlace(), (x,))
    assert torch.equal(x, torch.ones(2, 3))


def test_data_dependent_control_flow_is_an_error_with_a_remedy():
    class Branch(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(CaptureError, match=r"torch\.where or torch\.cond"):
        capture(Branch(), (torch.ones(2, 3),))


def test_inputs_that_do_not_fit_are_told_from_capture_failures(mlp):
    with pytest.raises(CaptureError, match="MLP itself fails on the example inputs"):
        capture(mlp, (torch.ones(2, 3),))


def test_falls_back_to_strict_tracing_with_a_note():
    class Picky(nn.Module):
        def forward(self, x):
            if isinstance(x.shape[0], torch.SymInt):
                raise ValueError("no symbols, please")
            return x * 2

    program = capture(Picky(), (torch.ones(2, 3),))
    assert program.dynamic_axes == {"x": {0: "batch", 1: "sequence"}}
    assert len(program.notes) == 1
    assert "strict=False: no symbols, please" in program.notes[0]


def test_falls_back_to_fixed_sizes_with_notes(mlp, monkeypatch):
    honest = torch.export.export

    def fixed_only(model, args, kwargs, *, dynamic_shapes, strict):
        if any(dynamic_shapes.values()):
            raise ValueError("only fixed sizes")
        return honest(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=strict)

    monkeypatch.setattr(torch.export, "export", fixed_only)
    program = capture(mlp, (torch.ones(2, 64),))
    assert program.dynamic_axes == {}
    assert [note.split(":")[0] for note in program.notes] == [
        "not traced with batch and sequence dynamic, strict=False",
        "not traced with batch and sequence dynamic, strict=True",
        "not traced with batch dynamic, strict=False",
        "not traced with batch dynamic, strict=True",
    ]


def test_takes_an_exported_program(mlp):
    exported = export(mlp, (torch.randn(2, 64),), dynamic_shapes=({0: Dim("n")},))
    program = capture(exported)
    assert program.dynamic_axes == {"x": {0: "batch"}}
    x = torch.randn(5, 64)
    assert torch.allclose(program.module(x), mlp(x))
    assert exported.example_inputs is not None


def test_a_symbol_that_stands_for_one_number_becomes_that_number() -> None:
    model = nn.Sequential(nn.Linear(512, 64), nn.GELU())  # its second axis was tried as dynamic
    program = capture(model, (torch.randn(8, 512),))
    (x,) = program.placeholders
    batch, width = x.meta["val"].shape
    assert isinstance(batch, torch.SymInt)
    assert type(width) is int


def test_an_exported_program_is_captured_with_its_own_structure_and_sizes(mlp):
    exported = export(mlp, (torch.randn(2, 64),), dynamic_shapes=({0: Dim("n")},))
    with pytest.raises(CaptureError, match="another structure"):
        capture(exported, (), {"x": torch.randn(2, 64)})
    with pytest.raises(CaptureError, match="has dynamic_shapes"):
        capture(exported, dynamic_shapes={})
    assert capture(exported, (torch.randn(7, 64),)).example_args[0].shape == (7, 64)
