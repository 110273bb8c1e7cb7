"""The kernels as the rest of fp4conv calls them: Numba, one pass, free of the GIL, bit-equal to `reference`.

Conventions of every function. A logical matrix is [N, K]; blocks run along K; an array flagged `kn` is stored
[K, N] instead. Arrays are C-contiguous and may be read-only where they are inputs. BF16 is held as uint16 bits,
E4M3 and E8M0 scales as uint8. `packed` is uint8, two codes a byte along K, the even K in the low nibble: [N, K/2]
or [K/2, N]. `scales` is uint8 [N, K/g] or [K/g, N]. A position is the flat logical index n * K + k, or -1 for none.

`signal` and `noise` (float64 [N], overwritten) are the sums over a row of x^2 and of (x - decoded)^2. The terms of
a block are added in halves (first half onto second, until one is left), the blocks of a row from left to right.

A call works on one thread and releases the GIL; run several for several cores.
"""

# ruff: noqa: PLR0917 -- the arrays of a call come in one fixed order everywhere

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fp4conv.formats import MXFP4, NVFP4, ScaleRule, Ties
from fp4conv.kernels import decode as _decode
from fp4conv.kernels import encode as _encode
from fp4conv.kernels import fp8 as _fp8
from fp4conv.kernels import scan as _scan
from fp4conv.kernels import transcode as _transcode
from fp4conv.kernels.contract import (
    F32,
    F64,
    U8,
    Source,
    Target,
    check_decode,
    check_encode,
    check_fp8,
    check_tensor_scale,
    check_transcode,
    flat,
    float_bits,
)
from fp4conv.kernels.jit import cache_note, is_cold
from fp4conv.kernels.quantise import TIES
from fp4conv.kernels.scales import RULES
from fp4conv.kernels.search import SMALL_TENSOR_SCALE
from fp4conv.kernels.window import choose_window, new_window_counts

__all__ = [
    "amax",
    "cache_note",
    "cast_bf16_to_f32",
    "cast_f32_to_bf16",
    "choose_window",
    "count_nonfinite",
    "decode_fp8_tiles",
    "decode_mxfp4",
    "decode_nvfp4",
    "encode_mxfp4",
    "encode_nvfp4",
    "is_cold",
    "new_window_counts",
    "transcode_mxfp4_nvfp4",
    "window_counts",
]


def encode_mxfp4(
    x: Source,
    x_kn: bool,
    rule: ScaleRule,
    ties: Ties,
    packed: U8,
    scales: U8,
    signal: F64,
    noise: F64,
    out_kn: bool = False,
) -> int:
    """Encode `x` (uint16 BF16 bits or float32) to MXFP4; K is a multiple of 32.

    Every rule of `formats.MXFP4.rules`; MSE is the optimum over all 255 scales, the smaller of equals. Codes keep
    the sign bit of x, so -0.0 and negatives that round to zero give code 8. A block of zeros gets scale byte 0.

    Returns -1, or the position of the first NaN or Inf; the outputs are then unspecified.
    """
    n, k = check_encode(MXFP4, x, x_kn, rule, packed, scales, signal, noise, out_kn)
    bits, shift = float_bits(x)
    done = _encode.encode_mx(
        bits, shift, n, k, x_kn, RULES[rule], TIES[ties],
        packed.reshape(-1), scales.reshape(-1), signal, noise, out_kn,
    )  # fmt: skip
    return -1 if done else int(_scan.first_nonfinite(bits, shift, n, k, x_kn))


