"""Optimizer state in 8 or 16 bits: every state tensor as data · 2^e, decoded only while it is used.

    optimizer = torch.optim.AdamW(model.parameters())
    state = scaleprop.optim.scaled_state(optimizer, dtype="fp16")   # train, save, load as before
    state.nbytes, state.left                                        # what it takes; what stayed

What is stored, and why:

| dtype  | moments, momenta         | squares (second moments)             | bytes a value (Adam) |
|--------|--------------------------|--------------------------------------|----------------------|
| `fp16` | float16, a scale/tensor  | UE6M10, a scale a tensor             | 2 + 2                |
| `bf16` | bfloat16, a scale/tensor | bfloat16, a scale a tensor           | 2 + 2                |
| `fp8`  | E4M3, a scale a block    | UE6M10; `second="fp8"`: UE5M3 blocks | 1 + 2; 1 + 1         |

- A scale is 2^e with e an int16, as in Scalify (arXiv:2407.17353): it cannot overflow or underflow,
  multiplying by it is exact, and it is found from the finite values alone, so that NaN and Inf stay
  where they are and touch nothing else. The largest value sits at the top of the element's range
  with one binade to spare; where a format has no Inf, its largest value, otherwise unused, is Inf.
- Blocks are of 256 values, as the 8-bit optimizers need them (arXiv:2110.02861): E4M3
  spans 18 binades, less than the moments of one tensor do.
- A square spans twice the binades of a moment and has no sign. Float16 holds 40; a square that
  underflows to 0 next to a moment that does not divides it by eps and throws the parameter far off.
  UE6M10 gives the sign bit to the exponent: 73 binades at float16's precision. What is positive
  never becomes 0: it stops at the smallest value, which only makes a step smaller.
- Squares move by 1-β₂ of themselves a step, 0.1 % at β₂ = 0.999. Rounding to nearest drops what is
  less than half a unit in the last place: up to 0.05 % in UE6M10, 0.4 % in bfloat16, 6 % in UE5M3.
  So bfloat16 squares stall: they do not decay at β₂ = 0.999. Rounding stochastically
  (``generator``) removes the bias and leaves noise; eight bits are refused for squares without it.
  FP8-LM, too, pairs eight-bit moments with squares in 16 bits (arXiv:2310.18313).

Which state is which is decided by its name (``SQUARES``, and ``squares`` for other optimizers').
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from scaleprop.errors import ConfigError
from scaleprop.formats.elements import FloatElement, element
from scaleprop.formats.rounding import Rounding, decode, encode, nearest, stochastic

SQUARES = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum", "variance",
                     "exp_inf", "step_size"})  # not negative, and divided by or multiplied with
KEPT: Mapping[str, str] = {"step": "", "ax": "an average of parameters"}  # and what to report
AT_ONCE = 1 << 24  # values of parameters whose state is decoded at the same time
RANDOM_BITS = 16
_SCALE, _GENERATOR = "exponent", "rounding_generator"  # keys in a state and a state_dict


@dataclasses.dataclass(frozen=True)
class StateFormat:
    """Stored values: ``element`` · 2^e. block: how many share e, along the flat tensor; 0: all.
    top: the largest finite value is stored as a number in (2^(top-1), 2^top]; below element.max."""

    element: FloatElement
    top: int
    block: int = 0
    unsigned: bool = False

    @property
    def storage(self) -> torch.dtype:
        """dtype of the stored data; UE6M10: its codes in int16."""
        return self.element.native or (torch.uint8 if self.element.bits <= 8 else torch.int16)


def _named(name: str) -> FloatElement:
    return cast(FloatElement, element(name))


# All exponents are numbers but for one code, NaN: 2^-40 … 2^33.
_UE6M10 = FloatElement(name="ue6m10", exponent_bits=6, fraction_bits=10, bias=31,
                       max_code=(1 << 16) - 2, signed=False)
FORMATS: Mapping[str, StateFormat] = {
    "f16": StateFormat(_named("f16"), top=15),
    "bf16": StateFormat(_named("bf16"), top=0),
    "e4m3": StateFormat(_named("e4m3"), top=8, block=256),
    "ue6m10": StateFormat(_UE6M10, top=32, unsigned=True),
    "ue5m3x": StateFormat(_named("ue5m3x"), top=16, block=256, unsigned=True),
}
_FIRST = {"fp16": "f16", "bf16": "bf16", "fp8": "e4m3"}
_SECOND = {"fp16": "ue6m10", "bf16": "bf16", "fp8": "ue5m3x"}


def _power(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2^exponent from its bits, exact on every device."""
    if dtype == torch.float64:
        return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def _shifted(x: Tensor, exponent: Tensor) -> Tensor:
    """x · 2^exponent in two steps, each a power of two that the dtype has."""
    half = exponent.to(torch.int32) >> 1
    return x * _power(half, x.dtype) * _power(exponent - half, x.dtype)


