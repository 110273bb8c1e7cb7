"""Adding low-rank products to weights: one pass, F32, in an order of our own, never through BLAS.

Arrays are [I, J] as they lie in memory: a row-major weight gives its rows of N as I, a K-major one its rows of K, with
the factors the other way round. Products are the same number either way, so the bytes are too. Every element is
    out = x + scale x fma(l2, r2, fma(l1, r1, fma(l0, r0, 0)))...
in F32: each step of the inner sum rounded once, as a fused multiply-add does, then the product with the scale and
the sum rounded by themselves; then the rounding to BF16 or F16 of the delta, of the result or of neither that the
caller names. No sum depends on how a matrix is cut into units. That order is also the one in which BLAS
libraries on processors with such an instruction add up a small rank, so that peft's bytes are met more often than
by separate roundings. The instruction is asked for by name: a processor without it takes longer to the same bits.

`merge_reference` is the oracle.
"""

# ruff: noqa: PLR0917 -- compiled functions take their arguments by position

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numba
import numba.extending
import numpy as np

from fp4conv.kernels.contract import F32, F64, Source, flat, float_bits
from fp4conv.kernels.decode import bf16_bits
from fp4conv.kernels.jit import device, helper, kernel
from fp4conv.kernels.lanes import I32, LANES, FloatBits

__all__ = ["ROUNDINGS", "add_product", "change_sums", "scale_rows", "square_sums"]

TILE = 2048  # values of a row that stay in the first-level cache with four rows of factors
TO_BF16, TO_F16 = 16, 13  # bits that F32 has more
ROUNDINGS = {"F32": 0, "BF16": TO_BF16, "F16": TO_F16}
_ABS, _SIGN, _INF = np.int32(0x7FFFFFFF), np.int32(-(2**31)), np.int32(0x7F800000)
_F16_NORMAL = np.int32(np.float32(2.0**-14).view(np.int32))
_F16_OVERFLOW = np.int32(np.float32(65520).view(np.int32))  # half way from F16's largest to the next power of two
_F16_STEPS = np.float32(0.75)  # F32 numbers near it are 2^-24 apart, like F16's subnormals


@device
def rounded_bf16(bits: np.int32) -> np.int32:
    """float32 bits rounded to BF16, ties to even; NaN stays NaN."""
    result = np.left_shift(bf16_bits(bits), np.int32(16))
    return bits if np.int32(bits & _ABS) >= _INF else result


@device
def rounded_f16(bits: np.int32, value: np.float32) -> np.int32:
    """float32 bits (those of `value`) rounded to F16, ties to even; too large gives Inf, NaN stays NaN."""
    magnitude, sign = np.bitwise_and(bits, _ABS), np.bitwise_and(bits, _SIGN)
    last_kept = np.bitwise_and(np.right_shift(magnitude, np.int32(13)), np.int32(1))
    normal = np.bitwise_and(np.add(np.add(magnitude, np.int32(0xFFF)), last_kept), np.int32(~0x1FFF))
    small = np.float32(np.float32(abs(value) + _F16_STEPS) - _F16_STEPS)
    if magnitude > _INF:
        return bits
    if magnitude >= _F16_OVERFLOW:
        return np.bitwise_or(_INF, sign)
    return np.bitwise_or(normal if magnitude >= _F16_NORMAL else np.float32(small).view(np.int32), sign)


@helper
def round_run(bits: I32, values: F32, dropped: int) -> None:
    """Round float32 in place; `bits` and `values` are the same memory."""
    if dropped == TO_BF16:
        for j in range(bits.size):
            bits[j] = rounded_bf16(bits[j])
    elif dropped == TO_F16:
        for j in range(bits.size):
            bits[j] = rounded_f16(bits[j], values[j])


