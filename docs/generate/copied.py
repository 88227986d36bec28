"""Documents of the repository that the site shows as they are, with links that work there."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from docs.generate.markdown import ROOT

# path in the repository → path in the site
COPIED = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "results/benchmarks.md",
    **{f"benchmarks/results/{path.name}": f"results/{path.name}"
       for path in sorted((ROOT / "benchmarks" / "results").glob("*"))
       if path.suffix in (".md", ".csv", ".txt")},
}
_LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?!https?:|#|mailto:)(?P<to>[^)#\s]+)(?P<at>#[^)]*)?\)")


def pages() -> Iterator[tuple[str, str]]:
    """Paths and texts."""
    for source, target in COPIED.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        if source.endswith(".md"):
            text = relinked(text, source, target)
        if source == "benchmarks/README.md":
            text = _with_results(text)
        yield target, text


def relinked(text: str, source: str, target: str) -> str:
    """``text`` of the document ``source``, shown as ``target``: links to what the site has lead
    there, others become the name of the file in the repository.

    Raises:
        ValueError: where there is no such file.
    """

    def replace(match: re.Match[str]) -> str:
        place = posixpath.normpath(PurePosixPath(source).parent / match["to"])
        shown = COPIED.get(place) or (place.removeprefix("docs/") if place.startswith("docs/")
                                      else None)
        if shown is not None:
            there = posixpath.relpath(shown, posixpath.dirname(target) or ".")
            return f"[{match['text']}]({there}{match['at'] or ''})"
        if not (ROOT / place).exists():
            raise ValueError(f"{source} links to {match['to']}, which does not exist")
        return f"{match['text']} (`{place}`)"

    return _LINK.sub(replace, text)


def _with_results(text: str) -> str:
    """The table of benchmarks, each with a link to its results where there are any."""
    known = {PurePosixPath(name).stem: PurePosixPath(name).name for name in COPIED.values()
             if name.startswith("results/") and name.endswith(".md")}

    def link(match: re.Match[str]) -> str:
        shown = known.get(match[2])
        return f"[{match[1]}]({shown})" if shown else match[1]

    return re.sub(r"(?<=\| )(`python -m benchmarks\.(\w+)`)", link, text)
