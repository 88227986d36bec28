"""Where scales are from, in words: what records say of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import torch.fx

from scaleprop.formats import ScaledFormat
from scaleprop.passes.outline import module_paths
from scaleprop.report.records import ScaleProvenance, TensorRecord, TransformRecord

_MOST = 12  # neighbours that a record lists

_STATISTICS: Mapping[str, str] = {
    "absmean": "mean |x|",
    "rms": "RMS",
    "mse": "the scale of least squared error",
    "fouroversix": "amax, brought to 6 or to 4, whichever has less error,",
}


def innermost_module(node: torch.fx.Node) -> str:
    """The dotted path of the module that ``node`` is in; empty where it is in the model itself."""
    return (module_paths(node) or ("",))[-1]


def statistic_of(fmt: ScaledFormat, clipping: str = "amax") -> str:
    """Which numbers a format finds its scales from: ``amax of each 1×32 block``."""
    what = _STATISTICS.get("mse" if clipping == "mse" else fmt.rule,
                           "min and max" if fmt.zero_point else "amax")
    kind, block = fmt.granularity.kind, fmt.block
    place = "the tensor" if kind == "tensor" else f"each {kind}"
    if block is not None:
        place = f"each {block[0]}×{block[1]} {kind}"
    return f"{what} of {place}{', and amax of the tensor' if fmt.two_level else ''}"


def with_neighbours(
    records: Sequence[TensorRecord], transforms: Iterable[TransformRecord]
) -> tuple[TensorRecord, ...]:
    """``records`` whose provenance names what has the same scale, and what transforms tied it to.

    The same scale: other operators that read one value in one format, as one quantization serves
    all. Tied: the other ends of a transform that moved scales into or out of the tensor.
    """
    readers: dict[tuple[str, str | None], list[str]] = {}
    for record in records:
        readers.setdefault((record.operand, record.format), []).append(record.node)
    tied: dict[str, list[str]] = {}
    for transform in transforms:
        if transform.refused is None:
            ends = (transform.seed, *transform.absorbed, *transform.readers)
            for end in ends:
                tied.setdefault(end, []).extend(other for other in ends if other != end)

    def found(record: TensorRecord, provenance: ScaleProvenance) -> tuple[str, ...]:
        shared = readers[record.operand, record.format]
        names = [f"{record.operand} of {node}" for node in shared if node != record.node]
        names += tied.get(record.operand, [])
        if record.role == "fprop.x":
            names += [name for name in tied.get(record.node, ()) if name != record.operand]
        kept = tuple(dict.fromkeys(names))
        more = (f"and {len(kept) - _MOST} more",) if len(kept) > _MOST else ()
        return (*provenance.neighbours, *kept[:_MOST], *more)

    return tuple(
        record if record.provenance is None else dataclasses.replace(
            record, provenance=dataclasses.replace(
                record.provenance, neighbours=found(record, record.provenance)))
        for record in records)
