"""Every private or unstable torch import, in one place, so that a new torch breaks one file."""

from __future__ import annotations

import functools
import itertools
import re
import sys
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import sympy
import torch
import torch.fx
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._decomp import core_aten_decompositions
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.source import ConstantSource
from torch._guards import CompileContext
from torch._ops import OperatorBase, OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram, default_decompositions
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.experimental.symbolic_shapes import (
    ConstraintViolationError,
    DimDynamic,
    GuardOnDataDependentSymNode,
    ShapeEnv,
    StatelessSymbolicContext,
    optimization_hint,
)
from torch.utils import _python_dispatch, checkpoint
from torch.utils._sympy.functions import FloorDiv
from torch.utils._sympy.printers import PythonPrinter
from torch.utils._sympy.solve import try_solve
from torch.utils.checkpoint import noop_context_fn

__all__ = [
    "ConstraintViolationError",
    "FakeTensorMode",
    "GuardOnDataDependentSymNode",
    "OpOverload",
    "OperatorBase",
    "ShapeEnv",
    "decompose",
    "decomposition_table",
    "fake_mode_of",
    "fake_size",
    "in_python",
    "inlined_checkpoints",
    "is_decomposed",
    "loaded_guards",
    "size_symbol",
    "solved_for",
    "symbolic_fake_mode",
    "trace",
    "traced_guards",
    "traced_nodes",
]

_CAPTURED: WeakKeyDictionary[ShapeEnv, tuple[Any, ...]] = WeakKeyDictionary()
_TORCH_HOME = Path(torch.__file__).parent
# where operators find shapes and strides, below the code that was traced
_INTERNALS = ("_prims", "_prims_common", "_refs", "_decomp", "_subclasses",
              "_meta_registrations.py", "_ops.py")  # fmt: skip

# Composites that rules and backends know as one operator. Decomposing the norms, softmax and
# attention would hide where scales end; the rest have a direct counterpart on every backend.
_KEPT_WHOLE = (
    "linear", "matmul", "bilinear",
    "conv1d", "conv2d", "conv3d",
    "layer_norm", "rms_norm", "group_norm", "instance_norm",
    "softmax.int", "log_softmax.int", "_safe_softmax", "logsumexp",
    "scaled_dot_product_attention",
    "_scaled_dot_product_flash_attention_for_cpu",  # its decomposition breaks its fused backward
    "silu", "mish", "hardswish", "hardsigmoid", "elu", "celu", "glu", "softplus", "leaky_relu",
    "_prelu_kernel",
    "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_avg_pool2d", "adaptive_avg_pool1d",
    "pixel_shuffle", "pixel_unshuffle", "split.Tensor", "unbind.int", "stack",
    "tril", "triu", "one_hot",
    "sym_size.int",
)  # fmt: skip


def _overload(name: str) -> OpOverload:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def decomposition_table() -> dict[OperatorBase, Callable[..., Any]]:
    """Core ATen decompositions, except for the composites that scaleprop keeps whole."""
    table = default_decompositions()
    for name in _KEPT_WHOLE:
        table.pop(_overload(name), None)
    return table


def is_decomposed(target: Any, table: Mapping[Any, Any]) -> bool:
    """Whether tracing with ``table`` replaces an operator by others."""
    if not isinstance(target, OpOverload) or target in _kept_whole():
        return False
    return target in table or torch._C._dispatch_has_kernel_for_dispatch_key(  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
        target.name(), "CompositeImplicitAutograd"
    )


@functools.cache
def _kept_whole() -> frozenset[OpOverload]:
    return frozenset(_overload(name) for name in _KEPT_WHOLE)


def trace(
    function: Callable[..., Any], values: Sequence[Any], table: dict[Any, Callable[..., Any]]
) -> torch.fx.GraphModule:
    """The graph of ``function`` on fake values, in the operators of ``table``."""
    with enable_python_dispatcher():
        return make_fx(function, decomposition_table=table, tracing_mode="real")(*values)


def decompose(exported: ExportedProgram) -> ExportedProgram:
    """``exported`` in the operators of ``decomposition_table``.

    Without example inputs ``run_decompositions`` leaves out its guard function, which mistakes
    keyword inputs of models with optional ones in between.
    """
    inputs = exported.example_inputs
    exported.example_inputs = None
    try:
        with torch.no_grad():
            return exported.run_decompositions(decomposition_table())
    finally:
        exported.example_inputs = inputs


