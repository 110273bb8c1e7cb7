"""The compiled scans and casts of plain values: amax, counts of NaN and Inf, BF16 to float32 and back."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fp4conv.kernels.decode import bf16_bits
from fp4conv.kernels.jit import kernel
from fp4conv.kernels.lanes import I32, FloatBits
from fp4conv.kernels.quantise import INF_BITS

_ABS = np.int32(0x7FFFFFFF)
_ROUNDS_TO_INF = np.int32(0x7F7F8000)  # half way from BF16's largest number to the next power of two


@kernel
def largest_bits(x: FloatBits, shift: int) -> int:
    """The largest |x| as float32 bits; `x` flat, int32 float bits or uint16 BF16 bits with shift 16."""
    largest = np.int32(0)
    for i in range(x.size):
        largest = np.int32(max(largest, np.int32(np.int32(x[i] << shift) & _ABS)))
    return int(largest)


@kernel
def largest_finite_bits(x: FloatBits, shift: int) -> int:
    largest = np.int32(0)
    for i in range(x.size):
        bits = np.int32(np.int32(x[i] << shift) & _ABS)
        if bits < INF_BITS:
            largest = np.int32(max(largest, bits))
    return int(largest)


@kernel
def nonfinite(x: FloatBits, shift: int) -> int:
    """How many values are NaN or Inf."""
    count = 0
    for i in range(x.size):
        count += int(np.int32(np.int32(x[i] << shift) & _ABS) >= INF_BITS)
    return count


@kernel
def first_nonfinite(x: FloatBits, shift: int, n: int, k: int, kn: bool) -> int:
    """The flat logical index of the first NaN or Inf, row by row, or -1; `x` flat."""
    for row in range(n):
        for column in range(k):
            at = column * n + row if kn else row * k + column
            if np.int32(np.int32(x[at] << shift) & _ABS) >= INF_BITS:
                return row * k + column
    return -1


@kernel
def to_bf16(bits: I32, out: npt.NDArray[np.uint16]) -> bool:
    """Round float32 bits to BF16 bits, NaN to a quiet NaN of its sign. False when a finite value became Inf."""
    overflows = 0
    for i in range(bits.size):
        value = bits[i]
        magnitude, top = np.bitwise_and(value, _ABS), np.right_shift(value, np.int32(16))
        quiet = np.bitwise_or(top, np.int32(0x40))
        out[i] = quiet if magnitude > INF_BITS else bf16_bits(value)
        overflows += int(magnitude >= _ROUNDS_TO_INF) - int(magnitude >= INF_BITS)
    return overflows == 0


@kernel
def first_overflow(bits: I32) -> int:
    """The first index of a finite float32 that rounds to Inf in BF16, or -1."""
    for i in range(bits.size):
        magnitude = np.int32(bits[i] & _ABS)
        if magnitude >= _ROUNDS_TO_INF and magnitude < INF_BITS:
            return i
    return -1


@kernel
def to_f32(x: npt.NDArray[np.uint16], out: I32) -> None:
    """Widen BF16 bits to float32 bits."""
    for i in range(x.size):
        out[i] = x[i] << 16
