"""The training recipes that ship, each one literal after a paper or library; ``replace`` makes
others of them.

Where a publication keeps layers high because of where they stand in a model of billions of
parameters (TransformerEngine: the last eight blocks), ``high`` has only the head: add
``last:16`` for those.
"""

from __future__ import annotations

import dataclasses
import difflib
import re

from scaleprop.errors import ConfigError
from scaleprop.ops.steps import signed_float
from scaleprop.recipes.training import OPERANDS, Operand, Phase, TrainingRecipe


def _all(x: Operand, w: Operand, dy: Operand) -> dict[str, Operand]:
    """The same operand wherever a kind of value is read."""
    return {"fprop.x": x, "fprop.w": w, "dgrad.dy": dy, "dgrad.w": w, "wgrad.dy": dy,
            "wgrad.x": x}


def _scaled(scaling: str, rule: str = "", dy: str = "") -> dict[str, Operand]:
    """E4M3 forward and E5M2 gradients, one scale a tensor."""
    x = Operand(format=f"e4m3[tensor]*f32{rule}", scaling=scaling)
    return _all(x, x, Operand(format=f"e5m2[tensor]*f32{rule}", scaling=dy or scaling))


FP32 = TrainingRecipe(
    name="fp32", description="nothing is changed", high=(),
    when="the baseline; what the backend costs when it changes nothing")
BF16 = TrainingRecipe(
    name="bf16", description="factors in bfloat16, sums in float32", high=(),
    operands=dict.fromkeys(OPERANDS[:6], Operand(format="bf16")),
    when="the baseline of mixed precision")
FP8 = TrainingRecipe(
    name="fp8", operands=_scaled("static", ":pow2"),
    description="E4M3, gradients in E5M2; exponents chosen once, for the whole graph",
    when="the default on any model, from any weights: no scale is found at run time where the "
         "room allows")
FP8_UNSCALED = TrainingRecipe(
    name="fp8-unscaled", operands=_scaled("constant:0"),
    description="E4M3, gradients in E5M2, every value as it is: for unit-scaled models",
    source="Blake et al., Unit Scaling, 2023, arXiv:2303.11257",
    when="models of unit_scale, from the first step on")
MUS_FP8 = FP8_UNSCALED.replace(
    name="mus-fp8", description="as fp8-unscaled, for models of unit_scale(scheme='mus')",
    source="Narayan et al., µnit Scaling, 2025, arXiv:2502.05967",
    when="models of unit_scale(scheme='mus')")
FP8_CURRENT = TrainingRecipe(
    name="fp8-current", operands=_scaled("current"),
    description="E4M3, gradients in E5M2, scales of the data at hand",
    source="TransformerEngine, Float8CurrentScaling",
    when="FP8 that follows data which change; one reading of every factor more than fp8")
FP8_DELAYED = TrainingRecipe(
    name="fp8-delayed", operands=_scaled("delayed:1024"),
    description="E4M3, gradients in E5M2, scales of the largest amax of 1024 steps",
    source="TransformerEngine, DelayedScaling; Micikevicius et al., 2022, arXiv:2209.05433",
    when="to repeat runs of TransformerEngine; no reading of the data before the cast")
_ROW128 = Operand(format="e4m3[1x128]*f32")
FP8_BLOCK = TrainingRecipe(
    name="fp8-block", operands=_all(_ROW128, Operand(format="e4m3[128x128]*f32"), _ROW128),
    description="E4M3 throughout, 1×128 blocks of activations and gradients, 128×128 of weights",
    source="DeepSeek-V3, 2024, arXiv:2412.19437, section 3.3",
    when="FP8 where activations have outliers; to repeat runs of DeepSeek-V3")
FP8_AMAX = TrainingRecipe(
    name="fp8-amax", operands=_scaled("current", ":pow2"),
    description="E4M3, gradients in E5M2, a power of two of the data at hand",
    source="Perez et al., 2023, arXiv:2309.17224, FP8-AMAX",
    when="as fp8-current, with scales that products take in exactly")
FP8_CSCALE = TrainingRecipe(
    name="fp8-cscale", operands=_scaled("constant:0", dy="constant:-8"),
    description="E4M3, gradients in E5M2, constant powers of two: 2^-8 for gradients, else 1",
    source="Perez et al., 2023, arXiv:2309.17224, FP8-CSCALE",
    when="to see what no scaling at all costs a model")

_MXFP8 = Operand(format="mxfp8:rceil")
MXFP8 = TrainingRecipe(
    name="mxfp8", operands=_all(_MXFP8, _MXFP8, _MXFP8),
    description="MXFP8 (E4M3) throughout, scales rounded up",
    source="Mishra et al., 2025, arXiv:2506.08027",
    when="the safe choice on devices with units for MX blocks")
