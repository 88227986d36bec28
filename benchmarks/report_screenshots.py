"""Pictures of the report for the documentation, taken in Debian's chromium.

    python -m benchmarks.report_screenshots            # writes docs/images/report-*.png
    python -m benchmarks.report_screenshots --keep DIR # and the pages themselves into DIR

A sentence encoder as released, in 4-bit blocks, beside other recipes; and a small Llama with random
weights, of which one step is looked at, forward and backward. Needs playwright and chromium.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import scaleprop
from benchmarks import peers
from benchmarks.demo import EXAMPLE, Task
from scaleprop.report import Report, Variant

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")
LARGEST = 300_000  # bytes of a picture
SIZE = {"width": 1280, "height": 800}
RECIPES = ("mxfp4", "mxfp8", "int8-dynamic")  # the page is of the first


def encoder_report(folder: Path) -> Report:
    """The encoder under ``RECIPES[0]``, beside the others."""
    task = Task.load(32, folder)
    reports = [scaleprop.compile(task.encoder, task.example(*EXAMPLE), recipe=recipe,
                                 verify=True).report for recipe in RECIPES]
    variants = tuple(
        Variant(recipe=recipe, backend=report.backend or "", nbytes=report.nbytes_after or 0,
                size_ratio=report.size_ratio, fidelity=report.fidelity)
        for recipe, report in zip(RECIPES, reports, strict=True))
    return dataclasses.replace(reports[0].measured(), variants=variants)


def training_page(path: Path) -> None:
    """One step of a Llama of eight layers."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=352, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(config.vocab_size, (4, 64))
    example = {"input_ids": ids, "labels": ids, "use_cache": False}
    scaleprop.analyze(model, example, loss_fn=lambda output: output.loss).save(path)


def worst(report: Report) -> str:
    """The operand of lowest SQNR among activations: one whose picture says something."""
    found = [record for record in report.quantized
             if record.sqnr_db is not None and record.scale_kind != "weight"]
    record = min(found, key=lambda record: record.sqnr_db or 0.0)
    return f"#t={record.node}:{record.operand}"


class Camera:
    """Takes pictures of pages into a folder."""

    def __init__(self, browser: Any, folder: Path) -> None:
        self._browser, self._folder = browser, folder

    def take(
        self, name: str, page: Path, fragment: str = "", scroll: str = "", hover: bool = False,
        **context: Any
    ) -> Path:
        """``page`` at ``fragment``, with the section ``scroll`` at the top; the first chart's
        cursor is put somewhere with ``hover``. Returns the picture's path.
        """
        settings: Mapping[str, Any] = {"viewport": SIZE, **context}
        with self._browser.new_context(**settings) as opened:
            view = opened.new_page()
            view.goto(page.as_uri() + fragment)
            view.locator("html[data-ready]").wait_for()
            if scroll:
                view.locator(scroll).evaluate("part => part.scrollIntoView()")
            if hover:
                box = view.locator(".plot").first.bounding_box()
                view.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 0.25 * box["height"])
            target = self._folder / f"report-{name}.png"
            view.screenshot(path=target)
        return target


def take_all(camera: Camera, encoder: Path, training: Path, tensor: str) -> list[Path]:
    """Every picture of the documentation."""
    small = {"width": 390, "height": 844}
    return [
        camera.take("overview", encoder),
        camera.take("depth", encoder, scroll="#depth", hover=True),
        camera.take("tensor", encoder, tensor),
        camera.take("dark", encoder, tensor, color_scheme="dark"),
        camera.take("phone", encoder, tensor, viewport=small),
        camera.take("training", training, scroll="#depth", hover=True),
        camera.take("training-dark", training, scroll="#depth", color_scheme="dark"),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pictures; exit status 1 where one is too large for a repository."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--keep", type=Path, help="a folder for the pages")
    options = parser.parse_args(arguments)
    from playwright.sync_api import sync_playwright

    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        with peers.quiet():
            report = encoder_report(Path(scratch))
            training_page(folder / "training.html")
        report.save(folder / "encoder.html")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=FLAGS)
            taken = take_all(Camera(browser, options.out), (folder / "encoder.html").resolve(),
                             (folder / "training.html").resolve(), worst(report))
            browser.close()
    for path in taken:
        print(f"{path}: {path.stat().st_size:,} bytes")
    return int(any(path.stat().st_size > LARGEST for path in taken))


if __name__ == "__main__":
    sys.exit(main())
