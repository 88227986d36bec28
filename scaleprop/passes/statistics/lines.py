"""How large the values and gradients are that each line of a model's source makes."""

from __future__ import annotations

import ast
import functools
import linecache
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.fx

from scaleprop import _torch_compat as compat
from scaleprop.passes.outline import stack_of
from scaleprop.passes.statistics.measure import Measured, own_random_state
from scaleprop.report.scales import Listing, Visit

_NOT_THE_USERS = (Path(torch.__file__).parent, Path(__file__).parents[2])


def visits(
    torch_level: torch.fx.GraphModule, given: Sequence[Any],
    masks: Collection[torch.fx.Node] = (),
) -> list[Visit]:
    """Every line that ran, in the order in which it first did.

    ``torch_level``: what Dynamo captured, its output the loss. It is run once, eagerly, on clones
    of what is no parameter; gradients are caught by hooks, parameters' ``grad`` stays. masks:
    values of the joint graph in which −∞ may stand for what is hidden: their lines' values too.
    """
    inputs = [value if isinstance(value, torch.nn.Parameter) or not isinstance(value, torch.Tensor)
              else value.detach().clone().requires_grad_(value.requires_grad) for value in given]
    learned = [value for value in inputs
               if isinstance(value, torch.Tensor) and value.requires_grad]
    work = _Hooked(torch_level, {_place(node) for node in masks})
    with torch.enable_grad(), compat.without_modes(), own_random_state(torch_level.graph, inputs):
        result = work.run(*inputs, enable_io_processing=False)
        loss = result[0] if isinstance(result, tuple | list) else result
        torch.autograd.grad(loss, learned, allow_unused=True)
    last: dict[tuple[str, int, str], torch.fx.Node] = {}
    for node in work.forward:
        file, line = _place(node)
        if file:
            last[file, line, module_of(node, users=True)] = node
    return [Visit(*key, work.forward[node], work.backward.get(node)) for key, node in last.items()]


class _Hooked(torch.fx.Interpreter):
    """Notes the RMS of float values and of the gradients that come back to them."""

    def __init__(
        self, module: torch.fx.GraphModule, masking: Collection[tuple[str, int]]
    ) -> None:
        super().__init__(module)
        self._masking = masking
        self.forward: dict[torch.fx.Node, float] = {}
        self.backward: dict[torch.fx.Node, float] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        if is_float and n.op not in ("placeholder", "get_attr", "output"):
            self.forward[n] = Measured.of(value, masks=_place(n) in self._masking).rms
            if value.requires_grad:
                value.register_hook(functools.partial(self._note, n))
        return value

    def _note(self, node: torch.fx.Node, gradient: torch.Tensor) -> None:
        self.backward[node] = Measured.of(gradient).rms


def _place(node: torch.fx.Node) -> tuple[str, int]:
    """File and line of the innermost frame outside PyTorch; ("", 0) where there is none."""
    for frame in reversed((node.meta.get("stack_trace") or "").splitlines()):
        text = frame.strip()
        if text.startswith('File "'):
            file, _, rest = text.removeprefix('File "').partition('", line ')
            if not any(Path(file).is_relative_to(home) for home in _NOT_THE_USERS):
                return file, int(rest.split(",")[0])
    return "", 0


def module_of(node: torch.fx.Node, *, users: bool = False) -> str:
    """The path of the innermost module that ``node`` comes from, as ``named_modules`` has it.

    users: of the innermost one whose class is not PyTorch's: its code has the line.
    """
    paths = [path for path, kind in stack_of(node) if not (users and kind.startswith("torch."))]
    return paths[-1] if paths else ""


def listings(found: Sequence[Visit]) -> list[Listing]:
    """The functions that the visited lines are in, in order of file and line."""
    result: list[Listing] = []
    for file in dict.fromkeys(visit.file for visit in found):
        text = linecache.getlines(file)
        wanted = {visit.line for visit in found if visit.file == file}
        for first, last in _functions("".join(text), wanted):
            result.append(Listing(file, first, tuple(
                line.rstrip("\n") for line in text[first - 1:last])))
    return result


def _functions(source: str, wanted: set[int]) -> list[tuple[int, int]]:
    """First and last lines of the outermost functions around ``wanted`` lines."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return []
    spans = sorted({(node.lineno, node.end_lineno or node.lineno) for node in ast.walk(tree)
                    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)})
    kept: list[tuple[int, int]] = []
    for first, last in spans:
        inside = bool(kept) and last <= kept[-1][1]
        if not inside and any(first <= line <= last for line in wanted):
            kept.append((first, last))
    return kept
