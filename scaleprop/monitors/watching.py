"""A model's training step, run once more to look at: operator by operator, beside the run itself.

The model is traced as the run's was, by the same transform, for as long as it is not compiled anew;
random numbers and carried amax are those of the step that the run made last.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor

from scaleprop import _torch_compat as compat
from scaleprop import ops
from scaleprop.backends.graphs import compile_joint
from scaleprop.backends.quantized import compile_quantized
from scaleprop.backends.state import TrainingState
from scaleprop.errors import ConfigError
from scaleprop.formats.scaled import parse
from scaleprop.monitors.measures import Seen
from scaleprop.monitors.solving import compile_solved
from scaleprop.passes.training.lower import CAST, Cast
from scaleprop.passes.training.rewrite import QUANTIZED
from scaleprop.passes.training.solved import solved
from scaleprop.recipes.training import Operand, TrainingRecipe

LossFn = Callable[..., Tensor]
_DIV: Any = torch.ops.aten.div.Tensor
_AMAX = 5  # the argument of quantize_operand


class _Still(TrainingState):
    """A training state at the last step of another's: runs change nothing of that."""

    def follow(self, state: TrainingState) -> None:
        """Have the next run be of ``state``'s last step once more."""
        self.__dict__.update(copy.deepcopy(state.__dict__))
        self._steps = {layer: step - 1 for layer, step in self._steps.items()}


class _Watch(torch.fx.Interpreter):
    """Runs a graph and shows each factor that it quantizes."""

    def __init__(self, module: torch.fx.GraphModule, see: Callable[[Seen], None]) -> None:
        super().__init__(module)
        self._see = see

    def run_node(self, n: torch.fx.Node) -> Any:
        """As the base class."""
        result = super().run_node(n)
        if QUANTIZED in n.meta:
            args, _ = self.fetch_args_kwargs_from_env(n)
            self._see(_seen(n, args, result))
        elif CAST in n.meta and n.target in (ops.cast, _DIV):
            args, _ = self.fetch_args_kwargs_from_env(n)
            self._see(_cast(n.meta[CAST], args, result))
        return result


def _seen(node: torch.fx.Node, args: Sequence[Any], result: Any) -> Seen:
    layer, role, operand = node.meta[QUANTIZED]
    if node.target not in (ops.quantize_operand, ops.eden_operand):
        return Seen(layer, role, operand, -1, args[0], result)
    amax = args[_AMAX] if node.target is ops.quantize_operand else None
    return Seen(layer, role, operand, args[2], args[0], result[0], result[1], amax)


def _cast(made: Cast, args: Sequence[Any], result: Tensor) -> Seen:
    """A value that is held at an exponent, or divided by a scale that was found at run time."""
    operand = Operand(format=f"{made.element}[tensor]*f32")
    element = parse(operand.format).element
    if made.exponent is None:
        scale, x = args[1].to(torch.float64), args[0]
        values = ops.cast(result, made.element)
    else:
        scale = torch.tensor(2.0**made.exponent, dtype=torch.float64, device=result.device)
        x, values = args[0].to(torch.float64) * scale, result
    return Seen(made.value, made.kind, operand, -1, x, values, scale,
                (scale * element.max).to(torch.float32))


class Twin:
    """A prepared model's step in low precision, watched, and in high precision."""

    def __init__(self, model: torch.nn.Module, recipe: TrainingRecipe, seed: int,
                 reports: Callable[[], Sequence[Any]], dynamic: bool | None = None) -> None:
        """reports: what was done to the graphs of the run; dynamic: how it was compiled."""
        self._model, self._state = model, _Still(seed)
        formats = solved(recipe)
        self._see: Callable[[Seen], None] = _ignored

        def runner(graph: torch.fx.GraphModule) -> Callable[..., Any]:
            return lambda *args: _Watch(graph, lambda seen: self._see(seen)).run(*args)

        def low(graph: torch.fx.GraphModule, given: Sequence[Any]) -> Any:
            if formats is not None:
                return compile_solved(graph, given, formats, runner, reports)
            return compile_quantized(graph, given, recipe, runner, self._state)

        def high(graph: torch.fx.GraphModule, given: Sequence[Any]) -> Any:
            return compile_joint(graph, given, _unchanged, "eager")

        self._low = compat.compiled_call(model, low, dynamic=dynamic)
        self._high = compat.compiled_call(model, high, dynamic=dynamic)

    def gradients(
        self, state: TrainingState, see: Callable[[Seen], None], loss_fn: LossFn,
        args: Sequence[Any], kwargs: Mapping[str, Any],
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Parameter → its gradients, low and high; ``see`` is shown every quantized factor.

        Raises:
            ConfigError: where the loss is no scalar that depends on a parameter.
        """
        self._state.follow(state)
        self._see = see
        try:
            low = self._gradients(self._low, loss_fn, args, kwargs)
        finally:
            self._see = _ignored
        high = self._gradients(self._high, loss_fn, args, kwargs)
        return {name: (low[name], high[name]) for name in low if name in high}

    def _gradients(
        self, call: Callable[..., Any], loss_fn: LossFn, args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        named = {name: value for name, value in self._model.named_parameters()
                 if value.requires_grad}
        with _undisturbed(self._model), torch.enable_grad(), compat.called_as(self._model, call):
            loss = loss_fn(self._model, *args, **kwargs)
            _check(loss)
            differentiate: Any = torch.autograd.grad  # typed as if it never gave None
            found = differentiate(loss, list(named.values()), allow_unused=True)
        return {name: value for name, value in zip(named, found, strict=True) if value is not None}


def _ignored(_: Seen) -> None:
    """Nothing is measured."""


def _unchanged(_: torch.fx.GraphModule) -> None:
    """High precision."""


def _check(loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad:
        is_ = f"a tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ConfigError(f"the monitor's loss is {is_}, not a scalar that depends on parameters. "
                          "Remedy: loss_fn=lambda model, *batch: …, the loss of one batch")


@contextlib.contextmanager
def _undisturbed(model: torch.nn.Module) -> Generator[None]:
    """Buffers and torch's random numbers are afterwards what they were."""
    before = [(module, name, buffer, buffer.detach().clone()) for module in model.modules()
              for name, buffer in module.named_buffers(recurse=False)]
    devices = {value.device for value in model.parameters() if value.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, value in before:
                    if getattr(module, name) is not buffer:
                        setattr(module, name, buffer)
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)
