"""Weights in bfloat16, without a copy in float32: steps are computed in float32 and rounded
stochastically.

Rounded to nearest, a step smaller than half a unit in the last place (0.2 to 0.4 % of a weight)
is lost, every time. Rounded up with probability (x - lower)/(upper - lower) it is right on average
(S. Gupta et al., arXiv:1502.02551). float32 has 16 bits more than bfloat16, so that 16 random bits
make these odds exact.
"""

from __future__ import annotations

import itertools
import math
import weakref
from typing import Any

import torch
from torch import Tensor

from scaleprop.errors import ConfigError
from scaleprop.formats.random import random_bits
from scaleprop.optim.entries import SCALE, Call, in_parts, params_of, parsed
from scaleprop.optim.state import ScaledState

KEY = "stochastic_weights"  # in a state_dict
_CHUNK = 1 << 16  # values that are rounded at a time: they stay in cache
_RANDOM_ROWS = 8  # rows whose 16-bit numbers are drawn together


def round_stochastic(x: Tensor, bits: Tensor) -> Tensor:
    """bfloat16 of float32 ``x``: up in magnitude with odds (its 16 lowest bits)/2^16.

    bits: int32 in 0..2^16-1, shaped as ``x``. Finite values stay finite; NaN and Inf stay.

    Raises:
        ConfigError: for other dtypes or shapes.
    """
    if x.dtype != torch.float32 or bits.dtype != torch.int32 or bits.shape != x.shape:
        raise ConfigError(f"round_stochastic takes float32 and int32 of one shape, not {x.dtype} "
                          f"{list(x.shape)} and {bits.dtype} {list(bits.shape)}")
    top = torch.finfo(torch.bfloat16).max
    carried = (x.clamp(-top, top).view(torch.int32) + bits) & -(1 << 16)
    return torch.where(x.isfinite(), carried.view(torch.float32), x).to(torch.bfloat16)


