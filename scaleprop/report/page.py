"""A page as one HTML file: style, scripts and data inline, no request to anywhere."""

from __future__ import annotations

import base64
import dataclasses
import json
import zlib
from collections.abc import Sequence
from html import escape
from importlib import resources
from typing import Any

# What the page may load: nothing but its own style and scripts.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

TABLE = ("dom.js", "theme.js", "table.js", "page.js")  # scripts of a page with a table
REPORT = ("dom.js", "theme.js", "table.js", "chart.js", "histogram.js", "depth.js", "panel.js",
          "report.js")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a page: reached as ``#name``, and listed under its heading at the top.

    body: HTML. The section is left out where there is none.
    """

    name: str
    heading: str
    body: str

    def html(self) -> str:
        """The section with its heading; "" without a body."""
        if not self.body:
            return ""
        return (f'<section id="{self.name}" aria-labelledby="{self.name}-heading">\n'
                f'<h2 id="{self.name}-heading">{escape(self.heading)}</h2>\n{self.body}'
                "</section>\n")


def page(
    title: str, parts: Sequence[Section | str], data: Any = None, scripts: Sequence[str] = TABLE,
    style: str = "",
) -> str:
    """A complete document of sections, or of HTML that has its headings already.

    data: what the scripts draw from, plain data for JSON. scripts: files of ``assets``, in order.
    style: rules besides those of all pages.
    """
    body = "".join(part.html() if isinstance(part, Section) else part for part in parts)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(title)}</title>
<style>
{_asset("report.css")}{style}</style>
</head>
<body>
{_head(title, [part for part in parts if isinstance(part, Section) and part.body])}
<main id="main" tabindex="-1">
{body}</main>
{_embedded(data)}<script>
"use strict";
{"".join(map(_asset, scripts))}</script>
</body>
</html>
"""


def _head(title: str, sections: Sequence[Section]) -> str:
    links = "".join(f'<li><a href="#{part.name}">{escape(part.heading)}</a></li>'
                    for part in sections)
    nav = f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n' if len(sections) > 1 else ""
    return f"""<a class="skip" href="#main">Skip to the content</a>
<header>
<h1>{escape(title)}</h1>
{nav}<label class="scripted theme">Theme<select id="theme"><option value="">system</option>
<option>light</option><option>dark</option></select></label>
</header>"""


def _embedded(data: Any) -> str:
    """``data`` as JSON. The same numbers are in the file that ``save`` writes as .json."""
    if data is None:
        return ""
    return packed("data", json.dumps(data, ensure_ascii=False, allow_nan=False,
                                     separators=(",", ":")))


def packed(name: str, text: str) -> str:
    """``text`` deflated (zlib) and in base64: scripts inflate it, and a page is a third of what it
    would be."""
    letters = base64.b64encode(zlib.compress(text.encode(errors="replace"), 9)).decode()
    return f'<script type="application/octet-stream" id="{name}">{letters}</script>\n'


def _asset(name: str) -> str:
    return resources.files("scaleprop.report").joinpath("assets", name).read_text(encoding="utf-8")


def cards(items: Sequence[tuple[str, str, str]]) -> str:
    """(what, value, detail) side by side; the detail may be HTML."""
    found = "".join(
        f'<div class="card"><dt>{escape(name)}</dt><dd>{escape(value)}<small>{detail}</small></dd>'
        "</div>" for name, value, detail in items)
    return f'<dl class="cards">{found}</dl>\n'


def simple_table(
    caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]],
    numbers: Sequence[int] = (),
) -> str:
    """A table that is not sorted; the columns at ``numbers`` are right-aligned. Cells are text."""
    if not rows:
        return ""
    kind = [" class=number" if place in numbers else "" for place in range(len(columns))]
    heads = "".join(f'<th scope="col"{kind[i]}>{escape(name)}</th>'
                    for i, name in enumerate(columns))
    body = "".join("<tr>" + "".join(f"<td{kind[i]}>{escape(cell)}</td>"
                                    for i, cell in enumerate(row)) + "</tr>\n" for row in rows)
    return (f'<div class="scroll fit" tabindex="0" role="region" aria-label="{escape(caption)}">'
            f'<table><caption class="unseen">{escape(caption)}</caption><thead class="plain"><tr>'
            f"{heads}</tr></thead><tbody>\n{body}</tbody></table></div>\n")


def notes_section(notes: Sequence[str]) -> Section:
    """Sentences as a list; nothing where there are none."""
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return Section("notes", "Notes", f"<ul>{items}</ul>\n" if items else "")


def number_cell(shown: str, value: float | None) -> str:
    """A right-aligned cell; ``data-value`` is what it sorts by, empty where not measured."""
    key = "" if value is None or value != value else repr(value).replace("inf", "Infinity")
    return f'<td class="number" data-value="{key}">{escape(shown)}</td>'
