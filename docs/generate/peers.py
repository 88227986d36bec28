"""The page that compares with peers: computed from the benchmarks' results, wins and losses alike.

A pair is a row of ours and the best row of the peers that do the same. Its figure is how many
times better ours is: above 1 ours is, below 1 the peer. Where rounds were measured, a pair whose
quartiles include 1 is even; elsewhere one within two percent is.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks import (
    compile_cost,
    harness,
    inductor_linears,
    ort_vs_peers,
    training_recipes,
    workloads,
)
from benchmarks.harness import Ratio, Timing
from docs.generate.markdown import ROOT, page, table

RESULTS = ROOT / "benchmarks" / "results"
EVEN = 0.02

# MiniLM's sentence embeddings: ours → peers with as many bits, and scales as fine
_ENCODER = {
    "8 bits, weights and activations": (
        ("ours int8", "ours int8-dynamic", "ours int8-token"),
        ("ORT quantize_dynamic", "ORT quantize_static", "torchao int8 dynamic",
         "torchao PT2E static", "torchao PT2E dynamic")),
    "8 bits, weights": (("ours int8-weight",), ("torchao int8 weight",)),
    "4 bits in blocks of 128, nearest": (
        ("ours int4",), ("MatMulNBits 4-bit g128", "torchao int4 weight g128")),
    "4 bits in blocks of 32, nearest": (
        ("ours int4-g32",), ("MatMulNBits 4-bit g32", "torchao int4 weight g32")),
}
_PEERS = ("torchao", "ORT", "llm-compressor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """One comparison. better: how many times better ours is, with quartiles where there are any;
    unit: what that is of, as in ``speed``."""

    case: str
    ours: str
    peer: str
    unit: str
    better: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """``ours``, ``even`` or ``peer``."""
        if self.low > 1:
            return "ours"
        return "peer" if self.high < 1 else "even"


def plain(case: str, ours: str, peer: str, unit: str, better: float) -> Pair:
    """A pair of single figures."""
    return Pair(case=case, ours=ours, peer=peer, unit=unit, better=better,
                low=better * (1 - EVEN), high=better * (1 + EVEN))


def timed(case: str, ours: str, peer: str, better: Ratio, unit: str = "speed") -> Pair:
    """A pair that was timed in rounds."""
    return Pair(case=case, ours=ours, peer=peer, unit=unit, better=better.median,
                low=better.low, high=better.high)


def load(name: str) -> dict[str, Any]:
    """A benchmark's results."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def models() -> Iterator[Pair]:
    """Speed of whole models on ONNX Runtime and Inductor, and what their files take."""
    rows = (*ort_vs_peers.ONNX_CLASSES["8-bit"], *ort_vs_peers.ONNX_CLASSES["4-bit"],
            *ort_vs_peers.INDUCTOR_ROWS)
    for name, section in load("ort_vs_peers")["sections"].items():
        if name in workloads.SINGLE_LINEAR or "error" in section:
            continue
        for row in rows:
            names, base = ort_vs_peers.rivals(section, row)
            for count in ("1", "2"):
                peer = ort_vs_peers.best_peer(section, names, base, count)
                found = peer and ort_vs_peers.ratio(section, row, peer, count)
                if peer and found:
                    yield timed(f"{name}, {count} thread{'s' * (count > '1')}",
                                row.removeprefix("ours "), peer, found)


def sizes() -> Iterator[Pair]:
    """Bytes of the same files."""
    for name, section in load("ort_vs_peers")["sections"].items():
        if name in workloads.SINGLE_LINEAR or "error" in section:
            continue
        for row in (each for rows in ort_vs_peers.ONNX_CLASSES.values() for each in rows):
            names, _ = ort_vs_peers.rivals(section, row)
            known = {peer: section["rows"][peer]["file_bytes"] for peer in names
                     if section["rows"][peer]["file_bytes"]}
            if known:
                peer = min(known, key=known.__getitem__)
                size = section["rows"][row]["file_bytes"]
                yield plain(name, row.removeprefix("ours "), peer, "size", known[peer] / size)


def linears() -> Iterator[Pair]:
    """Speed of blocks of linears through Inductor."""
    for name, section in load("inductor_linears")["sections"].items():
        timings = {key: Timing.from_dict(each)
                   for key, each in section.get("timings", {}).items()}
        for ours, peer in inductor_linears.PAIRS.items():
            if ours in timings and peer in timings:
                yield timed(f"{name}, 1 thread", ours, f"torchao {peer}",
                            harness.speedup(timings[ours], timings[peer], "cpu"))


def encoder() -> Iterator[Pair]:
    """How far MiniLM's embeddings are from float32's: 1 − cosine, the smaller the better."""
    rows = load("minilm_fidelity")["sections"]
    for case, (ours, theirs) in _ENCODER.items():
        peer = max(theirs, key=lambda name: rows[name]["mean"])
        for name in ours:
            yield plain(case, name.removeprefix("ours "), peer, "error",
                        (1 - rows[peer]["mean"]) / (1 - rows[name]["mean"]))


