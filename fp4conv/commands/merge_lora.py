"""`merge_lora`: an adapter into its base, which keeps its number format and its layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fp4conv.commands.convert import convert
from fp4conv.errors import UsageError
from fp4conv.formats import TARGETS
from fp4conv.layouts import layout_named, parse
from fp4conv.model import Model, Stored
from fp4conv.sources import open_source

if TYPE_CHECKING:
    from fp4conv.report.converted import ConvertResult


def merge_lora(
    base: str | Path,
    adapter: str | Path | Sequence[str | Path],
    destination: str | Path | None = None,
    *,
    to: str | None = None,
    layout: str | None = None,
    **options: object,
) -> ConvertResult:
    """Merge one adapter, or several in order, into the checkpoint in folder `base`; write `destination`.

        fp4conv.merge_lora("gpt-oss-20b", "my-lora", "gpt-oss-20b-tuned")

    The same as `convert(base, destination, lora=[adapter])`, with `to` and `layout` those of the base unless they are
    given. `options`, the result and the errors are those of `convert`. What no adapter touches is copied as it is.
    """
    adapters = [adapter] if isinstance(adapter, (str, Path)) else list(adapter)
    to, layout = as_base(base, to, layout)
    return convert(base, destination, to=to, layout=layout, lora=adapters, **options)  # type: ignore[arg-type]


def as_base(base: str | Path, to: str | None, layout: str | None) -> tuple[str, str | None]:
    """`to` and `layout`, or where they are None those of the checkpoint in `base`.

    The layout stays None, for the default of `to`, where `base` has another format than `to` or lies in a layout that
    is read and not written. Raises UsageError where `base` has no format that is written.
    """
    if to is not None and layout is not None:
        return to, layout
    model = parse(open_source(base))
    if to is None and model.format_name not in TARGETS:
        raise UsageError(
            f"{base} is {model.format_name}, which is not a format to write",
            hint=f"say which one the result should have: --to {', --to '.join(TARGETS)}",
        )
    to = to or model.format_name
    return to, layout or (_written_layout(model) if to == model.format_name else None)


def _written_layout(model: Model) -> str | None:
    """The layout that `model` is in, if that can be written with all that is quantised in it."""
    layout = layout_named(model.layout)
    quantized = [weight for weight in model.weights if not isinstance(weight.base, Stored)]
    holds = (model.format_name in layout.formats) if quantized else not layout.formats
    return layout.name if holds and not any(layout.refusal(each, model.family) for each in quantized) else None