def encode_nvfp4(
    x: Source,
    x_kn: bool,
    tensor_scale: float,
    rule: ScaleRule,
    ties: Ties,
    packed: U8,
    scales: U8,
    signal: F64,
    noise: F64,
    out_kn: bool = False,
) -> int:
    """Encode `x` (uint16 BF16 bits or float32) to NVFP4 under a given tensor scale; K is a multiple of 16.

    Every rule of `formats.NVFP4.rules`. AMAX is E4M3(amax / (6 x tensor scale)) in F32, clamped to 2^-9 .. 448;
    FOUR_OVER_SIX puts amax on 6 or on 4, whichever errs less; MSE is the optimum over all 126 scales; ties go to
    the smaller scale. The code is the rounded F32 quotient x / F32(block scale x tensor scale), its sign bit is
    quotient < 0, so -0.0 gives code 0. A block of zeros gets scale 1.0.

    `tensor_scale` is a float32 value within contract.MIN_TENSOR_SCALE .. MAX_TENSOR_SCALE.
    Returns -1, or the position of the first NaN or Inf; the outputs are then unspecified.
    """
    n, k = check_encode(NVFP4, x, x_kn, rule, packed, scales, signal, noise, out_kn)
    ts = check_tensor_scale(tensor_scale)
    bits, shift = float_bits(x)
    from_top = bool(ties is Ties.DOWN or ts < SMALL_TENSOR_SCALE)
    done = _encode.encode_nv(
        bits, shift, n, k, x_kn, ts, RULES[rule], from_top, TIES[ties],
        packed.reshape(-1), scales.reshape(-1), signal, noise, out_kn,
    )  # fmt: skip
    return -1 if done else int(_scan.first_nonfinite(bits, shift, n, k, x_kn))


def decode_mxfp4(packed: U8, scales: U8, packed_kn: bool, out: Target, out_kn: bool = False) -> int:
    """Decode MXFP4 to `out`: uint16 (BF16 bits) or float32; exact, the sign of zero included.

    Returns -1, or the position of the first value that is not finite: scale byte 255 (NaN), or an overflow, which
    bytes 253 and 254 can cause.
    """
    n, k, length = check_decode(packed, scales, packed_kn, out, out_kn, (MXFP4.block,))
    return _run_decode(packed, scales, (n, k, length), packed_kn, _decode.E8M0, np.float32(1), out, out_kn)


def decode_nvfp4(
    packed: U8,
    scales: U8,
    packed_kn: bool,
    tensor_scale: float,
    out: Target,
    out_kn: bool = False,
    inverse: bool = False,
) -> int:
    """Decode NVFP4 to `out`: uint16 (BF16 bits) or float32. The block length (16 or 32) follows from the shapes.

    A value is F32(code x F32(block scale x tensor scale)), rounded once more, ties to even, for BF16. That is
    ModelOpt's order of operations; code 8 gives -0.0. With `inverse`, `tensor_scale` is the reciprocal as
    compressed-tensors stores it, and a value is F32(code x F32(block scale / tensor_scale)), its order.

    Returns -1, or the position of the first value that is not finite (a NaN scale, or an overflow).
    """
    n, k, length = check_decode(packed, scales, packed_kn, out, out_kn, (16, 32))
    kind = _decode.E4M3_DIVIDED if inverse else _decode.E4M3_TIMES
    return _run_decode(packed, scales, (n, k, length), packed_kn, kind, np.float32(tensor_scale), out, out_kn)


def decode_fp8_tiles(values: U8, scales: F32, first_row: int, block: tuple[int, int], out: Target) -> int:
    """Decode FP8 with a scale a tile: E4M3 bytes `values` [N, K] to `out` [N, K], uint16 (BF16 bits) or float32.

    The rows are those from `first_row` of a matrix on; `scales` [tiles down, tiles across] begins with the row of
    tiles, `block` = (rows, columns) each, that holds `first_row`. A value is F32(code x scale), rounded once more
    for BF16.

    Returns -1, or the position of the first value that is not finite (NaN code or scale, or an overflow).
    """
    n, k = check_fp8(values, scales, first_row, block, out)
    shift = 16 if out.dtype == np.uint16 else 0
    bits: npt.NDArray[Any] = out.reshape(-1).view(np.uint16 if shift else np.int32)
    finite = _fp8.decode_tiles(flat(values), flat(scales), n, k, first_row % block[0], block[0], block[1], bits, shift)
    return -1 if finite else int(_scan.first_nonfinite(flat(bits), shift, n, k, False))


def amax(x: Source) -> tuple[float, int]:
    """The largest finite |x| of an array of any shape (0.0 of none), and the index of its first NaN or Inf or -1."""
    bits, shift = float_bits(x)
    largest = int(_scan.largest_bits(bits, shift))
    first = -1
    if largest >= 0x7F800000:
        largest = int(_scan.largest_finite_bits(bits, shift))
        first = int(_scan.first_nonfinite(bits, shift, 1, bits.size, False))
    return float(np.uint32(largest).view(np.float32)), first


def count_nonfinite(x: Source) -> int:
    """How many values of an array of any shape are NaN or Inf."""
    return int(_scan.nonfinite(*float_bits(x)))


