"""Names that differ in numbers alone, as one name for people."""

from __future__ import annotations

import re
from collections.abc import Sequence


def folded(names: Sequence[str], number: re.Pattern[str]) -> str:
    """'layers.{0..35}.q_proj' of names that are alike but for what `number` matches."""
    columns = zip(*([int(found) for found in number.findall(name)] for name in names), strict=True)
    spans = iter([_span(sorted(set(column))) for column in columns])
    return number.sub(lambda _: next(spans), names[0])


def _span(numbers: Sequence[int]) -> str:
    """'7', '{0..35}', or '{0,2,..}' where there are gaps."""
    first, last = numbers[0], numbers[-1]
    if first == last:
        return str(first)
    if last - first + 1 == len(numbers):
        return f"{{{first}..{last}}}"
    shown = ",".join(map(str, numbers[:3]))
    return f"{{{shown}{',..' if len(numbers) > 3 else ''}}}"
