"""What mkdocs calls: adds the generated pages, and puts the API's into the navigation."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # mkdocs loads hooks by their path

from docs.generate import api, cli, copied, errors, formats, passes, peers, recipes

GENERATORS = (formats, recipes, passes, cli, errors, peers, api, copied)
_ELSEWHERE = re.compile(  # what a browser would fetch from another machine
    r"""<(?:script|img|iframe|source)[^>]*\ssrc=["'](?:https?:)?//[^"']*"""
    r"""|<link[^>]*\shref=["'](?:https?:)?//[^"']*""")


def on_files(files: Files, *, config: Any) -> Files:
    """The pages of docs/, and those that are generated."""
    for path, text in itertools.chain.from_iterable(each.pages() for each in GENERATORS):
        if files.get_file_from_path(path) is not None:
            raise ValueError(f"docs/{path} is generated: remove the file")
        files.append(File.generated(config, path, content=text))
    for entry in config.nav:
        if entry == {"API": "API"}:
            entry["API"] = [{title: path} for path, title in api.TITLES.items()]
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Links to files beside docs/ lead to the site's copies of them."""
    path = page.file.src_uri
    if page.file.generated_by is not None:
        return markdown
    return copied.relinked(markdown, f"docs/{path}", path)


def on_post_page(output: str, *, page: Any, **_: Any) -> str:
    """The page as it is.

    Raises:
        ValueError: where it would fetch something from elsewhere.
    """
    if found := _ELSEWHERE.search(output):
        raise ValueError(f"{page.file.src_uri} is not offline: {found[0]}")
    return output