def post_training() -> Iterator[Pair]:
    """Each method that peers have, in each format; and the best of ours beside the best peer."""
    places: dict[str, dict[str, float]] = {}
    for key, cell in load("post_training").items():
        *place, method = key.split("|")
        measured = len(place) == 2 and place[1] != "float32"
        if measured and (error := _error(cell)) is not None:
            places.setdefault(", ".join(place), {})[method] = error
    for case, errors in places.items():
        theirs = {name: error for name, error in errors.items() if name.startswith(_PEERS)}
        if not theirs:
            continue
        ours = {name: error for name, error in errors.items() if name not in theirs}
        for method, error in ours.items():
            same = {name: each for name, each in theirs.items()
                    if name.partition(" ")[2] == method}
            if same:
                peer = min(same, key=same.__getitem__)
                yield plain(case, method, peer, "error", same[peer] / error)
        best, peer = (min(each, key=each.__getitem__) for each in (ours, theirs))
        yield plain(f"{case}, best of all", best, peer, "error", theirs[peer] / ours[best])


def _error(cell: Mapping[str, Any]) -> float | None:
    if "refused" in cell or "value" not in cell:
        return None
    return cell["divergence"] if "divergence" in cell else 1 - cell["value"]


def compiling() -> Iterator[Pair]:
    """From a module to a file: time, and peak memory."""
    rows = load("compile_cost")["sections"]
    for model in compile_cost.MODELS:
        for ours, peer in compile_cost.PAIRS.items():
            theirs = rows[f"{model} | {peer}"]
            for name in (ours, ours + compile_cost.UNCHECKED):
                row, label = rows[f"{model} | {name}"], name.removeprefix("ours ")
                yield plain(model, label, peer, "time", theirs["seconds"] / row["seconds"])
                yield plain(model, label, peer, "peak memory", theirs["peak"] / row["peak"])


def casting() -> Iterator[Pair]:
    """Quantizing a large tensor through Inductor."""
    for threads, section in load("casts")["sections"].items():
        clock: harness.Clock = "cpu" if threads == "1" else "wall"
        timings = {key: Timing.from_dict(each) for key, each in section["timings"].items()}
        for fmt in ("mxfp8", "mxfp4", "nvfp4"):
            ours = timings[f"ours, operator, {fmt}"]
            ratios = {key: harness.speedup(ours, each, clock) for key, each in timings.items()
                      if key.startswith("torchao") and key.endswith(fmt)}
            peer = min(ratios, key=lambda key: ratios[key].median)
            yield timed(f"{fmt}, {threads} thread{'s' * (threads > '1')}", "operator", peer,
                        ratios[peer])


def layers() -> Iterator[Pair]:
    """GPTQ of one layer: time, and the error of its output."""
    for name, section in load("gptq_layer")["sections"].items():
        timings = {key: Timing.from_dict(each)
                   for key, each in section.get("timings", {}).items()}
        if "torchao" not in timings:
            continue
        for ours in ("ours", "ours, act-order"):
            label = ours.replace("ours, ", "").replace("ours", "in order")
            yield timed(name, label, "torchao",
                        harness.speedup(timings[ours], timings["torchao"], "cpu"))
            yield plain(name, label, "torchao", "error",
                        section["loss"]["torchao"] / section["loss"][ours])


def optimizers() -> Iterator[Pair]:
    """AdamW with scaled state beside PyTorch's foreach AdamW in float32."""
    for section in load("optimizer_state")["sections"].values():
        steps = {key: Timing.from_dict(each) for key, each in section["steps"].items()}
        for kind in ("fp16", "bf16", "fp8", "fp8, squares too"):
            yield timed("AdamW", kind, "PyTorch's foreach, float32",
                        harness.speedup(steps[kind], steps["foreach"], "cpu"))
            yield plain("AdamW", kind, "PyTorch's foreach, float32", "state's size",
                        section["bytes"]["foreach"] / section["bytes"][kind])


def emulation() -> Iterator[Pair]:
    """A training step on a CPU, where low precision is emulated, beside bfloat16's."""
    for name, section in load("training_recipes")["sections"].items():
        timings = {key: Timing.from_dict(each) for key, each in section["timings"].items()}
        base = training_recipes.baseline_of(name)
        if "bf16" not in name:  # those are baselines
            yield timed("training step", name, "the same in bfloat16",
                        harness.speedup(timings[name], timings[base], "wall"))


