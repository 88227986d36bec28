"""Constants on the way back: gradients that products read have unit RMS.

Every value v has a potential φ(v): the gradient that is held for it is the true one times 2^φ(v).
On the edge from v to a reader u the gradient is multiplied by 2^(φ(v) − φ(u)). Whatever the
potentials are, gradients that meet at a value are held at the same power, and each parameter's is
the true one times 2^φ, a known constant: no choice of potentials can turn a gradient.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from scaleprop.errors import CalibrationError, ConfigError
from scaleprop.ops.scaling import scale_fwd_bwd
from scaleprop.passes.unit.forward import repeatable, rms
from scaleprop.passes.unit.module import UnitScaled
from scaleprop.passes.unit.structure import (
    Structure,
    attribute,
    find_signals,
    is_float,
    product_contraction,
)
from scaleprop.passes.unit.writer import INHERITED

LossFunction = Callable[[Any], torch.Tensor]


def scale_backward(
    module: UnitScaled, structure: Structure, inputs: Sequence[Any], out_spec: Any,
    loss_fn: LossFunction | None, whole: bool,
) -> dict[str, float]:
    """Insert constants for the gradients, in place; the parameters' potentials, by name.

    inputs: the placeholders' values. loss_fn: what makes a scalar of the model's output; without
    it, the output's first scalar, or all of it weighted with normal random numbers. whole: round
    potentials, so that constants are powers of two and exact.

    Raises:
        CalibrationError: where no gradient reaches any parameter, or one is NaN or Inf.
    """
    sizes = _measured(module, inputs, out_spec, loss_fn)
    potentials = _Potentials(module, structure, sizes, whole)
    potentials.solve()
    _insert(module, potentials.of)
    return potentials.parameters


class _Recorder(torch.fx.Interpreter):
    """Notes the RMS of every value's gradient."""

    def __init__(self, module: UnitScaled) -> None:
        super().__init__(module)
        self.sizes: dict[torch.fx.Node, float] = {}
        self.hooks: list[RemovableHandle] = []

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor) and result.requires_grad and n.op != "output":
            self.hooks.append(result.register_hook(lambda gradient: self._note(n, gradient)))
        return result

    def _note(self, node: torch.fx.Node, gradient: torch.Tensor) -> None:
        if not bool(torch.isfinite(gradient).all()):
            raise CalibrationError(
                f"the gradient of {node.name!r} ({node.target}) is NaN or Inf on the example "
                "inputs. Remedy: pass inputs, or a loss, with finite gradients.")
        self.sizes[node] = rms(gradient)


def _measured(
    module: UnitScaled, inputs: Sequence[Any], out_spec: Any, loss_fn: LossFunction | None
) -> dict[torch.fx.Node, float]:
    recorder = _Recorder(module)
    with torch.enable_grad(), repeatable(module):
        flat = recorder.run(*inputs, enable_io_processing=False)
        leaves = pytree.tree_leaves(flat)
        loss = _loss(leaves, out_spec, loss_fn)
        loss.backward()
    for hook in recorder.hooks:  # parameters would keep theirs
        hook.remove()
    for parameter in module.parameters():
        parameter.grad = None
    if not any(node.op == "get_attr" and size > 0 for node, size in recorder.sizes.items()):
        raise CalibrationError("no gradient reaches any parameter on the example inputs. "
                               "Remedy: check that parameters require gradients, and the loss.")
    return recorder.sizes


def _loss(leaves: list[Any], out_spec: Any, loss_fn: LossFunction | None) -> torch.Tensor:
    if loss_fn is not None:
        loss = loss_fn(pytree.tree_unflatten(leaves, out_spec))
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError("loss_fn must return a scalar tensor that depends on the output")
        return loss.sum()
    floats = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    if not floats:
        raise CalibrationError("no output of the model depends on a parameter that requires a "
                               "gradient. Remedy: set requires_grad, or check the inputs.")
    scalar = next((leaf for leaf in floats if leaf.numel() == 1), None)
    if scalar is not None:
        return scalar.sum()
    return torch.stack([(leaf * torch.randn_like(leaf)).sum().float() for leaf in floats]).sum()


