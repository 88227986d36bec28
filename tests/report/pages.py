"""Reports of the shapes that pages have to bear: of many layers, and with every part filled."""

from __future__ import annotations

import math
import random

from scaleprop.passes.training import Lowered
from scaleprop.passes.training.lower import Cast
from scaleprop.passes.training.operands import Operands
from scaleprop.passes.training.rewrite import Quantized
from scaleprop.recipes.training import Operand
from scaleprop.report import (
    Report,
    ScaleProvenance,
    ScaleReport,
    TensorRecord,
    TensorScale,
    Values,
    Variant,
)
from scaleprop.report.graph import Block, BlockEdge, BlockNode, Scale
from scaleprop.report.outliers import OutlierTable
from scaleprop.report.records import ScaleKind, TransformRecord, TrialRecord
from scaleprop.report.scales import FORMATS, Finding, Phase
from scaleprop.training import ScaleReports

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HIGH = (("aten.rms_norm.default", "norms run in high precision"),
        ("aten.scaled_dot_product_attention.default", "attention runs in high precision"))
SOURCE = "/home/someone/site-packages/model/modeling.py:{line} in forward"


def large_report(layers: int = 32, backward: bool = False) -> Report:
    """A decoder of ``layers`` layers in a block format: seven linears each, norms and attention."""
    rng = random.Random(0)
    records: list[TensorRecord] = []
    tensors: list[TensorScale] = []
    for layer in range(layers):
        for place, name in enumerate(LINEARS):
            module = f"model.layers.{layer}.{'mlp' if place > 3 else 'self_attn'}.{name}"
            node, source = f"scaled_mm_{7 * layer + place}", SOURCE.format(line=100 + place)
            activation = f"value_{layer}_{0 if place < 3 else place}"
            for operand, weight in ((f"{module}.weight", True), (activation, False)):
                records.append(linear_record(rng, node, operand, module, source, weight))
            tensors.append(scale(rng, activation, "forward", module, "aten.mul.Tensor"))
            tensors.append(scale(rng, node, "forward", module, "aten.linear.default"))
        for place, (op, reason) in enumerate(HIGH * 2):
            operand = f"value_{layer}_{3 + place}"
            records.append(TensorRecord(
                node=f"norm_{layer}_{place}", op=op, operand=operand, role="other",
                shape=("batch", "sequence", 4096), decided_by="assign-formats", reason=reason,
                module=f"model.layers.{layer}", source=SOURCE.format(line=60 + place),
                values=values(rng, scaled=False)))
    if backward:
        tensors += [scale(rng, f"mm_{i}", "backward", f"model.layers.{i // 8}.mlp", "aten.mm")
                    for i in reversed(range(8 * layers))]
    return Report(
        recipe="mxfp4", backend="onnxruntime", nbytes_before=16_000_000_000,
        nbytes_after=4_300_000_000, fidelity={"cosine": 0.9931, "sqnr_db": 18.4},
        records=tuple(records), notes=("a note",), scales=ScaleReport(
            model="Decoder", tensors=tuple(tensors)), variants=variants(), block=decoder_block())


def decoder_block() -> Block:
    """The first layer's linears, one after the other, each with what it reads in low precision."""
    nodes, edges = [BlockNode(name="norm_0_0", label="rms_norm")], list[BlockEdge]()
    for place, name in enumerate(LINEARS):
        node, quantized, weight = f"scaled_mm_{place}", f"quantize_{place}", f"{name}_weight_data"
        nodes += [BlockNode(name=quantized, label="quantize", kind="quantize", format="mxfp4"),
                  BlockNode(name=weight, label=f"{name}.weight", kind="parameter", format="mxfp4"),
                  BlockNode(name=node, label="linear", module=name)]
        scale = Scale(2.0**-place, 2.0**(-place - 3), 2.0**(2 - place), "mxfp4")
        edges += [BlockEdge(source=nodes[-4].name, target=quantized, detail="high precision"),
                  *(BlockEdge(source=each, target=node, forward=scale, detail="SQNR 18.4 dB")
                    for each in (quantized, weight))]
    return Block(path="model.layers.0", what="DecoderLayer, 1 of 32", made="mxfp4, onnxruntime",
                 meaning="→ what the data are divided by", nodes=tuple(nodes), edges=tuple(edges))


def variants() -> tuple[Variant, ...]:
    return tuple(Variant(recipe=name, backend="onnxruntime", nbytes=size, size_ratio=size / 16e9,
                         speed=speed, fidelity={"cosine": cosine})
                 for name, size, speed, cosine in (("mxfp4", 4_300_000_000, 1.84, 0.9931),
                                                   ("int8", 8_100_000_000, 2.31, 0.9997),
                                                   ("mxfp8", 8_200_000_000, None, 0.9999)))


