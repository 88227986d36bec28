"""``torch.compile(model, backend="scaleprop")``: a model's forward and backward, on one graph.

AOTAutograd gives the joint graph with norms, softmax, activations and attention whole, because
scales end there; a transform rewrites it; then Inductor (or eager PyTorch, to debug) runs what came
out. Parameters stay the caller's: DDP, FSDP, checkpointing, optimizers and ``state_dict`` see an
ordinary compiled module.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
import torch.fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakTensorKeyDictionary

from scaleprop import _torch_compat as compat
from scaleprop import ops
from scaleprop.errors import CaptureError, ConfigError
from scaleprop.ops import products
from scaleprop.passes.decompose import respell
from scaleprop.passes.statistics.peaks import predicted_amax
from scaleprop.passes.training import Formats, Lowered, lower_products
from scaleprop.passes.training.roles import is_tangent
from scaleprop.passes.training.statistics import Sizes, measured_amax
from scaleprop.rules import rule_for

logger = logging.getLogger(__name__)

_COPY: Any = torch.ops.aten.copy_.default
# what Inductor fuses with its neighbours, spelled in ATen
_FUSED: dict[Any, Callable[..., Any]] = {
    ops.cast: products.cast, ops.gemm: products.gemm, ops.power_scale: products.power_scale}

Inner = Literal["inductor", "eager"]
Exponents = Literal["measured", "predicted"]
_SIZES: Mapping[Exponents, Sizes] = {"measured": measured_amax, "predicted": predicted_amax}
TrainingRecipe = Literal["fp32", "bf16", "fp8", "fp8-unscaled"]
# what each recipe casts the factors of linear layers' products to
_FORMATS: Mapping[TrainingRecipe, Formats] = {
    "bf16": Formats(x="bf16", w="bf16", dy="bf16", scaled=False, head=True),
    "fp8": Formats(),
    "fp8-unscaled": Formats(scaled=False),
}
# of graphs compiled by name: parameter → what was done to those that read it
_REPORTS: Any = WeakTensorKeyDictionary()
# rewrites a joint graph (or a forward one, without gradients) in place
Transform = Callable[[torch.fx.GraphModule], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What ``torch.compile(…, options={…})`` takes.

    recipe: what the products of linear layers are computed on, forward and backward; sums are
        float32. ``fp32``: nothing is changed. ``bf16``: bfloat16. ``fp8``: E4M3 and, for gradients,
        E5M2, all held at exponents that suit their formats; the last layer before the loss stays
        high. ``fp8-unscaled``: the same formats, every value as it is and saturated: for models
        whose values lie about one already. The report says what over- and underflows.
    inner: what runs the rewritten graph: ``inductor``, or ``eager``, operator by operator.
    exponents: what they are chosen by: values ``measured`` in one run of the first batch, or
        ``predicted`` from the sizes of inputs and parameters, by the operators' rules. Where these
        do not know a size, the scale is found at run time.
    """

    recipe: TrainingRecipe = "fp8"
    inner: Inner = "inductor"
    exponents: Exponents = "measured"

    def __post_init__(self) -> None:
        for name, known in (("recipe", get_args(TrainingRecipe)), ("inner", get_args(Inner)),
                            ("exponents", get_args(Exponents))):
            if getattr(self, name) not in known:
                raise ConfigError(f"option {name}={getattr(self, name)!r} of backend 'scaleprop'; "
                                  f"known: {', '.join(known)}")

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> Options:
        """Checked options.

        Raises:
            ConfigError: naming an unknown option, or a wrong value.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in given or {}:
            if name not in known:
                raise ConfigError(f"unknown option {name!r} of backend 'scaleprop'; "
                                  f"known: {', '.join(known)}")
        return cls(**(given or {}))


def scaleprop(
    module: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The entry point that ``torch.compile`` calls by name.

    Raises:
        ConfigError: on an unknown option, or a mode: wrapped by ``torch.compile``, as every
            backend's errors are.
    """
    if mode is not None:
        raise ConfigError(f"backend 'scaleprop' has no mode {mode!r}. Remedy: set what it stands "
                          "for in torch._inductor.config.")
    parameters = [value for value in example_inputs if isinstance(value, torch.nn.Parameter)]

    def report(lowered: Lowered) -> None:
        for parameter in parameters:
            _REPORTS.setdefault(parameter, []).append(lowered)

    return compile_with(module, example_inputs, Options.of(options), report)


def reports_of(model: torch.nn.Module) -> list[Lowered]:
    """What was done to the graphs that read ``model``'s parameters, compiled by name."""
    found = [report for parameter in model.parameters() for report in _REPORTS.get(parameter, [])]
    return list({id(report): report for report in found}.values())


