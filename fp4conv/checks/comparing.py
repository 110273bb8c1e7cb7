"""A checkpoint beside the one that it was made from: is every tensor there, and how much was lost?"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fp4conv.checks.against import Against
from fp4conv.faults import Found, Kind
from fp4conv.model import Model, Stored
from fp4conv.pipeline.measuring import Compared, compare
from fp4conv.report.facts import add_errors, finite

_NEAR_DB = 6.0  # four bits keep 15 to 22 dB of what models hold; below this it is hardly the same tensor


def compare_with_source(
    model: Model,
    original: Model,
    *,
    max_memory: int,
    workers: int,
    on_total: Callable[[int], None] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> tuple[Against, list[Found]]:
    """What `model` kept of `original`, and what in it cannot come from a conversion of that."""
    found = compare(model, original, max_memory=max_memory, workers=workers, on_total=on_total, on_bytes=on_bytes)
    faults = [*_incomplete(found, original.source.name), *_changed(found, model, original)]
    against = Against(
        source=original.source.name,
        lossless=found.same,
        tensors=len(found.tensors),
        same=sum(each.same for each in found.tensors),
        sqnr_db=finite(add_errors(each.error for each in found.tensors).sqnr_db),
        per_tensor={each.name: finite(each.error.sqnr_db) for each in found.tensors},
    )
    return against, faults


def _incomplete(found: Compared, source: str) -> Iterator[Found]:
    for name in found.only_second:
        yield Found(Kind.SOURCE_MISMATCH, f"{source} has it, and this checkpoint has not", "it", name, weight=name)
    for name in found.only_first:
        yield Found(Kind.SOURCE_MISMATCH, f"{source} has no such tensor", "nothing that it has not", name, weight=name)
    for apart in found.apart:
        expected = f"{apart.expected}, as in {source}"
        yield Found(Kind.SOURCE_MISMATCH, apart.found, expected, apart.name, weight=apart.name)


def _changed(found: Compared, model: Model, original: Model) -> Iterator[Found]:
    """Tensors that a conversion copies and that differ, and others that are hardly the same."""
    here = {weight.name: weight.value for weight in model.weights}
    there = {weight.name: weight.value for weight in original.weights}
    for each in found.tensors:
        if each.same:
            continue
        ours, theirs = here[each.name], there[each.name]
        ref = ours.refs[0]
        copied = isinstance(ours, Stored) and isinstance(theirs, Stored) and ours.ref.spec == theirs.ref.spec
        if copied:
            values = f"{each.error.differ:,} of {each.error.values:,} values differ"
            expected = f"a copy of the same tensor in {original.source.name}"
            yield Found(Kind.SOURCE_MISMATCH, values, expected, ref.name, ref.file, each.name)
        elif each.error.nearness < _NEAR_DB:
            found_db = f"an SQNR of {each.error.sqnr_db:.1f} dB"
            yield Found(Kind.SOURCE_MISMATCH, found_db, f"{_NEAR_DB:.0f} dB or more", ref.name, ref.file, each.name)
