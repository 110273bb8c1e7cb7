"""What happens to one piece: read both sides, count, compare, try encodings; each by one kernel, while it is cached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fp4conv.codecs import codec_named
from fp4conv.codecs.base import Codes, Coding, Rows, Tally
from fp4conv.formats import Ties
from fp4conv.kernels import measure, measure_reference
from fp4conv.kernels.contract import Source
from fp4conv.kernels.measure import BlockCounts
from fp4conv.model import Stored, Weight
from fp4conv.pipeline.matrices import Array, Scratch
from fp4conv.pipeline.measuring.bands import FLAT_ROW, Band, Flat
from fp4conv.pipeline.measuring.estimating import Trial
from fp4conv.pipeline.measuring.pairs import Pair
from fp4conv.pipeline.measuring.sides import Loaded, Side, floats, is_small_float, read_flat, wide_floats
from fp4conv.pipeline.measuring.tally import ErrorTally, ValueTally
from fp4conv.plan import Action, Step, Unit

F64 = npt.NDArray[np.float64]
Peaks = tuple[int, int, int, float, float]  # as `measure.compare` returns them
_NOTHING: Peaks = (0, 0, 0, 0.0, 0.0)


@dataclass(frozen=True)
class Look:
    """All that a piece needs. `trials`: encodings with their tensor scale, and where their sums go."""

    pair: Pair
    own: Side
    other: Side | None
    error: ErrorTally | None
    special: npt.NDArray[np.bool_] | None
    trials: Sequence[tuple[Trial, float, ErrorTally]]
    scratch: Scratch
    with_values: bool


@dataclass
class Found:
    """What one piece gives, but for the sums of its rows, which are in their places. `pairs`: values compared."""

    values: tuple[float, float, int, int] = (np.inf, -np.inf, 0, 0)
    blocks: BlockCounts | None = None
    error: Peaks = _NOTHING
    trials: dict[Trial, Peaks] = field(default_factory=dict)
    pairs: int = 0
    unquantisable: bool = False


# ---- rows


def look_at_band(look: Look, band: Band) -> Found:
    """One band of rows of a matrix."""
    weight = look.pair.weight
    unit = Unit(Step(weight.name, Action.COPY, (), "", weight), band.index, band.n0, band.n1)
    own = look.own.load(unit)
    other = look.other.load(unit) if look.other is not None else None
    tally, found = ValueTally(), Found()
    if own.codes is not None and look.with_values:
        assert look.special is not None
        found.blocks = BlockCounts.none()
        measure.count_blocks(own.codes.packed, own.codes.block_scale, own.codes.kn, look.special, found.blocks)
    if own.codes is None or other is not None or look.trials:
        for first in range(0, band.n1 - band.n0, band.step):
            rows = range(first, min(first + band.step, band.n1 - band.n0))
            place = band.index * weight.n + band.n0 + first
            _look_at_rows(look, (own, other), rows, place, tally=tally, found=found)
    found.values = (tally.smallest, tally.largest, tally.zeros, tally.nan)
    return found


def _look_at_rows(
    look: Look, sides: tuple[Loaded, Loaded | None], rows: range, place: int, *, tally: ValueTally, found: Found
) -> None:
    """A block of rows whose sums belong at `place`."""
    own, other = sides
    kn = look.pair.kn
    values = own.values(rows.start, rows.stop, kn)
    found.pairs += values.size
    sums = np.empty((4, len(rows)))
    if own.codes is None and look.with_values:
        tally.add(measure.survey(values))
    if other is not None:
        assert look.error is not None
        found.error = _peaks(found.error, measure.compare(values, other.values(rows.start, rows.stop, kn), kn, sums))
        look.error.sums[:, place : place + len(rows)] = sums
    for trial, scale, error in look.trials:
        peaks = _try(trial, scale, Rows(values, kn), sums, look.scratch)
        if peaks is None:
            found.unquantisable = True
            continue
        found.trials[trial] = _peaks(found.trials.get(trial, _NOTHING), peaks)
        error.sums[:, place : place + len(rows)] = sums


def _try(trial: Trial, tensor_scale: float, rows: Rows, sums: F64, scratch: Scratch) -> Peaks | None:
    """Encode rows as `convert` would, decode them again and compare; None where a value is not finite.

    The sums of signal and noise are those that the encoder gives, which are the ones that `convert` reports.
    """
    n, k = rows.array.shape[::-1] if rows.kn else rows.array.shape
    packed = scratch.array("trial codes", (n, k // 2), "U8")
    scales = scratch.array("trial scales", (n, k // trial.format.block), "U8")
    codes = Codes(packed, scales)  # type: ignore[arg-type]
    codec, signal, noise = codec_named(trial.format.name), np.empty(n), np.empty(n)
    if codec.encode(rows, Coding(trial.rule, Ties.EVEN, tensor_scale), codes, Tally(signal, noise)) >= 0:
        return None
    decoded = Rows(scratch.array("trial values", rows.array.shape, "F32"), rows.kn)  # type: ignore[arg-type]
    codec.decode(codes, tensor_scale, decoded)
    peaks = measure.compare(decoded.array, rows.array, rows.kn, sums)
    sums[0], sums[1] = signal, noise
    return peaks


def _peaks(one: Peaks, two: Peaks) -> Peaks:
    return one[0] + two[0], one[1] + two[1], one[2] + two[2], max(one[3], two[3]), max(one[4], two[4])


# ---- flat pieces


def look_at_flat(look: Look, piece: Flat) -> Found:
    """A piece of a dense tensor of any type and shape."""
    weight, reference = look.pair.weight, look.pair.reference
    stored = read_flat(look.own.reader, weight, piece.start, piece.stop, look.own.scratch)
    found = Found(values=_survey(stored, weight, look.own.scratch) if look.with_values else Found().values)
    if reference is None:
        return found
    assert look.other is not None
    assert look.error is not None
    there = read_flat(look.other.reader, reference, piece.start, piece.stop, look.other.scratch)
    found.pairs = stored.size
    first = piece.start // FLAT_ROW
    sums = look.error.sums[:, first : first + -(-stored.size // FLAT_ROW)]
    whole = stored.size // FLAT_ROW * FLAT_ROW
    if _dtype(weight) == _dtype(reference) and not is_small_float(_dtype(weight)):
        exact = int(np.count_nonzero(stored != there)) - _both_nan(stored, there)
    else:
        exact = -1
    a, b = _comparable(stored, look.own), _comparable(there, look.other)
    wide = np.float64 in (a.dtype, b.dtype)  # rare, and then the oracle is quick enough
    if wide:
        a, b = a.astype(np.float64), b.astype(np.float64)
    for start, stop, width in ((0, whole, FLAT_ROW), (whole, stored.size, stored.size - whole)):
        if stop > start:
            place = slice(start // FLAT_ROW, -(-stop // FLAT_ROW))
            kept = np.empty((4, place.stop - place.start))
            x, y = a[start:stop].reshape(-1, width), b[start:stop].reshape(-1, width)
            peaks = (measure_reference if wide else measure).compare(x, y, False, kept)
            sums[:, place] = kept
            found.error = _peaks(found.error, peaks)
    if exact >= 0:
        found.error = (exact, *found.error[1:])
    return found


def _dtype(weight: Weight) -> str:
    assert isinstance(weight.base, Stored)
    return weight.base.ref.spec.dtype


def _comparable(stored: Array, side: Side) -> Source | F64:
    dtype = _dtype(side.weight)
    return floats(stored, dtype, side.scratch) if is_small_float(dtype) else wide_floats(stored, dtype)


def _survey(stored: Array, weight: Weight, scratch: Scratch) -> tuple[float, float, int, int]:
    """(smallest, largest, zeros, not finite)."""
    dtype = _dtype(weight)
    if is_small_float(dtype):
        return measure.survey(floats(stored, dtype, scratch))
    good = stored[np.isfinite(stored)]
    if not good.size:
        return np.inf, -np.inf, 0, stored.size
    return float(good.min()), float(good.max()), int(np.count_nonzero(good == 0)), stored.size - good.size


def _both_nan(a: Array, b: Array) -> int:
    """Pairs of NaN, which NumPy calls different."""
    return int(np.count_nonzero((a != a) & (b != b)))  # noqa: PLR0124 -- NaN is what is not itself
