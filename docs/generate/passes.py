"""The page on passes: what each does and why, and its options."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator

from docs.generate.fields import listed
from docs.generate.markdown import code, page, table
from scaleprop.passes.auto import Auto
from scaleprop.passes.pipeline import describe_passes, pass_types
from scaleprop.passes.transforms.base import TransformPass

_LEAD = """\
`scaleprop.compile` runs the usual passes on every model. Methods are added by name, with options
in braces: `passes=["smooth{alpha=0.6}", "rotate"]`, or `-p "smooth{alpha=0.6}" -p rotate` on the
command line. Options of a usual pass are changed the same way:
`"quantize-weights{rounding=nearest}"`. [Transforms of channels](transforms.md) tells how methods
find their way through a graph.

*Keeps the function*: the pass changes nothing but rounding of float64, and is held to that by
`verify=True`.
"""


def pages() -> Iterator[tuple[str, str]]:
    """The page."""
    known = {kind.name: kind for kind in pass_types()}
    infos = {info.name: info for info in describe_passes()}
    usual = [name for name, kind in known.items()
             if not issubclass(kind, (TransformPass, Auto)) and name != "solve-weights"]
    methods = [name for name in known if name not in usual]
    parts = [_LEAD]
    for title, names in (("The usual passes", usual), ("Methods, by name", methods)):
        rows = [(f"[`{name}`](#{name})", infos[name].summary,
                 "yes" if infos[name].preserves_function else "") for name in names]
        parts += [f"## {title}", table(("pass", "what it does", "keeps the function"), rows)]
        for name in names:
            parts += [f"### {name}", _explained(known[name])]
            if options := infos[name].options:
                cells = [(code(option), code(kind), code(usual_))
                         for option, kind, usual_ in options]
                parts.append(table(("option", "type", "default"), cells))
    yield "passes.md", page("Passes", *parts)


def _explained(kind: type) -> str:
    """The class's docstring, and its module's where that is the pass's own."""
    module = sys.modules[kind.__module__]
    texts = [inspect.cleandoc(kind.__doc__ or "")]
    if module.__doc__ and not kind.__module__.endswith(".auto"):
        texts.append(inspect.cleandoc(module.__doc__))
    return "\n\n".join(listed(_spaced(text)) for text in texts)


def _spaced(text: str) -> str:
    """Indented formulas with the empty lines that Markdown wants around them; bullets too."""
    text = re.sub(r"\n(?=(?:[*-]|\d\.) )", "\n\n", text)
    return re.sub(r"^(\S.*)\n(    )", r"\1\n\n\2", text, count=0, flags=re.M) \
        if "\n\n    " in text else text
