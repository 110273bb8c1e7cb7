"""Where ModelOpt's fake quantisers are known to differ from the formats' exact arithmetic, and why.

Read off `tensor_quant_mx.cu` and `fp4_kernel_hopper.py` of ModelOpt 0.47:

- MXFP4, float32 masters: the kernel divides amax by 6 before it looks at the exponent, so an amax a few units in the
  last place above 6 x 2^k rounds to 2^k, and the block gets a scale one step too small. The largest values saturate.
  BF16 and F16 have no values there.
- NVFP4: a block whose scale (block scale x tensor scale) is below 1e-5 is quantised with a scale of 1, so all of it
  becomes zero. No file can say that.

A window explains a difference only where the values are those that it predicts.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fp4conv.formats import BLOCK_FORMATS, E2M1, E4M3, MXFP4, NVFP4_AMAX_DIVISOR, Ties
from fp4conv.kernels.small_floats import E2M1_VALUES, e2m1_codes

Values = npt.NDArray[np.float32]

LOG2_WINDOW_ULPS = 32  # above 6 x 2^k
SMALLEST_SCALE = 1e-5


def explained_blocks(
    format_name: str, values: tuple[Values, Values, Values], amax: float | None, *, exact: bool
) -> int | None:
    """How many blocks differ between values = (master, used, expected), each [N, K]; None where one has no explanation.

    `exact`: the master is float32, so that an amax can lie in the window of MXFP4.
    """
    block = BLOCK_FORMATS[format_name].block
    master, used, expected = (array.reshape(-1, block) for array in values)
    differing = np.flatnonzero((used != expected).any(axis=1))
    master, used = master[differing], used[differing]
    largest = np.abs(master).max(axis=1)
    if format_name == MXFP4.name:
        explained = _in_log2_window(largest) & _saturated(used, master, largest) & exact
    else:
        # E4M3 rounds a block scale by a sixteenth at most, or to a multiple of its smallest value.
        step = E4M3.min_value * (amax or 0.0) / NVFP4_AMAX_DIVISOR
        small = largest / E2M1.max_value < SMALLEST_SCALE * 17 / 16 + step
        explained = (used == 0).all(axis=1) & small
    return len(differing) if bool(explained.all()) else None


def _in_log2_window(amax: Values) -> npt.NDArray[np.bool_]:
    """Whether each amax lies above 6 x 2^k by at most the window."""
    above = (amax.view(np.uint32) & np.uint32(0x7FFFFF)).astype(np.int64) - 0x400000  # the mantissa of 1.5
    return np.asarray((above > 0) & (above <= LOG2_WINDOW_ULPS))


def _saturated(used: Values, master: Values, amax: Values) -> npt.NDArray[np.bool_]:
    """Whether each block has the values of the smaller scale, under which amax saturates at 6 x 2^k."""
    scale = np.ldexp(np.float32(1), np.frexp(amax)[1] - 3).astype(np.float32)[:, None]
    expected = np.copysign(E2M1_VALUES[e2m1_codes(master / scale, Ties.EVEN)] * scale, master)
    return np.asarray((used == expected).all(axis=1))
