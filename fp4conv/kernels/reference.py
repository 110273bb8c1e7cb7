"""The oracle of the kernels: slow, obvious NumPy, one whole tensor at a time.

Owns the meaning of every kernel. `compiled` must give the same bytes, the same sums and the same
positions, on every machine. Refuses to own speed: it makes copies, searches every scale there is
and transposes instead of walking in the other order.

Sources: OCP Microscaling Formats v1.0, sections 5.3.3, 5.4.1, 6.3; OCP OFP8 v1.0, table 1. The order
of operations of NVFP4 (scale, product of scales, quotient) is that of ModelOpt 0.47, `NVFP4QTensor`.
"""

# ruff: noqa: PLR0917 -- the arrays of a call come in one fixed order everywhere

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from fp4conv.formats import E2M1_MAGNITUDES, E8M0_BIAS, MXFP4, NVFP4, ScaleRule, Ties
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
)
from fp4conv.kernels.small_floats import (
    E2M1_VALUES,
    E4M3_ONE,
    E4M3_VALUES,
    bf16_to_f32,
    e2m1_codes,
    e4m3_from_f32,
    f32_to_bf16,
)
from fp4conv.kernels.window import E4M3_EXPONENTS, WINDOW_OFFSET, valid_shifts

_POSITIVE_E4M3 = np.arange(1, 127, dtype=np.uint8)
_SEARCH_CHUNK = 1024  # blocks searched at a time: bounds the memory of the brute force


def halving_sum(terms: F64) -> F64:
    """Sum of the last axis (length a power of two) in the order shared with `compiled`: halves added."""
    while terms.shape[-1] > 1:
        half = terms.shape[-1] // 2
        terms = terms[..., :half] + terms[..., half:]
    return terms[..., 0]


def _row_sums(block_sums: F64) -> F64:
    total = np.zeros(block_sums.shape[0])
    for column in block_sums.T:
        total = total + column
    return total


# -- layouts ------------------------------------------------------------------------------------


def _widen(x: Source, x_kn: bool) -> F32:
    values = bf16_to_f32(x) if x.dtype == np.uint16 else x.astype(np.float32)  # type: ignore[arg-type]
    return np.ascontiguousarray(values.T) if x_kn else values


def _first(bad: npt.NDArray[np.bool_]) -> int:
    where = np.flatnonzero(bad)
    return int(where[0]) if where.size else -1


def _pack(codes: U8) -> U8:
    return codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))


def _unpack(packed: U8) -> U8:
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=np.uint8)
    codes[..., 0::2] = packed & 15
    codes[..., 1::2] = packed >> 4
    return codes


def _store(out: npt.NDArray[np.uint8], values: U8, out_kn: bool) -> None:
    out[...] = values.T if out_kn else values


# -- MXFP4 --------------------------------------------------------------------------------------


def _pow2(exponents: npt.NDArray[np.int64]) -> F32:
    return np.ldexp(np.float32(1), exponents).astype(np.float32)


def mxfp4_exponent(amax: float, rule: ScaleRule) -> int:
    """The exponent e of a block's scale 2^e (scale byte e + 127) for the rules that look at amax alone."""
    if amax == 0:
        return -E8M0_BIAS
    mantissa, exponent = math.frexp(amax)  # amax = mantissa * 2^exponent, mantissa in [.5, 1)
    if rule is ScaleRule.FLOOR:
        e = exponent - 3
    elif rule is ScaleRule.RCEIL:
        e = exponent - 3 if mantissa <= 0.75 else exponent - 2
    elif rule is ScaleRule.EVEN:  # 1.75 rounds to 2 in one mantissa bit
        e = exponent - 3 if mantissa < 0.875 else exponent - 2
    else:
        raise AssertionError(f"{rule} is not decided by amax")
    return max(e, -E8M0_BIAS)


def _mx_quantise(blocks: F32, exponents: npt.NDArray[np.int64], ties: Ties) -> tuple[U8, F64]:
    """Codes [..., 32] and squared error [...] of blocks [..., 32] at scale 2^exponents [...]."""
    with np.errstate(over="ignore", under="ignore"):
        quotient = blocks * _pow2(-exponents)[..., None]
    codes = e2m1_codes(quotient, ties)
    decoded = E2M1_VALUES[codes].astype(np.float64) * np.ldexp(1.0, exponents)[..., None]
    error = np.abs(blocks).astype(np.float64) - decoded
    signs = np.signbit(blocks).astype(np.uint8) << np.uint8(3)
    return codes | signs, halving_sum(error * error)


