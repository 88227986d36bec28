"""Chains of methods, and running one for some of the operators only."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from scaleprop.calibration.feed import Data
from scaleprop.errors import ConfigError
from scaleprop.passes.base import PassManager, Program
from scaleprop.passes.calibrate import Calibrate
from scaleprop.passes.methods import METHODS
from scaleprop.passes.transforms.base import TransformPass

Chain = tuple[TransformPass, ...]


def parse_chain(text: str) -> Chain:
    """``fold-norms+rotate``: methods by name, in order, with their own options; "" is none.

    Raises:
        ConfigError: a name that is no method.
    """
    known = {method.name: method for method in METHODS}
    names = [name.strip() for name in text.split("+") if name.strip()]
    for name in names:
        if name not in known:
            raise ConfigError(f"chain {text!r}: {name!r} is no method; known: {', '.join(known)}")
    return tuple(known[name]() for name in names)


def run_chain(
    program: Program, chain: Chain, data: Data, only: Iterable[str] | None = None,
    runtime: bool = True,
) -> Program:  # fmt: skip
    """``program`` after ``chain``, calibrated before each method that asks for it.

    only: names of the operators whose inputs may be transformed; None: all.
    """
    names = None if only is None else tuple(sorted(only))
    for method in chain:
        step = dataclasses.replace(method, only=names, runtime=method.runtime and runtime)
        needs = step.needs
        calibration = [Calibrate(data=data, everything=True, channels=needs.channels,
                                 sample=needs.sample, moments=needs.moments)]
        program = PassManager([*(calibration if needs.anything else []), step]).run(program)
    return program


def together(programs: Sequence[Program], operators: Iterable[str]) -> list[frozenset[str]]:
    """Operators in classes: those that some program's transform ties must be decided together."""
    parent = {name: name for name in operators}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    for program in programs:
        for record in program.transforms:
            tied = [name for name in record.readers if name in parent]
            for name in tied[1:]:
                parent[root(name)] = root(tied[0])
    classes: dict[str, set[str]] = {}
    for name in parent:
        classes.setdefault(root(name), set()).add(name)
    return [frozenset(names) for names in classes.values()]


def class_error(local: Mapping[str, float], names: Iterable[str]) -> float:
    """The mean relative error of some operators."""
    found = [local[name] for name in names if name in local]
    return sum(found) / len(found) if found else 0.0
