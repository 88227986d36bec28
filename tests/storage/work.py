"""Work to be killed: a process that has everything imported, and forks a child for each request.

    python -m tests.storage.work      reads lines of JSON, see ``serve``

Children are killed from outside, or kill themselves right before one of their file operations,
which Python's audit events tell.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

import scaleprop
from scaleprop.api import CompiledModel
from scaleprop.streaming import compile_from_safetensors
from scaleprop.sweeps import running
from tests.sweep import tiny

WIDTH, BLOCKS = 144, 4
AXES = {"*.format": ["mxfp8", "mxfp4"]}
SHARD = 30_000
COMMANDS = ("save", "export", "compile", "sweep")
_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree",
           "ctypes.dlsym")


class Model(torch.nn.Module):
    """Linears, larger than what streaming keeps in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(BLOCKS)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x).tanh()


def inputs() -> torch.Tensor:
    return torch.linspace(-1, 1, 3 * WIDTH).reshape(3, WIDTH)


def made(seed: int) -> tuple[Model, CompiledModel]:
    torch.manual_seed(seed)
    model = Model()
    return model, scaleprop.compile(model, inputs(), "int8-weight", "reference")


def work(command: str, folder: Path, source: Path, compiled: CompiledModel) -> None:
    """One of ``COMMANDS``, whose output is ``folder/out*``."""
    if command == "save":
        compiled.save(folder / "out", shard_bytes=SHARD)
    elif command == "export":
        compiled.export(folder / "out.onnx", external_data=True)
    elif command == "compile":
        report = compile_from_safetensors(source, folder / "out", inputs(), "int8-weight",
                                          "reference", model=Model, shard_bytes=SHARD)
        report.save(folder / "out.json")
    else:
        perform = running.perform

        def counted(*args: Any) -> Any:
            logging.getLogger("scaleprop").info("a run is performed")
            return perform(*args)

        running.perform = counted
        found = tiny.run(folder / "out.sqlite", axes=AXES, steps=2, baseline=None)
        found.to_csv(folder / "out.csv")


def child(request: dict[str, Any], compiled: CompiledModel) -> None:
    folder = Path(request["folder"])
    logging.basicConfig(filename=request["log"], filemode="w", level=logging.INFO,
                        format="%(message)s")
    logging.getLogger("scaleprop").setLevel(logging.INFO)
    count, text = 0, str(folder)

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event in _EVENTS and (event == "ctypes.dlsym" or text in str(args[0])):
            count += 1
            if count == request["kill_at"]:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    started = time.perf_counter()
    work(request["command"], folder, Path(request["source"]), compiled)
    done = {"seconds": time.perf_counter() - started, "operations": count}
    Path(request["log"]).with_suffix(".done").write_text(json.dumps(done))


def serve() -> None:
    """For every line {command, folder, source, log, kill_at, kill_after}: how the child ended."""
    torch.set_num_threads(1)
    compiled = made(1)[1]
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            try:
                child(json.loads(line), compiled)
                os._exit(0)
            finally:  # nor may anything else of this process go on in the child
                traceback.print_exc()
                os._exit(1)
        sys.stdout.write(f"{ended(process, json.loads(line)['kill_after'])}\n")
        sys.stdout.flush()


def ended(process: int, kill_after: float | None) -> int:
    """A child's exit status, or minus the signal that ended it: SIGKILL after so many seconds."""
    deadline = None if kill_after is None else time.monotonic() + kill_after
    while True:
        found, status = os.waitpid(process, os.WNOHANG if deadline is not None else 0)
        if found:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(process, signal.SIGKILL)
            deadline = None
        time.sleep(0.001)


if __name__ == "__main__":
    serve()