_MXFP6 = Operand(format="mxfp6_e3m2")
MXFP6 = TrainingRecipe(
    name="mxfp6", operands=_all(_MXFP6, _MXFP6, _MXFP6),
    description="MXFP6 (E3M2) throughout", source="Rouhani et al., 2023, arXiv:2310.10537",
    when="to see what two bits less than MXFP8 cost")
_TSENG = Operand(format="mxfp4", rounding="stochastic_fastest:16", hadamard=64, signs="step",
                 prescale=0.75)
MXFP4_TSENG = TrainingRecipe(
    name="mxfp4-tseng",
    operands=dict.fromkeys(("dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x"), _TSENG),
    description="gradients' products in MXFP4: rotated by 64, stochastic, data times 3/4; "
                "forward as it is",
    source="Tseng et al., 2025, arXiv:2502.20586",
    when="4-bit gradients, forward products as they are")
_CEIL = Operand(format="mxfp4:rceil")
_CEIL_SR = Operand(format="mxfp4:rceil", rounding="stochastic:16")
_CEIL_AGAIN = Operand(format="mxfp4:rceil", rounding="stochastic:16", of="quantized")
MXFP4_TETRAJET = TrainingRecipe(
    name="mxfp4-tetrajet",
    operands={"fprop.x": _CEIL, "fprop.w": _CEIL, "dgrad.dy": _CEIL_SR, "dgrad.w": _CEIL_AGAIN,
              "wgrad.dy": _CEIL_SR, "wgrad.x": _CEIL_AGAIN},
    description="MXFP4 throughout, nothing saturates; backward stochastic, of what forward "
                "multiplied",
    source="Chen et al., TetraJet, 2025, arXiv:2502.20853",
    when="MXFP4 throughout without rotations")
_QUARTET = Operand(format="mxfp4:rms", hadamard=32, estimator="clipped-open")
_QUARTET_DY = Operand(format="mxfp4", rounding="stochastic:16", hadamard=32, signs="step",
                      prescale=0.75)
_QUARTET_AGAIN = dataclasses.replace(_QUARTET_DY, of="quantized")
MXFP4_QUARTET = TrainingRecipe(
    name="mxfp4-quartet",
    operands={"fprop.x": _QUARTET, "fprop.w": _QUARTET, "dgrad.dy": _QUARTET_DY,
              "dgrad.w": _QUARTET_AGAIN, "wgrad.dy": _QUARTET_DY, "wgrad.x": _QUARTET_AGAIN},
    description="MXFP4 throughout, rotated by 32: forward scales of least error, no gradient for "
                "what they clip; backward stochastic, data times 3/4",
    source="Castro et al., Quartet, 2025, arXiv:2505.14669",
    when="MXFP4 throughout, the least forward error")

_NVFP4 = Operand(format="nvfp4")
_NVFP4_SR = Operand(format="nvfp4", rounding="stochastic_fastest:8")
_NVFP4_W = Operand(format="nvfp4_2d")
NVFP4 = TrainingRecipe(
    name="nvfp4",
    operands={"fprop.x": _NVFP4, "fprop.w": _NVFP4_W, "dgrad.dy": _NVFP4_SR, "dgrad.w": _NVFP4_W,
              "wgrad.dy": Operand(format="nvfp4", rounding="stochastic_fastest:8", hadamard=16,
                                  signs="fixed"),
              "wgrad.x": Operand(format="nvfp4", hadamard=16, signs="fixed")},
    description="NVFP4 throughout: weights in 16×16 blocks, gradients stochastic, weight gradients "
                "rotated by 16",
    source="NVIDIA, 2025, arXiv:2509.25149; TransformerEngine, NVFP4BlockScaling",
    when="4 bits throughout as NVIDIA published them; a little slower emulated than mxfp4-tetrajet")
_EDEN = Operand(format="nvfp4", rounding="eden", hadamard=128, signs="step")
_EDEN_AGAIN = dataclasses.replace(_EDEN, of="quantized")
_SIX = Operand(format="nvfp4:fouroversix")
NVFP4_QUARTET2 = TrainingRecipe(
    name="nvfp4-quartet2",
    operands={"fprop.x": _SIX, "fprop.w": _SIX, "dgrad.dy": _EDEN, "dgrad.w": _EDEN_AGAIN,
              "wgrad.dy": _EDEN, "wgrad.x": _EDEN_AGAIN},
    description="NVFP4 throughout: forward the better of amax→6 and amax→4; backward rotated by "
                "128, unbiased by its scales",
    source="Quartet II, 2026",
    when="NVFP4 with unbiased gradients and no stochastic elements; slow where it is emulated")