def _mx_search(blocks: F32, ties: Ties) -> npt.NDArray[np.int64]:
    """Exponents [B] of the least squared error over all 255 scales; the smaller of equals."""
    best_error = np.full(blocks.shape[0], np.inf)
    best = np.full(blocks.shape[0], -E8M0_BIAS, dtype=np.int64)
    for e in range(-E8M0_BIAS, E8M0_BIAS + 1):
        _, error = _mx_quantise(blocks, np.full(blocks.shape[0], e, dtype=np.int64), ties)
        better = error < best_error
        best_error, best = np.where(better, error, best_error), np.where(better, e, best)
    return best


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
    """See `compiled.encode_mxfp4`."""
    check_encode(MXFP4, x, x_kn, rule, packed, scales, signal, noise, out_kn)
    values = _widen(x, x_kn)
    bad = _first(~np.isfinite(values))
    if bad >= 0:
        return bad
    n, k = values.shape
    blocks = values.reshape(-1, MXFP4.block)
    if rule is ScaleRule.MSE:
        chunks = [_mx_search(blocks[i : i + _SEARCH_CHUNK], ties) for i in range(0, len(blocks), _SEARCH_CHUNK)]
        exponents = np.concatenate([np.empty(0, dtype=np.int64), *chunks])
    else:
        amax = np.abs(blocks).max(axis=1)
        exponents = np.array([mxfp4_exponent(float(a), rule) for a in amax], dtype=np.int64)
    codes, error = _mx_quantise(blocks, exponents, ties)
    _store(packed, _pack(codes.reshape(n, k)), out_kn)
    _store(scales, (exponents + E8M0_BIAS).astype(np.uint8).reshape(n, -1), out_kn)
    signal[...] = _row_sums(halving_sum(blocks.astype(np.float64) ** 2).reshape(n, -1))
    noise[...] = _row_sums(error.reshape(n, -1))
    return -1


# -- NVFP4 --------------------------------------------------------------------------------------


def _nv_quantise(blocks: F32, block_scale: U8, tensor_scale: np.float32, ties: Ties) -> tuple[U8, F64]:
    """Codes [..., 16] and squared error [...] of blocks [..., 16] at E4M3 codes block_scale [...]."""
    with np.errstate(under="ignore", over="ignore"):
        scale = E4M3_VALUES[block_scale] * tensor_scale
        quotient = blocks / scale[..., None]
    codes = e2m1_codes(quotient, ties)
    decoded = E2M1_VALUES[codes].astype(np.float64) * scale.astype(np.float64)[..., None]
    error = np.abs(blocks).astype(np.float64) - decoded
    signs = (quotient < 0).astype(np.uint8) << np.uint8(3)
    return codes | signs, halving_sum(error * error)


def _nv_block_scale(amax: F32, full: float, tensor_scale: np.float32) -> U8:
    """E4M3 codes [B] that put amax on the value `full` (6 or 4); a quotient of zero gives 1.0."""
    with np.errstate(over="ignore", under="ignore"):
        ratio = amax / (np.float32(full) * tensor_scale)
    ratio = np.where(ratio == 0, np.float32(1), ratio)
    return e4m3_from_f32(np.clip(ratio, np.float32(2**-9), np.float32(448)))


def _nv_search(blocks: F32, candidates: U8, tensor_scale: np.float32, ties: Ties) -> U8:
    """The code among candidates [C, B] (rising) with the least squared error; the smaller of equals."""
    best, (_, best_error) = candidates[0], _nv_quantise(blocks, candidates[0], tensor_scale, ties)
    for codes in candidates[1:]:
        _, error = _nv_quantise(blocks, codes, tensor_scale, ties)
        better = error < best_error
        best, best_error = np.where(better, codes, best), np.where(better, error, best_error)
    return best


