"""Saving and loading encoded state: exact, under names of its own."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from scaleprop.errors import ConfigError
from scaleprop.optim.entries import GENERATOR, SCALE, Codec, params_of, parsed
from scaleprop.optim.storage import FORMATS


class Loading:
    """One call of ``load_state_dict`` at a time: what torch must not see of it."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._encoded: list[tuple[Tensor, dict[str, Tensor]]] = []
        self._generator: Tensor | None = None

    def before(self, optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Take encoded tensors out: torch would cast them to the parameter's dtype.

        Raises ``ConfigError`` where they do not fit this optimizer.
        """
        ids = itertools.chain.from_iterable(g["params"] for g in state_dict["param_groups"])
        params = dict(zip(ids, params_of(optimizer.param_groups), strict=False))
        generator = state_dict.get(GENERATOR)
        rest = dict(state_dict["state"])
        self._encoded, self._generator = [], generator
        for index, param in params.items():
            values = rest.get(index, {})
            encoded: dict[str, Tensor] = {}
            for key in [key for key in values if parsed(key)]:
                _check_saved(self._codec, index, key, values, param)
                encoded |= {key: values[key], f"{key}/{SCALE}": values[f"{key}/{SCALE}"]}
            if encoded and (generator is None) != (self._codec.generator is None):
                call = "without a generator" if generator is None else "with one: it is restored"
                raise ConfigError("the loaded optimizer state and this one are not both rounded "
                                  f"stochastically: call scaled_state {call}")
            if encoded:
                rest[index] = {key: values[key] for key in values if key not in encoded}
                self._encoded.append((param, encoded))
        return {**state_dict, "state": rest}

    def after(self, optimizer: Any) -> None:
        """Put them back, as they were saved, and the generator's state."""
        for param, encoded in self._encoded:
            optimizer.state[param].update(
                {key: value.detach().to(param.device, copy=True) for key, value in encoded.items()})
        if self._codec.generator is not None and self._generator is not None:
            self._codec.generator.set_state(self._generator.cpu())
        self._encoded, self._generator = [], None


def _check_saved(
    codec: Codec, index: Any, key: str, values: Mapping[str, Any], param: Tensor
) -> None:
    """That a saved tensor is complete, fits, and is in this optimizer's format."""
    name, kind, _ = parsed(key) or ("", "", None)
    where = f"the loaded optimizer state {key!r} of parameter {index}"
    if kind != codec.kind(name):
        raise ConfigError(f"{where} is kept as {codec.kind(name)} here: call scaled_state with "
                          "the arguments of the saved optimizer")
    data, scale = values[key], values.get(f"{key}/{SCALE}")
    if scale is None:
        raise ConfigError(f"{where} lacks its exponents: save every entry of state_dict")
    blocks = -(-param.numel() // (FORMATS[kind].block or max(param.numel(), 1)))
    if data.shape != param.shape or scale.shape != (blocks,) or scale.dtype != torch.int16 \
            or data.dtype != FORMATS[kind].storage:
        raise ConfigError(
            f"{where} is {data.dtype} {list(data.shape)} with exponents {scale.dtype} "
            f"{list(scale.shape)}; for a parameter of shape {list(param.shape)} it must be "
            f"{FORMATS[kind].storage} with torch.int16 [{blocks}]")
