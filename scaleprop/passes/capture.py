"""Capture: a model becomes a flat ATen graph that keeps its signature, names and tied weights.

``torch.export`` traces, our decomposition table brings the graph to core ATen with the composites
kept whole, and the parameters become ``get_attr`` nodes. Batch and sequence are dynamic where the
model allows it; every step back from that is a note on the program.
"""

from __future__ import annotations

import copy
import gc
import inspect
import logging
import os
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.fx
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.utils import _pytree as pytree

from scaleprop import _torch_compat
from scaleprop.errors import CaptureError, ConfigError
from scaleprop.passes import dimensions
from scaleprop.passes.base import Program
from scaleprop.passes.decompose import decomposed
from scaleprop.passes.find_guards import find_guards
from scaleprop.passes.structures import register_structures

logger = logging.getLogger(__name__)

_SHOWN = 3  # how many conditions a note lists
_NOT_THE_MODELS = tuple(f"{home}{os.sep}" for home in (Path(torch.__file__).parent,
                                                       Path(__file__).parents[1]))


def capture(
    model: torch.nn.Module | ExportedProgram,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> Program:
    """The program of ``model`` in eval mode. The model itself is left as it was.

    Args:
        model: a module, or what ``torch.export.export`` made of one.
        args, kwargs: example inputs; for an ``ExportedProgram`` its own are the default.
        dynamic_shapes: ``torch.export``'s own forms, taken exactly; ``{}`` fixes every size.
            None: batch and sequence dimensions are dynamic where the model allows. An
            ``ExportedProgram`` has its own.

    Raises:
        ConfigError: where ``model`` is neither.
        CaptureError: where the model cannot be traced, or writes to its inputs or buffers.
    """
    kwargs = dict(kwargs or {})
    if isinstance(model, ExportedProgram):
        if dynamic_shapes is not None:
            raise CaptureError("an exported program has dynamic_shapes: leave them out")
        args, kwargs = _examples(model, args, kwargs)
        return _finish(model, args, kwargs, given=[], notes=(), declared=True)
    if not isinstance(model, torch.nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"a model is a torch.nn.Module or what torch.export.export made of one, "
                          f"not {type(model).__name__}. Remedy: of a function, a module whose "
                          "forward calls it")
    if not isinstance(args, tuple):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise CaptureError(f"args must be a tuple of positional inputs, not {type(args).__name__}")
    register_structures((args, kwargs))
    with _tracing(model):
        if dynamic_shapes is None:
            exported, notes = export_as_dynamic_as_possible(model, args, kwargs)
            given: list[tuple[torch.Tensor, dict[int, str]]] = []
        else:
            exported = export_exactly(model, args, kwargs, dynamic_shapes, strict=False)
            inputs: Any = dimensions.argument_names(model.forward, args, kwargs)
            if isinstance(dynamic_shapes, (tuple, list)):
                inputs = tuple(inputs.values())
            given, notes = dimensions.user_names(dynamic_shapes, inputs), ()
        program = _finish(exported, args, kwargs, given, notes, dynamic_shapes is not None)
    return program.replace(arguments=tuple(inspect.signature(model.forward).parameters))


@contextmanager
def _tracing(model: torch.nn.Module) -> Generator[None]:
    """Eval mode, no autograd, output classes registered; everything put back afterwards.

    Nothing is garbage-collected on the way: tracing makes many objects and throws few away, and
    would spend a fifth of its time looking for them.
    """
    modes = [(module, module.training) for module in model.modules()]
    hook = model.register_forward_hook(lambda _module, _inputs, output: _register(output))
    collects = gc.isenabled()
    gc.disable()
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if collects:
            gc.enable()
        hook.remove()
        for module, training in modes:
            module.training = training


def _register(output: Any) -> None:
    register_structures(output)


def export_as_dynamic_as_possible(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[ExportedProgram, tuple[str, ...]]:
    """Batch and sequence dynamic; else batch only; else fixed. Each step back is a note."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    failures: list[CaptureError] = []
    notes: list[str] = []
    for wish in dimensions.LADDER:
        axes = dimensions.default_axes((args, kwargs), wish)
        if wish != "nothing" and not any(axes):
            continue
        traced_args, traced_kwargs = pytree.tree_unflatten(
            dimensions.without_ones(leaves, axes), spec
        )
        try:
            # {} fixes every size, also of what goes into **kwargs, which torch.export cannot name
            shapes = dimensions.as_dynamic_shapes(axes, spec, model.forward) if any(axes) else {}
        except TypeError:
            _refuse_broken(model, args, kwargs)
            raise
        found: list[tuple[ExportedProgram, list[tuple[str, int, int]]]] = []
        for strict in (False, True):
            try:
                exported = export_exactly(model, traced_args, traced_kwargs, shapes, strict)
            except CaptureError as error:
                if not failures:
                    _refuse_broken(model, args, kwargs)
                failures.append(error)
                notes.append(f"not traced with {wish} dynamic, strict={strict}: {_reason(error)}")
                continue
            fixed = _fixed_axes(exported, axes)
            found.append((exported, fixed))
            # strict tracing sometimes keeps a batch dynamic that non-strict tracing fixes
            if not any(axis == 0 for _, axis, _ in fixed):
                break
        if found:
            exported, fixed = min(found, key=lambda pair: len(pair[1]))
            return exported, (*notes, *map(_fixed_note, fixed))
    raise failures[-1]


def _refuse_broken(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell a model that cannot run from one that cannot be traced."""
    try:
        model(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} itself fails on the example inputs, before any capture: "
            f"{type(error).__name__}: {error}\n"
            "Remedy: pass example inputs that fit the model's forward."
        ) from error


def _reason(error: CaptureError) -> str:
    return str(error.__cause__ or error).strip().splitlines()[0]


def _fixed_note(fixed: tuple[str, int, int]) -> str:
    name, axis, size = fixed
    return f"input {name!r} axis {axis} is fixed at {size}: the model's code depends on it"


def export_exactly(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any,
    strict: bool = False,
) -> ExportedProgram:
    """``torch.export.export``, whose errors become ``CaptureError`` with a remedy."""
    try:
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=strict)
    except Exception as error:
        raise CaptureError(
            f"torch.export could not trace {type(model).__name__}: "
            f"{type(error).__name__}: {str(error).strip()}\n{_remedy(error)}"
        ) from error


