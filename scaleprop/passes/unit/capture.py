"""A model's forward as a graph that trains: attention, norms and dropout whole, gradients flowing.

``torch.export``'s training graph, made ready for rewriting: nothing is written in place but
buffers, regions without gradient are inlined, and checks of dtypes that tracing left are dropped.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx
from torch.utils import _pytree as pytree

from scaleprop._torch_compat import OpOverload, called_functions
from scaleprop.errors import CaptureError
from scaleprop.passes.capture import export_as_dynamic_as_possible, export_exactly, user_frames
from scaleprop.passes.structures import register_structures
from scaleprop.passes.unit.checkpoints import REGION, Options, Recorder, note_regions
from scaleprop.passes.unit.module import UnitScaled, assemble
from scaleprop.passes.unit.structure import is_float
from scaleprop.rules import rule_for

aten: Any = torch.ops.aten

REGIONS = "checkpointed"

_NO_GRAD: Any = torch.ops.higher_order.wrap_with_set_grad_enabled
_METADATA: Any = aten._assert_tensor_metadata.default


def capture_training(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_shapes: Any
) -> tuple[UnitScaled, tuple[str, ...]]:
    """A copy of ``model`` as a graph in training mode, and notes on what tracing fixed.

    What the model runs under activation checkpointing is marked in the graph; ``meta[REGIONS]``
    holds the options of each region, for ``outline_checkpoints``. A model whose code differs
    between training and eval by more than dropout and batch norms is traced in eval mode, with a
    note on what is left out.

    Raises:
        CaptureError: where the model cannot be traced.
    """
    given, kwargs = model, dict(kwargs)
    try:
        model = copy.deepcopy(given)
    except RuntimeError as error:
        raise CaptureError(
            f"{type(given).__name__} cannot be copied: {error}\nRemedy: call unit_scale before the "
            "model is run, or detach what it keeps.") from error
    register_structures((args, kwargs))
    traced, regions, notes = _trace(model, args, kwargs, dynamic_shapes)
    module = _with_all_state(traced, model)
    module.meta[REGIONS] = regions
    module.train(given.training)
    for other, mine in zip(_ordered(given), _ordered(module), strict=True):
        mine.training = other.training
    return module, notes


Traced = tuple[torch.fx.GraphModule, list[Options], tuple[str, ...]]


def _trace(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> Traced:
    """The graph, the options of checkpointed regions, and notes."""
    evaluated, inner, found = _traced(model, args, kwargs, dynamic_shapes, training=False)
    try:
        trained, regions, notes = _traced(model, args, kwargs, dynamic_shapes, training=True)
    except CaptureError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        return evaluated, inner, (*found, "traced in eval mode, without dropout of attention; in "
                                          f"training mode: {reason}")
    more, less = _operators(trained) - _operators(evaluated), \
        _operators(evaluated) - _operators(trained)
    if not more and not less:
        return trained, regions, notes
    names = ", ".join(sorted(str(target) for target in more | less))
    found = (*found, "traced in eval mode, without dropout of attention; code that only runs in "
                     f"training is left out: {names}")
    if (lost := _checkpointed(trained) - _checkpointed(evaluated)) > 0:
        found = (*found, f"{lost} checkpointed regions, which only run in training, keep what "
                         "their backward reads")
    return evaluated, inner, found


def _checkpointed(traced: torch.fx.GraphModule) -> int:
    return len({node.meta[REGION] for node in traced.graph.nodes if REGION in node.meta})


def _operators(traced: torch.fx.GraphModule) -> Counter[Any]:
    """What a graph computes with; views, copies, and counts of batches, apart."""
    return Counter(
        node.target for node in traced.graph.nodes
        if node.op == "call_function" and node.target is not aten.add_.Tensor
        and not ((rule := rule_for(node.target)) is not None and rule.moves))


def _traced(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any,
    training: bool,
) -> Traced:
    recorder = Recorder()
    with recorder.marking():
        exported, notes = _export(model, args, kwargs, dynamic_shapes, training)
    traced = exported.module(check_guards=False)
    for node in traced.graph.nodes:
        if node.meta.get("stack_trace") is not None:
            node.meta["stack_trace"] = user_frames(node.meta["stack_trace"])
    _inline(traced)
    note_regions(traced.graph)
    _drop_checks(traced.graph)
    _write_nothing(traced.graph)
    return traced, recorder.options, notes


def _export(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any,
    training: bool,
) -> Any:
    hook = model.register_forward_hook(_register)
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        with torch.enable_grad(), _kept_buffers(model), _no_backward_of_its_own():
            if dynamic_shapes is None:
                return export_as_dynamic_as_possible(model, args, kwargs)
            return export_exactly(model, args, kwargs, dynamic_shapes), ()
    finally:
        hook.remove()
        for module, mode in modes:
            module.training = mode


@contextmanager
def _no_backward_of_its_own() -> Generator[None]:
    """Raises where a ``torch.autograd.Function`` of the model's was traced: a graph has what it
    computes, and not how it says that gradients pass."""
    found: set[str] = set()
    with called_functions(found):
        yield
    if found:
        raise CaptureError(
            f"{', '.join(sorted(found))}: the backward that a torch.autograd.Function defines is "
            "not in a traced graph. Remedy: say the same with operators, such as "
            "x + (f(x) - x).detach() for a gradient that passes straight through.")


@contextmanager
def _kept_buffers(model: torch.nn.Module) -> Generator[None]:
    """A failed trace may leave fake tensors in buffers."""
    buffers = [(module, name, value) for module in model.modules()
               for name, value in module.named_buffers(recurse=False)]
    try:
        yield
    finally:
        for module, name, value in buffers:
            setattr(module, name, value)


def _register(_module: Any, _inputs: Any, output: Any) -> None:
    register_structures(output)


def _inline(module: torch.fx.GraphModule) -> None:
    """Put the nodes of regions under ``no_grad`` into the graph, what they return detached."""
    for node in module.graph.find_nodes(op="call_function", target=_NO_GRAD):
        _inline_one(module, node)


def _inline_one(module: torch.fx.GraphModule, node: torch.fx.Node) -> None:
    graph = module.graph
    enabled, holder, *operands = node.args
    inner: Any = module.get_submodule(holder.target)  # type: ignore[union-attr,arg-type]
    _inline(inner)
    copies = dict(zip(inner.graph.find_nodes(op="placeholder"), operands, strict=True))
    with graph.inserting_before(node):
        for other in inner.graph.nodes:
            if other.op not in ("placeholder", "output"):
                copies[other] = graph.node_copy(other, lambda n: copies[n])
        returned: Any = torch.fx.map_arg(inner.graph.output_node().args[0], lambda n: copies[n])
        if not enabled:
            returned = pytree.tree_map_only(torch.fx.Node, lambda n: _detached(graph, n), returned)
    for reader in list(node.users):
        reader.replace_all_uses_with(returned[reader.args[1]])  # type: ignore[index]
        graph.erase_node(reader)
    graph.erase_node(node)
    if not holder.users:  # type: ignore[union-attr]
        graph.erase_node(holder)  # type: ignore[arg-type]


def _detached(graph: torch.fx.Graph, node: torch.fx.Node) -> torch.fx.Node:
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return node
    made = graph.call_function(aten.detach.default, (node,))
    made.meta = dict(node.meta)
    return made


def _drop_checks(graph: torch.fx.Graph) -> None:
    """Dtypes may change from here on, under autocast for instance."""
    for node in graph.find_nodes(op="call_function", target=_METADATA):
        graph.erase_node(node)
    for node in graph.find_nodes(op="call_module", target="_guards_fn", sort=False):
        graph.erase_node(node)


def _write_nothing(graph: torch.fx.Graph) -> None:
    """``x.add_(y)`` becomes ``x.add(y)`` where x is a value that nothing reads any more.

    A multiplier between them would go unnoticed by readers of x otherwise.
    """
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, OpOverload):
            continue
        name, overload = node.target.name().split("::")[1], str(node.target).rsplit(".", 1)[1]
        name = name.split(".")[0]
        if not name.endswith("_") or name.endswith("__") or not node.args:
            continue
        written: Any = node.args[0]
        if _is_state(written):
            node.meta["counts"] = True
            continue
        if not is_float(written):  # no multiplier comes between
            continue
        packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
        bases = _bases(written)
        later = any(_is_state(base) or base.op == "placeholder" or _is_read_after(base, node)
                    for base in bases) or _is_read_after(written, node)
        if packet is None or later or overload not in packet.overloads():
            raise CaptureError(
                f"node {node.name!r} ({node.target}) writes into a value that is read again. "
                "Remedy: write x = x + y instead of x += y there; torch.where or torch.cat "
                "instead of x[…] = y.")
        node.target = getattr(packet, overload)


def _is_read_after(value: torch.fx.Node, write: torch.fx.Node) -> bool:
    """Whether ``value``, or a view of it, is read after it was written to."""
    return any(
        write < user or (_may_view(user) and _is_read_after(user, write))
        for user in value.users if user is not write)


def _bases(value: torch.fx.Node) -> list[torch.fx.Node]:
    """What ``value`` is a view of."""
    found: list[torch.fx.Node] = []
    while value.op == "call_function" and value.args and isinstance(value.args[0], torch.fx.Node):
        target: Any = value.target
        if target is operator.getitem:  # one of several results
            target = value.args[0].target
        if isinstance(target, OpOverload) and not any(
                returned.alias_info for returned in target._schema.returns):  # pyright: ignore[reportPrivateUsage]
            break
        value = value.args[0]
        found.append(value)
    return found


def _may_view(node: torch.fx.Node) -> bool:
    rule = rule_for(node.target) if node.op == "call_function" else None
    return rule is None or rule.family in ("movement", "cast")


def _is_state(node: torch.fx.Node) -> bool:
    return node.op == "get_attr"


def _with_all_state(traced: torch.fx.GraphModule, model: torch.nn.Module) -> UnitScaled:
    """A module of the traced graph that holds all of ``model``'s parameters and buffers, under
    their names, tied ones tied, those that are not saved not saved."""
    names = {id(value): name for name, value in _state(model)}
    tree = _skeleton(model)
    known = dict(_state(tree))
    for node in traced.graph.find_nodes(op="get_attr"):
        path, _, name = str(node.target).rpartition(".")
        if str(node.target) in known:
            continue
        value = getattr(traced.get_submodule(path), name)
        if (same := names.get(id(value))) is not None:
            node.target = same
        elif isinstance(value, torch.nn.Module):
            tree.add_module(str(node.target), value)
        else:  # a constant that tracing lifted
            node.target = f"_constant_{name}"
            tree.register_buffer(node.target, value.detach(), persistent=False)
    specs = {key: traced.__dict__[key] for key in ("_in_spec", "_out_spec")
             if key in traced.__dict__}
    return assemble(UnitScaled, tree, traced.graph, {}, specs)


def _state(module: torch.nn.Module) -> list[tuple[str, Any]]:
    return [*module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False)]


def _ordered(module: torch.nn.Module) -> list[torch.nn.Module]:
    return [child for _, child in module.named_modules(remove_duplicate=False)]


def _skeleton(module: torch.nn.Module) -> torch.nn.Module:
    """The folders of ``module``'s state, without what its classes do."""
    made = torch.nn.Module()
    for key in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
        made.__dict__[key] = module.__dict__[key]
    made.training = module.training
    for name, child in module.__dict__["_modules"].items():
        if child is not None:
            made.add_module(name, _skeleton(child))
    return made
