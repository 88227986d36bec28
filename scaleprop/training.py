"""Training in low precision without touching the model's code."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from scaleprop import _torch_compat as compat
from scaleprop.backends.dynamo import Inner, Options, Recipe, compile_with
from scaleprop.errors import ConfigError
from scaleprop.passes.training import Lowered


class ScaleReports(tuple[Lowered, ...]):
    """What was done to each graph of a prepared model."""

    def show(self) -> None:
        """Print a table of every cast, and why products stayed high.

        Raises:
            BackendUnavailable: without rich.
        """
        from rich.table import Table

        from scaleprop.report.console import stdout_console

        console = stdout_console()
        for place, graph in enumerate(self):
            table = Table(title=f"graph {place}: {len(graph.products)} products in low precision")
            for name in ("value", "is", "element", "amax", "drift", "exponent", "why"):
                table.add_column(name, overflow="fold")
            for cast in graph.casts:
                table.add_row(
                    cast.value, cast.kind, cast.element,
                    "?" if cast.amax is None else f"{cast.amax:.3g}", f"2^{cast.drift:.1f}",
                    "at run time" if cast.exponent is None else f"2^{cast.exponent}", cast.why)
            for node, why in graph.high.items():
                table.add_row(node, "product", "high", "", "", "", why)
            console.print(table)


_REPORTS: WeakKeyDictionary[torch.nn.Module, list[Lowered]] = WeakKeyDictionary()


def prepare_training(
    model: torch.nn.Module, recipe: Recipe = "fp8", *, inner: Inner = "inductor"
) -> torch.nn.Module:
    """Let ``model`` run forward and backward by ``recipe``, from its next call on.

    The model itself is returned: its parameters, ``state_dict`` keys, hooks and optimizers stay
    what they were, as after ``nn.Module.compile``. Call it again to change the recipe.
    ``model.scale_report()`` says what was done.

    Args:
        recipe: ``fp8`` runs linear layers on E4M3 data and gradients in E5M2; ``fp8-unscaled``
            the same without exponents, for unit-scaled models; ``bf16`` in bfloat16; ``fp32``
            changes nothing. See ``scaleprop.backends.dynamo.Options``.
        inner: what runs the rewritten graphs: ``inductor``, or ``eager``, to debug.

    Raises:
        ConfigError: on an unknown recipe or inner compiler, or a model that Dynamo cannot trace.
    """
    options = Options(recipe=recipe, inner=inner)
    _check(model)
    reports = _REPORTS[model] = []
    backend = functools.partial(_compile, options=options, reports=reports)
    compat.compile_in_place(model, backend)
    # no parameter and no module, so not in state_dict; a copy's own says that it is not prepared
    report: Any = functools.partial(scale_report, model)
    model.scale_report = report
    return model


def _check(model: Any) -> None:
    """Raise ``ConfigError`` for what would run as it is, or not at all."""
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"prepare_training takes a torch.nn.Module, not {type(model).__name__}. "
                          'Remedy: torch.compile(function, backend="scaleprop") for functions.')
    if isinstance(model, torch.jit.ScriptModule):
        raise ConfigError(f"{type(model).__name__} is TorchScript, which runs past torch.compile. "
                          "Remedy: prepare the module that was scripted.")


def _compile(
    module: torch.fx.GraphModule, inputs: Sequence[Any], *, options: Options, reports: list[Lowered]
) -> Any:
    return compile_with(module, inputs, options, reports.append)


def scale_report(model: torch.nn.Module) -> ScaleReports:
    """What was done to each graph of a prepared model so far: products, casts and their exponents.

    Raises:
        ConfigError: where ``model`` was not given to ``prepare_training``.
    """
    if model not in _REPORTS:
        raise ConfigError(f"{type(model).__name__} was not given to scaleprop.prepare_training")
    return ScaleReports(_REPORTS[model])
