"""The table of devices in the documentation is what ``scaleprop doctor`` would print."""

from __future__ import annotations

from pathlib import Path

from scaleprop.backends.cuda import devices

DOCUMENT = Path(__file__).parents[3] / "docs" / "cuda.md"


def table() -> str:
    columns = [{each.operation: each.how for each in devices.support(capability)}
               for capability in devices.KNOWN]
    heads = [f"{major}.{minor} ({name})" for (major, minor), name in devices.KNOWN.items()]
    rows = [["operation", *heads], ["---"] * (len(heads) + 1),
            *([name, *(column[name] for column in columns)] for name in columns[0])]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def test_the_table_of_devices_is_current():
    text = DOCUMENT.read_text()
    assert text.partition("<!-- devices -->\n")[2].partition("\n<!-- /devices -->")[0] == table()
