"""``examples/serve``: concurrent requests get their own answers, wrong and late ones a status."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnxruntime
import pytest
import uvicorn

from examples import serve
from examples.batching import Array, Batcher, Busy

ROWS = np.random.default_rng(0).standard_normal((48, serve.WIDTH)).astype(np.float32)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serve.export(tmp_path_factory.mktemp("serve") / "model.onnx")


@pytest.fixture(scope="module")
def expected(path: Path) -> Array:
    """Each row by itself."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([np.asarray(session.run(None, {name: row[None]})[0]) for row in ROWS])


@contextlib.asynccontextmanager
async def client(path: Path, **options: Any) -> AsyncIterator[Any]:
    app = serve.application(path, **options)
    async with (app.router.lifespan_context(app),
                httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as asks):
        yield asks


def body(row: Array) -> dict[str, Any]:
    return {"x": [float(value) for value in row]}


def test_concurrent_requests_get_their_own_answers(path: Path, expected: Array) -> None:
    async def ask() -> list[Any]:
        async with client(path) as asks:
            return await asyncio.gather(*(asks.post("/predict", json=body(row)) for row in ROWS))

    answers = asyncio.run(ask())
    assert {answer.status_code for answer in answers} == {200}
    found = np.array([answer.json()["y"] for answer in answers], np.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    assert np.unique(found, axis=0).shape == found.shape  # so that mixed-up answers would show


@pytest.mark.parametrize("content", [
    '{"x": [1.0]}', '{}', "[]", "nonsense",
    *('{"x": [' + ", ".join([bad] + ["0"] * (serve.WIDTH - 1)) + "]}"
      for bad in ("NaN", "Infinity", "1e39", '"a"', "null")),
])
def test_wrong_input_is_refused(path: Path, content: str) -> None:
    async def ask() -> Any:
        async with client(path) as asks:
            return await asks.post("/predict", content=content,
                                   headers={"content-type": "application/json"})

    assert asyncio.run(ask()).status_code == 422


def test_late_and_superfluous_requests_have_a_status_and_the_service_goes_on(path: Path) -> None:
    async def ask() -> tuple[list[int], dict[str, Any], int]:
        async with client(path, seconds=0.05, waiting=2, limit=1) as asks:
            batcher, release = asks._transport.app.state.batcher, threading.Event()
            run, batcher.run = batcher.run, lambda rows: (release.wait(), run(rows))[1]
            codes = [answer.status_code for answer in await asyncio.gather(
                *(asks.post("/predict", json=body(row)) for row in ROWS[:8]))]
            release.set()
            await asyncio.sleep(0)
            while batcher.queue.qsize():
                await asyncio.sleep(0.001)
            batcher.seconds = 5.0
            last = await asks.post("/predict", json=body(ROWS[0]))
            return codes, (await asks.get("/health")).json(), last.status_code

    codes, health, last = asyncio.run(ask())
    assert set(codes) == {503, 504}
    assert health == {"status": "ok", "waiting": 0} and last == 200


class Model:
    """Doubles rows, and keeps how many came at a time."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.sizes = seconds, list[int]()

    def __call__(self, rows: Array) -> Array:
        self.sizes.append(len(rows))
        if (rows < 0).any():
            raise ValueError("negative")
        time.sleep(self.seconds)
        return 2 * rows


def test_rows_share_calls_up_to_the_limit() -> None:
    async def ask(model: Model) -> list[Array]:
        batcher = Batcher(model, limit=4, wait=5.0)  # a full batch does not wait
        async with batcher.running():
            return await asyncio.gather(*(batcher(np.float32([n])) for n in range(8)))

    model = Model()
    assert [float(y[0]) for y in asyncio.run(ask(model))] == [2.0 * n for n in range(8)]
    assert model.sizes == [4, 4]


def test_an_error_reaches_those_it_is_about_and_the_next_batch_runs() -> None:
    async def ask() -> list[Any]:
        batcher = Batcher(Model(), limit=2, wait=5.0)
        async with batcher.running():
            return await asyncio.gather(*(batcher(np.float32([n])) for n in (-1, 1, 2, 3)),
                                        return_exceptions=True)

    found = asyncio.run(ask())
    assert [type(each) for each in found[:2]] == [ValueError, ValueError]
    assert [float(each[0]) for each in found[2:]] == [4.0, 6.0]


def test_those_who_gave_up_are_not_computed() -> None:
    async def ask(model: Model) -> float:
        batcher = Batcher(model, limit=2, wait=5.0)
        async with batcher.running():
            gone = asyncio.create_task(batcher(np.float32([1])))
            await asyncio.sleep(0)
            gone.cancel()
            return float((await batcher(np.float32([2])))[0])

    model = Model()
    assert asyncio.run(ask(model)) == 4.0
    assert model.sizes == [1]


def test_closing_answers_what_waits_and_takes_no_more() -> None:
    async def ask() -> list[Any]:
        batcher = Batcher(Model(seconds=0.02), limit=2, wait=5.0)
        async with batcher.running():
            waiting = [asyncio.create_task(batcher(np.float32([n]))) for n in range(5)]
            await asyncio.sleep(0)
        with pytest.raises(Busy):
            await batcher(np.float32([9]))
        return await asyncio.gather(*waiting)

    assert [float(each[0]) for each in asyncio.run(ask())] == [0.0, 2.0, 4.0, 6.0, 8.0]


def test_a_real_server_answers_and_ends_only_when_it_has(path: Path, expected: Array) -> None:
    app = serve.application(path, wait=0.2)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="on"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as asks, \
            concurrent.futures.ThreadPoolExecutor(8) as threads:
        assert asks.get("/health").json() == {"status": "ok", "waiting": 0}
        answers = [threads.submit(asks.post, "/predict", json=body(row)) for row in ROWS[:8]]
        while not (app.state.batcher.queue.qsize() or any(each.done() for each in answers)):
            time.sleep(0.001)
        time.sleep(0.05)  # all of them are under way
        server.should_exit = True
        found = np.array([each.result().json()["y"] for each in answers], np.float32)
    thread.join()
    np.testing.assert_allclose(found, expected[:8], rtol=1e-6, atol=1e-7)
    assert app.state.batcher.closing


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    serve.main(["--short", "--out", str(tmp_path)])
    assert "'y': [" in capsys.readouterr().out
