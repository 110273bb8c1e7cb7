"""The oracle of `merge`: the same sums in plain NumPy, an operation at a time."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt

from fp4conv.kernels.contract import F32, F64, Source

LANES = 64
_DTYPES: dict[str, npt.DTypeLike] = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}


def rounded(values: F32, dtype: str) -> F32:
    with np.errstate(over="ignore"):
        result: F32 = values.astype(_DTYPES[dtype]).astype(np.float32)
    return result


def values_of(x: Source) -> F32:
    """BF16 bits or float32 as float32."""
    wide: F32 = x.view(ml_dtypes.bfloat16).astype(np.float32) if x.dtype == np.uint16 else x.astype(np.float32)
    return wide


def fma(a: F32, b: F32, c: F32) -> F32:
    """a x b + c in float32, rounded once.

    The product is exact in float64. The sum there is rounded to odd (its last bit set where it was not exact), after
    which rounding to float32 gives what one rounding would have given (Boldo and Melquiond, 2008).
    """
    product = a.astype(np.float64) * b.astype(np.float64)
    wide = c.astype(np.float64)
    total = product + wide
    rest = total - product
    error = (product - (total - rest)) + (wide - rest)
    even = (total.view(np.int64) & 1) == 0
    odd = np.where((error != 0) & even, np.nextafter(total, np.copysign(np.inf, error)), total)
    result: F32 = odd.astype(np.float32)
    return result


def add_product(
    x: Source, left: F32, right: F32, scale: float, out: F32, *, delta_dtype: str = "F32", dtype: str = "F32"
) -> None:
    """See `merge.add_product`."""
    total: F32 = np.zeros(x.shape, np.float32)
    for one, other in zip(left, right, strict=True):
        total = fma(one[:, None], other[None, :], total)
    delta = rounded(total * np.float32(scale), delta_dtype)
    out[...] = rounded(values_of(x) + delta, dtype)


def change_sums(x: Source, after: F32, kn: bool, change: F64, before: F64) -> None:
    """See `merge.change_sums`."""
    wide = values_of(x).astype(np.float64)
    for target, terms in ((change, (after.astype(np.float64) - wide) ** 2), (before, wide**2)):
        target[...] = _down(terms) if kn else _lanes(terms)


def _down(terms: F64) -> F64:
    total = np.zeros(terms.shape[1])
    for row in terms:
        total = total + row
    return total


def _lanes(terms: F64) -> F64:
    rows, columns = terms.shape
    padded = np.zeros((rows, -(-columns // LANES) * LANES))
    padded[:, :columns] = terms
    partial = np.zeros((rows, LANES))
    for start in range(0, padded.shape[1], LANES):
        partial = partial + padded[:, start : start + LANES]
    while partial.shape[1] > 1:
        half = partial.shape[1] // 2
        partial = partial[:, :half] + partial[:, half:]
    return np.ascontiguousarray(partial[:, 0])


def square_sums(values: F32, kn: bool) -> F64:
    """See `merge.square_sums`."""
    change, before = np.empty((2, values.shape[1] if kn else values.shape[0]))
    change_sums(values, values, kn, change, before)
    return before


def scale_rows(values: F32, factors: F32, kn: bool, dtype: str) -> None:
    """See `merge.scale_rows`."""
    values[...] = rounded(values * (factors[None, :] if kn else factors[:, None]), dtype)
