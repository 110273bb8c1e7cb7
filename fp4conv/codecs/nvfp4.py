"""NVFP4: E2M1 codes, one E4M3 scale for 16 values, one F32 scale for the tensor; and MXFP4 -> NVFP4 in closed form."""

from __future__ import annotations

import numpy as np

from fp4conv.codecs.base import Codes, Coding, Rows, Tally
from fp4conv.formats import (
    NVFP4,
    NVFP4_AMAX_DIVISOR,
    NVFP4_FOUR_OVER_SIX_DIVISOR,
    NVFP4_MIN_TENSOR_SCALE,
    ScaleRule,
)
from fp4conv.kernels import compiled


class Nvfp4:
    format = NVFP4

    def encode(self, rows: Rows, coding: Coding, out: Codes, tally: Tally) -> int:
        return compiled.encode_nvfp4(
            rows.array,
            rows.kn,
            coding.tensor_scale,
            coding.rule,
            coding.ties,
            out.packed,
            out.block_scale,
            tally.signal,
            tally.noise,
            out.kn,
        )

    def decode(self, codes: Codes, tensor_scale: float, out: Rows, *, inverse: bool = False) -> int:
        return compiled.decode_nvfp4(
            codes.packed, codes.block_scale, codes.kn, tensor_scale, out.array, out.kn, inverse
        )


def tensor_scale(amax: float, rule: ScaleRule) -> float:
    """The F32 scale of a tensor whose largest magnitude is `amax`: amax / 2688, or / 1536 for four-over-six.

    Computed in F32 as ModelOpt does. 1.0 for an all-zero tensor, which would otherwise decode to NaN; never
    an F32 subnormal.
    """
    if amax == 0.0:
        return 1.0
    divisor = NVFP4_FOUR_OVER_SIX_DIVISOR if rule is ScaleRule.FOUR_OVER_SIX else NVFP4_AMAX_DIVISOR
    return max(float(np.float32(amax) / np.float32(divisor)), NVFP4_MIN_TENSOR_SCALE)
