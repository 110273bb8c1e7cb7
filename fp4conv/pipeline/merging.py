"""Merged weights: base values in, deltas added in order, values out. What to round, and when, is the node's.

once      F32 throughout: nothing is rounded before the target rounds
peft      each adapter's sum is rounded to the weight's dtype; but for linear layers the delta before it too
training  factors in the weight's dtype, the sum rounded to it
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fp4conv.codecs.base import Rows
from fp4conv.codecs.dense import narrow, widen
from fp4conv.deltas import Added, LowRank
from fp4conv.formats import MergeRounding
from fp4conv.kernels import merge
from fp4conv.kernels.contract import F64
from fp4conv.model import Decoded, LoraMerged
from fp4conv.pipeline.factors import F32, Factors
from fp4conv.pipeline.matrices import Scratch
from fp4conv.plan import Unit
from fp4conv.safetensors_io import numpy_dtype


def base_dtype(value: LoraMerged) -> str:
    """What a block-format base is decoded to before anything is added: BF16 where that is exact, or asked for."""
    base = value.base
    exact = isinstance(base, Decoded) and base.tensor_scale is None
    return "BF16" if exact or value.rounding is not MergeRounding.ONCE else "F32"


def merge_rows(factors: Factors, value: LoraMerged, unit: Unit, base: Rows, scratch: Scratch) -> Rows:
    """The unit's rows with every delta added: F32, as `base` lies. `base` keeps its values."""
    out: F32 = scratch.array("merged", base.array.shape, "F32")  # type: ignore[assignment]
    start = _base_rounded(value, base.array, out)
    for delta in value.deltas:
        assert isinstance(delta, LowRank), "a vector takes no rows"
        _add_low_rank(factors, value, delta, unit, start=start, out=Rows(out, base.kn))
        start = out
    return Rows(out, base.kn) if start is out else Rows(start, base.kn)


def _base_rounded(value: LoraMerged, base: npt.NDArray[np.uint16] | F32, out: F32) -> npt.NDArray[np.uint16] | F32:
    """The base in the dtype that the model was loaded in: another than its own only for a tensor of an adapter."""
    if value.rounding is MergeRounding.ONCE or base.dtype == np.uint16 or value.dtype == "F32":
        return base
    round_values(base, value.dtype, out)  # type: ignore[arg-type]
    return out


def _add_low_rank(
    factors: Factors,
    value: LoraMerged,
    delta: LowRank,
    unit: Unit,
    *,
    start: npt.NDArray[np.uint16] | F32,
    out: Rows,
) -> None:
    factor_dtype, delta_dtype, dtype = _roundings(value, delta)
    count, (i, j) = unit.n1 - unit.n0, start.shape
    rows = factors.rows(delta.rows, unit.index, factor_dtype)[:, unit.n0 : unit.n0 + count]
    columns = factors.rows(delta.columns, unit.index, factor_dtype)
    left, right = (columns[:, :i], rows) if out.kn else (rows, columns[:, :j])
    target: F32 = out.array  # type: ignore[assignment]  # `merge_rows` made it
    if delta.magnitude is None:
        merge.add_product(start, left, right, delta.scaling, target, delta_dtype=delta_dtype, dtype=dtype)
        return
    merge.add_product(start, left, right, delta.scaling, target, delta_dtype=delta_dtype)
    norms = np.sqrt(merge.square_sums(target, out.kn)).astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):  # a row of zeros: the result is not finite, and refused
        scale = factors.vector(delta.magnitude)[unit.n0 : unit.n1] / norms
    merge.scale_rows(target, scale, out.kn, dtype)


def _roundings(value: LoraMerged, delta: LowRank) -> tuple[str, str, str]:
    """Dtypes of the factors, of the delta and of the sum."""
    if value.rounding is MergeRounding.ONCE:
        return "F32", "F32", "F32"
    if value.rounding is MergeRounding.TRAINING:
        return value.dtype, "F32", value.dtype
    return "F32", "F32" if delta.linear else value.dtype, value.dtype


def merge_span(factors: Factors, value: LoraMerged, base: F32, start: int) -> F32:
    """Elements from `start` on of a weight that takes whole tensors only, F32; `base` is spent."""
    if value.rounding is not MergeRounding.ONCE:
        round_values(base, value.dtype, base)
    for delta in value.deltas:
        assert isinstance(delta, Added), "a product takes whole rows"
        added = factors.vector(delta.ref)[start : start + base.size]
        np.add(base, added * np.float32(delta.scaling), out=base)
        if value.rounding is not MergeRounding.ONCE:
            round_values(base, value.dtype, base)
    return base


def round_values(values: F32, dtype: str, out: F32) -> None:
    """`values` rounded to `dtype`, as F32 in `out`, which may be `values`."""
    if dtype == "F32":
        out[...] = values
        return
    narrowed = np.empty(values.shape, numpy_dtype(dtype))
    narrow(values, dtype, narrowed)  # an overflow is found where the values are written
    widen(narrowed, dtype, out)


def measure_change(base: Rows, merged: Rows, sums: tuple[F64, F64]) -> int:
    """Row sums of (merged - base)^2 and base^2 into `sums`, F64 [N] each.

    Returns -1, or the flat logical index n * K + k of the first value that is not finite.
    """
    change, before = sums
    merge.change_sums(base.array, merged.array, merged.kn, change, before)  # type: ignore[arg-type]
    if np.isfinite(change).all() and np.isfinite(before).all():
        return -1
    finite = np.isfinite(merged.array.T if merged.kn else merged.array)
    return int(np.argmin(finite))