def fake_mode_of(graph: torch.fx.Graph) -> FakeTensorMode:
    """The mode that the graph's fake values were made in; a new one where there are none."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and hasattr(value, "fake_mode"):
            return value.fake_mode  # pyright: ignore[reportAttributeAccessIssue]
    return symbolic_fake_mode()


def operator_names() -> list[str]:
    """Every operator that the dispatcher knows, as ``namespace::name.overload``."""
    return torch._C._dispatch_get_all_op_names()  # pyright: ignore[reportPrivateUsage]


def is_fake(value: Any) -> bool:
    """Whether a value is a tensor without data."""
    return isinstance(value, FakeTensor)


def without_modes() -> AbstractContextManager[Any]:
    """Real tensors are computed with, whatever is being traced."""
    return _python_dispatch._disable_current_modes()  # pyright: ignore[reportPrivateUsage]


def same_kind(value: torch.Tensor) -> torch.Tensor:
    """Another tensor of the same sizes, layout and dtype, without data where ``value`` has none."""
    if not isinstance(value, FakeTensor):
        return torch.empty_like(value)
    with value.fake_mode:
        return torch.empty_like(value)


def symbolic_fake_mode() -> FakeTensorMode:
    """A mode in which sizes can be symbols, and parameters may stay real tensors."""
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())


def fake_size(mode: FakeTensorMode, name: str, size: int) -> torch.SymInt:
    """A symbolic size, with ``size`` as what tracing tries it with."""
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])  # pyright: ignore[reportCallIssue]
    vector = mode.from_tensor(torch.empty(size), symbolic_context=context,
                              source=ConstantSource(name))
    return vector.shape[0]  # pyright: ignore[reportReturnType]


def traced_size(size: int | torch.SymInt) -> int:
    """What a size was when it was traced; no guard is added."""
    return optimization_hint(size)


def traced_guards(exported: ExportedProgram) -> list[tuple[sympy.Basic, bool]]:
    """Conditions that tracing put on symbolic sizes, simplified, and whether an operator's own
    code did; those that always hold are left out."""
    env = fake_mode_of(exported.graph).shape_env
    if env is None:
        return []
    # an exported program can be captured twice, and a backend adds guards for its own code
    guards = _CAPTURED.setdefault(env, tuple(env.guards))
    found = [(env.simplify(guard.expr), _is_internal(guard.sloc.framework_loc))
             for guard in guards]
    return [(condition, internal) for condition, internal in found if condition != sympy.true]


def _is_internal(place: traceback.FrameSummary | str | None) -> bool:
    if not isinstance(place, traceback.FrameSummary):
        return False
    path = Path(place.filename)
    return path.is_relative_to(_TORCH_HOME) and (
        path.relative_to(_TORCH_HOME).parts[0] in _INTERNALS)


def loaded_guards(exported: ExportedProgram) -> list[str]:
    """The conditions of a program that was read from a file, in torch's own spelling: none of them
    is in its shape environment."""
    env = fake_mode_of(exported.graph).shape_env
    traced_here = env is not None and env.var_to_sources
    return [] if traced_here else exported._guards_code  # pyright: ignore[reportPrivateUsage]


def size_symbol(name: str) -> sympy.Symbol:
    """A symbol that is assumed to be what a size is."""
    return sympy.Symbol(name, integer=True, positive=True)


def solved_for(expression: Any, size: sympy.Symbol, symbol: Any) -> Any | None:
    """``symbol`` where ``expression`` is ``size``, in integers; None where torch cannot solve."""
    solution = try_solve(sympy.Eq(expression, size), symbol)
    return None if solution is None else FloorDiv(*sympy.fraction(sympy.together(solution[1])))


def in_python(expression: Any) -> str:
    """An expression of sizes as Python: ``//``, ``%``, ``max``, ``==``."""
    return PythonPrinter().doprint(expression)


def core_table() -> dict[Any, Callable[..., Any]]:
    """Decompositions of what is not core ATen, backward operators included."""
    return dict(core_aten_decompositions())


def inductor_table() -> dict[Any, Callable[..., Any]]:
    """The decompositions that Inductor lowers its graphs with."""
    from torch._inductor.decomposition import select_decomp_table

    return dict(select_decomp_table())


