"""`inspect`: what a checkpoint holds."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from fp4conv.errors import UsageError
from fp4conv.layouts import parse
from fp4conv.report.facts import Inspected, describe
from fp4conv.sources import open_source


def inspect(source: str | Path, *, tensor: str | None = None) -> Inspected:
    """Formats, shapes and sizes of the tensors in folder `source`. Reads headers and configs only.

    `tensor` is a glob that picks tensors by name; totals are those of the whole checkpoint. Raises SourceError
    for a folder that is no checkpoint, UsageError for a glob that matches nothing.
    """
    found = describe(parse(open_source(source)))
    if tensor is None:
        return found
    picked = tuple(facts for facts in found.tensors if fnmatchcase(facts.name, tensor))
    if not picked:
        raise UsageError(f"--tensor {tensor!r} matches no tensor of {found.source}")
    return replace(found, tensors=picked)
