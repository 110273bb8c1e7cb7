"""What is added up over the pieces of one tensor while workers go through it, and the facts that come of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fp4conv.formats import E8M0_BIAS, MXFP4
from fp4conv.kernels.measure import BlockCounts, block_values, special_scales
from fp4conv.kernels.small_floats import E4M3_VALUES, block_factors
from fp4conv.model import Decoded
from fp4conv.report.facts import ErrorFacts, ValueFacts, exact_sum

F64 = npt.NDArray[np.float64]


@dataclass
class ErrorTally:
    """`sums` float64 [4, rows]: each piece fills in its own rows; the rest is merged under the run's lock."""

    sums: F64
    pairs: int = 0
    differ: int = 0
    left_out: int = 0
    odd: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0

    def add(self, found: tuple[int, int, int, float, float], pairs: int) -> None:
        differ, left_out, odd, max_abs, max_rel = found
        self.pairs += pairs
        self.differ += differ
        self.left_out += left_out
        self.odd += odd
        self.max_abs = max(self.max_abs, max_abs)
        self.max_rel = max(self.max_rel, max_rel)

    def facts(self) -> ErrorFacts:
        signal, noise, dot, power = (exact_sum(rows.tolist()) for rows in self.sums)
        return ErrorFacts(
            values=self.pairs - self.left_out,
            signal=signal,
            noise=noise,
            dot=dot,
            power=power,
            max_abs_error=self.max_abs,
            max_rel_error=self.max_rel,
            differ=self.differ,
            left_out=self.left_out,
            left_out_differ=self.odd,
        )


@dataclass
class ValueTally:
    """Values of a tensor that is not in four bits."""

    smallest: float = math.inf
    largest: float = -math.inf
    zeros: int = 0
    nan: int = 0

    def add(self, found: tuple[float, float, int, int]) -> None:
        smallest, largest, zeros, nan = found
        self.smallest = min(self.smallest, smallest)
        self.largest = max(self.largest, largest)
        self.zeros += zeros
        self.nan += nan

    @property
    def amax(self) -> float:
        return max(abs(self.smallest), abs(self.largest)) if self.smallest <= self.largest else 0.0

    def facts(self) -> ValueFacts:
        none = self.smallest > self.largest
        return ValueFacts(
            smallest=None if none else self.smallest,
            largest=None if none else self.largest,
            zeros=self.zeros,
            nan=self.nan,
        )


@dataclass
class BlockTally:
    """Codes and scales of a four-bit tensor; every figure follows from what `count_blocks` counts."""

    base: Decoded
    tensor_scale: float
    counts: BlockCounts = field(default_factory=BlockCounts.none)

    def __post_init__(self) -> None:
        self._factors = block_factors(self.base.format_name, self.tensor_scale, inverse=self.base.inverse)
        self._values = block_values(self._factors)
        self.special = special_scales(self._values)

    def add(self, counts: BlockCounts) -> None:
        self.counts.add(counts)

    def facts(self) -> ValueFacts:
        counts, scales = self.counts, self._scales()
        codes = _codes_of_bytes(counts.pairs)
        smallest, largest = self._range()
        bare = np.isnan(self._factors)
        negative = np.signbit(self._factors) & ~bare
        good = counts.magnitudes[~(bare | negative)].sum(axis=0)
        dead = (self._values[:, 7] == 0) & ~negative
        per_scale = counts.magnitudes.sum(axis=1)
        return ValueFacts(
            smallest=smallest,
            largest=largest,
            zeros=self._zeros(codes),
            nan=int((counts.codes * ~np.isfinite(self._values)).sum()),
            blocks=int(per_scale.sum()),
            zero_blocks=int(good[0]),
            saturated=int(good[7]),
            unused_range=int(good[1:6].sum()),
            codes=tuple(codes.tolist()),
            scales=self._histogram(per_scale, scales),
            tensor_scale=None if self.base.tensor_scale is None else self._plain_tensor_scale(),
            nan_scales=int(per_scale[bare].sum()),
            negative_scales=int(per_scale[negative].sum()),
            dead_blocks=int(counts.magnitudes[dead, 1:].sum()),
        )

    def _plain_tensor_scale(self) -> float:
        """The scale that multiplies, also where its reciprocal is stored."""
        if not self.base.inverse:
            return self.tensor_scale
        with np.errstate(divide="ignore"):
            return float(np.float32(1) / np.float32(self.tensor_scale))

    def _scales(self) -> F64:
        """[256]: exponents of E8M0 or values of E4M3; NaN for NaN."""
        if self.base.format_name == MXFP4.name:
            return np.append(np.arange(255) - float(E8M0_BIAS), np.nan)
        return E4M3_VALUES.astype(np.float64)

    def _histogram(self, per_scale: npt.NDArray[np.int64], scales: F64) -> tuple[tuple[float, int], ...]:
        found: dict[float, int] = {}
        for value, count in zip(scales.tolist(), per_scale.tolist(), strict=True):
            if count and not math.isnan(value):
                found[value + 0.0] = found.get(value + 0.0, 0) + count
        return tuple(sorted(found.items()))

    def _range(self) -> tuple[float | None, float | None]:
        """Smallest and largest finite value."""
        found: list[float] = []
        for byte in np.flatnonzero(self.counts.magnitudes.sum(axis=1)):
            values = self._values[byte]
            if self.special[byte]:
                held = values[self.counts.codes[byte] > 0]
                found += held[np.isfinite(held)].tolist()
            else:
                found += [float(values[_code_at(int(end[byte]))]) for end in (self.counts.high, self.counts.low)]
        return (min(found) + 0.0, max(found) + 0.0) if found else (None, None)

    def _zeros(self, codes: npt.NDArray[np.int64]) -> int:
        """Zero codes under ordinary scales, and whatever is zero under special ones."""
        special = self.counts.codes
        ordinary = int(codes[0] + codes[8] - special[:, 0].sum() - special[:, 8].sum())
        return ordinary + int((special * (self._values == 0)).sum())


def _code_at(order: int) -> int:
    """The code whose place in the order of values is -7 .. 7."""
    return order if order >= 0 else 8 - order


def _codes_of_bytes(pairs: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """[16]: how often each code is in bytes of two."""
    table = pairs.reshape(16, 16)
    codes: npt.NDArray[np.int64] = table.sum(axis=0) + table.sum(axis=1)
    return codes
