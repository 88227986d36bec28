"""NaN and ±∞ in a training step: where they come from, and whether the step is worth a look."""

from __future__ import annotations

import operator
from collections.abc import Mapping

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
        if not _is_bad(run, node):
            continue
        origin = _origin(run, node)
        seen = run.measured[origin]
        made = origin.args[0] if origin.target is operator.getitem else origin
        assert isinstance(made, torch.fx.Node)
        begins = (f"parameter {parameters[origin]!r}" if origin in parameters
                  else f"input {origin.name!r}") if origin.op == "placeholder" else describe(made)
        is_given = origin.op == "placeholder"
        raise CalibrationError(
            f"{what} is NaN or Inf: there is no step to look at. It begins at {begins}: "
            f"{round(seen.nonfinite * seen.count)} of {seen.count} values are NaN or Inf"
            + (". Remedy: pass finite numbers." if is_given
               else f", and all that it reads is finite. {_REMEDY}"))


def nonfinite_finding(run: Run) -> list[Finding]:
    """Values that are NaN or ±∞, and mask nothing, in a step whose loss and gradients are finite."""
    bad = [node for node in run.measured if _is_bad(run, node)]
    if not bad:
        return []
    first = bad[0]
    shares = tuple(run.measured[node].nonfinite for node in bad)
    return [Finding(
        name="overflow", warning=True,
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
            several = source not in run.measured and source.op == "call_function"
            if source not in seen and (several or _is_bad(run, source)):
                seen.add(source)
                ahead.append(source)
    return next(value for value in run.measured if value in seen and _is_bad(run, value))