def _remedy(error: Exception) -> str:
    """What a user can do about a tracing error."""
    text = str(error)
    if isinstance(error, _torch_compat.GuardOnDataDependentSymNode) or "data-dependent" in text:
        return (
            "Remedy: the model branches on the values of a tensor; choose with torch.where or "
            "torch.cond, or pass the decision as a Python argument."
        )
    if isinstance(error, _torch_compat.ConstraintViolationError) or "Constraints violated" in text:
        return "Remedy: fix the named dimensions, or let capture choose (dynamic_shapes=None)."
    if "dynamic_shapes" in text:
        return "Remedy: dynamic_shapes must mirror the inputs, see torch.export.export."
    if "not a known type" in text or "pytree" in text:
        return "Remedy: return tensors, tuples, dicts or dataclasses of tensors."
    if isinstance(error, TypeError):
        return "Remedy: check that the example inputs fit the model's forward."
    return "Remedy: run the model eagerly on the example inputs; then see torch.export's message."


def _fixed_axes(
    exported: ExportedProgram, axes: Sequence[tuple[int, ...]]
) -> list[tuple[str, int, int]]:
    """Input, axis and size of each dimension that was wished dynamic and that tracing fixed."""
    names = exported.graph_signature.user_inputs
    values = {node.name: node.meta.get("val") for node in exported.graph.nodes}
    return [
        (str(name), axis, int(values[name].shape[axis]))
        for name, wanted in zip(names, axes, strict=True)
        for axis in wanted
        if not dimensions.is_symbolic(values[name].shape[axis])
    ]