def linear_record(
    rng: random.Random, node: str, operand: str, module: str, source: str, weight: bool
) -> TensorRecord:
    kind: ScaleKind = "weight" if weight else "dynamic"
    return TensorRecord(
        node=node, op="aten.linear.default", operand=operand, module=module, source=source,
        role="fprop.w" if weight else "fprop.x",
        shape=(4096, 4096) if weight else ("batch", "sequence", 4096),
        decided_by="quantize-weights" if weight else "quantize-activations", format="mxfp4",
        scale_kind=kind, sqnr_db=rng.gauss(18.5, 0.6), saturated=rng.random() * 1e-3,
        underflowed=rng.random() * 0.1, nbytes=8_912_896 if weight else None,
        nbytes_high=67_108_864 if weight else None, values=values(rng),
        lowering="MatMulIntegerToFloat u8×s8, 4 activation × 1 weight limbs",
        provenance=ScaleProvenance(
            by="quantize-weights" if weight else "quantize-activations", value=operand,
            statistic="amax of each 1×32 block", batches=None if weight else 8,
            neighbours=(f"{module}.bias",) if weight else ("value_0_0 of scaled_mm_1",)))


def values(rng: random.Random, scaled: bool = True) -> Values:
    count = 16_777_216
    size = math.exp2(rng.uniform(-7, 2))
    return Values(
        count=count, amax=size * rng.uniform(4, 40), rms=size, mean=size * rng.gauss(0, 0.01),
        kurtosis=3 + 40 * rng.random() ** 4, zeros=0.0,
        predicted=size * math.exp2(rng.gauss(0, 0.5)),
        exponents=bell(rng, count, math.floor(math.log2(size))),
        scaled=bell(rng, count, 0) if scaled else {},
        scales=(size / 8, size * 2) if scaled else None)


def bell(rng: random.Random, count: int, middle: int) -> dict[int, int]:
    """About as the exponents of normal numbers are: half as many at each step down."""
    found = {middle + step: int(count * share * rng.uniform(0.9, 1.1))
             for step, share in ((2, 1e-4), (1, 0.04), (0, 0.27))}
    found |= {middle - step: max(1, int(0.66 * count * 2.0**-step * rng.uniform(0.9, 1.1)))
              for step in range(1, 17)}
    return found


def scale(rng: random.Random, node: str, phase: Phase, module: str, op: str) -> TensorScale:
    size = math.exp2(rng.gauss(-1 if phase == "forward" else -14, 1.5))
    return TensorScale(
        node=node, op=op, phase=phase, name="", shape=(4, 512, 4096), dtype="float32",
        source=SOURCE.format(line=99), module=module,
        read_in=(phase,) if phase in ("forward", "backward") else (),
        count=8_388_608, amax=size * rng.uniform(4, 30), rms=size, mean=0.0,
        kurtosis=3 + 10 * rng.random() ** 3, zeros=0.0, masked=0.0,
        exponents=bell(rng, 8_388_608, math.floor(math.log2(size))),
        predicted=size * math.exp2(rng.gauss(0, 0.4)),
        underflow=dict.fromkeys(FORMATS, 0.0), overflow=dict.fromkeys(FORMATS, 0.0))


def full_report() -> Report:
    """A small report in which every part of the page has something, and names are awkward."""
    report = large_report(layers=2, backward=True)
    odd = TensorRecord(
        node="</script><b>odd</b>", op="aten.add.Tensor", operand="a name with spaces & 100%",
        role="other", shape=(), decided_by="exclude", reason="excluded by 'a.*'",
        sqnr_db=math.inf, values=Values(count=0, amax=math.nan, rms=math.inf, mean=0.0))
    return Report(
        recipe=report.recipe, backend=report.backend, records=(*report.records, odd),
        notes=report.notes, nbytes_before=report.nbytes_before, nbytes_after=report.nbytes_after,
        fidelity=report.fidelity, scales=report.scales, variants=report.variants,
        block=report.block,
        outliers=OutlierTable(notes=("too short to tell",)),
        transforms=(TransformRecord(
            by="smooth", kind="scale", seed="value_0_0", members=2, absorbed=("norm.weight",),
            readers=("scaled_mm_0",), before={"kurtosis": 81.0, "sqnr_db": 11.2},
            after={"kurtosis": 4.1, "sqnr_db": 18.9}),),
        trials=(TrialRecord(chain="smooth → gptq", error=0.004, local_error=0.002, seconds=1.5,
                            chosen=True),))


def training_report() -> ScaleReport:
    """A step of a small decoder, forward and backward."""
    rng = random.Random(1)
    report = large_report(layers=3, backward=True)
    assert report.scales is not None
    parameters = tuple(scale(rng, f"primals_{i}", "parameter", f"model.layers.{i}", "")
                       for i in range(3))
    return ScaleReport(
        model="Decoder", tensors=(*parameters, *report.scales.tensors), notes=("one step",),
        block=report.block,
        findings=(Finding(name="residual-growth", warning=True, message="it grows", figures={},
                          advice="scale it"),))


def prepared_report() -> ScaleReports:
    """Two graphs of a prepared model, one of each kind."""
    low = Operand(format="mxfp4", rounding="stochastic", hadamard=16, signs="layer")
    return ScaleReports((
        Lowered(products={"mm": "fprop"}, high={"mm_1": "the last layer"}, rescales=1, unruled={},
                casts=tuple(Cast(f"x_{i}", "x", "e4m3", 3.25, 1.0, -i, False) for i in range(8))),
        Operands((Quantized("up.weight", "fprop.x", "relu", 1, Operand(format="mxfp4")),
                  Quantized("up.weight", "dgrad.dy", "mm_3", 1, low)), {})))