def _work_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows(x: Tensor, block: int) -> Tensor:
    """The flat tensor as [blocks, values of a block], the last padded with zeros."""
    size = block or max(x.numel(), 1)
    missing = -x.numel() % size
    flat = torch.nn.functional.pad(x.reshape(-1), (0, missing)) if missing else x.reshape(-1)
    return flat.view(-1, size)


def _exponents(finite: Tensor, top: int) -> Tensor:
    """[rows, 1] int32: the e with amax·2^-e in (2^(top-1), 2^top]; 0 where all is 0.

    Rounding may move amax onto a power of two but not past it, so that what was decoded encodes to
    itself.
    """
    amax = finite.abs().amax(1, keepdim=True)
    mantissa, exponent = torch.frexp(amax)
    exponent = exponent - (mantissa == 0.5).to(torch.int32) - top
    return torch.where(amax > 0, exponent, 0)


def encode_state(x: Tensor, fmt: StateFormat,
                 generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """(data shaped as ``x``, exponents int16 [blocks]); rounded to nearest without ``generator``.

    Finite values stay finite, NaN stays NaN, ±Inf stays ±Inf. Negative in an unsigned format: NaN.
    """
    item = fmt.element
    rows = _rows(x.detach().to(_work_dtype(x.dtype)), fmt.block)
    # what would round up to Inf stops at the element's largest value below 2^emax of x's dtype
    limit = math.ldexp(1.0 - 2.0 ** -(item.fraction_bits + 1),
                       math.frexp(torch.finfo(x.dtype).max)[1])
    finite = torch.where(rows.isfinite(), rows, 0.0).clamp(-limit, limit)
    exponent = _exponents(finite, fmt.top)
    units = _shifted(torch.where(rows.isfinite(), finite, rows), -exponent)
    if fmt.unsigned:
        units = torch.where(rows > 0, units.clamp(min=item.smallest), units)
        units = torch.where(rows < 0, torch.nan, units)
    data = _codes(units, item, generator).view(-1)[:x.numel()]
    return data.view(x.shape).to(fmt.storage), exponent.view(-1).to(torch.int16)


def _codes(units: Tensor, item: FloatElement, generator: torch.Generator | None) -> Tensor:
    bounded = units if item.has_inf else units.clamp(-item.max, item.max)  # Inf is element.max
    if generator is not None:
        bits = torch.randint(0, 1 << RANDOM_BITS, units.shape, generator=generator,
                             device=units.device, dtype=torch.int32)
        rounded = stochastic(bounded, item, Rounding("stochastic", RANDOM_BITS), bits)
        bounded = torch.where(bounded.isinf(), bounded, rounded)
    elif item.native is None:
        bounded = nearest(bounded, item)
    return bounded.to(item.native) if item.native is not None else encode(bounded, item)


def decode_state(data: Tensor, exponent: Tensor, fmt: StateFormat, dtype: torch.dtype) -> Tensor:
    """What ``encode_state`` stored, in ``dtype``."""
    item = fmt.element
    codes = data.to(torch.int32) & 0xFFFF if data.dtype == torch.int16 else data
    values = decode(codes, item, _work_dtype(dtype))
    if not item.has_inf:
        values = torch.where(values.abs() == item.max, values * torch.inf, values)
    rows = _shifted(_rows(values, fmt.block), exponent.view(-1, 1))
    return rows.view(-1)[:data.numel()].view(data.shape).to(dtype)


def _key(name: str, kind: str, dtype: torch.dtype) -> str:
    """The entry of encoded data: it says how to read it, and is not taken for ``name`` itself."""
    return f"{name}/{kind}/{str(dtype).removeprefix('torch.')}"


def _parsed(key: Any) -> tuple[str, str, torch.dtype] | None:
    """(name, format, decoded dtype) where ``key`` is that of encoded data."""
    parts = key.split("/") if isinstance(key, str) else ()
    if len(parts) != 3 or parts[1] not in FORMATS:
        return None
    dtype = getattr(torch, parts[2], None)
    return (parts[0], parts[1], dtype) if isinstance(dtype, torch.dtype) else None


class _Call(dict[str, Any]):
    """The keyword arguments of a step; they live as long as it does, however it ends."""


class ScaledState:
    """What ``scaled_state`` returns: the state of one optimizer, kept encoded between steps.

    Between steps ``optimizer.state[p]`` holds, for each tensor ``exp_avg`` that is encoded,
    ``exp_avg/f16/float32`` (the data, shaped as p) and ``exp_avg/f16/float32/exponent``."""

    def __init__(self, optimizer: torch.optim.Optimizer, first: str, second: str,
                 squares: frozenset[str], generator: torch.Generator | None) -> None:
        self.optimizer = optimizer
        self.generator = generator
        self._first, self._second, self._squares = first, second, squares
        self._groups: list[dict[str, Any]] | None = None  # while a step has them taken away
        self._call: weakref.ref[_Call] | None = None  # the outermost step under way
        self._loading: list[tuple[Tensor, dict[str, Tensor]]] = []
        self._loading_generator: Tensor | None = None
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_state_dict_pre_hook(self._before_saving),
            optimizer.register_state_dict_post_hook(self._after_saving),
            optimizer.register_load_state_dict_pre_hook(self._before_loading),
            optimizer.register_load_state_dict_post_hook(self._after_loading),
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor of the state, as it is now."""
        return sum(value.nbytes for entry in self.optimizer.state.values()
                   for value in entry.values() if isinstance(value, Tensor))

    @property
    def left(self) -> dict[str, str]:
        """``parameter index.name`` → why a tensor of the state is not encoded."""
        return {f"{index}.{name}": reason
                for index, param in enumerate(_params(self.optimizer.param_groups))
                for name, value in self._entry(param).items()
                if (reason := self._reason(name, value, param))}

    def decoded(self, param: Tensor) -> dict[str, Any]:
        """The state of a parameter as the optimizer sees it: a copy, with floating tensors."""
        entry = dict(self._entry(param))
        _decode_entry(entry, param)
        return entry

    def remove(self) -> None:
        """Decode everything and leave the optimizer as it was found."""
        self._settle()
        self._decode(_params(self.optimizer.param_groups))
        for handle in self._handles:
            handle.remove()
        _ATTACHED.discard(self.optimizer)

    def _entry(self, param: Tensor) -> dict[Any, Any]:
        return self.optimizer.state.get(param, {})  # not made where there is none

    def _kind(self, name: str) -> str:
        return self._second if name in self._squares else self._first

    def _reason(self, name: Any, value: Any, param: Tensor) -> str | None:
        """Why a state is left as it is; None where it is encoded. Empty: nothing to report."""
        if _parsed(str(name).removesuffix(f"/{_SCALE}")):
            return ""
        if not isinstance(value, Tensor):
            nested = isinstance(value, (list, tuple, dict))
            return f"a {type(value).__name__}, not a tensor" if nested else ""
        if name in KEPT:
            return KEPT[name]
        if value.layout != torch.strided:
            raise ConfigError(
                f"optimizer state {name!r} of a parameter of shape {list(param.shape)} is sparse "
                f"({value.layout}): use dense gradients, or an optimizer without scaled_state")
        if value.ndim == 0:
            return ""
        if not value.is_floating_point():
            return f"{value.dtype}, not floating"
        if value.shape != param.shape:
            return f"of shape {list(value.shape)}, not the parameter's {list(param.shape)}"
        if type(value) is not Tensor:
            return f"a {type(value).__name__}, not a plain tensor"
        if value.element_size() <= FORMATS[self._kind(name)].storage.itemsize:
            return f"{value.dtype}, not wider than what it would be stored in"
        return None

    def _decode(self, params: Iterable[Tensor]) -> None:
        for param in params:
            _decode_entry(self._entry(param), param)

    def _encode(self, params: Iterable[Tensor]) -> None:
        for param in params:
            entry = self._entry(param)
            for name in [name for name, value in entry.items()
                         if self._reason(name, value, param) is None]:
                kind = self._kind(name)
                stored = encode_state(entry[name], FORMATS[kind], self.generator)
                key = _key(name, kind, entry.pop(name).dtype)
                entry[key], entry[f"{key}/{_SCALE}"] = stored

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
        call = _Call(kwargs)
        self._call = weakref.ref(call)
        if self._in_parts():
            return self._step_in_parts(args, call), call
        self._decode(_params(optimizer.param_groups))
        return args, call

    def _after(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """After a step, not after one within: encode."""
        call = self._call and self._call()
        if call is not None and kwargs is not call:
            return
        self._settle()
        self._encode(_params(optimizer.param_groups))

    def _in_parts(self) -> bool:
        """Torch's own steps treat parameters one by one, so that some may come before others. Hooks
        between this one and the one after the step would see no parameter groups, or old values."""
        known: Any = self.optimizer
        step, before = type(known).step, known._optimizer_step_pre_hooks
        return (step.__module__.startswith("torch.optim.") and hasattr(step, "__wrapped__")
                and next(reversed(before)) == self._handles[0].id
                and next(iter(known._optimizer_step_post_hooks)) == self._handles[1].id)

    def _step_in_parts(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The whole step, ``AT_ONCE`` values after another; the caller's own finds no groups left.
        The closure runs first and once, while the state is encoded. Returns new arguments."""
        optimizer, *given = args
        step: Any = type(optimizer).step.__wrapped__  # without hooks
        closure = given[0] if given else kwargs.pop("closure", None)
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            args = (optimizer, lambda: loss)
        groups = self._groups = optimizer.param_groups
        try:
            for group in groups:
                for params in _parts(group["params"]):
                    optimizer.param_groups = [group | {"params": params}]
                    self._decode(params)
                    try:
                        step(optimizer)
                    finally:
                        self._encode(params)
        except BaseException:
            self._settle()
            raise
        optimizer.param_groups = []
        return args

    def _before_saving(self, optimizer: Any) -> None:
        self._settle()
        self._encode(_params(optimizer.param_groups))

    def _after_saving(self, optimizer: Any, state_dict: dict[str, Any]) -> None:
        if self.generator is not None:
            state_dict[_GENERATOR] = self.generator.get_state()

    def _before_loading(self, optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Take encoded tensors out: torch would cast them to the parameter's dtype."""
        self._settle()
        ids = itertools.chain.from_iterable(g["params"] for g in state_dict["param_groups"])
        params = dict(zip(ids, _params(optimizer.param_groups), strict=False))
        generator = state_dict.get(_GENERATOR)
        rest = dict(state_dict["state"])
        self._loading, self._loading_generator = [], generator
        for index, param in params.items():
            values = rest.get(index, {})
            encoded: dict[str, Tensor] = {}
            for key in [key for key in values if _parsed(key)]:
                self._check_saved(index, key, values, param)
                encoded |= {key: values[key], f"{key}/{_SCALE}": values[f"{key}/{_SCALE}"]}
            if encoded and (generator is None) != (self.generator is None):
                call = "without a generator" if generator is None else "with one: it is restored"
                raise ConfigError("the loaded optimizer state and this one are not both rounded "
                                  f"stochastically: call scaled_state {call}")
            if encoded:
                rest[index] = {key: values[key] for key in values if key not in encoded}
                self._loading.append((param, encoded))
        return {**state_dict, "state": rest}

    def _check_saved(self, index: Any, key: str, values: Mapping[str, Any], param: Tensor) -> None:
        """That a saved tensor is complete, fits, and is in this optimizer's format."""
        name, kind, _ = _parsed(key) or ("", "", None)
        where = f"the loaded optimizer state {key!r} of parameter {index}"
        if kind != self._kind(name):
            raise ConfigError(f"{where} is kept as {self._kind(name)} here: call scaled_state with "
                              "the arguments of the saved optimizer")
        data, scale = values[key], values.get(f"{key}/{_SCALE}")
        if scale is None:
            raise ConfigError(f"{where} lacks its exponents: save every entry of state_dict")
        blocks = -(-param.numel() // (FORMATS[kind].block or max(param.numel(), 1)))
        if data.shape != param.shape or scale.shape != (blocks,) or scale.dtype != torch.int16 \
                or data.dtype != FORMATS[kind].storage:
            raise ConfigError(
                f"{where} is {data.dtype} {list(data.shape)} with exponents {scale.dtype} "
                f"{list(scale.shape)}; for a parameter of shape {list(param.shape)} it must be "
                f"{FORMATS[kind].storage} with torch.int16 [{blocks}]")

    def _after_loading(self, optimizer: Any) -> None:
        for param, encoded in self._loading:
            optimizer.state[param].update(
                {key: value.detach().to(param.device, copy=True) for key, value in encoded.items()})
        if self.generator is not None and self._loading_generator is not None:
            self.generator.set_state(self._loading_generator.cpu())
        self._loading, self._loading_generator = [], None
        self._encode(_params(optimizer.param_groups))


_ATTACHED: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def _params(groups: list[dict[str, Any]]) -> Iterator[Tensor]:
    return itertools.chain.from_iterable(group["params"] for group in groups)


def _parts(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters that have a gradient, in runs of ``AT_ONCE`` values (at least one of them)."""
    run: list[Tensor] = []
    size = 0
    for param in params:
        if param.grad is None:
            continue
        if run and size + param.numel() > AT_ONCE:
            yield run
            run, size = [], 0
        run.append(param)
        size += param.numel()
    yield from [run] if run else []


def _decode_entry(entry: dict[Any, Any], param: Tensor) -> None:
    """Encoded tensors become floating ones, laid out in memory as the parameter."""
    for key in [key for key in entry if _parsed(key)]:
        name, kind, dtype = _parsed(key) or ("", "", torch.float32)
        value = decode_state(entry.pop(key), entry.pop(f"{key}/{_SCALE}"), FORMATS[kind], dtype)
        if not param.is_contiguous():
            value = torch.empty_like(param, dtype=dtype).copy_(value)
        entry[name] = value


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
    ``AT_ONCE`` values (or one parameter) at a time; all at once where other hooks run between the
    two of this one, and in other optimizers. Not inside a CUDA graph: stored tensors are new ones.

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
        if value not in _FIRST:
            raise ConfigError(f"unknown {what} {value!r}; known: {', '.join(_FIRST)}")
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
    names = SQUARES | frozenset(squares)
    state = ScaledState(optimizer, _FIRST[dtype], _SECOND[second], names, generator)
    _ATTACHED.add(optimizer)
    state._before_saving(optimizer)  # pyright: ignore[reportPrivateUsage]
    return state
