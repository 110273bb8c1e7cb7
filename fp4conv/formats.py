"""The number formats as values: E2M1, E4M3, E8M0 and the two block formats built from them.

This module owns what a format *is* (bits, range, block length, which scale rules exist for it).
It does not encode or decode anything: `kernels/` does.

Sources: OCP Microscaling Formats (MX) v1.0, sections 5.3.3 (E2M1), 5.4.1 (E8M0) and 6.3 (rounding
to MX); OCP 8-bit Floating Point (OFP8) v1.0, table 1 (E4M3); NVIDIA, "Introducing NVFP4".
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class ScaleRule(str, Enum):
    """How the scale of a block is chosen from its values."""

    FLOOR = "floor"  # MXFP4: 2^(floor(log2 amax) - 2), the rule of the MX specification
    RCEIL = "rceil"  # MXFP4: the smallest power of two that does not saturate amax
    EVEN = "even"  # MXFP4: FLOOR after rounding amax's mantissa to E2M1's one bit
    AMAX = "amax"  # NVFP4: E4M3(block amax / (6 x tensor scale)), tensor scale = amax / 2688
    FOUR_OVER_SIX = "four-over-six"  # NVFP4: block amax on code 4 or on code 6, whichever errs less
    MSE = "mse"  # both: the scale with the least squared error, over every scale there is


class Ties(str, Enum):
    """Where a value half way between two codes goes."""

    EVEN = "even"  # to the code with a zero last bit (IEEE 754 roundTiesToEven)
    DOWN = "down"  # to the smaller magnitude, as ModelOpt's gpt-oss MXFP4 converter script does


class MergeRounding(str, Enum):
    """ONCE: W + delta in F32, rounded to the target alone. PEFT: as peft's merge_and_unload, after each adapter to the
    weight's dtype. TRAINING: as the forward pass of LoRA-QAT: factors in the weight's dtype, an F32 sum, one rounding.
    """

    ONCE = "once"
    PEFT = "peft"
    TRAINING = "training"


@dataclass(frozen=True)
class FloatFormat:
    """A small float. `bits` in all; `max_value` and `min_value` are the finite positive range."""

    name: str
    bits: int
    max_value: float
    min_value: float  # the smallest positive value, a subnormal where the format has them
    signed: bool
    nan_codes: tuple[int, ...]


E2M1 = FloatFormat("e2m1", 4, 6.0, 0.5, True, ())
E4M3 = FloatFormat("e4m3", 8, 448.0, 2.0**-9, True, (0x7F, 0xFF))
E8M0 = FloatFormat("e8m0", 8, 2.0**127, 2.0**-127, False, (0xFF,))

E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by code 0..7; code + 8 is the negative
E8M0_BIAS = 127


@dataclass(frozen=True)
class BlockFormat:
    """Values that share a scale: `block` values along K, one `scale`, and perhaps one F32 a tensor."""

    name: str
    element: FloatFormat
    block: int
    scale: FloatFormat
    tensor_scale: bool
    rules: tuple[ScaleRule, ...]

    @property
    def bits_per_value(self) -> float:
        return self.element.bits + self.scale.bits / self.block


MXFP4 = BlockFormat("mxfp4", E2M1, 32, E8M0, False, (ScaleRule.FLOOR, ScaleRule.RCEIL, ScaleRule.EVEN, ScaleRule.MSE))
NVFP4 = BlockFormat("nvfp4", E2M1, 16, E4M3, True, (ScaleRule.AMAX, ScaleRule.FOUR_OVER_SIX, ScaleRule.MSE))
BLOCK_FORMATS = {MXFP4.name: MXFP4, NVFP4.name: NVFP4}
DENSE_FORMATS = ("bf16", "f16", "f32")
TARGETS = (*DENSE_FORMATS, *BLOCK_FORMATS)  # what a checkpoint can be converted to

# amax / NVFP4_AMAX_DIVISOR is the tensor scale: the largest code times the largest block scale.
NVFP4_AMAX_DIVISOR = E2M1.max_value * E4M3.max_value  # 2688
# Four-over-six keeps the block scale of amax at 256, so that 1.5 x as much still fits below 448.
NVFP4_FOUR_OVER_SIX_DIVISOR = E2M1.max_value * 256.0
# A smaller tensor scale would be an F32 subnormal, which GPUs may flush to zero.
NVFP4_MIN_TENSOR_SCALE = 2.0**-126