class _Potentials:
    """of: node → φ. parameters: name → φ."""

    def __init__(
        self, module: UnitScaled, structure: Structure, sizes: Mapping[torch.fx.Node, float],
        whole: bool,
    ) -> None:
        self.of: dict[torch.fx.Node, float] = {}
        self.parameters: dict[str, float] = {}
        self._module, self._structure = module, structure
        self._sizes, self._whole = sizes, whole

    def solve(self) -> None:
        """Values whose gradients a product reads are at unit RMS; others follow their reader."""
        self._share_parameters()
        self._share_tuples()
        for node in reversed(self._module.graph.nodes):
            if node not in self.of:
                self.of[node] = self._choose(node)

    def _choose(self, node: torch.fx.Node) -> float:
        if node.op in ("output", "placeholder"):  # who calls the model sees true gradients
            return 0.0
        if self._is_read_by_product(node) and (best := self._best(node)) is not None:
            return best
        found = {self.of[user] for user in node.users if _passes_gradient(node, user)}
        if len(found) <= 1:
            return found.pop() if found else 0.0
        best = self._best(node)
        return max(found) if best is None else best

    def _is_read_by_product(self, node: torch.fx.Node) -> bool:
        """Whether backward multiplies the gradient of ``node``, or of what it is scaled to."""
        return product_contraction(node) is not None and (
            node not in self._structure.products
            or self._structure.products[node].activation is not None)

    def _best(self, node: torch.fx.Node) -> float | None:
        """The potential at which the gradient has unit RMS; None where it is none or zero."""
        size = self._sizes.get(node, 0.0)
        if size <= 0:
            return None
        exact = -math.log2(size)
        return float(round(exact)) if self._whole else exact

    def _share_parameters(self) -> None:
        """One potential for all uses of a parameter, under all its names."""
        by_parameter: dict[int, list[torch.fx.Node]] = {}
        for node in self._module.graph.find_nodes(op="get_attr"):
            value = attribute(self._module, node)
            if isinstance(value, torch.nn.Parameter):
                by_parameter.setdefault(id(value), []).append(node)
        names = {id(value): name for name, value in self._module.named_parameters()}
        for key, nodes in by_parameter.items():
            best = next((b for node in nodes if (b := self._best(node)) is not None), 0.0)
            self.of.update(dict.fromkeys(nodes, best))
            self.parameters[names[key]] = best

    def _share_tuples(self) -> None:
        """The parts of a tuple have the tuple's potential: nothing can come in between."""
        for node in self._module.graph.nodes:
            parts = [user for user in node.users if user.target is operator.getitem]
            if parts and not isinstance(node.meta.get("val"), torch.Tensor):
                found = [b for part in parts if (b := self._best(part)) is not None]
                shared = sorted(found)[len(found) // 2] if found else 0.0
                self.of.update(dict.fromkeys([node, *parts], shared))


def _passes_gradient(node: torch.fx.Node, user: torch.fx.Node) -> bool:
    """Whether a gradient may come from ``user`` to ``node``."""
    if user.op == "output":
        return True
    value = user.meta.get("val")
    return not isinstance(value, torch.Tensor) or value.is_floating_point()


def _insert(module: UnitScaled, of: Mapping[torch.fx.Node, float]) -> None:
    """Put 2^(φ(v) − φ(u)) on the edges: in a multiplier where there is one, else in a new node."""
    graph = module.graph
    signals = find_signals(module)
    for node in list(graph.nodes):
        if not is_float(node) or node not in signals:
            continue
        shifts: dict[float, list[torch.fx.Node]] = {}
        for user in node.users:
            if _passes_gradient(node, user) and (shift := of[node] - of[user]):
                shifts.setdefault(shift, []).append(user)
        for shift, users in shifts.items():
            plain = [user for user in users if user.target is not scale_fwd_bwd]
            for user in users:
                if user.target is scale_fwd_bwd:
                    forward: Any = user.args[1]
                    user.update_arg(2, forward * 2.0**shift)
            if plain:
                _between(graph, node, plain, 2.0**shift)


def _between(
    graph: torch.fx.Graph, node: torch.fx.Node, users: list[torch.fx.Node], factor: float
) -> None:
    at = node
    while at.op in ("placeholder", "get_attr") and at.next.op in ("placeholder", "get_attr"):
        at = at.next
    with graph.inserting_after(at):
        made = graph.call_function(scale_fwd_bwd, (node, 1.0, factor))
    made.meta = {key: node.meta[key] for key in ("val", *INHERITED) if key in node.meta}
    node.replace_all_uses_with(made, lambda user: user in users)
