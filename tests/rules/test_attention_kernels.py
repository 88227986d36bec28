"""Attention's kernels on GPUs: no CPU runs them, so their rules are held against the CPU kernel's,
whose own are checked on numbers, argument by argument, by the names in their schemas."""

from __future__ import annotations

import math
import operator
from typing import Any

import pytest
import torch

from scaleprop.passes.statistics import predict
from scaleprop.passes.training import Formats, find_products, lower_products
from scaleprop.rules import contraction_behind, contraction_of, rule_for
from scaleprop.rules.base import answers_moments
from scaleprop.rules.moments import Moments

aten: Any = torch.ops.aten
KERNELS = ("flash_attention", "efficient_attention", "cudnn_attention")
MASKED = KERNELS[1:]
CPU = "flash_attention_for_cpu"
HIGH = "attention runs in high precision"
SIZES = (2, 3, 24, 8)  # [batch, heads, rows, width]
MOMENTS = {
    "query": Moments(0.1, 1.2), "key": Moments(0.4, 1.1), "value": Moments(0.5, 0.9),
    "grad_out": Moments(0.05, 0.3), "attn_mask": Moments(0.2, 1.5)}
# kernels call the same thing by other names
SAME = {"attn_bias": "attn_mask", "grad_out_": "grad_out", "log_sumexp": "logsumexp",
        "rng_state": "philox_seed", "unused": "philox_offset"}


def forward(kernel: str) -> Any:
    return getattr(aten, f"_scaled_dot_product_{kernel}").default


def backward(kernel: str) -> Any:
    return getattr(aten, f"_scaled_dot_product_{kernel}_backward").default


def names(op: Any) -> list[str]:
    """Of its arguments, as the CPU kernel calls them."""
    return [SAME.get(argument.name, argument.name) for argument in op._schema.arguments]


def call(graph: torch.fx.Graph, op: Any, given: dict[str, Any]) -> torch.fx.Node:
    """A node that calls ``op`` with what ``given`` has by name, and defaults; run on "meta", where
    the dispatcher checks that each argument is of the schema's type."""
    args, kwargs = [], {}
    for argument, name in zip(op._schema.arguments, names(op), strict=True):
        if argument.kwarg_only:
            kwargs[argument.name] = given.get(name)
        else:
            args.append(given.get(name, argument.default_value))
    node = graph.call_function(op, tuple(args), kwargs)
    run = torch.fx.node.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
    node.meta["val"] = op(*run[0], **run[1])
    return node


def place(graph: torch.fx.Graph, name: str, *size: int) -> torch.fx.Node:
    node = graph.placeholder(name)
    node.meta["val"] = torch.empty(size, device="meta")
    return node


def part(graph: torch.fx.Graph, node: torch.fx.Node, index: int) -> torch.fx.Node:
    picked = graph.call_function(operator.getitem, (node, index))
    picked.meta["val"] = node.meta["val"][index]
    return picked


def arguments(graph: torch.fx.Graph, mask: bool, causal: bool) -> dict[str, Any]:
    """Everything that any kernel is called with."""
    given: dict[str, Any] = {name: place(graph, name, *SIZES)
                             for name in ("query", "key", "value", "grad_out", "out")}
    given["attn_mask"] = place(graph, "mask", *SIZES[:3], SIZES[2]) if mask else None
    given["logsumexp"] = place(graph, "sums", *SIZES[:3])
    return given | {
        "dropout_p": 0.0, "is_causal": causal, "compute_log_sumexp": True, "cum_seq_q": None,
        "cum_seq_k": None, "max_q": SIZES[2], "max_k": SIZES[2], "grad_input_mask": [True] * 4,
        "philox_seed": place(graph, "seed"), "philox_offset": place(graph, "offset"), "scale": None}


def predicted(op: Any, count: int, mask: bool, causal: bool) -> list[Moments | None]:
    """What its moments rule says of the first ``count`` results."""
    graph = torch.fx.Graph()
    given = arguments(graph, mask, causal)
    node = call(graph, op, given)
    parts = [part(graph, node, index) for index in range(count)]
    known = {given[name]: moments for name, moments in MOMENTS.items() if given[name] is not None}
    found = predict(graph, known)
    return [found.moments.get(part) for part in parts]


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_contracted_is_what_the_cpu_kernel_contracts(kernel: str):
    op, rule, cpu = forward(kernel), rule_for(forward(kernel)), rule_for(forward(CPU))
    assert (rule.contraction, rule.family, rule.high) == (cpu.contraction, cpu.family, HIGH)
    places = [operand.argument for operand in rule.contraction.operands]
    assert [names(op)[place] for place in places] == ["query", "key", "value"]
    assert rule.axes is cpu.axes


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_gradients_are_made_of_is_what_the_cpu_kernel_makes_them_of(kernel: str):
    op, rule, cpu = backward(kernel), rule_for(backward(kernel)), rule_for(backward(CPU))
    assert rule.gradient_of == cpu.gradient_of and rule.gradient_of.kind == "attention"
    assert rule.contraction is None  # three products, no one of which is the operator's
    places = [operand.argument for operand in rule.gradient_of.operands]
    assert [names(op)[place] for place in places] == ["grad_out", "query", "key", "value"]
    assert rule.gradient_of.operands[0].role == "gradient"


