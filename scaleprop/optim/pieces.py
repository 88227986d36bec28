"""A step of one large parameter, some values after others, so that what is decoded, changed and
read again stays in cache.

Every value of a parameter, its gradient and its state is treated alike and alone by the optimizers
in ``ELEMENTWISE``. A piece is a view of some of them, which the optimizer takes for a parameter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, optim

from scaleprop.optim import kernels
from scaleprop.optim.entries import SCALE, Codec, Known, parsed
from scaleprop.optim.storage import FORMATS, StateFormat

CHUNKS = 2  # in a piece: fewer steps, which take longer to call
ELEMENTWISE = (optim.Adadelta, optim.Adagrad, optim.Adam, optim.Adamax, optim.AdamW, optim.ASGD,
               optim.NAdam, optim.RAdam, optim.RMSprop, optim.Rprop, optim.SGD)


def length() -> int:
    """Of a piece, in values."""
    return CHUNKS * kernels.CHUNK


def in_cache(optimizer: optim.Optimizer, params: Iterable[Tensor]) -> bool:
    """Whether few values at a time are faster: on a CPU, where a call costs little."""
    return isinstance(optimizer, ELEMENTWISE) and not kernels.flushes() and all(
        param.device.type == "cpu" for param in params)


def can_cut(optimizer: optim.Optimizer, param: Tensor) -> bool:
    """Whether a parameter of an optimizer that is stepped ``in_cache`` can be stepped in pieces,
    and is large enough that it should."""
    grad = param.grad
    return (param.numel() > length() and grad is not None and _is_plain(param.detach())
            and _is_plain(grad) and all(_is_cut(key, value, param) for key, value
                                        in optimizer.state.get(param, {}).items()))


def _is_plain(x: Tensor) -> bool:
    return (type(x) is Tensor and x.layout == torch.strided and x.is_contiguous()
            and x.dtype == torch.float32)


def _is_cut(key: Any, value: Any, param: Tensor) -> bool:
    """Whether an entry is encoded float32, one number, or plain and shaped as the parameter."""
    encoded = parsed(_data_key(key))
    if encoded:
        return encoded[2] == torch.float32
    if isinstance(value, Tensor):
        return value.ndim == 0 or (value.shape == param.shape and _is_plain(value))
    return value is None or isinstance(value, (int, float))


def _data_key(key: Any) -> str:
    """That of the data, for that of their exponents, too."""
    return str(key).removesuffix(f"/{SCALE}")


@dataclasses.dataclass(frozen=True)
class _Encoded:
    """A tensor of the state: flat data, its exponents, and memory for it decoded."""

    data: Tensor
    exponent: Tensor
    fmt: StateFormat
    decoded: Tensor

    def decode(self, where: slice) -> Tensor:
        out, block = self.decoded[where], self.fmt.block
        blocks = slice(where.start // block, -(-where.stop // block)) if block else slice(1)
        kernels.decode_into(out, self.data[where], self.exponent[blocks], self.fmt)
        return out


class Pieces:
    """The pieces of one parameter during one step; then ``encode`` what they left.

    spare: flat memory by name of state, for one parameter after another.
    """

    def __init__(
        self, optimizer: optim.Optimizer, param: Tensor, spare: dict[Any, Tensor], codec: Codec
    ) -> None:
        self._state, self._param, self._codec = optimizer.state, param, codec
        self._plain: dict[Any, Any] = {}
        self._encoded: dict[Any, _Encoded] = {}
        # float tensors shaped as the parameter, flat
        self._whole: dict[Any, Tensor] = {}
        self._after: dict[Any, Any] = {}
        self._ends: dict[Any, kernels.Ends] = {}
        entry = self._state.get(param, {})
        for key, value in entry.items():
            name, kind, _ = parsed(key) or ("", "", None)
            if name:
                memory = self._whole[name] = _reserved(spare, name, param.numel())
                self._encoded[name] = _Encoded(value.view(-1), entry[f"{key}/{SCALE}"],
                                               FORMATS[kind], memory)
            elif not parsed(_data_key(key)):
                self._plain[key] = value
                if isinstance(value, Tensor) and value.ndim:
                    self._whole[key] = value.detach().view(-1)

    def __iter__(self) -> Iterator[Tensor]:
        """One piece after another, each with a gradient and a state of its own."""
        assert self._param.grad is not None
        values, grads = self._param.detach().view(-1), self._param.grad.detach().view(-1)
        for start in range(0, values.numel(), length()):
            where = slice(start, min(start + length(), values.numel()))
            piece = values[where]
            piece.grad = grads[where]
            self._state[piece] = self._decoded(where)
            try:
                yield piece
                self._collect(self._state[piece], where)
            finally:
                self._state.pop(piece, None)

    def _decoded(self, where: slice) -> dict[Any, Any]:
        """A piece of the state as the optimizer is to see it, in the order of ``decode_entry``."""
        own: dict[Any, Any] = {}
        for key, value in self._plain.items():
            own[key] = self._whole[key][where] if key in self._whole else (
                value.clone() if isinstance(value, Tensor) else value)
        return own | {name: encoded.decode(where) for name, encoded in self._encoded.items()}

    def _collect(self, own: Mapping[Any, Any], where: slice) -> None:
        """Put together what the optimizer made of a piece of the state."""
        for name, value in own.items():
            if not isinstance(value, Tensor) or value.ndim == 0:
                self._after[name] = value
                continue
            if name not in self._whole:
                self._whole[name] = torch.empty(self._param.numel())
            place = self._whole[name][where]
            if value.data_ptr() != place.data_ptr():
                place.copy_(value)
            self._after[name] = self._whole[name].view(self._param.shape)
            self._ends.setdefault(name, []).append(kernels.ends_of(value))

    def encode(self) -> None:
        """Make what was put together the parameter's state, and encode it."""
        self._state[self._param] = dict(self._after)
        memory = {name: encoded.data.view(self._param.shape)
                  for name, encoded in self._encoded.items()}
        self._codec.encode(self._state, [self._param], Known(self._ends, memory))


def _reserved(spare: dict[Any, Tensor], name: Any, size: int) -> Tensor:
    if name not in spare or spare[name].numel() < size:
        spare[name] = torch.empty(size)
    return spare[name][:size]
