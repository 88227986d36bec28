"""Assign formats: which operand of which operator gets which format, and why the others do not.

Operators are found through the ``contraction`` of their rule, never by module. The decision is
written to ``node.meta`` for the quantizing passes; each operand that stays high gets a record.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.fx

from scaleprop.errors import ConfigError, source_line
from scaleprop.formats import parse
from scaleprop.passes.base import Pass, PassResult, Program
from scaleprop.passes.canonicalise.attention import ATTENTION
from scaleprop.passes.outline import module_paths
from scaleprop.passes.provenance import innermost_module
from scaleprop.passes.rewrite import Rewriter, shape_of
from scaleprop.passes.stored import (
    contraction_records,
    is_scaled,
    stored_records,
    stored_weight,
)
from scaleprop.recipes.base import Recipe, Role
from scaleprop.report.records import Role as RecordRole
from scaleprop.report.records import TensorRecord
from scaleprop.rules import Contraction, Operand, contraction_of, rule_for

ASSIGNMENT = "scaleprop.assignment"  # the key in node.meta

# contraction kind → the recipe's roles for (activation, weight)
_ROLES: Mapping[str, tuple[str | None, str]] = {
    "linear": ("fprop.x", "fprop.w"),
    "conv": ("conv.x", "conv.w"),
    "embedding": (None, "embedding"),
}
_RECORD_ROLES: Mapping[str | None, RecordRole] = {
    "fprop.x": "fprop.x",
    "fprop.w": "fprop.w",
    "conv.x": "fprop.x",
    "conv.w": "fprop.w",
    "embedding": "embedding",
}


@dataclasses.dataclass(frozen=True)
class Assignment:
    """What the operands of an operator ``op`` become. None: stays in high precision.

    extremes: of the activation, that its static scale is made for; None: those that calibration
        saw. A transform of the activation's channels drops them.
    scales: of the activation, where they are given: the scale (and zero point), or that of the
        whole tensor where blocks have scales of their own, found at run time.
    """

    contraction: Contraction
    activation: Role | None
    weight: Role | None
    op: str
    extremes: tuple[float, float] | None = None
    scales: tuple[float, ...] | None = None

    def argument(self, node: torch.fx.Node, role: str) -> Any:
        """The node's argument in ``role`` (activation, weight or bias); None if absent."""
        for operand in self.contraction.operands:
            if operand.role == role and operand.argument < len(node.args):
                return node.args[operand.argument]
        return None


def assignment_of(node: torch.fx.Node) -> Assignment | None:
    """What ``AssignFormats`` decided for ``node``."""
    return node.meta.get(ASSIGNMENT)


@dataclasses.dataclass(frozen=True)
class AssignFormats(Pass):
    """Give each operand of each contraction its format from a recipe.

    exclude, include: what stays high, or the only things quantized. Shell patterns (``*``, ``?``)
        over the paths of the modules around an operator, its parameters' names, its node name; or
        an operator's name such as ``aten.conv2d``.
    """

    recipe: Recipe
    exclude: Sequence[str] = ()
    include: Sequence[str] = ()

    name: ClassVar[str] = "assign-formats"
    preserves_function: ClassVar[bool] = True
    one_by_one: ClassVar[bool] = True

    def run(self, program: Program) -> PassResult:
        """The same graph with decisions in ``node.meta`` and records of what stays high."""
        rewriter = Rewriter(program, self.name)
        nodes = [node for node in rewriter.graph.nodes if node.op == "call_function"]
        names = {node: node_names(node) for node in nodes}
        check_patterns(self.exclude, self.include, itertools.chain(*names.values()))
        records: list[TensorRecord] = []
        count = 0
        for node in nodes:
            if is_scaled(node):
                records.extend(stored_records(rewriter, node))
                continue
            contraction, rule = contraction_of(node), rule_for(node.target)
            stays = rule is not None and rule.high
            if contraction is None or contraction.kind not in _ROLES or stays:
                records.extend(_unquantizable(node, contraction, self.name))
                continue
            if (stored := _stored(node, contraction)) is not None:
                x = contraction.operand("activation")
                read = None if x is None else node.args[x.argument]
                records.extend(contraction_records(rewriter, node, read, stored))
                continue
            reason = (reason_against(names[node], self.exclude, self.include)
                      or _structural_reason(rewriter, node))
            if reason is not None:
                records.extend(_stays_high(node, contraction, reason, self.name))
                continue
            assignment, kept = self._assign(node, contraction)
            records.extend(kept)
            if assignment.activation or assignment.weight:
                node.meta[ASSIGNMENT] = assignment
                count += 1
        assigned = rewriter.program.replace(
            records=(*program.records, *records),
            is_assigned=True,
            tolerance=self.recipe.tolerance,
        )
        note = f"{count} operators get formats from recipe {self.recipe.name!r}"
        return PassResult(assigned, True, (note,))

    def _assign(
        self, node: torch.fx.Node, contraction: Contraction
    ) -> tuple[Assignment, list[TensorRecord]]:
        kept: list[TensorRecord] = []
        found: dict[str, Role | None] = {"activation": None, "weight": None}
        for operand in contraction.operands:
            if operand.role == "bias" or operand.argument >= len(node.args):
                continue
            key = _ROLES[contraction.kind][operand.role == "weight"]
            role, reason = self._choose(node, contraction, operand, key)
            found[operand.role] = role
            if role is None:
                kept.append(high_record(node, operand, key, reason, self.name))
        return Assignment(contraction, found["activation"], found["weight"], str(node.target)), kept

    def _choose(
        self, node: torch.fx.Node, contraction: Contraction, operand: Operand, key: str | None
    ) -> tuple[Role | None, str]:
        """What an operand becomes; or None, and why."""
        role = self.recipe.roles.get(key) if key else None
        if role is None:
            return None, f"recipe {self.recipe.name!r} has no role {key!r}"
        problem = unfit(role, contraction, operand)
        return (role, "") if problem is None else (None, problem)