def compile_with(
    module: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    report: Callable[[Lowered], None] | None = None,
) -> Callable[..., Any]:
    """Compile what Dynamo captured; ``report`` hears what was done to each joint graph."""
    if options.recipe == "fp32":
        return compile_joint(module, example_inputs, _nothing, options.inner)

    def transform(joint: torch.fx.GraphModule) -> None:
        parameters, inputs = given_inputs(joint.graph, example_inputs)
        lowered = lower_products(joint, parameters, _FORMATS[options.recipe], inputs,
                                 _SIZES[options.exponents])
        logger.info("%d products in %s, %d high; %d values cast, %d exponents for nothing; "
                    "%d rescales", len(lowered.products), options.recipe, len(lowered.high),
                    len(lowered.casts), sum(cast.free for cast in lowered.casts), lowered.rescales)
        for cast in lowered.casts:
            if cast.why:
                logger.info("%s, %s: %s", cast.value, cast.kind, cast.why)
        if report is not None:
            report(lowered)

    return compile_joint(module, example_inputs, transform, options.inner)


def given_inputs(
    graph: torch.fx.Graph, example_inputs: Sequence[Any]
) -> tuple[list[torch.fx.Node], list[Any] | None]:
    """The graph's inputs that are parameters, and one real batch of all its inputs.

    Gradients come in as ones where they are a loss's, else as zeros: their size is unknown. What
    the graph writes to is copied. No batch where inputs have no data: DDP compiles a graph in as
    many pieces as it has buckets, and none but the first would have real inputs; nor has the device
    "meta" any.

    Raises:
        CaptureError: where the graph has more or fewer inputs than Dynamo's, naming why.
    """
    placeholders = graph.find_nodes(op="placeholder")
    primals = [node for node in placeholders if not is_tangent(node)]
    if len(primals) != len(example_inputs):
        raise CaptureError(_mismatch(len(primals), example_inputs))
    parameters = [node for node, value in zip(primals, example_inputs, strict=True)
                  if isinstance(value, torch.nn.Parameter)]
    if any(compat.is_fake(value) or getattr(value, "is_meta", False) for value in example_inputs):
        return parameters, None
    written = {node.args[0] for node in graph.nodes if node.target is _COPY}
    with compat.without_modes():
        values = [value.detach().clone() if node in written else value
                  for node, value in zip(primals, example_inputs, strict=True)]
        values.extend(_incoming(node.meta["val"]) for node in placeholders[len(primals):])
    return parameters, values


def _mismatch(traced: int, given: Sequence[Any]) -> str:
    """Why AOTAutograd's graph has other inputs than Dynamo's, and what to do."""
    parts = sorted({type(value).__name__ for value in given
                    if is_traceable_wrapper_subclass(value)})
    return f"AOTAutograd traced {traced} inputs of {len(given)}: " + (
        f"{', '.join(parts)} is made of several tensors. Remedy: pass them as plain tensors."
        if parts else "two of them share memory. Remedy: pass copies.")


def _incoming(like: torch.Tensor) -> torch.Tensor:
    """A gradient from outside, laid out as it was traced."""
    sizes, strides = ([compat.traced_size(size) for size in given]
                      for given in (like.shape, like.stride()))
    made = torch.empty_strided(sizes, strides, dtype=like.dtype, device=like.device)
    return made.fill_(0.0 if sizes else 1.0)


def compile_joint(
    module: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    transform: Transform,
    inner: Inner,
) -> Callable[..., Any]:
    """Compile what Dynamo captured, with ``transform`` applied to its joint graph."""

    def respelled(joint: torch.fx.GraphModule) -> None:
        transform(joint)
        with torch.no_grad(), compat.fake_mode_of(joint.graph):
            respell(joint, compat.inductor_table() | _FUSED, lambda op, table: op in table)

    if inner == "eager":
        return compat.compile_eager(module, example_inputs, _loud(transform), training_table())
    return compat.compile_inductor(module, example_inputs, _loud(respelled), training_table())


def _loud(rewrite: Transform) -> Transform:
    """``rewrite``, none of whose errors Dynamo takes for a graph break: those that fake tensors
    raise it does, and would run the model untransformed."""

    def run(joint: torch.fx.GraphModule) -> None:
        try:
            rewrite(joint)
        except Exception as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error

    return run


def training_table() -> dict[Any, Callable[..., Any]]:
    """Core ATen decompositions, but none of an operator that has a rule.

    Attention stays whole too: decomposing its forward alone gives wrong gradients.
    """
    return {op: how for op, how in compat.core_table().items()
            if rule_for(op) is None and "scaled_dot_product" not in str(op)}


def _nothing(joint: torch.fx.GraphModule) -> None:
    """The pass-through transform."""
