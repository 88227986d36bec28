"""The table of tensors on a page: sorted and searched by scripts, and there without them, too.

Of a table of thousands of rows, the first ``PLAIN`` are; scripts add the others, deflated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from html import escape
from typing import Literal
from urllib.parse import quote

from scaleprop.report import text
from scaleprop.report.page import packed

PLAIN = 1500  # rows that are there without scripts: more would be most of a page of a megabyte
Kind = Literal["number", "node", "name", "short", "outcome"]

_STYLES: dict[Kind, str] = {  # of the cells of a column, which carry no class of their own
    "number": "text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums",
    "node": "min-width: 19em; max-width: 30em; overflow-wrap: anywhere",
    "name": "min-width: 8em; max-width: 18em; overflow-wrap: anywhere",
    "short": "white-space: nowrap",
    "outcome": "min-width: 16em",
}
_LABELS = {"kind": "scale", "op": "operator"}  # of filters; others are called as they are


@dataclasses.dataclass(frozen=True)
class Column:
    """A heading, what its cells are, and the column of the page's data that it sorts by.

    Without ``data`` it sorts by the text that is seen.
    """

    name: str
    kind: Kind
    data: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor: its fragment, module and source line, and a cell for each column.

    high: whether it stayed in high precision: shown in grey.
    """

    slug: str
    module: str
    source: str
    cells: tuple[str, ...]
    high: bool = False


@dataclasses.dataclass(frozen=True)
class TensorTable:
    """Columns and rows; the cell of the column called ``node`` links to the tensor."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    @classmethod
    def of(cls, columns: Sequence[Column], rows: Sequence[Row]) -> TensorTable:
        """Without the columns in which no cell has anything."""
        kept = [i for i in range(len(columns)) if any(row.cells[i] for row in rows)]
        return cls(tuple(columns[i] for i in kept), tuple(
            dataclasses.replace(row, cells=tuple(row.cells[i] for i in kept)) for row in rows))

    def style(self) -> str:
        """CSS by the place of a cell in its row."""
        rules: list[str] = []
        for kind, style in _STYLES.items():
            places = [i for i, column in enumerate(self.columns, 1) if column.kind == kind]
            chosen = ", ".join(f"#tensors td:nth-child({i})" for i in places)
            rules += [f"{chosen} {{ {style}; }}\n"] if places else []
        return "".join(rules)

    def html(self, filters: Sequence[str]) -> str:
        """The controls and the table; ``filters`` are columns of the data: scripts fill them."""
        if not self.rows:
            return "<p>There are no tensors in this report.</p>\n"
        headings = "".join(
            f'<th scope="col" aria-sort="none" class="{column.kind}" data-column="{column.data}">'
            f'<button type="button">{escape(column.name)}</button></th>' for column in self.columns)
        chosen = "".join(f'<label>{_LABELS.get(name, name)}<select name="{name}"></select>'
                         "</label>\n" for name in filters)
        node = next(i for i, column in enumerate(self.columns) if column.name == "node")
        rows = [_row(row, node) for row in self.rows]
        body, more = "\n".join(rows[:PLAIN]), rows[PLAIN:]
        rest = "" if not more else (
            f'<p class="unscripted">The first {PLAIN} of {len(rows)}: scripts show the others, and '
            f"the report saved as .json has them.</p>\n{packed('rows', ''.join(more))}")
        return f"""<div class="controls scripted" role="search" aria-label="Tensors">
<label>Search (press /)<input type="search" name="text" autocomplete="off"
 placeholder="words in any column"></label>
<label>module<input name="module" list="modules" autocomplete="off" placeholder="begins with">
</label><datalist id="modules"></datalist>
{chosen}<span id="shown" role="status">{len(self.rows)} tensors</span>
</div>
<div class="scroll" tabindex="0" role="region" aria-label="Table of tensors">
<table id="tensors" data-opens><caption>One row per tensor, in graph order. <span class="scripted">
Headings sort. ↑ and ↓ move between rows, Enter opens one, Escape closes it.</span></caption>
<thead><tr>{headings}</tr></thead><tbody>
{body}
</tbody></table></div>
{rest}"""


def _row(row: Row, node: int) -> str:
    """A row with as few bytes as HTML allows: thousands of them are most of a page."""
    under = "<br>".join(map(escape, filter(None, (row.module, text.short_place(row.source)))))
    cells = [f"<td>{escape(cell)}" for cell in row.cells]
    cells[node] = (f"<td><a>{escape(row.cells[node])}</a>"  # scripts say where to: to this row
                   + (f"<small>{under}</small>" if under else ""))
    return f'<tr id="t={escape(row.slug)}"{" class=high" if row.high else ""}>{"".join(cells)}'


def fragment(slug: str) -> str:
    """The address of a tensor on the page."""
    return "#t=" + quote(slug, safe=":.~_-/,", errors="replace")