_COMPARED = (
    ("Speed of models", "ort_vs_peers", models),
    ("Size of their files", "ort_vs_peers", sizes),
    ("Linear layers through Inductor", "inductor_linears", linears),
    ("Fidelity of a sentence encoder", "minilm_fidelity", encoder),
    ("Methods of post-training quantization", "post_training", post_training),
    ("From a module to a file", "compile_cost", compiling),
    ("Quantizing 4096×4096 values", "casts", casting),
    ("GPTQ of one layer", "gptq_layer", layers),
    ("Optimizer state", "optimizer_state", optimizers),
    ("Training, emulated on a CPU", "training_recipes", emulation),
)
# what a reader has to know of a section's rows
_NOTES = {
    "Size of their files": "Where a model looks up a table, as the encoder and the Llama do, "
    "`MatMulNBits` leaves it in float32; ours holds it in 8 bits.",
    "Fidelity of a sentence encoder": "Error: 1 − the mean cosine to float32's embeddings.",
    "Methods of post-training quantization": "Error: of the encoder (`minilm`) 1 − the mean cosine "
    "to float32's embeddings, of the language model (`lm`) the divergence from float32's "
    "predictions. *Best of all* is any method of either side, ours `auto` among them, which "
    "measures several and takes the best.",
    "Quantizing 4096×4096 values": "Ours through Inductor; torchao's as well as it runs, compiled "
    "or eager: what does not compile is named among the rows.",
    "Training, emulated on a CPU": "No peer: what emulation costs beside the same step by recipe "
    "`bf16`, which multiplies in bfloat16. Devices that have the formats emulate nothing.",
}
_LEAD = """\
Every pair below is a row of ours and the **best** row of the peers that do the same, from the
newest results that are committed. Figures say how many times better ours is: above 1 ours, below 1
the peer. Of `error` and `time` the smaller is better, so 2 is half of it. Pairs that were timed in
rounds are even where the quartiles include 1, others within 2 %.

This page is computed when the documentation is built: no figure or verdict here is written by hand.
Each section links to all rows, with the machine that they were measured on.
"""


def pages() -> Iterator[tuple[str, str]]:
    """The page."""
    found = {title: (name, list(pairs())) for title, name, pairs in _COMPARED}
    every = [(title, pair) for title, (_, pairs) in found.items() for pair in pairs]
    parts = [_LEAD, "## In short", _summary(found),
             "## Where peers win", _listed(every, "peer"),
             "## Where ours win", _listed(every, "ours")]
    for title, (name, pairs) in found.items():
        said = f" {_NOTES[title]}" if title in _NOTES else ""
        parts += [f"## {title}", f"[All rows](results/{name}.md).{said}", _fold(pairs)]
    yield "comparison.md", page("Ours and peers", *parts)


def _count(pairs: Sequence[Pair]) -> tuple[str, ...]:
    verdicts = [pair.verdict for pair in pairs]
    return tuple(str(verdicts.count(each)) for each in ("ours", "even", "peer"))


def _summary(found: Mapping[str, tuple[str, Sequence[Pair]]]) -> str:
    """A row a section and unit: what is faster and larger is neither on the whole."""
    rows: list[tuple[str, ...]] = []
    for title, (_, pairs) in found.items():
        for unit in dict.fromkeys(pair.unit for pair in pairs):
            alike = [pair for pair in pairs if pair.unit == unit]
            rows.append((f"[{title}](#{_anchor(title)})", unit, *_count(alike), _middle(alike)))
    numbers = ("ours better", "even", "peer better", "median")
    return table(("what", "of", *numbers), rows, numbers)


def _middle(pairs: Sequence[Pair]) -> str:
    """The median of the ratios, by their logarithms: half and double are even."""
    return f"{math.exp(statistics.median(math.log(pair.better) for pair in pairs)):.2f}"


def _anchor(title: str) -> str:
    return "".join(letter for letter in title.lower().replace(" ", "-")
                   if letter.isalnum() or letter == "-")


def _listed(every: Sequence[tuple[str, Pair]], verdict: str) -> str:
    """What one side wins, a line a row and peer: by how much at most, and how often."""
    groups: dict[tuple[str, str, str, str], list[Pair]] = {}
    for title, pair in every:
        if pair.verdict == verdict:
            groups.setdefault((title, pair.ours, pair.unit, pair.peer), []).append(pair)
    lines: dict[str, list[str]] = {}
    for (title, ours, unit, peer), pairs in groups.items():
        factor = [pair.better if verdict == "ours" else 1 / pair.better for pair in pairs]
        most = pairs[factor.index(max(factor))]
        winner, loser = (f"`{ours}`", peer) if verdict == "ours" else (peer, f"`{ours}`")
        more = f", and in {len(pairs) - 1} more" if len(pairs) > 1 else ""
        lines.setdefault(title, []).append(
            f"- {winner} {_better(unit, max(factor))} {loser} ({most.case}{more}).")
    return "\n\n".join(f"**{title}**\n\n" + "\n".join(found)
                       for title, found in lines.items()) or "Nowhere in these results."


def _better(unit: str, factor: float) -> str:
    share = f"{100 / factor:.0f} %"
    return {"speed": f"is {factor:.2f} times as fast as", "time": f"needs {share} of the time of",
            "error": f"has {share} of the error of"}.get(unit, f"takes {share} of the {unit} of")


def _fold(pairs: Sequence[Pair]) -> str:
    rows = [(pair.case, f"`{pair.ours}`", pair.peer, pair.unit, f"{pair.better:.2f}", pair.verdict)
            for pair in pairs]
    text = table(("case", "ours", "best peer", "of", "times better", "winner"), rows,
                 ("times better",))
    body = "".join(f"    {line}\n" for line in text.splitlines())
    return f'??? note "{len(pairs)} pairs"\n\n{body}'
