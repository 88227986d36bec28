"""FX graphs as JSON: operators by name, arguments as data; nothing executable.

Only registered operators (``torch.ops``) and a closed list of scalar functions can be named, so
reading a file never runs what it contains.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx

from scaleprop._torch_compat import OpOverload
from scaleprop.errors import ConfigError, UnsupportedOpError, describe
from scaleprop.passes.outline import stack_of

_SCALAR_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in
       ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "getitem",
        "lt", "le", "gt", "ge", "eq", "ne", "and_", "or_", "not_")},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt")},
    **{f"torch.{name}": getattr(torch, name) for name in
       ("sym_max", "sym_min", "sym_float", "sym_int", "sym_not", "sym_ite", "sym_sum",
        "_sym_sqrt")},
}
_FUNCTION_NAMES = {function: name for name, function in _SCALAR_FUNCTIONS.items()}
_TORCH_ENUMS = (torch.dtype, torch.layout, torch.memory_format)


def graph_to_json(graph: torch.fx.Graph) -> list[dict[str, Any]]:
    """The nodes in order.

    Raises:
        UnsupportedOpError: for a node that is neither an operator nor a known scalar function.
    """
    return [_node_to_json(node) for node in graph.nodes]


def _node_to_json(node: torch.fx.Node) -> dict[str, Any]:
    if node.op == "call_function":
        target = _target_name(node)
    elif node.op in ("placeholder", "get_attr", "output"):
        target = str(node.target)
    else:
        raise UnsupportedOpError(f"{describe(node)}: a {node.op} node cannot be saved; "
                                 f"export to ONNX instead")
    return {
        "op": node.op,
        "name": node.name,
        "target": target,
        "args": _encode(node.args, node),
        "kwargs": _encode(dict(node.kwargs), node),
        "source": node.meta.get("stack_trace"),
        **({"modules": [list(pair) for pair in modules]} if (modules := stack_of(node)) else {}),
    }


def _target_name(node: torch.fx.Node) -> str:
    if isinstance(node.target, OpOverload):
        return f"ops.{node.target}"
    name = _FUNCTION_NAMES.get(node.target)  # pyright: ignore[reportArgumentType, reportCallIssue]
    if name is None:
        raise UnsupportedOpError(f"{describe(node)}: cannot be saved; export to ONNX instead")
    return name


def _encode(value: Any, node: torch.fx.Node) -> Any:
    match value:
        case torch.fx.Node():
            return {"node": value.name}
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {"float": str(value)}
        case list() | tuple():
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [_encode(item, node) for item in value]}
        case dict():
            return {"dict": {key: _encode(item, node) for key, item in value.items()}}
        case slice():
            return {"slice": [_encode(v, node) for v in (value.start, value.stop, value.step)]}
        case torch.device():
            return {"device": str(value)}
        case _ if isinstance(value, _TORCH_ENUMS):
            return {"torch": str(value).removeprefix("torch.")}
        case _:
            raise UnsupportedOpError(
                f"{describe(node)}: an argument of type {type(value).__name__} cannot be saved; "
                f"export to ONNX instead"
            )


def graph_from_json(nodes: list[dict[str, Any]]) -> torch.fx.Graph:
    """The graph that ``graph_to_json`` wrote; values (``meta["val"]``) are not part of it.

    Raises:
        ConfigError: where an operator is unknown here, naming it.
    """
    graph = torch.fx.Graph()
    made: dict[str, torch.fx.Node] = {}
    for entry in nodes:
        args, kwargs = _decode(entry["args"], made), _decode(entry["kwargs"], made)
        target: Any = entry["target"]
        if entry["op"] == "call_function":
            target = _resolve(target)
        node = graph.create_node(entry["op"], target, args, kwargs, entry["name"])
        if entry["source"]:
            node.meta["stack_trace"] = entry["source"]
        if "modules" in entry:
            node.meta["nn_module_stack"] = {path: (path, kind) for path, kind in entry["modules"]}
        made[entry["name"]] = node
    graph.lint()
    return graph


def _resolve(name: str) -> Callable[..., Any]:
    if name in _SCALAR_FUNCTIONS:
        return _SCALAR_FUNCTIONS[name]
    parts = name.split(".")
    found: Any = None
    if len(parts) == 4 and parts[0] == "ops":
        packet = getattr(getattr(torch.ops, parts[1]), parts[2], None)
        found = getattr(packet, parts[3], None) if packet is not None else None
    if not isinstance(found, OpOverload):
        raise ConfigError(f"operator {name!r} is not registered here; import the package that "
                          f"defines it before loading")
    return found


def _decode(value: Any, made: Mapping[str, torch.fx.Node]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "node":
            return made[content]
        case "float":
            return float(content)
        case "tuple":
            return tuple(_decode(item, made) for item in content)
        case "list":
            return [_decode(item, made) for item in content]
        case "dict":
            return {key: _decode(item, made) for key, item in content.items()}
        case "slice":
            return slice(*(_decode(item, made) for item in content))
        case "device":
            return torch.device(content)
        case "torch" if isinstance(found := getattr(torch, content, None), _TORCH_ENUMS):
            return found
        case _:
            raise ConfigError(f"graph.json: {kind!r}: {content!r} is not an argument")
