"""``InductorBackend``: plan, trace, compile; and what runs the compiled code."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from scaleprop import _torch_compat
from scaleprop.backends.base import Backend, Executable
from scaleprop.backends.inductor import compat
from scaleprop.backends.inductor.trace import Dialect, Traced, onednn, trace
from scaleprop.errors import ConfigError, LoweringError
from scaleprop.passes.base import Program

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class _Compiled:
    """Code for sizes that satisfy ``guards`` (expressions in the program's symbols)."""

    traced: Traced
    run: Callable[[list[Any]], Any]
    guards: tuple[Any, ...]

    def accepts(self, sizes: Mapping[Any, int]) -> bool:
        return all(bool(guard.xreplace(sizes)) for guard in self.guards)


class InductorExecutable(Executable):
    """Runs compiled code. Inputs are read, never written; results are new tensors.

    Code is compiled for symbolic sizes. Where compiling had to assume something of them (say,
    size > 1) that a later call breaks, code for that call's sizes is compiled then, once.
    """

    def __init__(self, program: Program, dialect: Dialect,
                 compute: torch.dtype = torch.float32) -> None:
        self._program = program.fork()
        self._dialect, self._compute = dialect, compute
        self._lock = threading.Lock()
        self._general = self._compile(None)
        self._by_sizes: dict[tuple[int, ...], _Compiled] = {}

    @property
    def lowerings(self) -> Mapping[str, str]:
        return self._general.traced.lowerings

    @property
    def graph(self) -> torch.fx.Graph:
        """The ATen graph that was compiled."""
        return self._general.traced.module.graph

    def _compile(self, sizes: Mapping[Any, int] | None) -> _Compiled:
        mode = (_torch_compat.fake_mode_of(self._program.module.graph) if sizes is None
                else compat.static_fake_mode())
        before = compat.guard_count(mode)
        traced = trace(self._program, self._dialect, self._compute, mode, sizes)
        try:
            run = compat.compile_inference(traced.module, traced.fakes)
        except Exception as error:
            raise LoweringError(
                f"Inductor could not compile the program: {type(error).__name__}: {error}. "
                "Use backend='onnxruntime' or 'reference'."
            ) from error
        return _Compiled(traced, run, tuple(compat.guards_since(mode, before)))

    def __call__(self, leaves: Sequence[Any]) -> list[Any]:
        compiled = self._choose(leaves)
        traced = compiled.traced
        arguments = [_prepared(leaves[index], fake, index, self._dialect.device)
                     for index, fake in zip(traced.inputs, traced.fakes, strict=True)]
        with torch.no_grad():
            results = compiled.run(arguments)
        return [results[value] if computed else value for computed, value in traced.outputs]

    def _choose(self, leaves: Sequence[Any]) -> _Compiled:
        general = self._general
        symbols = general.traced.symbols
        if not symbols or not general.guards:
            return general
        sizes = tuple(_size(leaves[index], axis) for index, axis in symbols.values())
        if sizes not in self._by_sizes:
            with self._lock:
                self._by_sizes[sizes] = self._compiled_for(dict(zip(symbols, sizes, strict=True)))
        return self._by_sizes[sizes]

    def _compiled_for(self, sizes: Mapping[Any, int]) -> _Compiled:
        if self._general.accepts(sizes):
            return self._general
        logger.info("compiling again for sizes %s", dict(sizes))
        return self._compile(sizes)


def _size(leaf: Any, axis: int) -> int:
    return int(leaf.shape[axis] if isinstance(leaf, Tensor) else leaf)


def _prepared(leaf: Any, fake: Any, index: int, device: torch.device) -> Any:
    """The input as the code expects it: dense, of the captured dtype and rank, on the device."""
    if not isinstance(fake, Tensor):
        return leaf
    if not isinstance(leaf, Tensor) or leaf.dtype != fake.dtype or leaf.ndim != fake.ndim:
        found = f"{leaf.dtype} of {leaf.ndim} axes" if isinstance(leaf, Tensor) else repr(leaf)
        raise ConfigError(f"input {index} is {found}; the program was captured with {fake.dtype} "
                          f"of {fake.ndim} axes")
    expected_sizes: Sequence[Any] = fake.shape
    for axis, (size, expected) in enumerate(zip(leaf.shape, expected_sizes, strict=True)):
        if not isinstance(expected, torch.SymInt) and size != expected:
            raise ConfigError(f"input {index} has size {size} on axis {axis}, which was captured "
                              f"as fixed at {expected}: pass dynamic_shapes= to make it dynamic")
    return leaf.detach().to(device).contiguous()


@dataclasses.dataclass(frozen=True)
class InductorBackend(Backend):
    """Compiles with TorchInductor for the CPU.

    compute: what unquantized matrix products, attention first of all, compute in. ``float32`` is
        what the program says; ``bfloat16`` rounds their operands to bfloat16 (sums stay in
        float32), and so what goes from a quantized linear straight into the next quantization.
    """

    name: ClassVar[str] = "inductor"
    compute: Literal["float32", "bfloat16"] = "float32"

    def lower(self, program: Program) -> InductorExecutable:
        """Compile ``program``; takes seconds.

        Raises:
            LoweringError: naming the node that has no lowering.
            ConfigError: for an unknown ``compute``.
        """
        if self.compute not in _DTYPES:
            raise ConfigError(f"compute is {self.compute!r}; known: {', '.join(_DTYPES)}")
        compute = _DTYPES[self.compute]
        return InductorExecutable(program, onednn(compute), compute)
