"""The compiled scans and casts of plain values: amax, counts of NaN and Inf, BF16 to float32 and back."""

from __future__ import annotations

import numpy as np

from fp4conv.kernels.compute import INF_BITS
from fp4conv.kernels.jit import kernel

_ABS = np.int32(0x7FFFFFFF)


@kernel
def largest_bits(x, shift):  # type: ignore[no-untyped-def]
    """The largest |x| as float32 bits; `x` flat, int32 float bits or uint16 BF16 bits with shift 16."""
    largest = np.int32(0)
    for i in range(x.size):
        largest = np.int32(max(largest, np.int32(np.int32(x[i] << shift) & _ABS)))
    return np.int64(largest)


@kernel
def largest_finite_bits(x, shift):  # type: ignore[no-untyped-def]
    largest = np.int32(0)
    for i in range(x.size):
        bits = np.int32(np.int32(x[i] << shift) & _ABS)
        if bits < INF_BITS:
            largest = np.int32(max(largest, bits))
    return np.int64(largest)


@kernel
def nonfinite(x, shift):  # type: ignore[no-untyped-def]
    """How many values are NaN or Inf."""
    count = 0
    for i in range(x.size):
        count += np.int32(np.int32(x[i] << shift) & _ABS) >= INF_BITS
    return count


@kernel
def first_nonfinite(x, shift, n, k, kn):  # type: ignore[no-untyped-def]
    """The flat logical index of the first NaN or Inf, row by row, or -1; `x` flat."""
    for row in range(n):
        for column in range(k):
            at = column * n + row if kn else row * k + column
            if np.int32(np.int32(x[at] << shift) & _ABS) >= INF_BITS:
                return row * k + column
    return -1


@kernel
def to_bf16(bits, out):  # type: ignore[no-untyped-def]
    """Round float32 bits (int32) to BF16 bits; returns the first index where a finite value became Inf, or -1."""
    overflowed = -1
    for i in range(bits.size):
        value = np.uint32(bits[i])
        rounded = np.uint32(value + np.uint32(0x7FFF) + ((value >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        magnitude = bits[i] & _ABS
        if magnitude > INF_BITS:
            rounded = (value >> np.uint32(16)) | np.uint32(0x40)
        out[i] = rounded
        if overflowed < 0 and magnitude < INF_BITS and (rounded & np.uint32(0x7FFF)) == 0x7F80:
            overflowed = i
    return overflowed


@kernel
def to_f32(x, out):  # type: ignore[no-untyped-def]
    """Widen BF16 bits (uint16) to float32 bits (int32)."""
    for i in range(x.size):
        out[i] = x[i] << 16
