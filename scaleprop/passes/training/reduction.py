"""What the ranks of a distributed run agree on: the largest magnitudes that exponents are fixed by.

Each rank measures its own part of the batch, so each would fix other exponents. Here the ranks take
the largest of what any of them measured, all values of a graph in one all-reduce, as
TransformerEngine does with the amaxes of its delayed scaling (``reduce_amax``): then every rank
leaves room for every rank's data, and which rank sees which sample changes no format.

A collective hangs if one rank alone calls it, and a graph may be compiled by one rank alone: a
shorter last batch, an evaluation. So the ranks first meet in the rendezvous store of the process
group; who has waited ``WITHIN`` goes on with its own values, all ranks go on so from then on, and a
warning says it. Graphs without a backward, and graphs compiled again for other sizes, are not
waited for.

Scales found at run time (``ops.power_scale``) are not reduced, like TransformerEngine's current
scaling: that would be a collective per value. They need no agreement: a power of two is taken
out again, exactly, right after the product that it was put in for, so gradients are unscaled before
they are added up over ranks; and parameters, whole wherever they are used, give every rank the same
scale.
"""

from __future__ import annotations

import datetime
import hashlib
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.fx

from scaleprop import _torch_compat as compat
from scaleprop.passes.training.roles import is_tangent

logger = logging.getLogger(__name__)

WITHIN = datetime.timedelta(seconds=60)
_ALL, _DIFFERENT, _ALONE = "all", "different", "alone"
_WHY = {
    _DIFFERENT: "the ranks compile different graphs here",
    _ALONE: "not all ranks compile a graph here; none is waited for any more",
}


def agree(
    amax: Mapping[torch.fx.Node, float], graph: torch.fx.Graph, within: datetime.timedelta = WITHIN
) -> Mapping[torch.fx.Node, float]:
    """The largest of what any rank measured, for each value of a training graph; Inf where any rank
    has NaN or Inf. Each rank's own where there is one rank, or where they do not all come here with
    the same graph ``within`` the time: then a warning is logged.
    """
    if not amax or not _many_ranks() or not _in_step(graph):
        return amax
    answer = _meet(fingerprint(amax, graph), within)
    if answer != _ALL:
        logger.warning("%s: each keeps the scales of its own data. Results stay right, but depend "
                       "on which rank has which sample", _WHY[answer])
        return amax
    known = [math.inf if math.isnan(value) else value for value in amax.values()]
    with torch.no_grad(), compat.without_modes():
        values = torch.tensor(known, dtype=torch.float64, device=_collective_device())
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return dict(zip(amax, values.tolist(), strict=True))


def fingerprint(amax: Mapping[torch.fx.Node, float], graph: torch.fx.Graph) -> str:
    """The same on two ranks that run the same operators and measured the same values, whatever
    their sizes."""
    lines = [f"{node.op} {node.target}" for node in graph.nodes if node.op == "call_function"]
    lines.extend(node.name for node in amax)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _many_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _in_step(graph: torch.fx.Graph) -> bool:
    """Whether every rank can be expected to compile the graph now."""
    inputs = graph.find_nodes(op="placeholder")
    trains = any(is_tangent(node) for node in inputs)
    resized = any(isinstance(node.meta.get("val"), torch.SymInt) for node in inputs)
    return trains and not (resized and compat.is_recompilation())


def _meet(mine: str, within: datetime.timedelta) -> str:
    """Wait for the other ranks: one answer, the same for all of them."""
    store, rank, world = _rendezvous_store(), dist.get_rank(), dist.get_world_size()
    turn = store.add(f"scaleprop/turn/{rank}", 1)
    place = f"scaleprop/{turn}"
    store.set(f"{place}/{rank}", mine)
    if store.check(["scaleprop/alone"]):
        store.compare_set(f"{place}/answer", "", _ALONE)
    elif store.add(f"{place}/arrived", 1) == world:
        everyone = {bytes(store.get(f"{place}/{other}")) for other in range(world)}
        store.compare_set(f"{place}/answer", "", _ALL if len(everyone) == 1 else _DIFFERENT)
    else:
        _wait(store, f"{place}/answer", within)
    answer = bytes(store.get(f"{place}/answer")).decode()
    if answer == _ALONE:
        store.set("scaleprop/alone", "yes")
    return answer


def _wait(store: Any, key: str, within: datetime.timedelta) -> None:
    """Until there is an answer; the first to lose patience gives it, for all."""
    try:
        store.wait([key], within)
    except RuntimeError:  # it ran out: not every kind of store has an error of its own for that
        store.compare_set(key, "", _ALONE)


def _rendezvous_store() -> Any:
    """The key-value store that the ranks of the default process group met in."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage]


def _collective_device() -> torch.device:
    """Where tensors must lie for a collective of the default process group."""
    from torch.distributed import distributed_c10d

    return torch.device(distributed_c10d._get_object_coll_device())  # pyright: ignore[reportPrivateUsage]
