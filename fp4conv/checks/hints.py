"""Are the round-trip hints beside a dense checkpoint whole? Against the digests that were written with them."""

from __future__ import annotations

from fp4conv.errors import SourceError
from fp4conv.faults import Found, Kind
from fp4conv.formats import BLOCK_FORMATS
from fp4conv.hints.reading import read_hints
from fp4conv.model import Model
from fp4conv.pipeline.hint_files import damaged_files


def damaged_hints(model: Model) -> list[Found]:
    expected = "the bytes that its digest was made of"
    for format_name in BLOCK_FORMATS:
        try:
            hints, _ = read_hints(model, format_name)
        except SourceError as error:
            return [Found(Kind.HINTS_DAMAGED, error.what, expected, file=error.where)]
        damaged = damaged_files(model.source, hints.files)
        if damaged:
            return [Found(Kind.HINTS_DAMAGED, "other bytes", expected, file=file) for file in damaged]
    return []
