"""The window of exponents that NVFP4 can hold, and the choice of a power-of-two tensor scale in it.

MXFP4 -> NVFP4 loses nothing while block scale 2^(k-m) is a power of two in E4M3, for a block of scale
2^k and tensor scale 2^m. `window_counts` of the kernels tells for how many 16-value halves each m works;
this module turns those counts into m. Pure integers; no numbers of a tensor are read here.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fp4conv.formats import E2M1_MAGNITUDES

E4M3_EXPONENTS = (-9, 8)  # 2^-9 .. 2^8 are the powers of two in E4M3
TENSOR_EXPONENTS = (-126, 127)  # 2^m is a normal float32
MAX_SHIFT = 3  # .5 -> 4 is the longest way between two codes by doubling

# `starts[lo + WINDOW_OFFSET]` and `ends[hi + WINDOW_OFFSET]` for an interval lo..hi of exponents m.
WINDOW_OFFSET = 127 + MAX_SHIFT + E4M3_EXPONENTS[1]
WINDOW_LENGTH = WINDOW_OFFSET + 127 + MAX_SHIFT - E4M3_EXPONENTS[0] + 1


def new_window_counts() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Empty `starts` and `ends`, int64 [WINDOW_LENGTH] each; counts of several tensors add up."""
    return np.zeros(WINDOW_LENGTH, dtype=np.int64), np.zeros(WINDOW_LENGTH, dtype=np.int64)


def valid_shifts(magnitudes: npt.NDArray[np.uint8]) -> list[int]:
    """The d for which every nonzero magnitude code has another code of value x 2^-d; block scale x 2^d."""
    values = {E2M1_MAGNITUDES[c] for c in magnitudes if c}
    return [d for d in range(-MAX_SHIFT, MAX_SHIFT + 1) if all(v * 2.0**-d in E2M1_MAGNITUDES for v in values)]


def choose_window(starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> tuple[int, int]:
    """The exponent m of the tensor scale 2^m, and the number of 16-value halves that it cannot hold.

    Fewest lossy halves first, then the smallest m: where everything fits that is kmax - 8, which puts
    the largest block scale on 2^8. Without a nonzero half the answer is (0, 0).
    """
    total = int(starts.sum())
    assert total == int(ends.sum()), "every interval has a start and an end"
    if total == 0:
        return 0, 0
    ended_before = np.concatenate([[0], np.cumsum(ends)[:-1]])
    held = np.cumsum(starts) - ended_before
    low, high = TENSOR_EXPONENTS
    allowed = held[low + WINDOW_OFFSET : high + WINDOW_OFFSET + 1]
    m = int(np.argmax(allowed))  # argmax takes the first, so the smallest m
    return m + low, total - int(allowed[m])