def _examples(
    exported: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not args and not kwargs:
        if exported.example_inputs is None:
            raise CaptureError("the exported program carries no example inputs; pass some")
        return exported.example_inputs
    found = pytree.tree_structure((args, kwargs))
    if found != exported.call_spec.in_spec:
        raise CaptureError(f"the example inputs have another structure than the exported program:\n"
                           f"  expected {exported.call_spec.in_spec}\n  got      {found}")
    return args, kwargs


def _finish(
    exported: ExportedProgram,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    given: Sequence[tuple[torch.Tensor, dict[int, str]]],
    notes: Sequence[str],
    declared: bool,
) -> Program:
    loaded = _torch_compat.loaded_guards(exported)
    try:
        flat, unlifted = decomposed(exported)
    except Exception as error:
        raise CaptureError(
            f"could not bring the exported graph to core ATen: {type(error).__name__}: {error}\n"
            "Remedy: report the operator; exclude it from the model, or capture without it."
        ) from error
    _refuse_mutation(flat)
    module = _plain(unlifted)
    program = Program(
        module=module,
        in_spec=_required(flat.call_spec.in_spec),
        out_spec=_required(flat.call_spec.out_spec),
        example_args=args,
        example_kwargs=kwargs,
        arguments=_arguments(module),
    )
    leaves = pytree.tree_leaves((args, kwargs))
    names = {
        node.name: axes
        for node, leaf in zip(program.placeholders, leaves, strict=True)
        for tensor, axes in given
        if leaf is tensor
    }
    guards, unknown = find_guards(flat, program.placeholders, loaded, declared)
    notes = [*notes, *_guard_notes(guards, unknown)]
    for note in notes:
        logger.info("capture: %s", note)
    axes = dimensions.name_dimensions(program.placeholders, names)
    return program.replace(dynamic_axes=axes, guards=guards, notes=tuple(notes))


def _plain(unlifted: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Without the input-check hooks, with train() and eval(), and with the user's stack traces."""
    module = torch.fx.GraphModule(unlifted, unlifted.graph)
    for node in module.graph.nodes:
        if node.meta.get("stack_trace") is not None:
            node.meta["stack_trace"] = user_frames(node.meta["stack_trace"])
        if isinstance(value := node.meta.get("val"), torch.Tensor):
            node.meta["val"] = dimensions.with_plain_sizes(value)
    return module


def _guard_notes(guards: Sequence[str], unknown: Sequence[str]) -> list[str]:
    notes = [f"the model's code depends on {condition}, which is not checked"
             for condition in unknown]
    if guards:
        more = f"; and {len(guards) - _SHOWN} more" if len(guards) > _SHOWN else ""
        notes.append(f"calls must satisfy what the model's code depends on: "
                     f"{'; '.join(guards[:_SHOWN])}{more} (an ONNX file does not check it)")
    return notes


def _arguments(module: torch.fx.GraphModule) -> tuple[str, ...]:
    """What an exported program was called with."""
    code: Any = module.graph._codegen  # pyright: ignore[reportPrivateUsage]
    return tuple(code.pytree_info.orig_args)


def user_frames(trace: str) -> str:
    """A stack trace without torch's frames and ours: its last line is then the user's."""
    frames = re.split(r"(?m)^(?=\s*File \")", trace)
    kept = [frame for frame in frames
            if not frame.lstrip().removeprefix('File "').startswith(_NOT_THE_MODELS)]
    return "".join(kept) if any(frame.strip() for frame in kept) else trace


def _required(spec: pytree.TreeSpec | None) -> pytree.TreeSpec:
    if spec is None:
        raise CaptureError("the exported program does not know its input and output structure")
    return spec


def _refuse_mutation(exported: ExportedProgram) -> None:
    """A program is a function; a model that writes somewhere is not one."""
    kinds = {
        OutputKind.BUFFER_MUTATION: "buffer",
        OutputKind.PARAMETER_MUTATION: "parameter",
        OutputKind.USER_INPUT_MUTATION: "input",
    }
    written = [
        f"{kinds[spec.kind]} {spec.target!r}"
        for spec in exported.graph_signature.output_specs
        if spec.kind in kinds
    ]
    if written:
        raise CaptureError(
            f"the model writes to its {', '.join(written)}; a compiled program is a function of "
            "its inputs. Remedy: clone what is written (x = x.clone()), or return the new state as "
            "an output and pass it in again."
        )
