"""Export a model to ONNX and serve it over HTTP: concurrent requests share calls of ONNX Runtime.

    python -m examples.serve --port 8000        # POST {"x": [64 numbers]} to /predict
    python -m examples.serve --short            # answers one request, without a port

Too many requests: 503. No answer in time: 504. Wrong input: 422. SIGTERM: answers what waits, ends.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.testclient import TestClient
from pydantic import BaseModel, Field
from torch import nn, randn

import scaleprop
from examples.batching import Batcher, Busy

WIDTH, LARGEST = 64, 1e6  # inputs, and their magnitude at most


class Row(BaseModel):
    x: list[float] = Field(min_length=WIDTH, max_length=WIDTH)


def export(path: Path) -> Path:
    """Any batch size, and a scale a row: no answer depends on who shares its batch."""
    model = nn.Sequential(nn.Linear(WIDTH, 256), nn.GELU(), nn.Linear(256, 8))
    path.parent.mkdir(parents=True, exist_ok=True)
    return scaleprop.compile(model, randn(4, WIDTH), recipe="int8-token").export(path)


def application(path: Path, **options: float) -> FastAPI:
    """The service of a file. options: of the ``Batcher``."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    batcher = Batcher(lambda rows: np.asarray(session.run(None, {name: rows})[0]), **options)
    app = FastAPI(lifespan=batcher.running)
    app.state.batcher = batcher

    @app.get("/health")
    async def health() -> dict[str, str | int]:
        return {"status": "closing" if batcher.closing else "ok", "waiting": batcher.queue.qsize()}

    @app.post("/predict")
    async def predict(row: Row) -> dict[str, list[float]]:
        x = np.array(row.x)
        if not (np.abs(x) <= LARGEST).all():  # nor for what is not a number
            raise HTTPException(422, f"numbers of at most {LARGEST:g}")
        try:
            return {"y": (await batcher(x.astype(np.float32))).tolist()}
        except (Busy, TimeoutError) as error:
            raise HTTPException(503 if isinstance(error, Busy) else 504, repr(error)) from None

    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Export, and serve until a signal comes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--out", type=Path, default=Path("demo/serve"))
    parser.add_argument("--short", action="store_true")
    given = parser.parse_args(arguments)
    app = application(export(given.out / "model.onnx"))
    if given.short:
        with TestClient(app) as client:
            print(client.post("/predict", json={"x": [1.0] * WIDTH}).raise_for_status().json())
    else:
        uvicorn.run(app, host="127.0.0.1", port=given.port)


if __name__ == "__main__":
    main()
