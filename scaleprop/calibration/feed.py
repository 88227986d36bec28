"""Feed calibration data, in any of the forms that users give it, to a program that is observed."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree

from scaleprop.calibration.observer import Observer
from scaleprop.errors import CalibrationError, ConfigError
from scaleprop.passes.base import Program
from scaleprop.signature import Signature, split_example

Data = Iterable[Any] | Callable[[Any], Any]


def feed(data: Data, program: Program, observer: Observer) -> None:
    """Run ``observer``, which interprets ``program``, on every batch of ``data``.

    data: an iterable of batches, each spelt as example inputs are (``split_example``); or a
        function ``f(model)`` that calls the model that it is given.

    Raises:
        CalibrationError: where ``data`` is empty or a single batch, or a batch does not fit.
    """
    refuse_bare(data)
    model = _Observed(program, observer)
    if callable(data):
        data(model)
    else:
        for batch in data:
            with _naming(observer):
                args, kwargs = split_example(batch)
            model(*args, **kwargs)
    if observer.batch == 0:
        raise CalibrationError(
            "calibration data was empty: the model was never called. Remedy: pass at least "
            "one batch; a generator can be read only once"
        )


def refuse_bare(data: Any) -> None:
    """Raise ``CalibrationError`` for one batch, whose rows or names would be taken for batches."""
    if isinstance(data, (torch.Tensor, Mapping)):
        raise CalibrationError(
            f"calibration data is an iterable of batches, not one {type(data).__name__}. "
            f"Remedy: wrap it in a list"
        )


@contextmanager
def _naming(observer: Observer) -> Generator[None]:
    """What is wrong with a batch is a calibration error that names it."""
    try:
        yield
    except ConfigError as error:
        raise CalibrationError(
            f"calibration batch {observer.batch} does not fit the model: {error}"
        ) from error


class _Observed(torch.nn.Module):
    """What a calibration function calls: the model's signature, observed."""

    def __init__(self, program: Program, observer: Observer) -> None:
        super().__init__()
        self._observer = observer
        self._signature = Signature.of(program)
        self._out_spec = program.out_spec

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output for these inputs, while its values are observed."""
        with _naming(self._observer):
            leaves = self._signature.flatten(args, kwargs)
        return pytree.tree_unflatten(self._observer.observe(leaves), self._out_spec)
