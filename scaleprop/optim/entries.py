"""Names of what is encoded in the state of an optimizer; which of it is encoded, and at a time."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from scaleprop.errors import ConfigError
from scaleprop.optim.batches import decode_states, encode_states, rows_of
from scaleprop.optim.kernels import Ends, decode_state, encode_state
from scaleprop.optim.storage import FORMATS, random_bits

SQUARES = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum", "variance",
                     "exp_inf", "step_size"})  # not negative, and divided by or multiplied with
KEPT: Mapping[str, str] = {"step": "", "ax": "an average of parameters"}  # and what to report
AT_ONCE = 1 << 24  # values of parameters whose state is decoded at the same time
ALONE = frozenset({"cpu"})  # devices where each tensor is encoded by itself
SCALE, GENERATOR = "exponent", "rounding_generator"  # keys in a state and a state_dict


class Call(dict[str, Any]):
    """The keyword arguments of a step; they live as long as it does, however it ends."""


def key_of(name: str, kind: str, dtype: torch.dtype) -> str:
    """The entry of encoded data: it says how to read it, and is not taken for ``name`` itself."""
    return f"{name}/{kind}/{str(dtype).removeprefix('torch.')}"


def parsed(key: Any) -> tuple[str, str, torch.dtype] | None:
    """(name, format, decoded dtype) where ``key`` is that of encoded data."""
    parts = key.split("/") if isinstance(key, str) else ()
    if len(parts) != 3 or parts[1] not in FORMATS:
        return None
    dtype = getattr(torch, parts[2], None)
    return (parts[0], parts[1], dtype) if isinstance(dtype, torch.dtype) else None


def params_of(groups: list[dict[str, Any]]) -> Iterator[Tensor]:
    """Every parameter, in the order of a state_dict."""
    return itertools.chain.from_iterable(group["params"] for group in groups)


def in_parts(params: list[Tensor], at_once: int | None = None) -> Iterator[list[Tensor]]:
    """Parameters that have a gradient, in runs of ``at_once`` values (at least one of them)."""
    at_once = AT_ONCE if at_once is None else at_once
    run: list[Tensor] = []
    size = 0
    for param in params:
        if param.grad is None:
            continue
        if run and size + param.numel() > at_once:
            yield run
            run, size = [], 0
        run.append(param)
        size += param.numel()
    yield from [run] if run else []


def decode_entry(entry: dict[Any, Any], param: Tensor) -> None:
    """Encoded tensors become floating ones, laid out in memory as the parameter."""
    for key in [key for key in entry if parsed(key)]:
        name, kind, dtype = parsed(key) or ("", "", torch.float32)
        value = decode_state(entry.pop(key), entry.pop(f"{key}/{SCALE}"), FORMATS[kind], dtype)
        if not param.is_contiguous():
            value = torch.empty_like(param, dtype=dtype).copy_(value)
        entry[name] = value


@dataclasses.dataclass(frozen=True)
class Known:
    """What is known of the state of one parameter, by name: its ends, and memory for its data."""

    ends: Mapping[Any, Ends]
    memory: Mapping[Any, Tensor]


NOTHING = Known({}, {})


@dataclasses.dataclass(frozen=True)
class Codec:
    """How the state of one optimizer is kept: formats of moments and of ``squares``, and rounding
    (to nearest without ``generator``)."""

    first: str
    second: str
    squares: frozenset[str]
    generator: torch.Generator | None

    def kind(self, name: str) -> str:
        """The format, in ``FORMATS``, of the state called ``name``."""
        return self.second if name in self.squares else self.first

    def reason(self, name: Any, value: Any, param: Tensor) -> str | None:
        """Why a state is left as it is; None where it is encoded. Empty: nothing to report.

        Raises ``ConfigError`` for sparse state.
        """
        if parsed(str(name).removesuffix(f"/{SCALE}")):
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
        if value.element_size() <= FORMATS[self.kind(name)].storage.itemsize:
            return f"{value.dtype}, not wider than what it would be stored in"
        return None

    def encode(self, state: Mapping[Tensor, dict[Any, Any]], params: Iterable[Tensor],
               known: Known = NOTHING) -> None:
        """Encode the state of ``params`` in place, whatever of it can be."""
        joined: dict[Any, list[tuple[dict[Any, Any], str, Any]]] = {}
        for param in params:
            entry = state.get(param, {})  # not made where there is none
            for name in [name for name, value in entry.items()
                         if self.reason(name, value, param) is None]:
                kind, value = self.kind(name), entry.pop(name)
                key, fmt = key_of(name, kind, value.dtype), FORMATS[kind]
                if value.device.type in ALONE or value.numel() == 0:
                    entry[key], entry[f"{key}/{SCALE}"] = encode_state(
                        value, fmt, self.generator, ends=known.ends.get(name),
                        memory=known.memory.get(name))
                    continue
                entry[key] = value  # holds its place; bits are drawn in this order
                bits = None if self.generator is None else (
                    random_bits(rows_of(value, fmt), self.generator))
                joined.setdefault((kind, value.dtype, value.device), []).append((entry, key, bits))
        for (kind, *_), together in joined.items():
            drawn = None if self.generator is None else [bits for *_, bits in together]
            stored = encode_states([entry[key] for entry, key, _ in together], FORMATS[kind], drawn)
            for (entry, key, _), (data, exponent) in zip(together, stored, strict=True):
                entry[key], entry[f"{key}/{SCALE}"] = data, exponent


def decode(state: Mapping[Tensor, dict[Any, Any]], params: Iterable[Tensor]) -> None:
    """Decode the state of ``params`` in place."""
    joined: dict[Any, list[tuple[dict[Any, Any], str, Tensor]]] = {}
    for param in params:
        entry = state.get(param, {})
        if param.device.type in ALONE or not param.is_contiguous() or param.numel() == 0:
            decode_entry(entry, param)
            continue
        for key in [key for key in entry if parsed(key)]:
            name, kind, dtype = parsed(key) or ("", "", torch.float32)
            exponent: Tensor = entry.pop(f"{key}/{SCALE}")
            entry[name] = entry.pop(key)  # holds its place
            joined.setdefault((kind, dtype, param.device), []).append((entry, name, exponent))
    for (kind, dtype, _), together in joined.items():
        values = decode_states([(entry[name], exponent) for entry, name, exponent in together],
                               FORMATS[kind], dtype)
        for (entry, name, _), value in zip(together, values, strict=True):
            entry[name] = value
