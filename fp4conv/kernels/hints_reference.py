"""The oracle of `kernels.hints`: whole arrays, scales by the rule itself, every code tried."""

# ruff: noqa: PLR0917 -- the arrays of a call come in one fixed order everywhere

from __future__ import annotations

import numpy as np

from fp4conv.formats import E8M0_BIAS, MXFP4, ScaleRule
from fp4conv.kernels.contract import F32, F64, U8, Source, check_measure, check_restore
from fp4conv.kernels.hints import NO_HINT
from fp4conv.kernels.reference import (
    _pack,
    _row_sums,
    _store,
    _unpack,
    _widen,
    decode_mxfp4,
    halving_sum,
    mxfp4_exponent,
)
from fp4conv.kernels.small_floats import E2M1_VALUES


def noncanonical_mxfp4(packed: U8, scales: U8, plane: U8) -> int:
    """See `hints.noncanonical_mxfp4`: decodes, and asks the rule RCEIL."""
    n, blocks = scales.shape
    values = np.empty((n, blocks * MXFP4.block), np.float32)
    decode_mxfp4(packed.reshape(n, -1), scales, False, values)
    amax = np.abs(values).reshape(n, blocks, MXFP4.block).max(axis=2)
    implied = np.vectorize(lambda a: mxfp4_exponent(float(a), ScaleRule.RCEIL) + E8M0_BIAS, otypes=[np.int64])(amax)
    other = implied != scales
    plane[...] = np.where(other, scales, NO_HINT)
    return int(other.sum())


def restore(
    x: Source,
    x_kn: bool,
    plane: U8,
    plane_kn: bool,
    tables: F32,
    packed: U8,
    scales: U8,
    out_kn: bool,
    matched: U8,
) -> int:
    """See `hints.restore`."""
    n, k, length = check_restore(x, x_kn, plane, plane_kn, tables, packed, scales, out_kn, matched)
    hints = plane.T if plane_kn else plane
    values = _widen(x, x_kn).reshape(n, -1, length)
    possible = tables[hints][:, :, None, :] == np.abs(values)[:, :, :, None]
    codes = possible.argmax(axis=-1).astype(np.uint8) | (np.signbit(values).astype(np.uint8) << np.uint8(3))
    fits = (hints != NO_HINT) & possible.any(axis=-1).all(axis=-1)
    held_codes = _unpack(packed.T if out_kn else packed).reshape(n, -1, length)
    _store(packed, _pack(np.where(fits[:, :, None], codes, held_codes).reshape(n, k)), out_kn)
    _store(scales, np.where(fits, hints, scales.T if out_kn else scales), out_kn)
    matched[...] = fits
    return int((hints != NO_HINT).sum() - fits.sum())


def measure(
    x: Source, x_kn: bool, packed: U8, scales: U8, codes_kn: bool, factor: F32, signal: F64, noise: F64
) -> None:
    """See `hints.measure`."""
    n, _, length = check_measure(x, x_kn, packed, scales, codes_kn, factor, signal, noise)
    values = _widen(x, x_kn).reshape(n, -1, length)
    magnitudes = np.abs(E2M1_VALUES)[_unpack(packed.T if codes_kn else packed)].reshape(values.shape)
    scale = factor[scales.T if codes_kn else scales].astype(np.float64)
    error = np.abs(values).astype(np.float64) - magnitudes.astype(np.float64) * scale[:, :, None]
    signal[...] = _row_sums(halving_sum(values.astype(np.float64) ** 2))
    noise[...] = _row_sums(halving_sum(error * error))
