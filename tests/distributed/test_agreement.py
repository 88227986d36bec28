"""Ranks fix the exponents of their casts by what any of them measured."""

from __future__ import annotations

import datetime
import logging
import math
import time

import pytest
import torch
import torch.distributed as dist
import torch.fx

import scaleprop
from scaleprop.passes.training import reduction
from scaleprop.passes.training.reduction import agree, fingerprint

from .ranks import WIDTH, adamw, alone, net, together, train

MOMENT = datetime.timedelta(seconds=2)


def graph(products: int = 1, trains: bool = True) -> tuple[torch.fx.Graph, list[torch.fx.Node]]:
    """A graph of as many products, and the values in it that are measured."""
    made = torch.fx.Graph()
    x = made.placeholder("primals_1")
    if trains:
        made.placeholder("tangents_1")
    values = [x]
    for _ in range(products):
        values.append(made.call_function(torch.ops.aten.mm.default, (values[-1], x)))
    made.output(values[-1])
    return made, values


class Warnings(logging.Handler):
    """The messages of a logger."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        reduction.logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())


def meetings() -> list[tuple[list[float], list[str]]]:
    """What came out of one call after another, and the warnings."""
    rank, heard = dist.get_rank(), Warnings()
    found: list[tuple[list[float], list[str]]] = []

    def call(made: tuple[torch.fx.Graph, list[torch.fx.Node]], amax: list[float]) -> None:
        result = agree(dict(zip(made[1], amax, strict=True)), made[0], MOMENT)
        assert list(result) == made[1]
        found.append((list(result.values()), heard.found))
        heard.found = []

    call(graph(), [float(rank), 4.0 - rank])
    call(graph(), [2.0**200, math.nan if rank else 1.0])
    call(graph(trains=False), [float(rank), 0.0])  # nobody is waited for
    call(graph(products=1 + rank), [float(rank)] * (2 + rank))
    call(graph(), [float(rank), 0.0])  # they agree again
    if rank:
        call(graph(), [1.0, 1.0])  # the other rank does not compile this one
    dist.barrier()
    call(graph(), [float(rank), 0.0])
    return found


def test_ranks_take_the_largest_or_their_own() -> None:
    started = time.monotonic()
    first, second = together(2, meetings)
    assert time.monotonic() - started < 60  # nobody waits for what does not come
    assert first[0] == second[0] == ([1.0, 4.0], [])
    assert first[1] == second[1] == ([2.0**200, math.inf], [])
    assert (first[2], second[2]) == (([0.0, 0.0], []), ([1.0, 0.0], []))
    assert (first[3][0], second[3][0]) == ([0.0, 0.0], [1.0, 1.0, 1.0])
    for rank in (first, second):
        assert "different graphs" in rank[3][1][0]
        assert rank[4] == ([1.0, 0.0], [])
        assert "not all ranks" in rank[-1][1][0]
    assert second[5][0] == [1.0, 1.0] and "not all ranks" in second[5][1][0]
    assert (first[-1][0], second[-1][0]) == ([0.0, 0.0], [1.0, 0.0])


def test_one_process_keeps_what_it_measured() -> None:
    made, values = graph()
    amax = {values[0]: 1.0, values[1]: math.nan}
    assert agree(amax, made) is amax


def test_a_fingerprint_is_that_of_the_operators() -> None:
    def of(products: int, measured: slice) -> str:
        made, values = graph(products)
        return fingerprint(dict.fromkeys(values[measured], 1.0), made)

    assert of(2, slice(2)) == of(2, slice(2))
    assert len({of(2, slice(2)), of(3, slice(2)), of(2, slice(1))}) == 3


def exponents(loud: bool) -> dict[str, int | None]:
    """Exponents of the casts of one step, with rank 1 seeing values 2^14 times as large; or, alone,
    all of them as large."""
    model = scaleprop.prepare_training(net(), "fp8", inner="eager")
    x = torch.linspace(-1, 1, 8 * WIDTH).view(8, WIDTH)
    scale = 2.0**14 if loud or (dist.is_initialized() and dist.get_rank()) else 1.0
    model(x * scale).square().mean().backward()
    (report,) = scaleprop.scale_report(model)
    return {cast.value: cast.exponent for cast in report.casts}


def test_casts_have_the_exponents_of_the_loudest_rank() -> None:
    first, second = together(2, exponents, False)
    loudest, quiet = alone(exponents, True), alone(exponents, False)
    assert first == second == loudest
    assert loudest != quiet


@pytest.mark.parametrize("depth", [12])
def test_many_blocks_are_all_compiled(depth: int) -> None:
    """Dynamo gives up, silently, on what was compiled more than eight times."""
    torch._dynamo.reset()
    model = net(depth)
    for block in model.blocks:
        scaleprop.prepare_training(block, "fp8", inner="eager")
    train(model, adamw(model), range(2))
    assert [len(scaleprop.scale_report(block)) for block in model.blocks] == [1] * depth
