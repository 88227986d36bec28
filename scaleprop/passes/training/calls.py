"""New calls in a joint graph, with a fake value and the provenance of what they stand in for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.fx

from scaleprop import _torch_compat as compat


def call(
    graph: torch.fx.Graph, target: Any, args: tuple[Any, ...], like: torch.fx.Node,
    kwargs: Mapping[str, Any] | None = None,
) -> torch.fx.Node:
    """A call where the graph inserts, its provenance ``like`` another node's."""
    node = graph.call_function(target, args, dict(kwargs or {}))
    given: Any = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])  # type: ignore[arg-type]
    with compat.fake_mode_of(graph):
        node.meta = {**like.meta, "val": target(*given[0], **given[1])}
    node.meta.pop("tensor_meta", None)
    return node
