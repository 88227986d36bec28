"""Optimizer state in 8 or 16 bits: every state tensor as data · 2^e, decoded only while it is used.

    optimizer = torch.optim.AdamW(model.parameters())
    state = scaleprop.optim.scaled_state(optimizer, dtype="fp16")   # train, save, load as before
    state.nbytes, state.left                                        # what it takes; what stayed

What is stored, and why:

| dtype  | moments, momenta         | squares (second moments)             | bytes a value (Adam) |
|--------|--------------------------|--------------------------------------|----------------------|
| `fp16` | float16, a scale/tensor  | UE6M10, a scale a tensor             | 2 + 2                |
| `bf16` | bfloat16, a scale/tensor | bfloat16, a scale a tensor           | 2 + 2                |
| `fp8`  | E4M3, a scale a block    | UE6M10; `second="fp8"`: UE5M3 blocks | 1 + 2; 1 + 1         |

- A scale is 2^e with e an int16, as in Scalify (arXiv:2407.17353): it cannot overflow or underflow,
  multiplying by it is exact, and it is found from the finite values alone, so that NaN and Inf stay
  where they are and touch nothing else. The largest value sits at the top of the element's range
  with one binade to spare; where a format has no Inf, its largest value, otherwise unused, is Inf.
- Blocks are of 256 values, as the 8-bit optimizers need them (arXiv:2110.02861): E4M3
  spans 18 binades, less than the moments of one tensor do.
- A square spans twice the binades of a moment and has no sign. Float16 holds 40; a square that
  underflows to 0 next to a moment that does not divides it by eps and throws the parameter far off.
  UE6M10 gives the sign bit to the exponent: 73 binades at float16's precision. What is positive
  never becomes 0: it stops at the smallest value, which only makes a step smaller.
- Squares move by 1-β₂ of themselves a step, 0.1 % at β₂ = 0.999. Rounding to nearest drops what is
  less than half a unit in the last place: up to 0.05 % in UE6M10, 0.4 % in bfloat16, 6 % in UE5M3.
  So bfloat16 squares stall: they do not decay at β₂ = 0.999. Rounding stochastically
  (``generator``) removes the bias and leaves noise; eight bits are refused for squares without it.
  FP8-LM, too, pairs eight-bit moments with squares in 16 bits (arXiv:2310.18313).

Which state is which is decided by its name (``SQUARES``, and ``squares`` for other optimizers').
"""

from __future__ import annotations

from scaleprop.optim.clipping import StableClip
from scaleprop.optim.entries import KEPT, SQUARES
from scaleprop.optim.oscillation import Oscillation
from scaleprop.optim.state import ScaledState, scaled_state
from scaleprop.optim.storage import FORMATS, StateFormat, decode_state, encode_state
from scaleprop.optim.weights import StochasticWeights, round_stochastic, stochastic_weights

__all__ = [
    "FORMATS",
    "KEPT",
    "SQUARES",
    "Oscillation",
    "ScaledState",
    "StableClip",
    "StateFormat",
    "StochasticWeights",
    "decode_state",
    "encode_state",
    "round_stochastic",
    "scaled_state",
    "stochastic_weights",
]
