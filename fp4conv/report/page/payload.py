"""What the page is told: an `Inspected` as columns of JSON, in the few characters that 30,000 tensors ask for.

Words that return (formats, kinds, files) and the values of scales are listed once and named by their place in the list.
`model.js` reads this back; `tests/test_page.py` compares what it understood with what was said.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

from fp4conv.model import JSON
from fp4conv.report.facts import ErrorFacts, Inspected, TensorFacts
from fp4conv.version import __version__

_Word = TypeVar("_Word", bound=Hashable)


class _Listing(Generic[_Word]):
    """Each word once, in the order of first use; `place` gives its number."""

    def __init__(self) -> None:
        self._places: dict[_Word, int] = {}

    def place(self, word: _Word) -> int:
        return self._places.setdefault(word, len(self._places))

    @property
    def words(self) -> list[_Word]:
        return list(self._places)


def payload(found: Inspected) -> dict[str, JSON]:
    """`found` as JSON without NaN and Infinity: those are the strings that JavaScript's Number() reads."""
    formats, roles, files, kinds = (_Listing[str]() for _ in range(4))
    conversions = _Listing[tuple[str, str]]()
    scales = _Listing[float]()
    rows: list[JSON] = []
    for facts in found.tensors:
        estimates = {conversions.place((e.format, e.rule)): _error(e.error) for e in facts.estimates}
        rows.append(
            [
                facts.name,
                formats.place(facts.format),
                list(facts.shape),
                facts.bytes,
                facts.bits_per_weight,
                roles.place(facts.role),
                files.place(facts.file),
                facts.layer,
                kinds.place(facts.kind),
                _values(facts, scales),
                None if facts.error is None else _error(facts.error),
                [[place, *figures] for place, figures in estimates.items()],
            ]
        )
    return {
        "version": __version__,
        "source": found.source,
        "reference": found.reference,
        "format": found.format,
        "layout": found.layout,
        "family": found.family,
        "parameters": found.parameters,
        "bytes": found.bytes,
        "bits_per_weight": found.bits_per_weight,
        "warnings": list(found.warnings),
        "formats": list(formats.words),
        "roles": list(roles.words),
        "files": list(files.words),
        "kinds": list(kinds.words),
        "conversions": [list(pair) for pair in conversions.words],
        "scales": [_number(value) for value in scales.words],
        "tensors": rows,
    }


def _error(error: ErrorFacts) -> list[JSON]:
    """The sums, not the figures that follow from them: the page adds them up over layers and kinds."""
    sums = (error.signal, error.noise, error.dot, error.power, error.max_abs_error, error.max_rel_error)
    return [error.values, error.differ, error.left_out, *_numbers(sums)]


def _values(facts: TensorFacts, scales: _Listing[float]) -> JSON:
    values = facts.values
    if values is None:
        return None
    ends = (values.smallest, values.largest, values.tensor_scale)
    counts = (values.zeros, values.nan)
    blocks = (values.blocks, values.zero_blocks, values.saturated, values.unused_range)
    faults = (values.nan_scales, values.negative_scales, values.dead_blocks)
    spread = [number for value, count in values.scales for number in (scales.place(value), count)]
    return [*_numbers(ends), *counts, *blocks, *faults, list(values.codes), list(spread)]


def _numbers(values: Iterable[float | None]) -> list[JSON]:
    return [_number(value) for value in values]


def _number(value: float | None) -> JSON:
    if value is None or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
