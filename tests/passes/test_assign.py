"""Who gets a format, who does not, and why."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scaleprop.errors import ConfigError, PreconditionError
from scaleprop.passes.assign import AssignFormats, assignment_of
from scaleprop.passes.canonicalise import Canonicalise
from scaleprop.passes.capture import capture
from scaleprop.passes.cleanup import CleanUp
from scaleprop.passes.quantize_activations import QuantizeActivations
from scaleprop.passes.quantize_weights import QuantizeWeights
from scaleprop.recipes import Role, named_recipe


def assigned(model, *args, recipe="int8-dynamic", **options):
    program = capture(model, args)
    step = AssignFormats(recipe=named_recipe(recipe), **options)
    for each in (CleanUp(), Canonicalise(), step):
        program = each.run(program).program
    return program


def kinds(program) -> list[str]:
    found = [assignment_of(node) for node in program.module.graph.nodes]
    return [a.contraction.kind for a in found if a is not None]


def reasons(program) -> dict[str, str]:
    return {f"{r.op}:{r.operand}": r.reason for r in program.records}


def test_operators_are_found_by_contraction(tied, convnet, ids):
    assert kinds(assigned(tied, ids)) == ["embedding", "linear", "linear", "linear"]
    image = torch.randn(2, 3, 12, 12)
    assert kinds(assigned(convnet, image)) == ["conv", "conv", "linear"]


def test_what_stays_high_says_why(tied, convnet, ids):
    why = reasons(assigned(tied, ids))
    assert why["aten.layer_norm.default:embedding"] == "norms run in high precision"
    attention = [r for key, r in why.items() if "scaled_dot_product" in key]
    assert attention == ["attention runs in high precision"] * 3
    why = reasons(assigned(convnet, torch.randn(2, 3, 12, 12)))
    assert "a transposed convolution runs in high precision" in why.values()


def test_missing_role_is_the_reason(mlp):
    why = reasons(assigned(mlp, torch.randn(2, 64), recipe="int4"))
    assert why["aten.linear.default:x"] == "recipe 'int4' has no role 'fprop.x'"


def test_operator_without_rule_is_reported():
    class Odd(nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)

    why = reasons(assigned(Odd(), torch.randn(2, 3)))
    op = "aten.special_bessel_j0.default"
    assert why == {f"{op}:x": f"no rule for {op}: it runs as it was"}


EXCLUDED = {
    "gate": ["up", "down"],
    "gate.weight": ["up", "down"],
    "*p": ["gate", "down"],
    "aten.linear": [],
    "aten.linear.default": [],
    "linear_2": ["gate", "up"],
}


@pytest.mark.parametrize("pattern", EXCLUDED)
def test_exclude_by_module_parameter_node_and_operator(mlp, pattern):
    program = assigned(mlp, torch.randn(2, 64), exclude=(pattern,))
    left = [n.meta["nn_module_stack"] for n in program.module.graph.nodes if assignment_of(n)]
    assert [[path for path, _ in stack.values()][-1] for stack in left] == EXCLUDED[pattern]
    assert f"excluded by {pattern!r}" in reasons(program).values()


def test_include_is_the_only_thing_quantized(tied, ids):
    program = assigned(tied, ids, include=("qkv", "aten.embedding"))
    assert kinds(program) == ["embedding", "linear"]
    assert sum("not among include" in (r.reason or "") for r in program.records) == 4


def test_exclude_wins_over_include(mlp):
    program = assigned(mlp, torch.randn(2, 64), include=("*",), exclude=("up",))
    assert len(kinds(program)) == 2


@pytest.mark.parametrize("option", ["exclude", "include"])
def test_pattern_that_matches_nothing_lists_near_names(mlp, option):
    with pytest.raises(ConfigError, match=rf"{option}='dwon' matches no .*near: .*'down'"):
        assigned(mlp, torch.randn(2, 64), **{option: ("dwon",)})


class Computed(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 8))

    def forward(self, x):
        return nn.functional.linear(x, self.w.tanh())


def test_computed_weights_stay_high():
    why = reasons(assigned(Computed(), torch.randn(2, 3, 8)))
    assert "its weight is computed in the graph, not a parameter" in why.values()


UNFIT = {
    "fprop.x": (Role(format="int8[channel]*f32"), "has a scale per summed index"),
    "conv.x": (Role(format="mxfp8"), "is not per tensor; a convolution's input needs one scale"),
    "embedding": (Role(format="int8"), "has no scale per row of the table"),
}


@pytest.mark.parametrize("key", UNFIT)
def test_formats_that_do_not_fit_an_operand(tied, convnet, ids, key):
    role, message = UNFIT[key]
    recipe = named_recipe("int8-dynamic")
    recipe = recipe.replace(roles={**recipe.roles, key: role})
    model, x = (convnet, torch.randn(2, 3, 12, 12)) if key == "conv.x" else (tied, ids)
    found = reasons(assigned(model, x, recipe=recipe)).values()
    assert any(message in reason for reason in found)


def test_static_needs_a_scale_per_tensor(mlp):
    recipe = named_recipe("mxfp8")
    role = Role(format="mxfp8", scaling="static")
    recipe = recipe.replace(roles={**recipe.roles, "fprop.x": role})
    found = reasons(assigned(mlp, torch.randn(2, 64), recipe=recipe)).values()
    assert any("cannot be static" in reason for reason in found)


def test_order_of_passes_is_checked(mlp):
    program = capture(mlp, (torch.randn(2, 64),))
    with pytest.raises(PreconditionError, match="run assign-formats first"):
        QuantizeWeights().requires(program)
    with pytest.raises(PreconditionError, match="run quantize-weights first"):
        QuantizeActivations().requires(assigned(mlp, torch.randn(2, 64)))


PRODUCTS = {
    "alpha": (lambda s, x: torch.addmm(s.b, x, s.w, alpha=2), "aten.addmm.default:x"),
    "beta": (lambda s, x: torch.addmm(s.b, x, s.w, beta=0.5), "aten.addmm.default:w"),
    "batch of weights": (lambda s, x: x @ s.w[None].expand(2, -1, -1), "aten.matmul.default:x"),
    "activations": (lambda s, x: x @ x.t(), "aten.matmul.default:x"),
}


@pytest.mark.parametrize("key", PRODUCTS)
def test_products_that_are_no_linear_operator_say_so(key):
    forward, operand = PRODUCTS[key]
    model = type("Model", (torch.nn.Module,), {"forward": forward})()
    model.b, model.w = (torch.nn.Parameter(torch.randn(size)) for size in ((5,), (8, 5)))
    reason = reasons(assigned(model, torch.randn(3, 8)))[operand]
    assert "it is no linear operator (rows times a parameter" in reason
    assert "both factors are activations" not in reason
