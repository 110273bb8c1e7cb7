"""What a plan has to know of stored tensor scales before the first byte is written: a few bytes a weight, read here.

Sets that servers fuse and whose scales differ are refused, or requantised with `repair`; scales that are to be stored
the other way, as reciprocals, are counted where that rounds them for good. Imports no kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from fp4conv.errors import ValuesError
from fp4conv.hints.reciprocals import exact_scales_file
from fp4conv.hints.values import RECIPROCALS
from fp4conv.plan import Plan, Reciprocal
from fp4conv.repair import kept_scales, refuse_apart, repaired, sets_apart
from fp4conv.safetensors_io import Reader, TensorRef


def settle(plan: Plan, *, repair: bool, hints: bool) -> Plan:
    """`plan`, repaired where it must be and may be; with `hints`, and a file of what reciprocals round for good.

    Raises PlanError for sets apart, ValuesError for a bad scale.
    """
    with plan.model.source.reader() as reader:
        kept = kept_scales(plan)
        apart = sets_apart(
            {key: {name: stored_scale(reader, ref) for name, ref in members.items()} for key, members in kept.items()}
        )
        if apart and not repair:
            raise refuse_apart(apart)
        if apart:
            plan = repaired(plan, apart)
        rounded = rounded_reciprocals(plan, reader)
    turned = sum(1 for _ in _reciprocals(plan))
    if not turned:
        return plan
    back = f"{len(rounded)} of them do not" if rounded else "all of them"
    beside = f"; {RECIPROCALS} keeps those for the way back" if rounded and hints else ""
    note = (
        f"{turned} tensor and input scales were turned into their reciprocals, rounded once: {back} give the same bits "
        f"when they are turned back{beside}"
    )
    files = (exact_scales_file(rounded),) if rounded and hints else ()
    return replace(plan, warnings=(*plan.warnings, note), files=(*plan.files, *files))


def rounded_reciprocals(plan: Plan, reader: Reader) -> dict[str, float]:
    """Key -> F32 value as stored, of every scale whose reciprocal's reciprocal is another."""
    found = {}
    for origin in _reciprocals(plan):
        scale = stored_scale(reader, origin.ref)
        if reciprocal(turned_over(reader, origin), origin.ref.name) != scale:
            found[origin.key] = scale
    return found


def turned_over(reader: Reader, origin: Reciprocal) -> float:
    """What is written: the value that is known to have become `ref`, or the reciprocal of `ref`."""
    scale = stored_scale(reader, origin.ref)
    exact = origin.exact
    if exact is not None and np.isfinite(exact) and exact > 0 and reciprocal(exact, origin.ref.name) == scale:
        return exact
    return reciprocal(scale, origin.ref.name)


def _reciprocals(plan: Plan) -> Iterator[Reciprocal]:
    for step in plan.steps:
        for output in step.outputs:
            if isinstance(output.origin, Reciprocal):
                yield output.origin


def stored_scale(reader: Reader, ref: TensorRef) -> float:
    """An F32 tensor or input scale as stored, plain or as a reciprocal: finite, and greater than zero."""
    scale = np.empty(1, np.float32)
    reader.read_into(ref.file, ref.offset, scale)
    if not (np.isfinite(scale[0]) and scale[0] > 0):
        raise ValuesError(
            f"a tensor scale of {scale[0]}; expected finite and greater than zero",
            where=f"{ref.name} ({ref.file})",
            hint="the checkpoint is damaged: download or export it again",
        )
    return float(scale[0])


def reciprocal(scale: float, where: str) -> float:
    """F32(1 / scale), the other way to store a tensor scale. ValuesError where that is Inf."""
    with np.errstate(over="ignore"):
        value = float(np.float32(1.0) / np.float32(scale))
    if not np.isfinite(value):
        raise ValuesError(
            f"a scale of {scale!r}, whose reciprocal F32 cannot hold",
            where=where,
            hint="leave --layout out: the modelopt layout holds it as it is",
        )
    return value
