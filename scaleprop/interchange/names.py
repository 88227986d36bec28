"""Parameters' names in a model, and in checkpoints of its class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from scaleprop.interchange.libraries import library


def checkpoint_names(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Name of a parameter → its name in checkpoints, as ``model.save_pretrained`` has it.

    Those that checkpoints hold in another form, split or joined with others, are left out.
    """
    loading = library("transformers.core_model_loading", "a checkpoint's names")
    marks = {name: torch.empty(0) for name in names}
    places = {id(mark): name for name, mark in marks.items()}
    try:
        written: Mapping[str, Any] = loading.revert_weight_conversion(model, dict(marks))
    except (RuntimeError, ValueError, LookupError, TypeError):
        # some operation of the class does not take marks: one name at a time tells which
        written = {}
        for name in names:
            try:
                written |= loading.revert_weight_conversion(model, {name: marks[name]})
            except (RuntimeError, ValueError, LookupError, TypeError):
                continue
    return {places[id(mark)]: name for name, mark in written.items() if id(mark) in places}


def parameter_name(written: str, model: nn.Module, known: Mapping[str, str]) -> str | None:
    """The parameter of ``model`` that a checkpoint calls ``written``; None where there is none.

    known: what ``checkpoint_names`` says of the model. A base model's names may have its prefix, or
    lack it, as transformers loads them.
    """
    inverse = {name: parameter for parameter, name in known.items()}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for name in (written, prefix + written, written.removeprefix(prefix)):
        if name in inverse:
            return inverse[name]
        if name in known:
            return name
    return None