@numba.extending.intrinsic
def _fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """a x b + c, rounded once; float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return numba.types.float32(numba.types.float32, numba.types.float32, numba.types.float32), generate


fma = cast("Callable[[np.float32, np.float32, np.float32], np.float32]", _fma)  # the compiler supplies the context


@helper
def add_four(total: F32, a: F32, b: F32, c: F32, d: F32, factors: F32) -> None:
    p, q, r, s = factors[0], factors[1], factors[2], factors[3]
    for j in range(total.size):
        total[j] = fma(s, d[j], fma(r, c[j], fma(q, b[j], fma(p, a[j], total[j]))))


@helper
def add_one(total: F32, a: F32, factor: np.float32) -> None:
    for j in range(total.size):
        total[j] = fma(factor, a[j], total[j])


@helper
def product_run(factors: F32, right: F32, start: int, stride: int, total: F32) -> None:
    """total[j] = the sum of factors[k] x right[k * stride + start + j], term after term from zero."""
    width, rank, k = total.size, factors.size, 0
    total[:] = np.float32(0)
    while k + 4 <= rank:
        a = k * stride + start
        b, c, d = a + stride, a + 2 * stride, a + 3 * stride
        rows = right[a : a + width], right[b : b + width], right[c : c + width], right[d : d + width]
        add_four(total, rows[0], rows[1], rows[2], rows[3], factors[k : k + 4])
        k += 4
    while k < rank:
        a = k * stride + start
        add_one(total, right[a : a + width], factors[k])
        k += 1


@helper
def add_run(x: FloatBits, shift: int, total: F32, scratch: F32, out: F32) -> None:
    """out = x + total."""
    bits = scratch.view(np.int32)
    for j in range(total.size):
        bits[j] = x[j] << shift
    for j in range(total.size):
        out[j] = np.float32(scratch[j] + total[j])


@kernel
def add_product_flat(
    x: FloatBits,
    shift: int,
    left: F32,
    left_stride: int,
    right: F32,
    right_stride: int,
    scale: np.float32,
    roundings: tuple[int, int],
    shape: tuple[int, int, int],
    out: F32,
) -> None:
    """Arrays flat; `roundings` of the delta and of the result; `shape` is (I, J, rank)."""
    height, width, rank = shape
    total, scratch, factors = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(rank, np.float32)
    bits = total.view(np.int32)
    for i in range(height):
        for k in range(rank):
            factors[k] = left[k * left_stride + i]
        for start in range(0, width, TILE):
            size, at = min(TILE, width - start), i * width + start
            product_run(factors, right, start, right_stride, total[:size])
            for j in range(size):
                total[j] = np.float32(total[j] * scale)
            round_run(bits[:size], total[:size], roundings[0])
            add_run(x[at : at + size], shift, total[:size], scratch[:size], total[:size])
            round_run(bits[:size], total[:size], roundings[1])
            out[at : at + size] = total[:size]


@kernel
def sums_by_row(x: FloatBits, shift: int, after: F32, width: int, change: F64, before: F64) -> None:
    """Row sums of (after - x)^2 and x^2, in LANES partial sums each: value j goes to sum j % LANES."""
    differences, squares = np.empty(LANES, np.float64), np.empty(LANES, np.float64)
    values = np.empty(LANES, np.float32)
    bits = values.view(np.int32)
    for i in range(change.size):
        differences[:] = 0.0
        squares[:] = 0.0
        for start in range(0, width, LANES):
            size, at = min(LANES, width - start), i * width + start
            for j in range(size):
                bits[j] = x[at + j] << shift
            for j in range(size):
                value = np.float64(values[j])
                difference = np.float64(after[at + j]) - value
                differences[j] += difference * difference
                squares[j] += value * value
        change[i], before[i] = folded(differences), folded(squares)


@device
def folded(terms: F64) -> float:
    """The sum of LANES terms, the second half added onto the first until one is left; `terms` is spent."""
    size = LANES
    while size > 1:
        size //= 2
        for j in range(size):
            terms[j] += terms[size + j]
    return float(terms[0])


@kernel
def sums_by_column(x: FloatBits, shift: int, after: F32, width: int, change: F64, before: F64) -> None:
    """The same of columns, from the first row to the last."""
    change[:] = 0.0
    before[:] = 0.0
    values = np.empty(TILE, np.float32)
    bits = values.view(np.int32)
    for i in range(x.size // width):
        for start in range(0, width, TILE):
            size, at = min(TILE, width - start), i * width + start
            add_squares(x[at : at + size], shift, after[at : at + size], bits[:size], values[:size],
                        change[start : start + size], before[start : start + size])  # fmt: skip


@helper
def add_squares(x: FloatBits, shift: int, after: F32, bits: I32, values: F32, change: F64, before: F64) -> None:
    for j in range(x.size):
        bits[j] = x[j] << shift
    for j in range(x.size):
        difference = np.float64(after[j]) - np.float64(values[j])
        change[j] += difference * difference
    for j in range(x.size):
        value = np.float64(values[j])
        before[j] += value * value


@kernel
def scale_flat(values: F32, width: int, factors: F32, by_column: bool, dropped: int) -> None:
    """values[i, j] times factors[i], or factors[j], and rounded; in place."""
    bits = values.view(np.int32)
    for i in range(values.size // width):
        at = i * width
        if by_column:
            for j in range(width):
                values[at + j] = np.float32(values[at + j] * factors[j])
        else:
            for j in range(width):
                values[at + j] = np.float32(values[at + j] * factors[i])
        round_run(bits[at : at + width], values[at : at + width], dropped)


# ---- as the rest of fp4conv calls them


def add_product(
    x: Source, left: F32, right: F32, scale: float, out: F32, *, delta_dtype: str = "F32", dtype: str = "F32"
) -> None:
    """out = x + scale x left^T right, all [I, J]; `left` [rank, I] and `right` [rank, J] are float32.

    `x` is uint16 (BF16 bits) or float32, and may be `out` itself. The delta is rounded to `delta_dtype`, the sum to
    `dtype` ('F32', 'BF16', 'F16'); `out` is float32 whatever they are. The factors' last axis is contiguous.
    """
    height, width = x.shape
    rank = left.shape[0]
    assert left.shape == (rank, height), f"left has shape {left.shape}, expected {(rank, height)}"
    assert right.shape == (rank, width), f"right has shape {right.shape}, expected {(rank, width)}"
    assert out.shape == x.shape, f"out has shape {out.shape}, x {x.shape}"
    assert out.dtype == np.float32, f"out has dtype {out.dtype}"
    assert out.flags.c_contiguous, "out is not C-contiguous"
    if not rank or not x.size:
        raise AssertionError("an empty product")
    flat_left, left_stride = _rows(left)
    flat_right, right_stride = _rows(right)
    bits, shift = float_bits(x)
    add_product_flat(
        bits, shift, flat_left, left_stride, flat_right, right_stride, np.float32(scale),
        (ROUNDINGS[delta_dtype], ROUNDINGS[dtype]), (height, width, rank), out.reshape(-1),
    )  # fmt: skip


def change_sums(x: Source, after: F32, kn: bool, change: F64, before: F64) -> None:
    """Sums over K of (after - x)^2 and of x^2 for each row of N: float64 [N], overwritten. Both [N, K], [K, N] if `kn`.

    Not finite where a value is not.
    """
    assert x.shape == after.shape, f"x has shape {x.shape}, after {after.shape}"
    rows = x.shape[1] if kn else x.shape[0]
    assert change.shape == before.shape == (rows,), f"sums have shape {change.shape}, expected {(rows,)}"
    bits, shift = float_bits(x)
    (sums_by_column if kn else sums_by_row)(bits, shift, flat(after), x.shape[1], change, before)


def square_sums(values: F32, kn: bool) -> F64:
    """The sum over K of x^2 for each row of N, float64 [N]; in the order of `change_sums`."""
    change, before = np.empty((2, values.shape[1] if kn else values.shape[0]), np.float64)
    change_sums(values, values, kn, change, before)
    return before


def scale_rows(values: F32, factors: F32, kn: bool, dtype: str) -> None:
    """Each row of N times its factor, rounded to `dtype`; in place. `values` [N, K], or [K, N] when `kn`."""
    assert factors.shape == (values.shape[1] if kn else values.shape[0],), f"factors have shape {factors.shape}"
    scale_flat(values.reshape(-1), values.shape[1], factors, kn, ROUNDINGS[dtype])


def _rows(factor: F32) -> tuple[F32, int]:
    """(flat memory from the first element on, elements from row to row) of a 2-D array with contiguous rows."""
    assert factor.dtype == np.float32, f"a factor has dtype {factor.dtype}"
    assert factor.shape[1] == 1 or factor.strides[1] == 4, "a factor's rows are not contiguous"
    stride = factor.strides[0] // 4 if factor.shape[0] > 1 else factor.shape[1]
    length = (factor.shape[0] - 1) * stride + factor.shape[1]
    memory = np.lib.stride_tricks.as_strided(factor, (length,), (4,), writeable=False)
    return memory, stride
