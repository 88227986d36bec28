"""Requests that arrive at about the same time share one call of a model: asyncio, one queue."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


class Busy(Exception):
    """As many requests wait as may, or no more are taken."""


class Batcher:
    """Awaited with one row while it is ``running``, answers with its row of ``run(rows)``.

    run: [rows, …] → [rows, …], called in a thread, one call at a time.
    limit: rows a call at most. wait: seconds for which the first row waits for others.
    waiting: rows that may wait before more are refused. seconds: for an answer.
    """

    def __init__(
        self, run: Callable[[Array], Array], limit: int = 32, wait: float = 0.005,
        waiting: int = 256, seconds: float = 5.0,
    ) -> None:
        self.run, self.limit, self.wait = run, limit, wait
        self.waiting, self.seconds = waiting, seconds
        self.queue: asyncio.Queue[tuple[Array, asyncio.Future[Array]] | None] = asyncio.Queue()
        self.closing = False

    async def __call__(self, row: Array) -> Array:
        """The answer to one row.

        Raises:
            Busy: too many rows are waiting, or the queue is being closed.
            TimeoutError: no answer within ``seconds``.
        """
        if self.closing or self.queue.qsize() >= self.waiting:
            raise Busy
        answer: asyncio.Future[Array] = asyncio.get_running_loop().create_future()
        self.queue.put_nowait((row, answer))
        async with asyncio.timeout(self.seconds):
            return await answer  # cancelled with its caller: `work` then leaves the row out

    @contextlib.asynccontextmanager
    async def running(self, *_: object) -> AsyncIterator[None]:
        """A worker answers; at the end no more rows are taken, and those that wait are answered."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.work())
            try:
                yield
            finally:
                self.close()

    def close(self) -> None:
        """Take no more rows; ``work`` returns when those that wait are answered."""
        self.closing = True
        self.queue.put_nowait(None)

    async def work(self) -> None:
        """Answer rows until the queue is closed."""
        while (first := await self.queue.get()) is not None:
            batch, last = [first], False
            try:
                async with asyncio.timeout(self.wait):
                    while len(batch) < self.limit and not last:
                        item = await self.queue.get()
                        if item is None:
                            last = True
                        else:
                            batch.append(item)
            except TimeoutError:
                pass
            await self._answer([entry for entry in batch if not entry[1].done()])
            if last:
                return

    async def _answer(self, batch: list[tuple[Array, asyncio.Future[Array]]]) -> None:
        if not batch:
            return
        try:
            rows = await asyncio.to_thread(self.run, np.stack([row for row, _ in batch]))
        except Exception as error:  # noqa: BLE001  # each caller gets it
            for _, answer in batch:
                if not answer.done():
                    answer.set_exception(error)
            return
        for row, (_, answer) in zip(rows, batch, strict=True):
            if not answer.done():
                answer.set_result(row)
