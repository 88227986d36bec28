"""Real English sentences without a download: from the standard library's docstrings."""

from __future__ import annotations

import ast
import functools
import random
import re
import sysconfig
import warnings
from pathlib import Path

_SENTENCE_END = re.compile(r"(?<=[.!?])\s")


def sentences(count: int, seed: int = 0) -> list[str]:
    """A sample of distinct sentences, the same for one Python version.

    Args:
        count: how many; a larger sample starts with the smaller one of the same seed.
        seed: of the shuffle.

    Raises:
        ValueError: where the standard library has fewer.
    """
    found = list(_all_sentences())
    if len(found) < count:
        raise ValueError(f"the standard library has {len(found)} docstring sentences, not {count}")
    random.Random(seed).shuffle(found)
    return found[:count]


@functools.cache
def _all_sentences() -> tuple[str, ...]:
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(library.rglob("*.py"))
             if not {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
             & set(path.parts)]
    return tuple(sorted({text for path in files for text in _docstring_sentences(path)}))


def _docstring_sentences(path: Path) -> list[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's files
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    firsts = (_first_sentence(text) for text in texts if text)
    return [sentence for sentence in firsts if sentence]


def _first_sentence(text: str) -> str | None:
    """The first sentence of a docstring, or None where it does not look like prose."""
    sentence = _SENTENCE_END.split(" ".join(text.split("\n\n")[0].split()))[0]
    words = sentence.split()
    letters = sum(character.isalpha() or character == " " for character in sentence)
    if not 5 <= len(words) <= 60 or letters < 0.85 * len(sentence):
        return None
    return sentence
