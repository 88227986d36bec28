"""The recipes that ship, each one literal; ``replace`` makes a new one of any.

Choices that hold for all:

* An embedding table is looked up, not multiplied, so it is stored in 8 bits a value: the file
  shrinks and the lookup costs nothing.
* Convolutions take INT8 activations in the ``int8`` recipes, where backends have integer kernels;
  everywhere else only their weights are quantized, to 8 bits.
* Compensated errors (GPTQ) cost calibration and nothing at run time: later columns of a weight make
  up for what earlier ones lost in rounding. MXFP8 then takes NVIDIA's scale rule, which clips
  nothing.
* Four bits for weights and activations (``int4-int4``) need a method that prepares the model:
  rotate, smooth, merge-quant. Weights then have one scale per output channel, for integer kernels.
* INT8 weights are symmetric (no zero point): a zero point would cost a correction in every product.
  INT4 kernels decode each block anyway; there a zero point is free and uses all 16 codes.
"""

from __future__ import annotations

from scaleprop.recipes.base import Clipping, Recipe, Role

_INT8_ROWS = Role(format="int8[row]*f32")
_FP8_ROWS = Role(format="e4m3[row]*f32")
_INT8_TENSOR = "int8[tensor]*f32+zp"
# A kernel may round activations to INT8 blocks itself (a third of what INT4 weights cost), or
# weights again to INT8 per channel, where that is faster. ``replace(tolerance=…)`` asks for more;
# the report names each product's kernel.
_INT4_TOLERANCE = 2.0**-5

