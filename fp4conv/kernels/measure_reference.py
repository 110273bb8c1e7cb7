"""The oracle of `kernels.measure`: whole arrays in NumPy float64, in the order that the kernels promise."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fp4conv.kernels.contract import F64, U8, Source, check_compare, logical
from fp4conv.kernels.measure import LANES, BlockCounts
from fp4conv.kernels.reference import _unpack, _widen, halving_sum

_ORDER = np.array([code if code < 8 else 8 - code for code in range(16)])


def survey(x: Source) -> tuple[float, float, int, int]:
    """See `measure.survey`."""
    values = _widen(x.reshape(-1), False)
    finite = values[np.isfinite(values)]
    low, high = finite.min(initial=np.inf), finite.max(initial=-np.inf)
    return float(low) + 0.0, float(high) + 0.0, int((finite == 0).sum()), values.size - finite.size


def compare(x: Source | F64, reference: Source | F64, kn: bool, sums: F64) -> tuple[int, int, int, float, float]:
    """See `measure.compare`; takes float64 too."""
    check_compare(x, reference, kn, sums)
    a, b = (_wide(side) for side in (x, reference))
    different = ~((a == b) | (np.isnan(a) & np.isnan(b)))
    good = np.isfinite(a) & np.isfinite(b)
    a, b = np.where(good, a, 0.0), np.where(good, b, 0.0)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # of float64 alone: squares beyond it are Inf
        apart = np.abs(a - b)
        for number, terms in enumerate((b * b, apart * apart, a * b, a * a)):
            sums[number] = _in_order(terms.T if kn else terms, kn)
        relative = np.divide(apart, np.abs(b), out=np.zeros_like(apart), where=b != 0)
    peaks = float(apart.max(initial=0.0)), float(relative.max(initial=0.0))
    return int(different.sum()), int((~good).sum()), int((different & ~good).sum()), *peaks


def _wide(x: Source | F64) -> F64:
    return x if x.dtype == np.float64 else _widen(x, False).astype(np.float64)  # type: ignore[arg-type, return-value]


def _in_order(terms: F64, one_lane: bool) -> F64:
    """Row sums of [N, K] in LANES lanes, or in one."""
    lanes = 1 if one_lane else LANES
    padded = np.zeros((terms.shape[0], -(-terms.shape[1] // lanes) * lanes))
    padded[:, : terms.shape[1]] = terms
    total = np.zeros((terms.shape[0], lanes))
    for piece in range(padded.shape[1] // lanes):
        total = total + padded[:, piece * lanes : (piece + 1) * lanes]
    return halving_sum(total)


def count_blocks(packed: U8, scales: U8, kn: bool, special: npt.NDArray[np.bool_], counts: BlockCounts) -> None:
    """See `measure.count_blocks`."""
    if kn:
        packed, scales = packed.T, scales.T
    n, blocks = logical(scales.shape, False)
    codes = _unpack(np.ascontiguousarray(packed)).reshape(n * blocks, -1)
    order = _ORDER[codes]
    counts.pairs[:] += np.bincount(packed.reshape(-1), minlength=256)
    for scale in np.unique(scales):
        held = scales.reshape(-1) == scale
        counts.magnitudes[scale] += np.bincount(np.abs(order[held]).max(axis=1), minlength=8)
        counts.high[scale] = max(counts.high[scale], order[held].max())
        counts.low[scale] = min(counts.low[scale], order[held].min())
        if special[scale]:
            counts.codes[scale] += np.bincount(codes[held].reshape(-1), minlength=16)
