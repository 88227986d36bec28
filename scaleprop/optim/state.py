"""The state of one optimizer, encoded between its steps."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from scaleprop.errors import ConfigError
from scaleprop.optim import entries
from scaleprop.optim.entries import (
    GENERATOR,
    SQUARES,
    Call,
    Codec,
    decode,
    decode_entry,
    in_parts,
    params_of,
)
from scaleprop.optim.pieces import Pieces, can_cut, in_cache, length
from scaleprop.optim.saving import Loading
from scaleprop.optim.storage import FIRST, SECOND


class ScaledState:
    """What ``scaled_state`` returns: the state of one optimizer, kept encoded between steps.

    Between steps ``optimizer.state[p]`` holds, for each tensor ``exp_avg`` that is encoded,
    ``exp_avg/f16/float32`` (the data, shaped as p) and ``exp_avg/f16/float32/exponent``."""

    def __init__(self, optimizer: torch.optim.Optimizer, codec: Codec) -> None:
        self.optimizer = optimizer
        self._codec = codec
        self._groups: list[dict[str, Any]] | None = None  # while a step has them taken away
        self._call: weakref.ref[Call] | None = None  # the outermost step under way
        self._loading = Loading(codec)
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_state_dict_pre_hook(self._before_saving),
            optimizer.register_state_dict_post_hook(self._after_saving),
            optimizer.register_load_state_dict_pre_hook(self._before_loading),
            optimizer.register_load_state_dict_post_hook(self._after_loading),
        ]

    @property
    def generator(self) -> torch.Generator | None:
        """The random numbers that it is rounded with; None where it is rounded to nearest."""
        return self._codec.generator

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor of the state, as it is now."""
        return sum(value.nbytes for entry in self.optimizer.state.values()
                   for value in entry.values() if isinstance(value, Tensor))

    @property
    def left(self) -> dict[str, str]:
        """``parameter index.name`` → why a tensor of the state is not encoded."""
        return {f"{index}.{name}": reason
                for index, param in enumerate(params_of(self.optimizer.param_groups))
                for name, value in self.optimizer.state.get(param, {}).items()
                if (reason := self._codec.reason(name, value, param))}

    def decoded(self, param: Tensor) -> dict[str, Any]:
        """The state of a parameter as the optimizer sees it: a copy, with floating tensors."""
        entry = dict(self.optimizer.state.get(param, {}))
        decode_entry(entry, param)
        return entry

    def remove(self) -> None:
        """Decode everything and leave the optimizer as it was found."""
        self._settle()
        decode(self.optimizer.state, params_of(self.optimizer.param_groups))
        for handle in self._handles:
            handle.remove()
        _ATTACHED.discard(self.optimizer)

    def _settle(self) -> None:
        """The state between steps, also where the last one did not come to its end."""
        if self._groups is not None:
            self.optimizer.param_groups, self._groups = self._groups, None
        self._call = None

    def _before(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a step: decode; or, where that is safe, do the step in parts."""
        if self._call is not None and self._call() is not None:
            return None  # a step that calls the step of its base class
        self._settle()
        _check_groups(optimizer, self.generator)
        call = kwargs if isinstance(kwargs, Call) else Call(kwargs)
        self._call = weakref.ref(call)
        if self._can_part():
            return self._step_in_parts(args, call), call
        decode(optimizer.state, params_of(optimizer.param_groups))
        return args, call

    def _after(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """After a step, not after one within: encode."""
        call = self._call and self._call()
        if call is not None and kwargs is not call:
            return
        self._settle()
        self._codec.encode(optimizer.state, params_of(optimizer.param_groups))

    def _can_part(self) -> bool:
        """Torch's own steps treat parameters one by one, so that some may come before others. Hooks
        between this one and the one after the step would see no parameter groups, or old values."""
        known: Any = self.optimizer
        step, before = type(known).step, known._optimizer_step_pre_hooks
        return (step.__module__.startswith("torch.optim.") and hasattr(step, "__wrapped__")
                and next(reversed(before)) == self._handles[0].id
                and next(iter(known._optimizer_step_post_hooks)) == self._handles[1].id)

    def _step_in_parts(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The whole step, some values after others; the caller's own finds no groups left. The
        closure runs first and once, while the state is encoded. Returns new arguments."""
        optimizer, *given = args
        step: Any = type(optimizer).step.__wrapped__  # without hooks
        closure = given[0] if given else kwargs.pop("closure", None)
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            args = (optimizer, lambda: loss)
        groups = self._groups = optimizer.param_groups
        spare: dict[Any, Tensor] = {}
        try:
            for group in groups:
                for params, cut in self._parts(group["params"]):
                    if not cut:
                        optimizer.param_groups = [group | {"params": params}]
                        self._step_part(step, params)
                        continue
                    pieces = Pieces(optimizer, params[0], spare, self._codec)
                    for piece in pieces:
                        optimizer.param_groups = [group | {"params": [piece]}]
                        step(optimizer)
                    pieces.encode()
        except BaseException:
            self._settle()
            raise
        optimizer.param_groups = []
        return args

    def _parts(self, params: list[Tensor]) -> Iterator[tuple[list[Tensor], bool]]:
        """Parameters that are decoded together, and whether they are one that is cut into pieces.
        Those come last; in their own place if random numbers are drawn, one after another."""
        few = in_cache(self.optimizer, params)
        cut = {id(param) for param in params if few and can_cut(self.optimizer, param)}
        if self.generator is None:
            params = sorted(params, key=lambda param: id(param) in cut)
        at_once = min(length(), entries.AT_ONCE) if few else entries.AT_ONCE
        for pieces, run in itertools.groupby(params, lambda param: id(param) in cut):
            for part in in_parts([*run], 1 if pieces else at_once):
                yield part, pieces

    def _step_part(self, step: Any, params: list[Tensor]) -> None:
        """One step of some parameters."""
        decode(self.optimizer.state, params)
        try:
            step(self.optimizer)
        finally:
            self._codec.encode(self.optimizer.state, params)

    def _before_saving(self, optimizer: Any) -> None:
        self._settle()
        self._codec.encode(optimizer.state, params_of(optimizer.param_groups))

    def _after_saving(self, optimizer: Any, state_dict: dict[str, Any]) -> None:
        if self.generator is not None:
            state_dict[GENERATOR] = self.generator.get_state()

    def _before_loading(self, optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        self._settle()
        return self._loading.before(optimizer, state_dict)

    def _after_loading(self, optimizer: Any) -> None:
        self._loading.after(optimizer)
        self._codec.encode(optimizer.state, params_of(optimizer.param_groups))


_ATTACHED: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def _check_groups(optimizer: torch.optim.Optimizer, generator: torch.Generator | None) -> None:
    """Raise ``ConfigError`` for what rounded state would break."""
    for index, group in enumerate(optimizer.param_groups):
        if group.get("centered"):
            raise ConfigError(f"param_groups[{index}] has centered=True: rounded square_avg less "
                              "rounded grad_avg² turns negative, its root NaN; use centered=False")
        if group.get("differentiable"):
            raise ConfigError(f"param_groups[{index}] has differentiable=True: gradients do not "
                              "pass through stored state; use differentiable=False")
        for param in group["params"]:
            if generator is not None and generator.device.type != param.device.type:
                raise ConfigError(f"param_groups[{index}] is on {param.device}, the generator on "
                                  f"{generator.device}: use torch.Generator({param.device.type!r})")


def scaled_state(optimizer: torch.optim.Optimizer, dtype: str = "fp16", *,
                 second: str | None = None, squares: Collection[str] = (),
                 generator: torch.Generator | None = None) -> ScaledState:
    """Keep the state of ``optimizer`` as data · power of two, in 16 or 8 bits; see the module.

    For every optimizer whose state holds floating tensors shaped as the parameter: Adam, AdamW, SGD
    with momentum, RMSprop, … ; foreach and fused too. What exists is encoded now, what comes later
    (new parameters, new state) after the step that makes it. Steps of ``torch.optim`` decode
    ``AT_ONCE`` values (or one parameter) at a time; on a CPU, where every value is treated alone,
    what stays in cache: a chunk at a time, one parameter in float32 at most. All at once where
    other hooks run between the two of this one, and in other optimizers. Not inside a CUDA graph:
    stored tensors are new ones there.

    dtype: "fp16", "bf16" or "fp8", of moments and momenta. second: of squares; the same unless
        stated, but "fp16" with "fp8" as in FP8-LM. squares: further names of state that is never
        negative. generator: round stochastically, with its random numbers; its state is saved and
        restored with the optimizer's. Without it: to nearest, ties to even.

    ``state_dict`` holds encoded tensors under names of their own, so that saving and loading are
    exact; load it into an optimizer that ``scaled_state`` was called on with the same arguments. A
    float state loads, too, and is encoded.

    Raises:
        ConfigError: unknown dtype, eight bits for squares without generator, sparse state, LBFGS,
            ``centered`` or ``differentiable`` groups, an optimizer that is scaled already.
    """
    second = second or {"fp8": "fp16"}.get(dtype, dtype)
    for what, value in (("dtype", dtype), ("second", second)):
        if value not in FIRST:
            raise ConfigError(f"unknown {what} {value!r}; known: {', '.join(FIRST)}")
    if second == "fp8" and generator is None:
        raise ConfigError("squares in 8 bits stand still when rounded to nearest: pass a generator "
                          "to round stochastically, or second='fp16'")
    known: Any = optimizer
    if not isinstance(known, torch.optim.Optimizer) or isinstance(known, torch.optim.LBFGS):
        raise ConfigError("scaled_state takes a torch.optim.Optimizer that keeps state for each "
                          f"parameter, not {type(optimizer).__name__}")
    if optimizer in _ATTACHED:
        raise ConfigError("the state of this optimizer is scaled already: remove() that first")
    _check_groups(optimizer, generator)
    codec = Codec(FIRST[dtype], SECOND[second], SQUARES | frozenset(squares), generator)
    state = ScaledState(optimizer, codec)
    _ATTACHED.add(optimizer)
    state._before_saving(optimizer)  # pyright: ignore[reportPrivateUsage]
    return state