INT8 = Recipe(
    name="int8",
    description="W8A8: weights per output channel, activations per tensor, scales calibrated",
    source="Jacob et al., 2017, arXiv:1712.05877",
    when="fastest 8 bits on a CPU where inputs look like the calibration data; vision models",
    roles={
        "fprop.w": _INT8_ROWS,
        "fprop.x": Role(format=_INT8_TENSOR, scaling="static"),
        "conv.w": _INT8_ROWS,
        "conv.x": Role(format=_INT8_TENSOR, scaling="static"),
        "embedding": _INT8_ROWS,
    },
)
INT8_DYNAMIC = Recipe(
    name="int8-dynamic",
    description="W8A8: weights per output channel, activations per tensor at run time",
    source="ONNX Runtime, quantize_dynamic",
    when="the first to try on a CPU: no calibration, as fast as static scales in most models",
    roles={
        "fprop.w": _INT8_ROWS,
        "fprop.x": Role(format=_INT8_TENSOR),
        "conv.w": _INT8_ROWS,
        "conv.x": Role(format=_INT8_TENSOR),
        "embedding": _INT8_ROWS,
    },
)
INT8_TOKEN = Recipe(
    name="int8-token",
    description="W8A8: weights per output channel, activations per token at run time",
    source="Yao et al., ZeroQuant, 2022, arXiv:2206.01861",
    when="tokens that differ much in size; nearer to float32 than int8-dynamic, a little slower",
    roles={
        "fprop.w": _INT8_ROWS,
        "fprop.x": _INT8_ROWS,
        "conv.w": _INT8_ROWS,
        "conv.x": Role(format=_INT8_TENSOR),
        "embedding": _INT8_ROWS,
    },
)
INT8_WEIGHT = Recipe(
    name="int8-weight",
    description="weights in INT8 per output channel, activations as they were",
    when="a file of a quarter of the size, and next to no loss; little speed",
    roles={"fprop.w": _INT8_ROWS, "conv.w": _INT8_ROWS, "embedding": _INT8_ROWS},
)
INT4 = Recipe(
    name="int4",
    description="weights in INT4, blocks of 128, activations as they were (within tolerance)",
    source="blocks as in Frantar et al., GPTQ, 2022, arXiv:2210.17323",
    when="few rows at a time, as in decoding: weights are what is read",
    roles={
        "fprop.w": Role(format="int4[1x128]*f32+zp"),
        "conv.w": _INT8_ROWS,
        "embedding": _INT8_ROWS,
    },
    tolerance=_INT4_TOLERANCE,
)
INT4_G32 = Recipe(
    name="int4-g32",
    description="weights in INT4, blocks of 32, activations as they were (within tolerance)",
    source="blocks as in Frantar et al., GPTQ, 2022, arXiv:2210.17323",
    when="as int4, nearer to float32 for a slightly larger file",
    roles={
        "fprop.w": Role(format="int4[1x32]*f32+zp"),
        "conv.w": _INT8_ROWS,
        "embedding": _INT8_ROWS,
    },
    tolerance=_INT4_TOLERANCE,
)
INT4_G32_COMPENSATED = Recipe(
    name="int4-g32-compensated",
    description="weights in INT4, blocks of 32, rounded with compensated errors; calibrated",
    source="Frantar et al., GPTQ, 2022, arXiv:2210.17323",
    when="the best 4-bit weights; compiling takes longer and wants calibration data",
    roles={
        "fprop.w": Role(format="int4[1x32]*f32+zp", rounding="compensated", clipping="mse"),
        "conv.w": _INT8_ROWS,
        "embedding": _INT8_ROWS,
    },
    tolerance=_INT4_TOLERANCE,
)
INT4_INT8 = Recipe(
    name="int4-int8",
    description="W4A8: weights in INT4 and activations in INT8 at run time, blocks of 128",
    source="Lin et al., QServe, 2024, arXiv:2405.04532, for the bits",
    when="integer products for certain, where int4 leaves that to the backend",
    roles={
        "fprop.w": Role(format="int4[1x128]*f32+zp"),
        "fprop.x": Role(format="int8[1x128]*f32"),
        "conv.w": _INT8_ROWS,
        "embedding": _INT8_ROWS,
    },
    tolerance=_INT4_TOLERANCE,
)
INT4_INT8_TOKEN = Recipe(
    name="int4-int8-token",
    description="W4A8: weights in INT4, blocks of 128; activations in INT8 per token at run time",
    source="Lin et al., QServe, 2024, arXiv:2405.04532, for the bits",
    when="as int4-int8, for kernels that take one scale a token",
    roles={
        "fprop.w": Role(format="int4[1x128]*f32+zp"),
        "fprop.x": _INT8_ROWS,
        "conv.w": _INT8_ROWS,
        "embedding": _INT8_ROWS,
    },
    tolerance=_INT4_TOLERANCE,
)
_INT4_ROWS = Role(format="int4[row]*f32", clipping="mse")
INT4_INT4 = Recipe(
    name="int4-int4",
    description="W4A4: weights per output channel, activations per token at run time, both INT4",
    source="Ashkboos et al., QuaRot, 2024, arXiv:2404.00456, for the bits",
    when="a target for methods: with rotate or recipe='auto', never by itself",
    roles={
        "fprop.w": _INT4_ROWS,
        "fprop.x": Role(format="int4[row]*f32"),
        "conv.w": _INT8_ROWS,
        "embedding": _INT8_ROWS,
    },
)
INT4_INT4_STATIC = Recipe(
    name="int4-int4-static",
    description="W4A4: weights per output channel, activations per tensor, scales calibrated",
    source="MergeQuant, arXiv:2503.07654, for the bits",
    when="a target for merge-quant or recipe='auto', never by itself",
    roles={
        "fprop.w": _INT4_ROWS,
        "fprop.x": Role(format="int4[tensor]*f32", scaling="static"),
        "conv.w": _INT8_ROWS,
        "embedding": _INT8_ROWS,
    },
)
# FP8 scales of INT4 blocks underflow without a scale of the whole tensor (FireQ, arXiv:2505.20839)
INT4_FP8 = Recipe(
    name="int4-fp8",
    description="INT4 weights in blocks of 128 with E4M3 scales, E4M3 activations per token",
    source="FireQ, arXiv:2505.20839",
    when="devices that multiply FP8: 4-bit weights with FP8 activations",
    roles={
        "fprop.w": Role(format="int4[1x128]*e4m3*f32", clipping="mse"),
        "fprop.x": _FP8_ROWS,
        "conv.w": _FP8_ROWS,
        "embedding": _FP8_ROWS,
    },
    tolerance=_INT4_TOLERANCE,
)
FP8 = Recipe(
    name="fp8",
    description="E4M3 weights per output channel and activations per token at run time",
    source="Micikevicius et al., 2022, arXiv:2209.05433, for E4M3",
    when="devices that multiply FP8; on a CPU for its size alone",
    roles={
        "fprop.w": _FP8_ROWS,
        "fprop.x": _FP8_ROWS,
        "conv.w": _FP8_ROWS,
        "embedding": _FP8_ROWS,
    },
)
FP8_WEIGHT = Recipe(
    name="fp8-weight",
    description="E4M3 weights per output channel, activations as they were",
    source="Micikevicius et al., 2022, arXiv:2209.05433, for E4M3",
    when="8-bit weights whose sizes differ within a row",
    roles={"fprop.w": _FP8_ROWS, "conv.w": _FP8_ROWS, "embedding": _FP8_ROWS},
)


