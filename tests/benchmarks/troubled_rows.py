"""A benchmark most of whose rows come to grief: a process is started for it."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from benchmarks.cuda_harness import Row, Script, main
from benchmarks.cuda_timing import Bench, Skip


def good(bench: Bench) -> dict[str, Any]:
    found = bench.compare({"ours": lambda: lambda: 1, "peer": lambda: lambda: 1 / 0}, ("peer",))
    return found.result({"rate": [2.0, 1.0, 3.0], "× peer": found.faster("ours", "peer")})


def fails(bench: Bench) -> dict[str, Any]:
    raise ValueError("no such thing")


def skipped(bench: Bench) -> dict[str, Any]:
    raise Skip("not installed")


def dies(bench: Bench) -> dict[str, Any]:
    sys.stderr.write("out of luck\n")
    sys.stderr.flush()
    os._exit(9)


def hangs(bench: Bench) -> dict[str, Any]:
    time.sleep(60)
    return {}


def rows(small: bool) -> list[Row]:
    del small
    return [Row(name="good", run=good, bounds={"rate": 1.5, "× peer": 1.0}),
            Row(name="fails", run=fails), Row(name="skipped", run=skipped),
            Row(name="dies", run=dies), Row(name="missed", run=good, bounds={"rate": 2.5}),
            Row(name="hangs", run=hangs, seconds=0.5)]  # fmt: skip


SCRIPT = Script(name="troubled_rows", package="tests.benchmarks", doc="Trouble.\n\nOf rows.",
                rows=rows)

if __name__ == "__main__":
    sys.exit(main(SCRIPT))
