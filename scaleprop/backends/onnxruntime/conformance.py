"""Does a written model compute what the program means? Checked node by node.

Low precision is discontinuous: one float32 sum that differs in its last bit can move a code, a
moved extreme can move a whole tensor's scale, and two right implementations drift apart by as
much as the format's own error. So every node is compared *given the same inputs*: the reference
runs with onnxruntime's own values in place of its own, and each node must agree within its bound.
"""

from __future__ import annotations

import operator
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
import torch.fx

from scaleprop.backends.onnxruntime.emitter import Emitted
from scaleprop.backends.onnxruntime.session import OnnxExecutable, SessionConfig
from scaleprop.errors import MismatchError, describe
from scaleprop.passes.base import Program, relative_error

PLAIN_BOUND = 2.0**-13  # float32 operators: other summation orders, other polynomials for erf
PROBE = ".probe.onnx"


def check_nodes(
    emitted: Emitted,
    written: Path,
    program: Program,
    inputs: Iterable[Sequence[Any]],
    config: SessionConfig,
) -> float:
    """Compare every node of the file ``written`` with the reference, on its own inputs.

    inputs: sets of flat inputs. A second model beside ``written``, which makes every value an
    output, is run on each and deleted.

    Returns:
        The largest error found: max|difference| / max|reference|.

    Raises:
        MismatchError: naming the node, its error and its bound.
    """
    # a kernel that rounds operands states the error it expects; the recipe's is the one promised
    bounds = {node: program.tolerance for node, stated in emitted.bounds.items()
              if stated > PLAIN_BOUND}
    names = set(emitted.values.values())
    probe = written.with_name(written.stem + PROBE)
    worst = 0.0
    try:
        _write_probe(written, probe, names - {str(v.name) for v in emitted.model.graph.outputs})
        executable = OnnxExecutable(emitted, probe, config)
        for leaves in inputs:
            found = executable.fetch(leaves, names)
            forced = _Forced(
                program.module, {n: found[name] for n, name in emitted.values.items()}, bounds)
            with torch.no_grad():
                forced.run(*leaves, enable_io_processing=False)
            worst = max(worst, forced.worst)
    finally:
        probe.unlink(missing_ok=True)
    return worst


def _write_probe(written: Path, probe: Path, names: Iterable[str]) -> None:
    """A copy of ``written`` with more outputs, appended: protobuf messages merge when they follow
    one another, so gigabytes of weights need not be parsed."""
    more = onnx.ModelProto()
    more.graph.output.extend(map(onnx.helper.make_empty_tensor_value_info, sorted(names)))
    shutil.copyfile(written, probe)
    with probe.open("ab") as file:
        file.write(more.SerializeToString())


class _Forced(torch.fx.Interpreter):
    """The reference, with another implementation's values put in place of its own."""

    def __init__(
        self,
        module: torch.fx.GraphModule,
        values: Mapping[str, torch.Tensor],
        bounds: Mapping[str, float],
    ) -> None:
        super().__init__(module)
        self.extra_traceback = False  # messages name the node themselves
        self._bounds = bounds
        self._values = values
        self._searched: dict[torch.fx.Node, tuple[torch.Tensor, int]] = {}
        self.worst = 0.0

    def run_node(self, n: torch.fx.Node) -> Any:
        if n.target in _PLACES:
            args, _ = self.fetch_args_kwargs_from_env(n)
            self._searched[n] = (args[0], _place_axis(n))
        expected = super().run_node(n)
        actual = self._values.get(n.name)
        if actual is None or not isinstance(expected, torch.Tensor):
            return expected
        if n.target in _UNDEFINED:
            return actual.to(expected.dtype)
        if n.target is operator.getitem and n.args[1] == 1 and n.args[0] in self._searched:
            # torch leaves the order of equal elements open: other places of the same elements
            values, axis = self._searched[n.args[0]]
            if torch.equal(values.gather(axis, actual), values.gather(axis, expected)):
                return actual
        self.worst = max(
            self.worst, _compare(n, actual, expected, self._bounds.get(n.name, PLAIN_BOUND))
        )
        return actual.to(expected.dtype)


# operators that return (values, places), and the argument that says along which axis
_PLACES: dict[Any, int] = {torch.ops.aten.sort.default: 1, torch.ops.aten.topk.default: 2}


# operators whose contents mean nothing
_UNDEFINED: tuple[Any, ...] = (
    torch.ops.aten.empty.memory_format, torch.ops.aten.empty_permuted.default,
    torch.ops.aten.empty_like.default, torch.ops.aten.new_empty.default,
)  # fmt: skip


def _place_axis(node: torch.fx.Node) -> int:
    position = _PLACES[node.target]
    axis = node.args[position] if len(node.args) > position else node.kwargs.get("dim", -1)
    assert isinstance(axis, int)
    return axis


def _compare(
    node: torch.fx.Node, actual: torch.Tensor, expected: torch.Tensor, bound: float
) -> float:
    if actual.shape != expected.shape:
        raise MismatchError(f"{describe(node)}: onnxruntime gives shape {list(actual.shape)}, "
                            f"the reference {list(expected.shape)}")
    error = relative_error(actual, expected)
    bound = bound if expected.is_floating_point() else 0.0
    if not error <= bound:
        raise MismatchError(
            f"{describe(node)}: given the same inputs, onnxruntime differs from the reference by "
            f"{error:.3g} of the largest value (bound {bound:.3g})"
        )
    return error