class StochasticWeights:
    """What ``stochastic_weights`` returns. ``seed``, ``steps``: what its random numbers follow."""

    def __init__(self, optimizer: torch.optim.Optimizer, seed: int) -> None:
        self.optimizer, self.seed, self.steps = optimizer, seed, 0
        self._call: weakref.ref[Call] | None = None  # the outermost step under way
        self._inner = False  # while it calls steps of some parameters
        self._groups: list[dict[str, Any]] | None = None  # while a step has them taken away
        self._shadows: list[tuple[dict[str, Any], list[Tensor], list[Tensor]]] = []
        self._numbers: dict[int, int] = {}  # of parameters, by identity, in a step
        self._loaded: list[tuple[Tensor, dict[Any, Tensor]]] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_state_dict_pre_hook(lambda _: self._settle()),
            optimizer.register_state_dict_post_hook(self._after_saving),
            optimizer.register_load_state_dict_pre_hook(self._before_loading),
            optimizer.register_load_state_dict_post_hook(self._after_loading),
        ]
        self._widen_state()

    def remove(self) -> None:
        """Leave the optimizer as it was found; its state stays in float32."""
        self._settle()
        for handle in self._handles:
            handle.remove()
        _ATTACHED.discard(self.optimizer)

    # --- steps ---

    def _before(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a step: give it float32 parameters; or do it, some parameters after others."""
        if self._inner or (self._call is not None and self._call() is not None):
            return None  # also of a step that calls the step of its base class
        self._settle()
        _check_groups(optimizer)
        self._numbers = {id(param): index for index, param in enumerate(
            params_of(optimizer.param_groups))}
        call = kwargs if isinstance(kwargs, Call) else Call(kwargs)
        self._call = weakref.ref(call)
        optimizer, *given = args
        closure = given[0] if given else call.pop("closure", None)
        if closure is not None:  # it computes with bfloat16 weights
            with torch.enable_grad():
                loss = closure()
            args = (optimizer, lambda: loss)
        if self._can_part():
            self._step_in_parts()
        else:
            for group in optimizer.param_groups:
                self._widen(group, group["params"])
        return args, call

    def _after(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = self._call and self._call()
        if self._inner or (call is not None and kwargs is not call):
            return
        self._narrow()
        self._settle()
        self.steps += 1

    def _can_part(self) -> bool:
        """Torch's own steps treat parameters one by one; other hooks may expect one step only, and
        hooks before this one have seen the whole of it already."""
        known: Any = self.optimizer
        step, before = type(known).step, known._optimizer_step_pre_hooks
        owners = [getattr(hook, "__self__", None)
                  for hook in (*before.values(), *known._optimizer_step_post_hooks.values())]
        return (step.__module__.startswith("torch.optim.") and hasattr(step, "__wrapped__")
                and next(iter(before)) == self._handles[0].id
                and all(isinstance(owner, (StochasticWeights, ScaledState)) for owner in owners))

    def _step_in_parts(self) -> None:
        """The whole step, so that few weights are in float32 at a time; no groups are left for the
        caller's."""
        optimizer: Any = self.optimizer
        groups = self._groups = optimizer.param_groups
        self._inner = True
        try:
            for group in groups:
                for params in in_parts(group["params"]):
                    part = group | {"params": params}
                    optimizer.param_groups = [part]
                    self._widen(part, params)
                    type(optimizer).step(optimizer)
                    self._narrow()
        except BaseException:
            self._settle()
            raise
        finally:
            self._inner = False
        optimizer.param_groups = []

    def _widen(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Put float32 copies of its bfloat16 ``params`` into ``group``, with gradient and state."""
        state = self.optimizer.state
        shadows: list[Tensor] = []
        self._shadows.append((group, params, shadows))
        for param in params:
            if param.dtype != torch.bfloat16 or param.grad is None:
                shadows.append(param)
                continue
            shadow = param.detach().to(torch.float32)
            shadow.grad = param.grad.detach().to(torch.float32)
            shadows.append(shadow)
            if param in state:
                state[shadow] = state.pop(param)
        group["params"] = shadows

    def _narrow(self) -> None:
        """Round the copies back into the parameters."""
        for _, params, shadows in self._shadows:
            for param, shadow in zip(params, shadows, strict=True):
                if shadow is not param:
                    self._store(param.detach(), shadow, self._numbers[id(param)])
        self._restore()

    def _store(self, param: Tensor, wide: Tensor, index: int) -> None:
        """Round ``wide`` into ``param``, number ``index``; element (r, c) of [rows, the rest]."""
        rows = param.shape[0] if param.ndim else 1
        columns = param.numel() // max(rows, 1)
        some = max(_CHUNK // max(columns, 1) // _RANDOM_ROWS, 1) * _RANDOM_ROWS
        for first in range(0, rows if columns else 0, some):
            values = wide[first:first + some] if param.ndim else wide
            place = param[first:first + some] if param.ndim else param
            count = min(some, rows - first)
            bits = random_bits((count, columns), self.seed, index, self.steps, 16, (first, 0),
                               device=param.device)
            place.copy_(round_stochastic(values, bits.reshape(values.shape)))

    def _restore(self) -> None:
        """The parameters and their state in place of the copies."""
        state = self.optimizer.state
        for group, params, shadows in self._shadows:
            for param, shadow in zip(params, shadows, strict=False):
                if shadow is not param and shadow in state:
                    state[param] = state.pop(shadow)
            group["params"] = params
        self._shadows = []

    def _settle(self) -> None:
        """As between steps, also where the last one did not come to its end."""
        self._call = None
        self._restore()
        if self._groups is not None:
            self.optimizer.param_groups, self._groups = self._groups, None

    # --- saving ---

    def _widen_state(self) -> None:
        """State of bfloat16 parameters in float32, as float32 parameters would have made it."""
        for param in params_of(self.optimizer.param_groups):
            if param.dtype != torch.bfloat16:
                continue
            entry = self.optimizer.state.get(param, {})
            for name, value in entry.items():
                encoded = parsed(name)
                if encoded and encoded[2] != torch.float32:
                    raise ConfigError(
                        f"optimizer state {name!r} was encoded from {encoded[2]}: remove() its "
                        "scaled_state, call stochastic_weights, then scaled_state again")
                if not encoded and isinstance(value, Tensor) and value.dtype == torch.bfloat16:
                    entry[name] = value.to(torch.float32)

    def _after_saving(self, optimizer: Any, state_dict: dict[str, Any]) -> None:
        state_dict[KEY] = {"seed": self.seed, "steps": self.steps}

    def _before_loading(self, optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Remember float32 state: torch casts it to the parameter's bfloat16. What is more than one
        number is taken out, so that nothing encodes it before it is put back."""
        self._settle()
        ids = itertools.chain.from_iterable(g["params"] for g in state_dict["param_groups"])
        rest = dict(state_dict["state"])
        self._loaded = []
        for index, param in zip(ids, params_of(optimizer.param_groups), strict=False):
            if param.dtype != torch.bfloat16 or index not in rest:
                continue
            wide = {name: value for name, value in rest[index].items() if _is_wide(name, value)}
            rest[index] = {name: value for name, value in rest[index].items()
                           if name not in wide or wide[name].ndim == 0}
            self._loaded.append((param, wide))
        saved = state_dict.get(KEY)
        if saved is not None:
            self.seed, self.steps = saved["seed"], saved["steps"]
        return {**state_dict, "state": rest}

    def _after_loading(self, optimizer: Any) -> None:
        for param, wide in self._loaded:
            optimizer.state[param].update(
                {name: value.detach().to(param.device, copy=True) for name, value in wide.items()})
        self._loaded = []
        self._widen_state()


def _is_wide(name: Any, value: Any) -> bool:
    """Whether this is float32 state that is not encoded."""
    encoded = parsed(str(name).removesuffix(f"/{SCALE}"))
    return (isinstance(value, Tensor) and value.dtype == torch.float32 and name != "step"
            and not encoded)


_ATTACHED: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def _check_groups(optimizer: torch.optim.Optimizer) -> None:
    """Raise ``ConfigError`` for what cannot be stepped as a copy."""
    for index, group in enumerate(optimizer.param_groups):
        if group.get("differentiable"):
            raise ConfigError(f"param_groups[{index}] has differentiable=True: gradients do not "
                              "pass through rounded weights; use differentiable=False")
        for param in group["params"]:
            if param.dtype == torch.bfloat16 and type(param.detach()) is not Tensor:
                raise ConfigError(f"param_groups[{index}] has a {type(param.detach()).__name__}: "
                                  "stochastic_weights takes plain tensors")
            if param.grad is not None and param.grad.layout != torch.strided:
                raise ConfigError(f"param_groups[{index}] has a sparse gradient: use dense ones")


def stochastic_weights(optimizer: torch.optim.Optimizer, seed: int = 0) -> StochasticWeights:
    """Step the bfloat16 parameters of ``optimizer`` in float32, and round them stochastically.

        model.to(torch.bfloat16)
        optimizer = torch.optim.AdamW(model.parameters())
        scaleprop.optim.stochastic_weights(optimizer, seed=0)
        scaleprop.optim.scaled_state(optimizer, "fp16")       # if you like: 2 + 2 + 2 bytes a value

    For every optimizer that keeps its state by parameter; new state is float32. Parameters of other
    dtypes are stepped as before. Steps of ``torch.optim`` widen ``AT_ONCE`` values (or one
    parameter) at a time, others all at once. Random numbers are a function of seed, place of the
    parameter in the optimizer, step, and place of the value: data-parallel ranks with the same
    seed stay equal. ``state_dict`` has seed and steps; loading one goes on as the saved run.

    Raises:
        ConfigError: no bfloat16 parameter, LBFGS, tensor subclasses, ``differentiable``, a seed
            beyond 32 bits, an optimizer whose weights are stochastic already.
    """
    known: Any = optimizer
    if not isinstance(known, torch.optim.Optimizer) or isinstance(known, torch.optim.LBFGS):
        raise ConfigError("stochastic_weights takes a torch.optim.Optimizer that keeps state for "
                          f"each parameter, not {type(optimizer).__name__}")
    if optimizer in _ATTACHED:
        raise ConfigError("the weights of this optimizer are stochastic already: remove() that "
                          "first")
    if not 0 <= seed < 1 << 32 or math.floor(seed) != seed:
        raise ConfigError(f"seed is {seed}: an integer in 0..2^32-1")
    if not any(p.dtype == torch.bfloat16 for p in params_of(optimizer.param_groups)):
        raise ConfigError("no parameter is bfloat16: call model.to(torch.bfloat16) before making "
                          "the optimizer")
    _check_groups(optimizer)
    weights = StochasticWeights(optimizer, seed)
    _ATTACHED.add(optimizer)
    return weights
