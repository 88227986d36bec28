"""One block of a model as a picture: which modules it is, what is drawn, and what is put in a box.

Which block is drawn unless one is named: the class of modules of which there are several that
together hold most of the model, and of nested ones the most numerous; the first such module that
is like most of its kind.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile

from scaleprop.errors import ConfigError, ScalePropError
from scaleprop.passes.outline import Outline, Read, Step
from scaleprop.report.graph import Block, BlockEdge, BlockNode, Scale
from scaleprop.report.text import short_place

logger = logging.getLogger(__name__)

_FEWEST = 4  # operators of a block; modules of fewer are operators with a name
_MOST_OF = 0.8  # of what the best class of modules holds: nested ones hold about the same
_LISTED = 24  # modules in an error message

# what to write on the edge on which a step (the second) reads another (the first)
Facts = Callable[[Step, Read, Step], tuple[Scale | None, Scale | None, str]]


@dataclasses.dataclass(frozen=True)
class Module:
    """One module of an outline. count: how many of its class there are; place: which one it is."""

    path: str
    kind: str
    steps: tuple[str, ...]
    count: int = 1
    place: int = 1

    @property
    def what(self) -> str:
        """``Layer, 1 of 12``."""
        name = self.kind.rpartition(".")[2] or "model"
        return f"{name}, {self.place} of {self.count}" if self.count > 1 else name


def modules_of(outline: Outline) -> dict[str, Module]:
    """Path → module, of those that hold operators, in the order in which they first run."""
    found: dict[str, tuple[str, list[str]]] = {"": ("", [])}
    for step in outline.steps:
        if step.kind in ("parameter", "input"):
            continue
        for path, kind in {"": "", **dict(step.stack)}.items():
            known = found.setdefault(path, (kind, []))
            known[1].append(step.name)
            if kind and not known[0]:
                found[path] = (kind, known[1])
    counts = Counter(kind for kind, _ in found.values())
    seen: Counter[str] = Counter()
    result: dict[str, Module] = {}
    for path, (kind, steps) in found.items():
        seen[kind] += 1
        result[path] = Module(path, kind, tuple(steps), counts[kind] if kind else 1, seen[kind])
    return result


def chosen_block(outline: Outline, path: str | None) -> Module:
    """The module of this path; without one, see above.

    Raises:
        ConfigError: where there is no such module, or it holds no operator, naming those that do.
    """
    modules = modules_of(outline)
    if not modules[""].steps:
        raise ConfigError("the model has no operator on float values: there is nothing to draw")
    if path is None:
        return _typical(outline, modules)
    if path not in modules:
        known = [name for name, module in modules.items() if name and len(module.steps) >= _FEWEST]
        more = f", … ({len(known)} in all)" if len(known) > _LISTED else ""
        raise ConfigError(f"block={path!r} is no module with operators. Known blocks: "
                          f"{', '.join(known[:_LISTED]) or 'the whole model'}{more}; \"\" for the "
                          "whole model")
    return modules[path]


def _typical(outline: Outline, modules: Mapping[str, Module]) -> Module:
    several: dict[str, list[Module]] = {}
    for module in modules.values():
        if module.path and module.count > 1:
            several.setdefault(module.kind, []).append(module)
    held = {kind: sum(len(each.steps) for each in found) for kind, found in several.items()
            if sum(len(each.steps) for each in found) >= _FEWEST * len(found)}
    if not held:
        return modules[""]
    enough = [kind for kind in held if held[kind] >= _MOST_OF * max(held.values())]
    kind = max(enough, key=lambda each: len(several[each]))
    named = outline.named()
    forms = {module.path: tuple(named[step].op for step in module.steps)
             for module in several[kind]}
    usual = Counter(forms.values()).most_common(1)[0][0]
    return next(module for module in several[kind] if forms[module.path] == usual)


def block_of(
    outline: Outline, path: str | None, depth: int | None, facts: Facts, meaning: str,
    made: str = "", notes: Sequence[str] = (),
) -> Block:
    """One block, drawn operator by operator.

    depth: how many levels of modules below the block have a box for each operator; what is deeper
    is one box per module. None: all, but modules without a product that run in one piece.

    Raises:
        ConfigError: on an unknown block, or a depth below 0.
    """
    if depth is not None and depth < 0:
        raise ConfigError(f"depth={depth}: 0 or more levels of modules")
    module = chosen_block(outline, path)
    work = _Drawing(outline, module, facts)
    work.collect()
    work.group(depth)
    nodes, edges = work.drawn()
    return Block(path=module.path, what=module.what, made=made, meaning=meaning,
                 nodes=nodes, edges=edges,
                 notes=(*notes, "Not drawn: moves and casts of whole values, masks and integers, "
                                "biases and other vectors of parameters."))


def block_for_report(draw: Callable[[], Block]) -> Block | None:
    """What ``draw`` makes of the most typical block; None where no block is there several times, or
    it cannot be drawn, which is no reason to have no report: the log says which."""
    try:
        block = draw()
    except (ScalePropError, RuntimeError, LookupError, TypeError, ValueError) as error:
        logger.debug("no picture of a block: %s: %s", type(error).__name__, error)
        return None
    if not block.path:
        logger.debug("no picture of a block: none is there several times")
        return None
    return block


class _Drawing:
    def __init__(self, outline: Outline, module: Module, facts: Facts) -> None:
        self._module, self._facts = module, facts
        self._steps = outline.named()
        self._inside = [self._steps[name] for name in module.steps]
        self._nodes: dict[str, BlockNode] = {}
        self._edges: dict[tuple[str, str], BlockEdge] = {}  # (value, reader)
        self._group: dict[str, str] = {}
        self._outline = outline

    def collect(self) -> None:
        """Every operator of the block, what it reads, and who else reads it."""
        inside = {step.name for step in self._inside}
        for step in self._inside:
            for read in step.reads:
                source = self._steps[read.source]
                if read.source not in self._nodes:
                    self._nodes[read.source] = self._node(source, read.source in inside)
                self._edge(source, read, step, step.name)
            self._nodes[step.name] = self._node(step, True)
        for name, readers in self._readers(inside).items():
            self._leave(self._steps[name], readers)
        for step in self._inside:
            if step.leaves and not any(key[0] == step.name and key[1].startswith(step.name + "→")
                                       for key in self._edges):
                self._leave(step, ())

    def _readers(self, inside: Iterable[str]) -> dict[str, list[tuple[Read, Step]]]:
        """Value of the block → who reads it outside."""
        found: dict[str, list[tuple[Read, Step]]] = {}
        for step in self._outline.steps:
            for read in step.reads:
                if step.name not in inside and read.source in inside:
                    found.setdefault(read.source, []).append((read, step))
        return found

    def _leave(self, step: Step, readers: Sequence[tuple[Read, Step]]) -> None:
        """An edge out of the block."""
        name = f"{step.name}→"
        where = _common([reader.module for _, reader in readers]) or "the model"
        self._nodes[name] = BlockNode(
            name=name, kind="output", label=f"to {where}" if readers else "output",
            detail=", ".join(f"{reader.op} {reader.module}".strip() for _, reader in readers))
        read, reader = readers[0] if readers else (Read(step.name, (step.name,)), step)
        self._edge(step, read, reader, name)

    def _edge(self, source: Step, read: Read, reader: Step, target: str) -> None:
        forward, backward, detail = self._facts(source, read, reader)
        self._edges[source.name, target] = BlockEdge(
            source=source.name, target=target, forward=forward, backward=backward, detail=detail)

    def _node(self, step: Step, inside: bool) -> BlockNode:
        shape = "×".join(map(str, step.shape))
        detail = "\n".join(part for part in (
            f"{shape} {step.dtype}".strip(), step.why,
            short_place(step.source) if step.source else "") if part)
        if step.kind == "parameter":
            return BlockNode(name=step.name, label=".".join(step.op.split(".")[-2:]),
                             kind="parameter", format=step.format,
                             detail=f"{step.op}\n{detail}")
        if not inside:
            label = step.op if step.kind == "input" else f"from {step.op}"
            return BlockNode(name=step.name, label=label, kind="input", module=step.module,
                             format=step.format, detail=detail)
        return BlockNode(name=step.name, label=step.op, kind=step.kind, format=step.format,
                         module=self._relative(step.module), detail=detail)

    def _relative(self, path: str) -> str:
        """A path below the block."""
        if path == self._module.path:
            return ""
        return path.removeprefix(f"{self._module.path}.") if self._module.path else path

    def group(self, depth: int | None) -> None:
        """Decide which operators share a box; none that would make edges run in a circle."""
        modules: dict[str, list[Step]] = {}
        for step in self._inside:
            parts = [part for part in self._relative(step.module).split(".") if part]
            if depth is None:
                if parts:
                    modules.setdefault(".".join(parts), []).append(step)
            elif len(parts) > depth:
                modules.setdefault(".".join(parts[:depth + 1]), []).append(step)
        for path, steps in modules.items():
            if len(steps) < 2 or (depth is None and not _in_one_piece(path, steps, modules)):
                continue
            tried = {**self._group, **{step.name: f"{path}/" for step in steps}}
            if not _runs_in_a_circle(self._edges, tried):
                self._group = tried
                self._nodes[f"{path}/"] = self._module_node(path, steps)

    def _module_node(self, path: str, steps: Sequence[Step]) -> BlockNode:
        whole = f"{self._module.path}.{path}" if self._module.path else path
        kinds = dict(pair for step in steps for pair in step.stack)
        kind = kinds.get(whole, "module").rpartition(".")[2]
        return BlockNode(name=f"{path}/", label=kind, kind="module", module=path,
                         detail=", ".join(step.op for step in steps))

    def drawn(self) -> tuple[tuple[BlockNode, ...], tuple[BlockEdge, ...]]:
        """Boxes and edges, those within a box left out."""
        edges: dict[tuple[str, str], BlockEdge] = {}
        for (value, target), edge in self._edges.items():
            ends = self._group.get(value, value), self._group.get(target, target)
            if ends[0] != ends[1]:
                edges.setdefault((value, ends[1]), dataclasses.replace(
                    edge, source=ends[0], target=ends[1]))
        ends = {name for edge in edges.values() for name in (edge.source, edge.target)}
        kept = ends | {self._group.get(step.name, step.name) for step in self._inside}
        nodes = [node for name, node in self._nodes.items() if name in kept
                 and (node.kind != "parameter" or name in ends)]
        return tuple(nodes), tuple(edges.values())


def _common(paths: Sequence[str]) -> str:
    """The module that all of these are in."""
    shared = takewhile(lambda parts: len(set(parts)) == 1,
                       zip(*(path.split(".") for path in paths), strict=False))
    return ".".join(parts[0] for parts in shared)


def _in_one_piece(path: str, steps: Sequence[Step], modules: Mapping[str, object]) -> bool:
    """Whether a module without modules of its own only has operators that no scale depends on."""
    is_leaf = not any(other.startswith(f"{path}.") for other in modules)
    return is_leaf and not any(step.product or step.kind != "operator" for step in steps)


def _runs_in_a_circle(
    edges: Iterable[tuple[str, str]], group: Mapping[str, str]
) -> bool:
    below: dict[str, set[str]] = {}
    for value, target in edges:
        ends = group.get(value, value), group.get(target, target)
        if ends[0] != ends[1]:
            below.setdefault(ends[0], set()).add(ends[1])
    missing = Counter(target for targets in below.values() for target in targets)
    ready = [name for name in below if not missing[name]]
    left = {*below, *missing}
    while ready:
        name = ready.pop()
        left.discard(name)
        for target in below.get(name, ()):
            missing[target] -= 1
            if not missing[target]:
                ready.append(target)
    return bool(left)
