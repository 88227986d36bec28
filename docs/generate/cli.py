"""The page on the command line, from the commands themselves."""

from __future__ import annotations

from collections.abc import Iterator

import click

from docs.generate.markdown import code, page, table
from scaleprop.cli.app import INTERRUPTED, REFUSED, app

_LEAD = f"""\
`pip install "scaleprop[cli]"` brings it; `scaleprop --help` says the same.

MODEL is `package.module:factory`, where the factory returns a module or `(module, example_inputs)`,
or a `.pt2` file from `torch.export.save`. With `--json`, stdout is one JSON document and everything
else goes to stderr.

| exit status | |
| --- | --- |
| 0 | done |
| 1 | a bug; or what the command says of itself |
| {REFUSED} | refused: the reason, and what to do, are on stderr |
| {INTERRUPTED} | interrupted |
"""


def pages() -> Iterator[tuple[str, str]]:
    """The page."""
    context = click.Context(app, info_name="scaleprop")
    commands = {name: app.get_command(context, name) for name in app.list_commands(context)}
    parts = [_LEAD]
    for name, command in commands.items():
        assert command is not None
        inner = click.Context(command, info_name=name, parent=context)
        usage = " ".join(["scaleprop", name, *command.collect_usage_pieces(inner)])
        parts += [f"## {name}", (command.help or "").strip(), f"```\n{usage}\n```",
                  _options(command, inner)]
    yield "cli.md", page("Command line", *parts)


def _options(command: click.Command, context: click.Context) -> str:
    records = [found for parameter in command.get_params(context)
               if (found := parameter.get_help_record(context))]
    return table(("option", "what it does"),
                 [(code(flags), text.replace("\n", " ")) for flags, text in records])