def _nv_scales(blocks: F32, tensor_scale: np.float32, rule: ScaleRule, ties: Ties) -> U8:
    amax = np.abs(blocks).max(axis=1)
    on_six = _nv_block_scale(amax, 6, tensor_scale)
    if rule is ScaleRule.AMAX:
        return on_six
    if rule is ScaleRule.FOUR_OVER_SIX:
        on_four = _nv_block_scale(amax, 4, tensor_scale)
        return _nv_search(blocks, np.stack([on_six, on_four]), tensor_scale, ties)
    every = np.broadcast_to(_POSITIVE_E4M3[:, None], (_POSITIVE_E4M3.size, len(blocks)))
    best = _nv_search(blocks, every, tensor_scale, ties)
    return np.where(amax == 0, np.uint8(E4M3_ONE), best)


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
    """See `compiled.encode_nvfp4`."""
    check_encode(NVFP4, x, x_kn, rule, packed, scales, signal, noise, out_kn)
    ts = check_tensor_scale(tensor_scale)
    values = _widen(x, x_kn)
    bad = _first(~np.isfinite(values))
    if bad >= 0:
        return bad
    n, k = values.shape
    blocks = values.reshape(-1, NVFP4.block)
    block_scale = _nv_scales(blocks, ts, rule, ties)
    codes, error = _nv_quantise(blocks, block_scale, ts, ties)
    _store(packed, _pack(codes.reshape(n, k)), out_kn)
    _store(scales, block_scale.reshape(n, -1), out_kn)
    signal[...] = _row_sums(halving_sum(blocks.astype(np.float64) ** 2).reshape(n, -1))
    noise[...] = _row_sums(error.reshape(n, -1))
    return -1


# -- decoding -----------------------------------------------------------------------------------


def _decode(packed: U8, scale: F32, packed_kn: bool, out: Target, out_kn: bool) -> int:
    codes = _unpack(np.ascontiguousarray(packed.T) if packed_kn else packed)
    n, k = codes.shape
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        values = E2M1_VALUES[codes].reshape(n, scale.shape[1], -1) * scale[:, :, None]
    values = values.reshape(n, k)
    if out.dtype == np.uint16:
        rounded = f32_to_bf16(values)
        out[...] = rounded.T if out_kn else rounded
        return _first(~np.isfinite(bf16_to_f32(rounded)))
    out[...] = values.T if out_kn else values
    return _first(~np.isfinite(values))


def decode_mxfp4(packed: U8, scales: U8, packed_kn: bool, out: Target, out_kn: bool = False) -> int:
    """See `compiled.decode_mxfp4`."""
    check_decode(packed, scales, packed_kn, out, out_kn, (MXFP4.block,))
    exponents = (scales.T if packed_kn else scales).astype(np.int64) - E8M0_BIAS
    scale = np.where(exponents == 128, np.float32(np.nan), _pow2(np.minimum(exponents, 127)))
    return _decode(packed, scale, packed_kn, out, out_kn)


def decode_nvfp4(
    packed: U8,
    scales: U8,
    packed_kn: bool,
    tensor_scale: float,
    out: Target,
    out_kn: bool = False,
    inverse: bool = False,
) -> int:
    """See `compiled.decode_nvfp4`."""
    check_decode(packed, scales, packed_kn, out, out_kn, (16, 32))
    block_scale, factor = E4M3_VALUES[scales.T if packed_kn else scales], np.float32(tensor_scale)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        scale = block_scale / factor if inverse else block_scale * factor
    return _decode(packed, scale, packed_kn, out, out_kn)


