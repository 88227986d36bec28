"""Formats as a checkpoint has them: weights in its own codes and scales, none rounded again.

The checkpoint's weights, decoded, went into the model that was captured. ``OrderStored`` sorts the
input channels of those whose groups are of channels far apart; ``AssignStored`` takes the place of
``assign-formats``, and hands the codes to ``quantize-weights``, which stores them as they are:

    linear(x, w, b)  →  linear(index_select(x, order), w[:, order], b)      where there is an order
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.fx

from scaleprop.errors import ConfigError, describe
from scaleprop.formats import ScaledTensor
from scaleprop.passes.assign import AssignFormats, Assignment
from scaleprop.passes.base import Pass, PassResult, Program
from scaleprop.passes.rewrite import Rewriter
from scaleprop.passes.solving.solved import SOLVED
from scaleprop.recipes import Role
from scaleprop.report.records import TensorRecord
from scaleprop.rules import Contraction, Operand, contraction_of

aten: Any = torch.ops.aten

_KINDS = ("linear", "embedding")


@dataclasses.dataclass(frozen=True, eq=False)
class StoredWeight:
    """A weight as a checkpoint has it.

    tensor: codes and scales of [N, K]. activation: how what it is multiplied with is quantized.
    scales: of that, where static: the scale (and zero point), or NVFP4's scale of the tensor.
    order: [K], which input channel comes where; None: as they are.
    """

    tensor: ScaledTensor
    activation: Role | None = None
    scales: tuple[float, ...] | None = None
    order: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class OrderStored(Pass):
    """Sort the input channels of stored weights whose groups are of channels far apart."""

    weights: Mapping[str, StoredWeight]

    name: ClassVar[str] = "order-stored"
    preserves_function: ClassVar[bool] = True

    def run(self, program: Program) -> PassResult:
        """The program with a selection of channels before each such linear."""
        rewriter = Rewriter(program, self.name)
        orders = {name: kept.order for name, kept in self.weights.items()
                  if kept.order is not None}  # fmt: skip
        count = 0
        for node in list(rewriter.graph.nodes):
            name = _weight_name(node, contraction_of(node))
            if name in orders:
                self._sort(rewriter, node, orders[name])
                count += 1
        note = f"the input channels of {count} linears are put in the order of their groups"
        return PassResult(rewriter.finish(), bool(count), (note,))

    def _sort(self, rewriter: Rewriter, node: torch.fx.Node, order: torch.Tensor) -> None:
        x, w, *rest = node.args
        assert isinstance(w, torch.fx.Node)
        name = str(w.target)
        if node.target is not aten.linear.default or len(w.users) != 1:
            raise ConfigError(f"{describe(node)}: the groups of {name} are of channels in another "
                              "order, and it is read elsewhere, too, where no order can be put")
        weight = rewriter.tensor(w)
        assert weight is not None
        why = f"the groups of {name} are of channels far apart"
        places = rewriter.constant(order, f"{name}_order", at=node, why=why)
        selected = rewriter.call(aten.index_select.default, (x, -1, places), at=node, why=why)
        columns = rewriter.constant(weight.detach()[:, order], name, at=node, why=why)
        node.args = (selected, columns, *rest)
        rewriter.take_name(w, columns)
        rewriter.modified = True


@dataclasses.dataclass(frozen=True)
class AssignStored(AssignFormats):
    """Give stored weights the formats that they have, and leave all else high.

    weights: parameter → what the checkpoint has of it. recipe: names what is done.
    """

    weights: Mapping[str, StoredWeight] = dataclasses.field(default_factory=dict)

    def run(self, program: Program) -> PassResult:
        """The same graph with decisions, codes and scales in ``node.meta``.

        Raises:
            ConfigError: where an operator reads a stored weight that has no form with codes.
        """
        result = super().run(program)
        for node in result.program.module.graph.nodes:
            for source in node.all_input_nodes:
                name = str(source.target)
                if source.op != "get_attr" or name not in self.weights:
                    continue
                if _weight_name(node, contraction_of(node)) != name or SOLVED not in node.meta:
                    raise ConfigError(
                        f"{describe(node)} reads {name}, which the checkpoint has in "
                        f"{self.weights[name].tensor.format}; only linears and embeddings read "
                        "codes. Remedy: load the decoded model (scaleprop.interchange.decoded)")
        return result

    def _assign(
        self, node: torch.fx.Node, contraction: Contraction
    ) -> tuple[Assignment, list[TensorRecord]]:
        assignment, records = super()._assign(node, contraction)
        if assignment.weight is not None:
            kept = self._kept(node, contraction)
            assert kept is not None
            node.meta[SOLVED] = kept.tensor
            assignment = dataclasses.replace(assignment, scales=kept.scales)
        return assignment, records

    def _choose(
        self, node: torch.fx.Node, contraction: Contraction, operand: Operand, key: str | None
    ) -> tuple[Role | None, str]:
        kept = self._kept(node, contraction)
        if kept is None:
            return None, "the checkpoint keeps it in high precision"
        if operand.role == "weight":
            return Role(format=str(kept.tensor.format)), ""
        return kept.activation, "the checkpoint quantizes the weight alone"

    def _kept(self, node: torch.fx.Node, contraction: Contraction) -> StoredWeight | None:
        name = _weight_name(node, contraction)
        return self.weights.get(name) if name is not None and contraction.kind in _KINDS else None


def _weight_name(node: torch.fx.Node, contraction: Contraction | None) -> str | None:
    """The parameter that a contraction reads as its weight."""
    for operand in contraction.operands if contraction is not None else ():
        if operand.role == "weight" and operand.argument < len(node.args):
            source = node.args[operand.argument]
            if isinstance(source, torch.fx.Node) and source.op == "get_attr":
                return str(source.target)
    return None
