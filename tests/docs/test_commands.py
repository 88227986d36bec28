"""Shell commands in the documents exist: their options parse, their modules and files are there."""

from __future__ import annotations

import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator

import click
import pytest

from scaleprop.cli.app import app
from tests.documents import PAGES, ROOT

PLAIN = ("pip", "make", "cd")  # of pip and make, what they are given is looked at


def commands() -> Iterator[tuple[str, str]]:
    """Every line of every block of shell, and every command in a line of text: page, command."""
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for block in re.findall(r"^ *```sh\n(.*?)^ *```", text, re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip():
                    yield page, line.strip()
        outside = re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)
        for line in re.findall(r"`((?:scaleprop [a-z]|python -m|make )[^`]*)`", outside):
            yield page, line.replace("\n", " ")


COMMANDS = sorted(set(commands()))


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[line for _, line in COMMANDS])
def test_commands_exist(page: str, line: str) -> None:
    words = shlex.split(line.replace("…", ""), comments=True)
    while "=" in words[0]:  # of the environment
        words.pop(0)
    program = words[0].rpartition("/")[2]
    if program == "scaleprop":
        check_scaleprop(words[1:])
    elif program == "python":
        assert words[1] == "-m" and importlib.util.find_spec(words[2]), line
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert not {word for word in words[1:] if "=" not in word} - set(targets), line
    elif program == "pip":
        check_pip(words)
    else:
        assert program in PLAIN, f"{page}: {line}"


def check_scaleprop(words: list[str]) -> None:
    """Commands, options and numbers of arguments are those that click knows; names separated by a
    bar are each a command."""
    context = click.Context(app, info_name="scaleprop")
    names = [word for word in words if word != "|"] if "|" in words else words[:1]
    for name in names:
        command = app.get_command(context, name)
        assert command is not None, f"no command {name!r}"
        if "|" not in words:
            given = [re.sub(r"^(FILE|NAME)$", "x", word) for word in words[1:]]
            required = {"export": ["m:f", "--out", "x"]}.get(name, ["m:f"])
            given = given or (required if any(each.required for each in command.params) else [])
            command.make_context(name, given, resilient_parsing=False)


def check_pip(words: list[str]) -> None:
    """Extras exist."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r"\[([\w,]+)\]", " ".join(words)):
        assert not set(extras.split(",")) - set(project["optional-dependencies"])
