"""How a caller's arguments become the flat leaves that a program takes, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from scaleprop.errors import ConfigError
from scaleprop.passes.base import Program
from scaleprop.passes.dimensions import spell, symbol_names
from scaleprop.passes.guards import Guard


def split_example(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``(args, kwargs)`` from what users write: one tensor, a tuple or list of positional
    arguments, a dict of keyword arguments, or the pair ``(args, kwargs)`` itself.

    Raises:
        ConfigError: for anything else.
    """
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), _named(example_inputs)
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        match example_inputs:
            case [tuple() | list() as args, Mapping() as kwargs]:
                return tuple(args), _named(kwargs)
            case _:
                return tuple(example_inputs), {}
    raise ConfigError(
        f"example inputs are a tensor, a tuple of arguments, a dict of keyword arguments or a "
        f"pair (args, kwargs), not {type(example_inputs).__name__}"
    )


def _named(kwargs: Mapping[Any, Any]) -> dict[str, Any]:
    if wrong := [key for key in kwargs if not isinstance(key, str)]:
        raise ConfigError(f"keyword arguments have string names, not {wrong[0]!r}")
    return dict(kwargs)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One flattened input: its name, and for a tensor the dtype and shape it must have.

    shape: an ``int`` for a fixed size, its dimension's name for a dynamic one; equal names,
        equal sizes.
    """

    name: str
    dtype: torch.dtype | None
    shape: tuple[int | str, ...] = ()
    constant: Any = None

    def check(self, value: Any, sizes: dict[str, int]) -> None:
        """Raise ``ConfigError`` where ``value`` is not what the program was captured with."""
        if self.dtype is None:
            if isinstance(value, torch.Tensor) or value != self.constant:
                raise ConfigError(
                    f"input {self.name!r} was captured as the constant {self.constant!r}; "
                    f"compile again to change it"
                )
            return
        if not isinstance(value, torch.Tensor):
            raise ConfigError(f"input {self.name!r}: expected a tensor, got {type(value).__name__}")
        if value.dtype != self.dtype:
            raise ConfigError(f"input {self.name!r}: expected {self.dtype}, got {value.dtype}")
        expected = [sizes.setdefault(size, given) if isinstance(size, str) else size
                    for size, given in zip(self.shape, value.shape, strict=False)]
        if len(self.shape) != value.dim() or expected != list(value.shape):
            known = ", ".join(f"{size} = {sizes[size]}" for size in dict.fromkeys(self.shape)
                              if isinstance(size, str) and size in sizes)
            raise ConfigError(
                f"input {self.name!r}: expected shape [{', '.join(map(str, self.shape))}]"
                f"{f' with {known}' if known else ''}, got {list(value.shape)}; "
                f"compile with dynamic_shapes= to let a size vary"
            )


@dataclasses.dataclass(frozen=True)
class Signature:
    """Flattens calls to a program.

    guards: conditions on the leaves' sizes.
    positional: how many arguments the program was captured with by position.
    names: the parameter names of the model's ``forward``, in order; lets a caller pass by
        position what was captured by name, and the other way round.
    """

    in_spec: pytree.TreeSpec
    leaves: tuple[Leaf, ...]
    guards: tuple[Guard, ...]
    positional: int
    keywords: tuple[str, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, program: Program) -> Signature:
        """The signature of a captured program."""
        flat = program.example_leaves
        names = symbol_names(program)
        leaves = tuple(
            _leaf(str(node.target), node.meta.get("val"), example, names)
            for node, example in zip(program.placeholders, flat, strict=True)
        )
        return cls(program.in_spec, leaves, tuple(map(Guard.parse, program.guards)),
                   len(program.example_args), tuple(program.example_kwargs), program.arguments)

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Flat leaves in the program's order.

        Raises:
            ConfigError: naming the argument that is missing, unexpected or does not fit.
        """
        args, kwargs = self._rebind(args, kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != self.in_spec:
            raise ConfigError(
                f"the arguments have another structure than the example inputs:\n"
                f"  expected {self.in_spec}\n  got      {spec}"
            )
        sizes: dict[str, int] = {}
        for leaf, value in zip(self.leaves, leaves, strict=True):
            leaf.check(value, sizes)
        shapes = {leaf.name: value.shape for leaf, value in zip(self.leaves, leaves, strict=True)
                  if isinstance(value, torch.Tensor)}
        for guard in self.guards:
            guard.check(shapes)
        return leaves

    def _rebind(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if len(args) == self.positional and tuple(kwargs) == self.keywords:
            return tuple(args), dict(kwargs)
        given = dict(kwargs)
        for name, value in zip(self.names, args, strict=False):
            if name in given:
                raise ConfigError(f"argument {name!r} is given twice")
            given[name] = value
        expected = (*self.names[: self.positional], *self.keywords)
        missing = [name for name in expected if name not in given]
        # None stands for a parameter that the model was captured without
        unexpected = [name for name in given if name not in expected and given[name] is not None]
        surplus = max(0, len(args) - len(self.names))
        if missing or unexpected or surplus:
            raise ConfigError(
                f"the model was captured with the arguments {list(expected)}: missing {missing}, "
                f"unexpected {unexpected}, {surplus} too many by position"
            )
        return (
            tuple(given[name] for name in self.names[: self.positional]),
            {name: given[name] for name in self.keywords},
        )


def _leaf(name: str, value: Any, example: Any, names: Mapping[str, str]) -> Leaf:
    if not isinstance(value, torch.Tensor):
        return Leaf(name, None, constant=example)
    shape = tuple(spell(size, names) if isinstance(size, torch.SymInt) else size
                  for size in value.shape)
    return Leaf(name, value.dtype, shape)
