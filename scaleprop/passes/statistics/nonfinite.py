"""NaN and ±∞ in a training step: where they come from, and whether the step is worth a look."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch.fx

from scaleprop.errors import CalibrationError, describe, source_line
from scaleprop.passes.statistics.measure import Run
from scaleprop.report.scales import Finding

_REMEDY = ("Remedy: keep what this operator reads in its domain and its type's range: a smaller "
           "scale, float32 or bfloat16 for float16, an ε in what is divided by or taken the "
           "logarithm of, no row that is masked throughout; or loss scaling for small batches.")


def refuse_nonfinite(
    run: Run, loss: torch.fx.Node, gradients: Mapping[torch.fx.Node, str],
    parameters: Mapping[torch.fx.Node, str],
) -> None:
    """Stop where a step's loss, or the gradient of a parameter, is NaN or ±∞ anywhere.

    gradients, parameters: node → the parameter's name.

    Raises:
        CalibrationError: naming the value that is the first to be NaN or ±∞ on the way there.
    """
    wrong = {node: f"the gradient of {name!r}" for node, name in gradients.items()}
    for node, what in {loss: "the loss", **wrong}.items():
        if _is_bad(run, node):
            raise CalibrationError(f"{what} is NaN or Inf: there is no step to look at. It begins "
                                   f"at {_begin(run, _origin(run, node), parameters)}")


def _begin(run: Run, origin: torch.fx.Node, parameters: Mapping[torch.fx.Node, str]) -> str:
    """Where NaN and ±∞ begin, how many they are there, and what to do."""
    seen = run.measured[origin]
    share = f"{round(seen.nonfinite * seen.count)} of {seen.count} values are NaN or Inf"
    if origin.op == "placeholder":
        name = f"parameter {parameters[origin]!r}" if origin in parameters \
            else f"input {origin.name!r}"
        return f"{name}: {share}. Remedy: pass finite numbers."
    made: Any = origin.args[0] if origin.target is operator.getitem else origin
    return f"{describe(made)}: {share}, while what it reads is finite or masked. {_REMEDY}"


def nonfinite_finding(run: Run) -> list[Finding]:
    """Values that are NaN or ±∞ and mask nothing, though the loss and its gradients are finite.
    A warning where a parameter or a gradient has a part in one; else they are a model's own."""
    bad = [node for node in run.measured if _is_bad(run, node)]
    if not bad:
        return []
    first = bad[0]
    shares = tuple(run.measured[node].nonfinite for node in bad)
    return [Finding(
        name="overflow", warning=any(node not in run.given for node in bad),
        message=f"{len(bad)} values hold NaN or Inf that masks no softmax, up to {max(shares):.2%} "
                f"of one; the first is {describe(first)}",
        figures={"share": shares},
        advice="what is clamped, selected or saturated later hides it from the loss, until it does "
               "not: keep it in range where it is made",
        where=tuple(dict.fromkeys(source_line(node) for node in bad)))]


def _is_bad(run: Run, node: torch.fx.Node) -> bool:
    return node in run.measured and run.measured[node].nonfinite > 0


def _origin(run: Run, node: torch.fx.Node) -> torch.fx.Node:
    """The first value with NaN or ±∞ that a chain of such values leads to ``node`` from."""
    seen, ahead = {node}, [node]
    for value in ahead:  # grows
        for source in value.all_input_nodes:
            several = isinstance(source.meta.get("val"), tuple | list)  # its parts are measured
            if source not in seen and (several or _is_bad(run, source)):
                seen.add(source)
                ahead.append(source)
    return next(value for value in run.measured if value in seen and _is_bad(run, value))