def cast_f32_to_bf16(x: F32, out: npt.NDArray[np.uint16]) -> int:
    """Round float32 to BF16 bits, ties to even, NaN to a quiet NaN; any shape.

    Returns -1, or the flat index of the first finite value that became Inf.
    """
    _check_cast(x, np.float32, out, np.uint16)
    bits = float_bits(x)[0]
    return -1 if _scan.to_bf16(bits, out.reshape(-1)) else int(_scan.first_overflow(bits))


def cast_bf16_to_f32(x: npt.NDArray[np.uint16], out: F32) -> int:
    """Widen BF16 bits to float32, exactly; any shape. Returns -1."""
    _check_cast(x, np.uint16, out, np.float32)
    _scan.to_f32(float_bits(x)[0], out.reshape(-1).view(np.int32))
    return -1


def window_counts(packed: U8, scales: U8, starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> int:
    """Add to `starts` and `ends` the interval of exponents m that holds each 16-value half of MXFP4 [N, K].

    A half of scale 2^k is held under tensor scale 2^m when, for some shift d that turns each of its nonzero
    magnitudes v into another code v x 2^-d, the block scale 2^(k + d - m) is a power of two in E4M3. The interval
    lo..hi adds 1 to starts[lo + WINDOW_OFFSET] and ends[hi + WINDOW_OFFSET]. Halves of zeros count nowhere.

    Returns -1, or the position of the first value under scale byte 255 (the counts are then unspecified).
    """
    assert packed.dtype == scales.dtype == np.uint8, "packed codes and scales are bytes"
    assert packed.size == 16 * scales.size, f"{scales.size} scales for {packed.size} bytes of codes"
    block = int(_transcode.count_windows(flat(packed), flat(scales), starts, ends))
    return -1 if block < 0 else block * MXFP4.block


def transcode_mxfp4_nvfp4(
    packed: U8,
    scales: U8,
    m: int,
    out_packed: U8,
    out_scales: U8,
    signal: F64,
    noise: F64,
    out_kn: bool = False,
) -> int:
    """MXFP4 [N, K/2], [N, K/32] to NVFP4 under tensor scale 2^m, exactly wherever NVFP4 can hold the values.

    A half that can be held gets block scale 2^(k + d - m) with the smallest |d| and its codes shifted by d (d = 0
    copies them); signs are kept, those of zeros too. A half of zeros gets scale 1.0 and its codes. Any other half is
    encoded by NVFP4's MSE rule, ties to even, from its exact values.

    Returns the number of halves not held, or -1 - p for the position p of the first value under scale byte 255, or
    of a value that is to be re-encoded and overflows float32.
    """
    n, k = check_transcode(packed, scales, m, out_packed, out_scales, signal, noise, out_kn)
    return int(
        _transcode.transcode(
            flat(packed), flat(scales), n, k, m, out_packed.reshape(-1), out_scales.reshape(-1), signal, noise, out_kn
        )
    )


def _check_cast(x: npt.NDArray[Any], x_dtype: type, out: npt.NDArray[Any], out_dtype: type) -> None:
    assert x.dtype == x_dtype, f"x has dtype {x.dtype}"
    assert out.dtype == out_dtype, f"out has dtype {out.dtype}"
    assert x.shape == out.shape, f"x has shape {x.shape}, out {out.shape}"
    assert out.flags.c_contiguous, "out is not C-contiguous"


def _run_decode(
    packed: U8,
    scales: U8,
    shape: tuple[int, int, int],
    packed_kn: bool,
    kind: int,
    tensor_scale: np.float32,
    out: Target,
    out_kn: bool,
) -> int:
    n, k, length = shape
    shift = 16 if out.dtype == np.uint16 else 0
    bits: npt.NDArray[Any] = out.reshape(-1).view(np.uint16 if shift else np.int32)
    codes, block_scales = flat(packed), flat(scales)
    if packed_kn or out_kn:
        finite = _decode.decode_turning(
            codes, block_scales, n, k, length, packed_kn, kind, tensor_scale, bits, shift, out_kn
        )
    else:
        finite = _decode.decode_rows(codes, block_scales, length, kind, tensor_scale, bits, shift)
    return -1 if finite else int(_scan.first_nonfinite(flat(bits), shift, n, k, out_kn))