_UE5M3 = Operand(format="fp4_ue5m3", scaling="held:50")
_UE5M3_W = Operand(format="e2m1[16x16]*ue5m3*f32", scaling="held:50")
_UE5M3_SR = Operand(format="fp4_ue5m3", rounding="stochastic_fast:8", scaling="held:50")
UE5M3 = TrainingRecipe(
    name="ue5m3",
    operands={"fprop.x": _UE5M3, "fprop.w": _UE5M3_W, "dgrad.dy": _UE5M3_SR, "dgrad.w": _UE5M3_W,
              "wgrad.dy": _UE5M3_SR, "wgrad.x": _UE5M3},
    description="E2M1 with UE5M3 scales: amax of a tensor held 50 steps, gradients stochastic, "
                "nothing rotated",
    source="Graphcore, 2026",
    when="FP4 without a reading of the whole tensor in every step")
FP4_ALL_THE_WAY = TrainingRecipe(
    name="fp4-all-the-way",
    operands={"fprop.x": _NVFP4, "fprop.w": _NVFP4, "dgrad.dy": _NVFP4_SR, "dgrad.w": _NVFP4,
              "wgrad.dy": _NVFP4_SR, "wgrad.x": _NVFP4_SR},
    description="NVFP4 throughout: nearest forward, gradients and what they multiply into weights' "
                "stochastic; end with ``with_tail``",
    source="Chmiel et al., 2025, arXiv:2505.19115",
    when="NVFP4 with no rotation; end a run with with_tail")
# at the scale of least error the largest weights saturate on either side: all 15 levels are used
_INT4 = Operand(format="int4[tensor]*f32:mse", estimator="tanh")
INT4_CNN = TrainingRecipe(
    name="int4-cnn", operands={"fprop.w": _INT4, "dgrad.w": _INT4}, high=(), convolutions=True,
    description="weights of linear layers and convolutions in 15 levels, one scale a tensor, "
                "softly clipped; the rest as it is",
    source="True 4-bit quantized CNN training on CPU, 2026",
    when="convolutional networks whose weights are to be stored in 4 bits afterwards")

NAMED: tuple[TrainingRecipe, ...] = (
    FP32, BF16, FP8, FP8_UNSCALED, FP8_CURRENT, FP8_DELAYED, FP8_BLOCK, FP8_AMAX, FP8_CSCALE,
    MUS_FP8, MXFP8, MXFP6, MXFP4_TSENG, MXFP4_TETRAJET, MXFP4_QUARTET, NVFP4, NVFP4_QUARTET2,
    UE5M3, FP4_ALL_THE_WAY, INT4_CNN,
)  # fmt: skip


def with_tail(recipe: TrainingRecipe, start: int) -> TrainingRecipe:
    """``recipe`` whose backward products are as they were from step ``start`` on: the last phase of
    Chmiel et al., 2025 (FP4 forward, BF16 backward)."""
    backward = {role: None for role in recipe.operands if not role.startswith("fprop")}
    return recipe.replace(phases=(*recipe.phases, Phase(start=start, operands=backward)))


def truncated(name: str) -> TrainingRecipe:
    """The recipe that truncates every floating tensor to an element format such as ``e5m7``.

    Raises:
        FormatError: for a name that is no signed float element.
    """
    signed_float(name)
    return TrainingRecipe(name=name, description=f"every tensor truncated to {name}", high=(),
                          every=name, source="bit truncation of float32")


def training_recipe(recipe: str | TrainingRecipe) -> TrainingRecipe:
    """The recipe meant by a name, by ``ExMy`` as in ``e5m7``, or by a recipe itself.

    Raises:
        ConfigError: on an unknown name, where the close ones are listed, or another object.
    """
    if isinstance(recipe, TrainingRecipe):
        return recipe
    if not isinstance(recipe, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"a recipe for training is a name or a TrainingRecipe, not "
                          f"{type(recipe).__name__}: scaleprop.compile takes the others")
    known = {candidate.name: candidate for candidate in NAMED}
    if recipe in known:
        return known[recipe]
    if re.fullmatch(r"e\d+m\d+", recipe):
        return truncated(recipe)
    close = difflib.get_close_matches(recipe, known, n=3, cutoff=0.4)
    meant = f"did you mean {', '.join(map(repr, close))}? " if close else ""
    raise ConfigError(f"unknown training recipe {recipe!r}; {meant}known: {', '.join(known)}; or "
                      "an element format for every tensor, as in 'e5m7'")