@pytest.mark.parametrize("of", [forward, backward])
@pytest.mark.parametrize("kernel", KERNELS)
def test_scales_of_every_result_are_those_of_the_cpu_kernel(of: Any, kernel: str):
    def powers(op: Any, output: int) -> dict[str, int]:
        """Argument's name → its power; what is not named must be unscaled."""
        law = rule_for(op).homogeneity
        assert not law.follows and law.exact
        return {names(op)[place]: degree for place, degree in law.of_output(output).items()}

    shared = len(of(CPU)._schema.returns)
    results = len(of(kernel)._schema.returns)
    assert results >= shared
    assert [powers(of(kernel), index) for index in range(shared)] == [
        powers(of(CPU), index) for index in range(shared)]
    # seeds and places have no scale; the gradient of what is added to scores is linear in dO
    rest = {"value": 0} if of is forward else {"grad_out": 1}
    assert all(powers(of(kernel), index) == rest for index in range(shared, results))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("kernel", "mask"), [
    *((kernel, False) for kernel in KERNELS), *((kernel, True) for kernel in MASKED)])
def test_moments_are_those_of_the_cpu_kernel(kernel: str, mask: bool, causal: bool):
    for of, count in ((forward, 2), (backward, 3)):
        want = predicted(of(CPU), count, mask, causal)
        assert None not in want
        assert predicted(of(kernel), count, mask, causal) == want


def test_a_mask_changes_moments():
    assert predicted(backward(MASKED[0]), 3, True, False) != predicted(
        backward(MASKED[0]), 3, False, False)


@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_is_said_of_seeds_and_places(kernel: str):
    results = len(forward(kernel)._schema.returns)
    assert set(predicted(forward(kernel), results, False, False)[2:]) == {None}
    assert answers_moments(forward(kernel)) and answers_moments(backward(kernel))


def test_gradients_of_a_bias_are_as_large_as_predicted():
    """Against autograd of softmax(q·kᵀ/√d + bias)·v, written out."""
    draw = torch.Generator().manual_seed(0)

    def normal(*size: int, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
        return torch.randn(*size, generator=draw, dtype=torch.float64) * std + mean

    sizes = 4, 4, 64, 16
    inputs = [normal(*sizes), normal(*sizes, mean=0.5), normal(*sizes, mean=0.5),
              normal(*sizes[:3], 64, std=0.7)]
    q, k, v, bias = (x.requires_grad_() for x in inputs)
    out = (q @ k.mT / math.sqrt(sizes[-1]) + bias).softmax(-1) @ v
    dy = normal(*sizes, mean=0.1)
    made = torch.autograd.grad(out, [q, k, v, bias], dy)
    graph = torch.fx.Graph()
    given = arguments(graph, True, False)
    known = {}
    for name, value in (("query", q), ("key", k), ("value", v), ("attn_mask", bias),
                        ("grad_out", dy)):
        given[name].meta["val"] = torch.empty_like(value, device="meta")
        known[given[name]] = Moments.measured(value.detach())
    node = call(graph, backward("efficient_attention"), given)
    parts = [part(graph, node, index) for index in range(4)]
    found = predict(graph, known).moments
    for picked, gradient in zip(parts, made, strict=True):
        assert found[picked].rms == pytest.approx(float(gradient.square().mean().sqrt()), rel=0.1)
    assert found[parts[3]].mean == 0 and abs(float(made[3].mean())) < 1e-12  # rows sum to 0


def step(kernel: str) -> tuple[torch.fx.GraphModule, list[torch.fx.Node]]:
    """A joint graph of x·W as queries, keys and values, and its gradients; the parameter."""
    graph = torch.fx.Graph()
    batch, heads, rows, width = SIZES
    weight, x = place(graph, "w", 8, heads * width), place(graph, "x", batch * rows, 8)
    tangent = place(graph, "tangents_1", *SIZES)

    def op(target: Any, *args: Any) -> torch.fx.Node:
        node = graph.call_function(target, args)
        run = torch.fx.node.map_arg(args, lambda source: source.meta["val"])
        node.meta["val"] = target(*run)
        return node

    y = op(aten.mm.default, x, weight)
    split = op(aten.permute.default, op(aten.view.default, y, [batch, rows, heads, width]),
               [0, 2, 1, 3])
    given = {"query": split, "key": split, "value": split, "dropout_p": 0.0, "is_causal": True,
             "compute_log_sumexp": True, "attn_mask": None}
    attended = call(graph, forward(kernel), given)
    results = [part(graph, attended, index) for index in range(len(attended.meta["val"]))]
    saved = dict(zip((SAME.get(r.name, r.name) for r in forward(kernel)._schema.returns), results,
                     strict=True))
    gradients = call(graph, backward(kernel), given | saved | {
        "grad_out": tangent, "out": results[0], "grad_input_mask": [True] * 4})
    dq = part(graph, gradients, 0)
    dy = op(aten.reshape.default, op(aten.permute.default, dq, [0, 2, 1, 3]),
            [batch * rows, heads * width])
    dw = op(aten.mm.default, op(aten.permute.default, x, [1, 0]), dy)
    graph.output((results[0], dw))
    return torch.fx.GraphModule(torch.nn.Module(), graph), [weight]


@pytest.mark.parametrize("kernel", [*KERNELS, CPU])
def test_kernels_are_among_the_products_that_stay_high(kernel: str):
    joint, parameters = step(kernel)
    both = [node for node in joint.graph.nodes if node.target in (forward(kernel),
                                                                  backward(kernel))]
    assert find_products(joint.graph, parameters).high == dict.fromkeys(both, HIGH)
    assert contraction_of(both[0]) is contraction_behind(both[0])
    assert contraction_of(both[1]) is None
    lowered = lower_products(joint, parameters, Formats(head=True), None)
    assert lowered.high == {node.name: HIGH for node in both}
    assert sorted(lowered.products.values()) == ["fprop", "wgrad"]
    assert not lowered.unruled
