"""How a tensor is cut: rows of matrices that fit a worker's memory, or flat pieces. No figure depends on the cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fp4conv.errors import PlanError
from fp4conv.model import Decoded, Stored, Weight
from fp4conv.pipeline.measuring.pairs import Pair

# Rows are looked at in blocks of about this size, several times over: they should stay in the cache meanwhile.
BAND_BYTES = 1_500_000
# But of K-major values a kernel takes the columns of a block side by side, and few columns cost it more than the cache
# saves: 64 at a time take four times as long as 512.
BAND_COLUMNS = 512
# A flat tensor's sums are kept for every so many values, whatever its shape.
FLAT_ROW = 4096


@dataclass(frozen=True)
class Band:
    """Rows n0:n1 of matrix `index`, read at once and looked at in blocks of `step` rows."""

    index: int
    n0: int
    n1: int
    step: int


@dataclass(frozen=True)
class Flat:
    """Elements start:stop; both but for the tensor's end are multiples of FLAT_ROW."""

    start: int
    stop: int


def bands(pair: Pair, budget: int, trials: bool) -> Iterator[Band | Flat]:
    """The pieces of a pair, each within `budget` bytes of memory."""
    weight = pair.weight
    if not weight.elements:
        return
    if not pair.by_rows:
        rows = max(1, min(budget // 4, BAND_BYTES) // (_flat_bytes(pair) * FLAT_ROW)) * FLAT_ROW
        yield from (Flat(i, min(i + rows, weight.elements)) for i in range(0, weight.elements, rows))
        return
    read, worked = _row_bytes(pair, trials)
    fits = budget // 2 // (read + worked)
    step = min(fits, max(BAND_BYTES // (read + worked), BAND_COLUMNS if pair.kn else 1))
    step = min(weight.n, max(1, step))
    # Where columns are read in strides, the more at a time the better; they are cut again in memory.
    rows = min(weight.n, max(step, (budget // 2) // read)) if _turned(pair) else step
    for index in range(weight.matrices):
        for n0 in range(0, weight.n, rows):
            yield Band(index, n0, min(n0 + rows, weight.n), step)


def check_fits(pair: Pair, budget: int, trials: bool) -> None:
    """PlanError where a worker may not even hold one row."""
    if not pair.by_rows or not pair.weight.elements:
        return
    read, worked = _row_bytes(pair, trials)
    if read + worked > budget:
        raise PlanError(
            f"one row needs {read + worked:,} bytes of memory, a worker may hold {budget:,}",
            where=pair.weight.name,
            hint="give more --max-memory or fewer --workers",
        )


def sum_rows(pair: Pair) -> int:
    """How many row sums there are."""
    weight = pair.weight
    if pair.by_rows:
        return weight.matrices * weight.n if weight.elements else 0
    return -(-weight.elements // FLAT_ROW)


def _row_bytes(pair: Pair, trials: bool) -> tuple[int, int]:
    """(bytes read of both sides, bytes that a worker makes of them) for one row of N."""
    weight = pair.weight
    rows = weight.matrices * weight.n
    sides = [side for side in (weight, pair.reference) if side is not None]
    worked = sum(4 * weight.elements for side in sides if not _as_it_lies(side))
    worked += sum(side.nbytes for side in sides) if _turned(pair) else 0
    worked += 5 * weight.elements if trials else 0
    return max(1, pair.nbytes // rows), worked // rows


def _as_it_lies(weight: Weight) -> bool:
    return isinstance(weight.base, Stored) and weight.base.ref.spec.dtype in ("BF16", "F32")


def _turned(pair: Pair) -> bool:
    sides = [side for side in (pair.weight, pair.reference) if side is not None]
    return pair.kn or any(isinstance(side.base, Decoded) and side.base.kn for side in sides)


def _flat_bytes(pair: Pair) -> int:
    """Bytes an element: stored on each side, and as float64 where it is no small float."""
    return 16 + -(-pair.nbytes // pair.weight.elements)
