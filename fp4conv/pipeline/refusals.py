"""The errors that values cause while a plan runs: which tensor, where in it, and what to do."""

from __future__ import annotations

from fp4conv.errors import ValuesError
from fp4conv.model import Weight
from fp4conv.patterns import exclude


def refuse_nonfinite(weight: Weight, where: list[int]) -> None:
    raise ValuesError(
        f"the value at {where} is NaN or Inf and cannot be quantised",
        where=weight.name,
        hint=f"mend the source, or leave this module as it is with: {exclude(weight.module)}",
    )


def refuse_merged(weight: Weight, where: list[int]) -> None:
    raise ValuesError(
        f"the merged value at {where} is NaN or Inf",
        where=weight.name,
        hint="the base or the adapter is broken there, or DoRA met a row of zeros: nothing sensible can be written",
    )


def refuse_overflow(weight: Weight, where: list[int], value: float, dtype: str) -> None:
    raise ValuesError(
        f"the value {value!r} at {where} is too large for {dtype}",
        where=weight.name,
        hint="choose a target with more range: --to bf16 or --to f32",
    )
