"""The figure of the FP8 papers: how scales are distributed, and where they go in a run."""

from __future__ import annotations

import io
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from scaleprop.errors import BackendUnavailable, ConfigError
from scaleprop.extras import install_command
from scaleprop.monitors.records import Measurement
from scaleprop.report.files import write_bytes

_SUFFIXES = (".svg", ".png", ".pdf")
_COLUMNS = 3
_FAINT = 1e-3  # the share that has the last colour: tails are what underflows and saturates


def plot_scales(records: Sequence[Measurement], path: str | PathLike[str]) -> None:
    """Draw, for each role, which part of all layers' blocks has which scale exponent, ⌊log₂ s⌋, at
    each measured step; the median as a line (after Micikevicius et al., arXiv:2209.05433, and Perez
    et al., arXiv:2309.17224). The ending of ``path`` says how: .svg, .png, .pdf.

    Raises:
        ConfigError: without any scale, for another ending, or a path that cannot be written.
        BackendUnavailable: without matplotlib.
    """
    kind = Path(path).suffix.lower()
    if kind not in _SUFFIXES:
        raise ConfigError(f"scales are drawn as {', '.join(_SUFFIXES)}, not as {str(path)!r}")
    shares = exponent_shares(records)
    if not shares:
        raise ConfigError("no scales were measured: nothing to plot. Remedy: monitor.step(*batch) "
                          "in the training loop, and an every that it reaches")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BackendUnavailable("the plot of scales needs matplotlib. Remedy: "
                                 f"{install_command('matplotlib')}") from error
    columns = min(_COLUMNS, len(shares))
    rows = -(-len(shares) // columns)
    figure = Figure(figsize=(4.0 * columns, 3.0 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    meshes = [_draw(panel, role, found)
              for panel, (role, found) in zip(panels, shares.items(), strict=False)]
    for panel in panels[len(shares):]:
        panel.set_axis_off()
    figure.colorbar(meshes[0], ax=panels, label="share of blocks")
    drawn = io.BytesIO()
    figure.savefig(drawn, format=kind.removeprefix("."))
    write_bytes(path, drawn.getvalue())


def exponent_shares(
    records: Sequence[Measurement]
) -> dict[str, dict[int, dict[int, float]]]:
    """role → step → exponent → share of the role's blocks, in all layers, that has it."""
    counts: dict[str, dict[int, Counter[int]]] = {}
    for record in records:
        for each in record.operands:
            if each.exponents:
                steps = counts.setdefault(each.role, {})
                steps.setdefault(record.step, Counter()).update(each.exponents)
    return {role: {step: {at: count / found.total() for at, count in sorted(found.items())}
                   for step, found in sorted(steps.items())}
            for role, steps in sorted(counts.items())}


def _draw(panel: Any, role: str, found: Mapping[int, Mapping[int, float]]) -> Any:
    """One role: columns are measurements, rows exponents."""
    steps = list(found)
    places = range(min(map(min, found.values())), max(map(max, found.values())) + 1)
    grid = [[found[step].get(at, float("nan")) for step in steps] for at in places]
    from matplotlib.colors import LogNorm

    mesh = panel.pcolormesh(_edges(steps), [places[0] - 0.5, *(at + 0.5 for at in places)], grid,
                            norm=LogNorm(_FAINT, 1.0, clip=True), cmap="viridis")
    panel.plot(steps, [_median(found[step]) for step in steps], color="tab:red", marker=".",
               linewidth=1.0, label="median")
    panel.set(title=role, xlabel="step", ylabel="⌊log₂ scale⌋")
    for axis in (panel.xaxis, panel.yaxis):
        axis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    return mesh


def _edges(steps: Sequence[int]) -> list[float]:
    """Borders of the columns: half way between measurements."""
    if len(steps) == 1:
        return [steps[0] - 0.5, steps[0] + 0.5]
    middles = [(one + next_) / 2 for one, next_ in itertools.pairwise(steps)]
    return [2 * steps[0] - middles[0], *middles, 2 * steps[-1] - middles[-1]]


def _median(shares: Mapping[int, float]) -> int:
    """The lowest exponent that half of all blocks do not exceed."""
    total = 0.0
    for at, share in sorted(shares.items()):
        total += share
        if total >= 0.5:
            return at
    return max(shares)