def compile_eager(
    module: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    rewrite: Callable[[torch.fx.GraphModule], None],
    table: dict[Any, Callable[..., Any]],
    run_by: Callable[[torch.fx.GraphModule], Callable[..., Any]] | None = None,
) -> Callable[..., Any]:
    """Forward and backward of a Dynamo graph, run operator by operator after ``rewrite``, or by
    what ``run_by`` makes of each of both."""

    def partition(joint: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
        rewrite(joint)
        return min_cut_rematerialization_partition(joint, inputs, **options)

    def run(graph: torch.fx.GraphModule, _: Any) -> Any:
        return make_boxed_func(graph.forward if run_by is None else run_by(graph))

    def infer(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        rewrite(graph)
        return run(graph, inputs)

    compiler = aot_autograd(
        fw_compiler=run, bw_compiler=run, inference_compiler=infer, partition_fn=partition,
        decompositions=table, keep_inference_input_mutations=True)
    return compiler(module, example_inputs)


def compile_inductor(
    module: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    rewrite: Callable[[torch.fx.GraphModule], None],
    table: dict[Any, Callable[..., Any]],
    finish: Callable[[torch.fx.GraphModule], None],
) -> Callable[..., Any]:
    """Inductor's code for a Dynamo graph, ``rewrite`` applied first of all joint-graph passes, and
    ``finish`` first of all passes of what that was parted into."""
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Rewrite(CustomGraphPass):
        def __init__(self, by: Callable[[torch.fx.GraphModule], None]) -> None:
            self.by = by

        def __call__(self, graph: torch.fx.Graph) -> None:
            assert graph.owning_module is not None
            self.by(graph.owning_module)

        def uuid(self) -> None:
            """No name under which compiled code could be cached."""

    compiled: Any = compile_fx(module, example_inputs, decompositions=table,
                               config_patches={"joint_custom_pre_pass": Rewrite(rewrite),
                                               "post_grad_custom_pre_pass": Rewrite(finish)})
    return compiled


def with_inputs(
    module: torch.fx.GraphModule, values: Mapping[str, torch.Tensor]
) -> torch.fx.GraphModule:
    """A copy of a Dynamo graph that takes ``values`` before its own inputs; it does not read them
    yet. Dynamo goes on using the graph that it has."""
    graph = torch.fx.Graph()
    copies: dict[torch.fx.Node, torch.fx.Node] = {}
    mode = fake_mode_of_inputs(module.graph)
    for name, value in values.items():
        node = graph.placeholder(name)
        node._dynamo_source = ConstantSource(name)  # type: ignore[attr-defined]
        node.meta["example_value"] = mode.from_tensor(value, static_shapes=True)
    graph.output(graph.graph_copy(module.graph, copies))
    copied = torch.fx.GraphModule(module, graph)
    copied.meta = dict(module.meta)
    for node, copy in copies.items():
        if hasattr(node, "_dynamo_source"):
            copy._dynamo_source = node._dynamo_source  # type: ignore[attr-defined]
    for name in ("_param_name_to_source", "_source_to_user_stacks"):
        if hasattr(module, name):
            setattr(copied, name, getattr(module, name))
    return copied


def fake_mode_of_inputs(graph: torch.fx.Graph) -> FakeTensorMode:
    """The mode of the fake inputs that Dynamo gave a graph; a new one where it has none."""
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("example_value")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return symbolic_fake_mode()


def source_name(node: torch.fx.Node) -> str:
    """What an input of a Dynamo graph is called in the model, as in ``layers.0.weight``."""
    source = getattr(node, "_dynamo_source", None)
    keys = re.findall(r"\['([^']+)'\]", source.name if source is not None else "")
    return ".".join(keys[1:] or keys) or str(node.target)  # the first one is the model itself


def in_backward() -> bool:
    """Whether autograd is running a backward pass on this thread."""
    return torch._C._current_graph_task_id() != -1  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]


def use_threads(count: int) -> None:
    """Let this process use so many threads to compute, and processes to compile."""
    from torch._inductor import config

    torch.set_num_threads(count)
    config.compile_threads = count


def compile_in_place(
    model: torch.nn.Module, backend: Callable[..., Any], *, dynamic: bool | None = None,
    fullgraph: bool = False, after: Callable[[], None] = lambda: None,
) -> None:
    """``model.compile``, also where the module's class is torch's own: Dynamo skips the frames of
    ``Sequential`` and ``Linear`` when they come first, and would run them as they are.

    after: called after each call.
    """
    compiled = compiled_call(model, backend, dynamic=dynamic, fullgraph=fullgraph)

    def call(*args: Any, **kwargs: Any) -> Any:
        result = compiled(*args, **kwargs)
        if not torch.compiler.is_compiling():  # as part of a larger model
            after()
        return result

    model._compiled_call_impl = call  # pyright: ignore[reportPrivateUsage]


_COUNT = itertools.count()
_NUMBERS: WeakKeyDictionary[torch.nn.Module, int] = WeakKeyDictionary()  # of compiled models


def compiled_call(
    model: torch.nn.Module, backend: Callable[..., Any], *, dynamic: bool | None = None,
    fullgraph: bool = False,
) -> Callable[..., Any]:
    """What ``model`` calls once it is compiled; ``model`` is not changed.

    Dynamo stops compiling, without an error, what has been compiled too often. It counts by code
    object and by region, so every model has its own of both: else the ninth block of a model whose
    blocks are compiled one by one would run as it is. Which sizes it saw change it remembers by
    name and line: else those of one model would be symbols in the next.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return model._call_impl(*args, **kwargs)  # pyright: ignore[reportPrivateUsage]

    number = _NUMBERS.setdefault(model, next(_COUNT))
    call.__code__ = call.__code__.replace(co_name=f"call_{number}")
    compile_: Any = torch.compile  # its overloads lack an argument
    return compile_(call, backend=backend, dynamic=dynamic, fullgraph=fullgraph,
                    isolate_recompiles=True)


@contextmanager
def called_as(model: torch.nn.Module, call: Callable[..., Any]) -> Generator[None]:
    """``model(…)`` is ``call(…)`` within."""
    before = model._compiled_call_impl  # pyright: ignore[reportPrivateUsage]
    model._compiled_call_impl = call  # pyright: ignore[reportPrivateUsage]
    try:
        yield
    finally:
        model._compiled_call_impl = before  # pyright: ignore[reportPrivateUsage]


def is_recompilation() -> bool:
    """Whether what Dynamo is compiling has been compiled before, for other inputs."""
    found = CompileContext.current_compile_id()
    return found is not None and bool(found.frame_compile_id)


@contextmanager
def inlined_checkpoints(
    region: Callable[[Mapping[str, Any]], AbstractContextManager[None]]
) -> Generator[None]:
    """Within, ``torch.utils.checkpoint.checkpoint`` runs functions as they are, under ``region``
    of its options that are not the default ones; in both of its kinds."""
    defaults = {"preserve_rng_state": True, "context_fn": noop_context_fn,
                "determinism_check": "default", "debug": False, "early_stop": True}

    def without_reentrant(_function: Any, *given: Any, **_kwargs: Any) -> Generator[None]:
        chosen = dict(zip(defaults, given, strict=False))  # then come the function's own
        with region({key: value for key, value in chosen.items() if value != defaults[key]}):
            yield

    class Reentrant:
        @staticmethod
        def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
            with region({} if preserve else {"preserve_rng_state": False}):
                return function(*args)

    replaced = {"_checkpoint_without_reentrant_generator": without_reentrant,
                "CheckpointFunction": Reentrant}
    kept = {name: getattr(checkpoint, name) for name in replaced}
    try:
        for name, value in replaced.items():
            setattr(checkpoint, name, value)
        yield
    finally:
        for name, value in kept.items():
            setattr(checkpoint, name, value)


@contextmanager
def traced_nodes() -> Generator[list[torch.fx.Node]]:
    """Filled, at the end, with the nodes that tracing made within; none where nothing traces."""
    found: list[torch.fx.Node] = []
    mode = get_proxy_mode()
    if mode is None:
        yield found
        return
    graph = mode.tracer.graph
    end: Any = graph._root  # pyright: ignore[reportPrivateUsage]
    last = end.prev
    yield found
    node = last.next
    while node is not end:
        found.append(node)
        node = node.next


@contextmanager
def called_functions(found: set[str]) -> Generator[None]:
    """Add the names of ``torch.autograd.Function`` classes whose ``apply`` is called, except for
    torch's own."""
    # asked by every apply; an alias of apply, made before, cannot be replaced
    inside: Any = torch.autograd.function
    original: Any = inside._is_setup_context_defined

    def asked(setup_context: Any) -> Any:
        kind: Any = sys._getframe(1).f_locals.get("cls")  # pyright: ignore[reportPrivateUsage]
        if kind is not None and not kind.__module__.startswith("torch."):
            found.add(kind.__qualname__)
        return original(setup_context)

    inside._is_setup_context_defined = asked
    try:
        yield
    finally:
        inside._is_setup_context_defined = original