def _block(name: str, long_name: str, embedding: Role, clipping: Clipping = "amax",
           rule: str = "", *, source: str, when: str) -> tuple[Recipe, Recipe]:
    """A block format for weights and activations, and its weight-only form."""
    weight_only = {
        "fprop.w": Role(format=name + rule, clipping=clipping),
        "conv.w": _FP8_ROWS,
        "embedding": embedding,
    }
    return (
        Recipe(
            name=name,
            description=f"{long_name} weights, and activations at run time",
            source=source,
            when=when,
            roles={**weight_only, "fprop.x": Role(format=name + rule)},
        ),
        Recipe(
            name=f"{name}-weight",
            description=f"{long_name} weights, activations as they were",
            source=source,
            when=f"a smaller file with the weights of {name}; activations lose nothing",
            roles=weight_only,
        ),
    )


_MX = "Rouhani et al., 2023, arXiv:2310.10537; OCP MX 1.0"
MXFP8, MXFP8_WEIGHT = _block(
    "mxfp8", "MXFP8", Role(format="mxfp8"), source=_MX,
    when="devices with units for MX blocks; outliers cost only their own 32 neighbours")
MXFP6, MXFP6_WEIGHT = _block(
    "mxfp6", "MXFP6 (E2M3)", Role(format="mxfp8"), source=_MX,
    when="nearly the fidelity of mxfp8 for three quarters of its bits")
# The specification's scale, a power of two below amax, saturates what lies above 6/8 of a block's
# range; "even" rounds amax as the element would be rounded first.
MXFP4, MXFP4_WEIGHT = _block(
    "mxfp4", "MXFP4", Role(format="mxfp8"), rule=":even", source=_MX,
    when="four bits throughout: integer kernels on a CPU, block-scaled units on a device; add a "
         "method, or recipe='auto', where its loss shows")
NVFP4, NVFP4_WEIGHT = _block(
    "nvfp4", "NVFP4", _FP8_ROWS, clipping="mse",
    source="NVIDIA, 2025, arXiv:2509.25149",
    when="four bits throughout on devices that multiply NVFP4; nearer to float32 than mxfp4, for "
         "a quarter of a bit a value more")

MXFP8_WEIGHT_COMPENSATED = Recipe(
    name="mxfp8-weight-compensated",
    description="MXFP8 weights, rounded with compensated errors; calibrated",
    source="Frantar et al., GPTQ, 2022, arXiv:2210.17323",
    when="the nearest to float32 of the FP8 files; compiling wants calibration data",
    roles={
        "fprop.w": Role(format="mxfp8:rceil", rounding="compensated"),
        "conv.w": _FP8_ROWS,
        "embedding": Role(format="mxfp8:rceil"),
    },
)

NAMED: tuple[Recipe, ...] = (
    INT8,
    INT8_DYNAMIC,
    INT8_TOKEN,
    INT8_WEIGHT,
    INT4,
    INT4_G32,
    INT4_G32_COMPENSATED,
    INT4_INT8,
    INT4_INT8_TOKEN,
    INT4_INT4,
    INT4_INT4_STATIC,
    INT4_FP8,
    FP8,
    FP8_WEIGHT,
    MXFP8,
    MXFP8_WEIGHT,
    MXFP8_WEIGHT_COMPENSATED,
    MXFP6,
    MXFP6_WEIGHT,
    MXFP4,
    MXFP4_WEIGHT,
    NVFP4,
    NVFP4_WEIGHT,
)
