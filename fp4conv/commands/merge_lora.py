"""`merge_lora`: an adapter into its base, which keeps its number format, and the bytes of what is not touched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fp4conv.commands.convert import convert
from fp4conv.errors import UsageError
from fp4conv.formats import TARGETS
from fp4conv.layouts import layout_named, parse
from fp4conv.model import Decoded, Model
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

    The same as `convert(base, destination, lora=[adapter])`, with `to` the base's own format unless it is given, and an
    NVFP4 base of compressed-tensors in its own layout unless `layout` or `for_server` is. `options`, the result and the
    errors are those of `convert`. What no adapter touches is copied as it is.
    """
    adapters = [adapter] if isinstance(adapter, (str, Path)) else list(adapter)
    to, layout = as_base(base, to, layout, options.get("for_server"))
    return convert(base, destination, to=to, layout=layout, lora=adapters, **options)  # type: ignore[arg-type]


def as_base(base: str | Path, to: str | None, layout: str | None, for_server: object = None) -> tuple[str, str | None]:
    """`to` and `layout`, or where they are None those with which what no adapter touches keeps its bytes.

    `to` is then the format of `base`, and `layout` stays None, for the default of `to`, unless `base` is in one that
    stores reciprocals and no `for_server` asks for another. Raises UsageError where `base` has no format that is
    written.
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
    stays = layout is None and for_server is None and to == model.format_name
    return to, _with_reciprocals(model) if stays else layout


def _with_reciprocals(model: Model) -> str | None:
    """The layout that `model` is in where another would round its scales, and where it can be written again."""
    layout = layout_named(model.layout)
    quantized = [weight for weight in model.weights if isinstance(weight.base, Decoded)]
    rounds = any(isinstance(weight.base, Decoded) and weight.base.inverse for weight in quantized)
    return layout.name if rounds and not any(layout.refusal(each, model.family) for each in quantized) else None