def reason_against(
    names: Iterable[str], exclude: Sequence[str], include: Sequence[str]
) -> str | None:
    """Why the user's patterns keep high what has these names."""
    names = tuple(names)
    for pattern in exclude:
        if _matches(pattern, names):
            return f"excluded by {pattern!r}"
    if include and not any(_matches(pattern, names) for pattern in include):
        return f"not among include={list(include)}"
    return None


def check_patterns(
    exclude: Sequence[str], include: Sequence[str], names: Iterable[str]
) -> None:
    """Refuse patterns that match nothing: they are misspelt."""
    everything = sorted(set(names))
    for option, patterns in (("exclude", exclude), ("include", include)):
        for pattern in patterns:
            if not _matches(pattern, everything):
                near = difflib.get_close_matches(pattern, everything, n=5, cutoff=0.3)
                raise ConfigError(
                    f"{option}={pattern!r} matches no module, parameter, node or operator; "
                    f"near: {', '.join(map(repr, near or everything[:5]))}"
                )


def node_names(node: torch.fx.Node) -> tuple[str, ...]:
    """Everything a pattern may call ``node`` by."""
    operator = str(node.target)
    original = node.meta.get("original_aten")
    operators = {operator, operator.rpartition(".")[0], str(original or operator)}
    parameters = [str(source.target) for source in node.all_input_nodes if source.op == "get_attr"]
    return (node.name, *sorted(operators), *module_paths(node), *parameters)


def _matches(pattern: str, names: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def _structural_reason(rewriter: Rewriter, node: torch.fx.Node) -> str | None:
    """Why an operator cannot be quantized whatever the recipe says."""
    contraction = contraction_of(node)
    operand = contraction.operand("weight") if contraction else None
    if operand is None:
        return "it has no weight operand"
    weight = rewriter.tensor(node.args[operand.argument])
    if weight is None:
        return "its weight is computed in the graph, not a parameter"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, not floating point"
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
        return "it computes in float64, which scaled operators would round"
    return None


def _stored(node: torch.fx.Node, contraction: Contraction) -> torch.fx.Node | None:
    """The stored codes that a node's weight is made of."""
    operand = contraction.operand("weight")
    return None if operand is None else stored_weight(node.args[operand.argument])


def unfit(role: Role, contraction: Contraction, operand: Operand) -> str | None:
    """Why a role's format cannot serve this operand; None where it can."""
    fmt = parse(role.format)
    kind = fmt.granularity.kind
    if contraction.kind == "embedding" and kind not in ("row", "block"):
        return f"{fmt} has no scale per row of the table; use a [row] or block format"
    if contraction.kind == "conv" and operand.role == "activation" and kind != "tensor":
        return f"{fmt} is not per tensor; a convolution's input needs one scale"
    if contraction.kind == "linear" and kind == "channel":
        return f"{fmt} has a scale per summed index, which cannot leave the sum"
    static = role.scaling == "static" and operand.role == "activation"
    if static and kind != "tensor" and not fmt.two_level:
        return f"{fmt} cannot be static: only a per-tensor scale is known before run time"
    return None


def _unquantizable(
    node: torch.fx.Node, contraction: Contraction | None, by: str
) -> list[TensorRecord]:
    """Records of an operator that no recipe quantizes, where a reader would ask why."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return []
    if not any(isinstance(n.meta.get("val"), torch.Tensor) for n in node.all_input_nodes):
        return []  # a constant made in place
    rule = rule_for(node.target)
    if rule is None:
        if getattr(node.target, "namespace", None) is None:
            return []
        reason = f"no rule for {node.target}: it runs as it was"
    elif node.meta.get(ATTENTION):
        reason = f"attention ({node.meta[ATTENTION]}) runs in high precision"
    else:
        reason = rule.high
    if not reason:
        return []
    if contraction is not None:
        return _stays_high(node, contraction, reason, by)
    return [high_record(node, Operand(0, "activation"), None, reason, by)]


def _stays_high(
    node: torch.fx.Node, contraction: Contraction, reason: str, by: str
) -> list[TensorRecord]:
    roles = _ROLES.get(contraction.kind, (None, None))
    return [
        high_record(node, operand, roles[operand.role == "weight"], reason, by)
        for operand in contraction.operands
        if operand.role != "bias" and operand.argument < len(node.args)
    ]


def high_record(
    node: torch.fx.Node, operand: Operand, role: str | None, reason: str, by: str
) -> TensorRecord:
    """The record of an operand that stays in high precision."""
    argument = node.args[operand.argument] if operand.argument < len(node.args) else None
    source = argument if isinstance(argument, torch.fx.Node) else node
    value = source.meta.get("val")
    nbytes = None
    if source.op == "get_attr" and isinstance(value, torch.Tensor):
        nbytes = value.numel() * value.element_size()
    return TensorRecord(
        node=node.name,
        op=str(node.target),
        operand=str(source.target) if source.op == "get_attr" else source.name,
        role=_RECORD_ROLES.get(role, "other"),
        shape=shape_of(source),
        decided_by=by,
        reason=reason,
        nbytes=nbytes,
        nbytes_high=nbytes,
        source=source_line(node),
        module=innermost_module(node),
    )