def decode_fp8_tiles(values: U8, scales: F32, first_row: int, block: tuple[int, int], out: Target) -> int:
    """See `compiled.decode_fp8_tiles`."""
    n, k = check_fp8(values, scales, first_row, block, out)
    down = (np.arange(first_row, first_row + n) // block[0]) - first_row // block[0]
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        decoded = E4M3_VALUES[values] * scales[down][:, np.arange(k) // block[1]]
    if out.dtype == np.uint16:
        out[...] = f32_to_bf16(decoded)
        return _first(~np.isfinite(bf16_to_f32(out)))  # type: ignore[arg-type]
    out[...] = decoded
    return _first(~np.isfinite(decoded))


# -- plain values -------------------------------------------------------------------------------


def amax(x: Source) -> tuple[float, int]:
    """See `compiled.amax`."""
    values = np.abs(_widen(x.reshape(-1), False))
    bad = ~np.isfinite(values)
    return float(values[~bad].max(initial=0)), _first(bad)


def count_nonfinite(x: Source) -> int:
    """See `compiled.count_nonfinite`."""
    return int(np.count_nonzero(~np.isfinite(_widen(x.reshape(-1), False))))


def cast_f32_to_bf16(x: F32, out: npt.NDArray[np.uint16]) -> int:
    """See `compiled.cast_f32_to_bf16`."""
    out[...] = f32_to_bf16(x)
    return _first((np.isfinite(x) & np.isinf(bf16_to_f32(out))).reshape(-1))


def cast_bf16_to_f32(x: npt.NDArray[np.uint16], out: F32) -> int:
    """See `compiled.cast_bf16_to_f32`."""
    out[...] = bf16_to_f32(x)
    return -1


# -- MXFP4 to NVFP4 -----------------------------------------------------------------------------


def _halves(packed: U8, scales: U8) -> tuple[U8, npt.NDArray[np.int64]]:
    """Codes [halves, 16] and the exponent of each half."""
    codes = _unpack(packed).reshape(-1, NVFP4.block)
    return codes, np.repeat(scales.reshape(-1).astype(np.int64) - E8M0_BIAS, MXFP4.block // NVFP4.block)


def window_counts(packed: U8, scales: U8, starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> int:
    """See `compiled.window_counts`."""
    codes, exponents = _halves(packed, scales)
    nan = _first(scales.reshape(-1) == 255)
    if nan >= 0:
        return nan * MXFP4.block
    low, high = E4M3_EXPONENTS
    for half, k in zip(codes, exponents, strict=True):
        if not (half & 7).any():
            continue
        held = [m for d in valid_shifts(half & 7) for m in range(int(k) + d - high, int(k) + d - low + 1)]
        starts[min(held) + WINDOW_OFFSET] += 1
        ends[max(held) + WINDOW_OFFSET] += 1
    return -1


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
    """See `compiled.transcode_mxfp4_nvfp4`."""
    check_transcode(packed, scales, m, out_packed, out_scales, signal, noise, out_kn)
    n = packed.shape[0]
    codes, exponents = _halves(packed, scales)
    values = E2M1_VALUES[codes].astype(np.float64) * np.ldexp(1.0, exponents)[:, None]
    unreadable = (exponents == 128)[:, None] & np.ones((1, NVFP4.block), dtype=bool)
    if unreadable.any():
        return -1 - _first(unreadable.reshape(-1))
    block_scale = np.full(len(codes), E4M3_ONE, dtype=np.uint8)
    new_codes, error, lossy = codes.copy(), np.zeros(len(codes)), 0
    for i, (half, k) in enumerate(zip(codes, exponents, strict=True)):
        if not (half & 7).any():
            continue
        shifts = [d for d in valid_shifts(half & 7) if E4M3_EXPONENTS[0] <= k + d - m <= E4M3_EXPONENTS[1]]
        if shifts:
            d = min(shifts, key=abs)
            scale = np.float32(2.0 ** (k + d - m))
            shifted = [E2M1_MAGNITUDES.index(E2M1_MAGNITUDES[c] * 2.0**-d) for c in half & 7]
            new_codes[i] = np.array(shifted, dtype=np.uint8) | (half & 8)
            block_scale[i] = np.searchsorted(E4M3_VALUES[:127], scale)
            continue
        lossy += 1
        if np.abs(values[i]).max() > np.finfo(np.float32).max:
            return -1 - (i * NVFP4.block + _first(np.abs(values[i]) > np.finfo(np.float32).max))
        exact, ts = values[i : i + 1].astype(np.float32), np.float32(2.0**m)
        block_scale[i : i + 1] = _nv_scales(exact, ts, ScaleRule.MSE, Ties.EVEN)
        new_codes[i : i + 1], error[i : i + 1] = _nv_quantise(exact, block_scale[i : i + 1], ts, Ties.EVEN)
    _store(out_packed, _pack(new_codes.reshape(n, -1)), out_kn)
    _store(out_scales, block_scale.reshape(n, -1), out_kn)
    signal[...] = _row_sums(halving_sum(values**2).reshape(n, -1))
    noise[...] = _row_sums(error.reshape(n, -1))
    return lossy
