"""`merge_lora`: an adapter into its base, which keeps its number format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fp4conv.commands.convert import convert
from fp4conv.errors import UsageError
from fp4conv.formats import TARGETS
from fp4conv.layouts import parse
from fp4conv.sources import open_source

if TYPE_CHECKING:
    from fp4conv.report.converted import ConvertResult


def merge_lora(
    base: str | Path,
    adapter: str | Path | Sequence[str | Path],
    destination: str | Path | None = None,
    *,
    to: str | None = None,
    **options: object,
) -> ConvertResult:
    """Merge one adapter, or several in order, into the checkpoint in folder `base`; write `destination`.

        fp4conv.merge_lora("gpt-oss-20b", "my-lora", "gpt-oss-20b-tuned")

    The same as `convert(base, destination, lora=[adapter])`, with `to` the base's own format unless it is given.
    `options`, the result and the errors are those of `convert`. What no adapter touches is copied as it is.
    """
    adapters = [adapter] if isinstance(adapter, (str, Path)) else list(adapter)
    return convert(base, destination, to=to or own_format(base), lora=adapters, **options)  # type: ignore[arg-type]


def own_format(base: str | Path) -> str:
    """What `--to` writes the checkpoint in `base` in the format that it has; UsageError where there is none."""
    found = parse(open_source(base)).format_name
    if found not in TARGETS:
        raise UsageError(
            f"{base} is {found}, which is not a format to write",
            hint=f"say which one the result should have: --to {', --to '.join(TARGETS)}",
        )
    return found
