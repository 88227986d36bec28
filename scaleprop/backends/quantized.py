"""Training graphs whose products read quantized operands, see ``recipes.TrainingRecipe``.

The graph is given five inputs of scaleprop's own: the step, the memory of amax, and what tells the
random numbers of operands apart; a run passes them in, the first four from the model's
``TrainingState``.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx

from scaleprop import _torch_compat as compat
from scaleprop.backends.graphs import Inner, Runner, compile_joint, given_inputs
from scaleprop.backends.state import GraphState, TrainingState
from scaleprop.extras import install_command
from scaleprop.passes.training.attention import ROLES, spell_attention
from scaleprop.passes.training.high import keep_high
from scaleprop.passes.training.layers import step_outline
from scaleprop.passes.training.memory import Memory, Row, Streams
from scaleprop.passes.training.operands import Operands, quantize_operands
from scaleprop.passes.training.rewrite import Settings
from scaleprop.passes.training.roles import find_products, is_tangent
from scaleprop.passes.training.truncate import truncate_values
from scaleprop.recipes.training import Operand, TrainingRecipe

logger = logging.getLogger(__name__)

_INPUTS = ("scaleprop_step", "scaleprop_used", "scaleprop_seen", "scaleprop_seen_backward",
           "scaleprop_streams")  # fmt: skip
_ROWS_PER_CALL = 6  # operands of a layer


@dataclasses.dataclass
class _Phase:
    """One compiled phase of a graph. layer: the first that is quantized, "" where none is.
    streams: as ``Streams`` has them."""

    run: Callable[..., Any]
    layer: str = ""
    rows: Sequence[Row] = ()
    training: bool = False
    streams: torch.Tensor | None = None


def compile_quantized(
    module: torch.fx.GraphModule, example_inputs: Sequence[Any], recipe: TrainingRecipe,
    inner: Inner | Runner, state: TrainingState,
    report: Callable[[Operands], None] | None = None,
) -> Callable[..., Any]:
    """Compile what Dynamo captured, once for each phase of ``recipe``, all at once: a tracer and
    its guards are at hand only now.

    Raises:
        RuntimeError: wrapped by ``torch.compile``, what a transform raised.
    """
    work = _Work(module, example_inputs, inner, state, report)
    starts = [0, *(phase.start for phase in recipe.phases)]
    phases = [work.compiled(recipe, recipe.at(start)) for start in starts]
    layer = next((phase.layer for phase in phases if phase.layer), "")
    anchor = next((place for place, value in enumerate(example_inputs)
                   if isinstance(value, torch.nn.Parameter)), None)

    def run(*inputs: Any) -> Any:
        if not layer or any(map(compat.is_fake, inputs)):
            # nothing reads the step; or it is none: DDP asks each piece what it would return
            return phases[0].run(*work.unused(), *inputs)
        mine = state.of_run(inputs)
        block = mine.place_of(inputs[anchor], work.names[anchor]) if anchor is not None else ""
        step = mine.next_step(block + layer, phases[0].training)
        place = sum(step >= start for start in starts[1:])
        phase = phases[place]
        graph = mine.of_graph(f"{block}{layer}#{place}", phase.rows, work.device)
        own = graph.begin(step, phase.training, phase.rows, work.capacity, block)
        return phase.run(*own, phase.streams, *inputs)

    return run


class _Work:
    """One Dynamo graph, to be compiled in several ways."""

    def __init__(
        self, module: torch.fx.GraphModule, example_inputs: Sequence[Any],
        inner: Inner | Runner, state: TrainingState, report: Callable[[Operands], None] | None,
    ) -> None:
        self.inputs, self.state, self.report = example_inputs, state, report
        self.inner: Inner | Runner = inner
        calls = sum(node.op == "call_function" for node in module.graph.nodes)
        self.capacity = 1 << (_ROWS_PER_CALL * calls).bit_length()
        self.device = next((value.device for value in example_inputs
                            if isinstance(value, torch.Tensor)), torch.device("cpu"))
        self.own: dict[str, torch.Tensor] = dict(zip(_INPUTS, self.unused(), strict=True))
        self.module = compat.with_inputs(module, self.own)
        self.names = [compat.source_name(node)
                      for node in module.graph.find_nodes(op="placeholder")]

    def unused(self) -> tuple[torch.Tensor, ...]:
        """Inputs of scaleprop's own that are of no step."""
        none = torch.zeros(2 * self.capacity, dtype=torch.int64, device=self.device)
        return (*GraphState(self.device).begin(0, False, (), self.capacity), none)

    def compiled(self, recipe: TrainingRecipe, operands: Mapping[str, Operand]) -> _Phase:
        """The graph with these operands."""
        inputs = [*self.own.values(), *self.inputs]
        phase = _Phase(self.module)

        def transform(joint: torch.fx.GraphModule) -> None:
            self._transform(joint, recipe, operands, phase)

        module = compat.with_inputs(self.module, {})
        if any(role in operands for role in ROLES):
            spell_attention(module)
        phase.run = compile_joint(module, inputs, transform, self.inner)
        return phase

    def _transform(
        self, joint: torch.fx.GraphModule, recipe: TrainingRecipe,
        operands: Mapping[str, Operand], phase: _Phase,
    ) -> None:
        parameters, _ = given_inputs(joint.graph, [*self.own.values(), *self.inputs])
        phase.training = any(is_tangent(node)
                             for node in joint.graph.find_nodes(op="placeholder"))
        if recipe.every:
            count = truncate_values(joint.graph, recipe.every)
            joint.recompile()
            if self.report is not None:
                self.report(Operands((), {}, count))
            return
        step, used, *seen, table = mine = joint.graph.find_nodes(op="placeholder")[:len(_INPUTS)]
        for node in mine:
            int(node.meta["val"].shape[0])  # a constant, not a size to generate code for
        given = joint.graph.find_nodes(op="placeholder")[len(_INPUTS):]
        memory, streams = Memory(used, (seen[0], seen[1])), Streams(table)
        names = dict(zip(given, self.names, strict=False))
        outline = step_outline(joint.graph, parameters, names)
        products = keep_high(joint.graph, find_products(joint.graph, parameters), parameters,
                             recipe.high, recipe.convolutions)
        found = quantize_operands(joint, products, parameters, Settings(
            operands=operands, names=names,
            seed=self.state.seed, step=step, memory=memory, streams=streams, rank=_rank()),
            recipe.convolutions)
        _keep_stored(joint, self.device)
        phase.rows = memory.rows
        with compat.without_modes():
            phase.streams = streams.values(self.device)
        phase.layer = found.quantized[0].layer if found.quantized else ""
        if self.report is not None:
            self.report(dataclasses.replace(found, outline=outline))


def _keep_stored(joint: torch.fx.GraphModule, device: torch.device) -> None:
    """On CUDA, products read stored operands where the device has units for them."""
    if device.type != "cuda":
        return
    if importlib.util.find_spec("triton") is None:
        logger.warning("products multiply decoded operands: the device's own units need triton, "
                       "which is not installed; %s", install_command("triton"))
        return
    from scaleprop.backends.cuda.devices import capability_of
    from scaleprop.backends.cuda.training import keep_stored

    count = keep_stored(joint, capability_of(device))
    logger.info("%d products read stored operands", count)


def _rank() -> int:
    """Which part of the batch this process has, where training is distributed."""
    distributed = torch.distributed
    return distributed.get_rank() if (
        distributed.is_available() and distributed.is_initialized()) else 0
