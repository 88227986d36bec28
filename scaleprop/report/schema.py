"""The JSON Schema of ``report.json``, and what of it this library checks when it reads one.

Understood: type, enum, const, anyOf, $ref into $defs, properties, required, additionalProperties,
items, minItems, maxItems, minimum. The shipped schema uses nothing else.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any, cast

_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list, tuple), "string": (str,), "integer": (int,),
    "number": (int, float), "boolean": (bool,), "null": (type(None),),
}


@functools.cache
def report_schema() -> dict[str, Any]:
    """The schema, JSON Schema 2020-12."""
    path = resources.files("scaleprop.report").joinpath("assets", "report.schema.json")
    return json.loads(path.read_text(encoding="utf-8"))


def part_schema(name: str) -> dict[str, Any]:
    """The schema of one of the report's parts, for a file that holds it alone."""
    whole = report_schema()
    return {**whole["$defs"][name], "$defs": whole["$defs"]}


def problem(data: Any, schema: Mapping[str, Any] | None = None) -> str | None:
    """The first thing in ``data`` that the schema does not allow, by its place; None where all is
    as it should be: ``records[3].sqnr_db is 'high', no number``."""
    root = schema if schema is not None else report_schema()
    return next(_problems(data, root, root, ""), None)


def _problems(data: Any, schema: Mapping[str, Any], root: Mapping[str, Any], at: str
              ) -> Iterator[str]:
    where = at.removeprefix(".") or "the report"
    if "$ref" in schema:
        name = schema["$ref"].removeprefix("#/$defs/")
        yield from _problems(data, root["$defs"][name], root, at)
    if "anyOf" in schema:
        each = [list(_problems(data, one, root, at)) for one in schema["anyOf"]]
        if all(each):
            # the one that gets furthest into the data says most
            yield max((found[0] for found in each), key=lambda text: text.find(" is "))
    if "enum" in schema and not any(_same(data, one) for one in schema["enum"]):
        yield f"{where} is {_short(data)}, not one of {schema['enum']}"
    if "const" in schema and not _same(data, schema["const"]):
        yield f"{where} is {_short(data)}, not {schema['const']!r}"
    if "type" in schema and not _is_type(data, schema["type"]):
        yield f"{where} is {_short(data)}, no {schema['type']}"
        return
    if "minimum" in schema and data < schema["minimum"]:
        yield f"{where} is {data}, less than {schema['minimum']}"
    if isinstance(data, dict):
        yield from _of_object(cast(dict[str, Any], data), schema, root, at)
    elif isinstance(data, list | tuple):
        items = cast(list[Any], data)
        least, most = schema.get("minItems", 0), schema.get("maxItems", len(items))
        if not least <= len(items) <= most:
            yield f"{where} is a list of {len(items)} instead of {least}"
        for index, item in enumerate(items if "items" in schema else ()):
            yield from _problems(item, schema["items"], root, f"{at}[{index}]")


def _of_object(data: Mapping[str, Any], schema: Mapping[str, Any], root: Mapping[str, Any], at: str
               ) -> Iterator[str]:
    where = at.removeprefix(".") or "the report"
    known: Mapping[str, Any] = schema.get("properties", {})
    missing = [name for name in schema.get("required", ()) if name not in data]
    if missing:
        yield f"{where} is without {', '.join(map(repr, missing))}"
    others = schema.get("additionalProperties", True)
    for name, value in data.items():
        if name in known:
            yield from _problems(value, known[name], root, f"{at}.{name}")
        elif others is False:
            yield f"{where} is with {name!r}, which is unknown"
        elif isinstance(others, dict):
            yield from _problems(value, cast(dict[str, Any], others), root, f"{at}.{name}")


def _is_type(data: Any, names: str | list[str]) -> bool:
    if isinstance(names, list):
        return any(_is_type(data, name) for name in names)
    if isinstance(data, bool):
        return names == "boolean"
    if isinstance(data, int) and abs(data) > sys.float_info.max:  # nothing could be said of it
        return False
    return isinstance(data, _TYPES[names])


def _same(data: Any, value: Any) -> bool:
    return type(data) is type(value) and data == value


def _short(data: Any) -> str:
    shown = repr(data)
    return shown if len(shown) <= 60 else f"{shown[:57]}…"


def markdown() -> str:
    """The schema as a page: every object with its fields."""
    schema = report_schema()
    head = ("# The report as JSON\n\n"
            "`Report.save(\"report.json\")` writes one object, described by "
            "`scaleprop/report/assets/report.schema.json` (JSON Schema 2020-12; "
            "`scaleprop report schema` prints it). "
            "This page is made from it by `scaleprop report schema --markdown "
            "docs/report-schema.md`.\n\n"
            "JSON has no infinities: a Number is a number, or `\"inf\"`, `\"-inf\"` or `\"nan\"`. "
            "Fields in italics may be left out.\n")
    parts = [head, _section("Report", schema)]
    parts += [_section(name, one) for name, one in schema["$defs"].items()]
    return "\n".join(parts)


def _section(name: str, schema: Mapping[str, Any]) -> str:
    lines = [f"## {name}\n", schema["description"] + "\n"]
    if "properties" in schema:
        lines += ["| field | type | what it is |", "|---|---|---|"]
        lines += [
            f"| {f'`{key}`' if key in schema['required'] else f'*`{key}`*'} | {_type(one)} | "
            f"{one.get('description', '').replace('|', chr(92) + '|')} |"
            for key, one in schema["properties"].items()]
    return "\n".join(lines) + "\n"


def _type(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].removeprefix("#/$defs/")
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(map(_type, schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return ", ".join(f"`{json.dumps(value)}`" for value in values)
    kind = schema["type"]
    if kind == "array":
        return f"list of {_type(schema['items'])}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"name → {_type(schema['additionalProperties'])}"
    return " or ".join(kind) if isinstance(kind, list) else kind
