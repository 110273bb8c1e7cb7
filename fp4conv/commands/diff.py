"""`diff`: do two checkpoints have the same values, in whatever formats and layouts?"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from fp4conv.commands.convert import DEFAULT_MEMORY, resources
from fp4conv.errors import UsageError
from fp4conv.layouts import parse
from fp4conv.model import Source
from fp4conv.report.differing import Difference, FileDifference
from fp4conv.sources import OnFetch, bring_weights, open_source


def diff(
    first: str | Path,
    second: str | Path,
    *,
    tolerance: float | None = None,
    max_memory: int | str = DEFAULT_MEMORY,
    workers: int | None = None,
    on_total: Callable[[int], None] | None = None,
    on_bytes: Callable[[int], None] | None = None,
    on_fetch: OnFetch | None = None,
) -> Difference:
    """Compare the values of two checkpoints, tensor by tensor under the names of the BF16 checkpoint.

        assert fp4conv.diff("gpt-oss-20b", "gpt-oss-20b-bf16").same

    `first` and `second` are folders or repositories on the Hub, in any format and layout. Values are numbers: -0.0 is
    0.0, NaN is NaN, BF16 is what it is in F32. With `tolerance` a tensor passes whose SQNR in dB against that of
    `second` is at least that; NaN and Inf must then still be in the same places. A tensor that one side lacks, or that
    has another shape, is a difference either way. Other files are mentioned, and decide nothing.

    Values are streamed within `max_memory` (bytes, or text such as '1GB') by `workers` threads, by default one a core.
    `on_total` is told the bytes that will be read before they are, `on_bytes` those that were, `on_fetch` those that
    came from the Hub and those in all. Raises SourceError for what cannot be read as a checkpoint, UsageError for
    arguments that do not fit.
    """
    threads, memory = resources(workers, max_memory)
    if tolerance is not None and math.isnan(tolerance):
        raise UsageError("--tolerance takes dB, such as 40")
    models = [parse(open_source(source)) for source in (first, second)]
    for model in models:
        bring_weights(model.source, on_fetch)
    from fp4conv.pipeline.measuring import compare  # compiled kernels: only who reads values pays for them

    found = compare(*models, max_memory=memory, workers=threads, on_total=on_total, on_bytes=on_bytes)
    return Difference(
        first=models[0].source.name,
        second=models[1].source.name,
        formats=(models[0].format_name, models[1].format_name),
        tolerance=tolerance,
        tensors=tuple((each.name, each.error) for each in found.tensors),
        only_first=found.only_first,
        only_second=found.only_second,
        shapes_apart=tuple((each.name, each.found, each.expected) for each in found.apart),
        unread=found.unread,
        files=_files(models[0].source, models[1].source),
    )


def _files(first: Source, second: Source) -> tuple[FileDifference, ...]:
    """Small files beside the weights that are not the same, config.json by its keys."""
    sizes = [{file.name: file.nbytes for file in source.files if not file.weights} for source in (first, second)]
    found = []
    for name in sorted(set(sizes[0]) | set(sizes[1])):
        if name.endswith(".index.json"):
            continue  # which file a tensor is in is no difference
        if name not in sizes[0] or name not in sizes[1]:
            found.append(FileDifference(name, f"only in {(first if name in sizes[0] else second).name}"))
        elif name == "config.json":
            mine, theirs = first.json(name) or {}, second.json(name) or {}
            keys = sorted(key for key in {*mine, *theirs} if mine.get(key) != theirs.get(key))
            if keys:
                found.append(FileDifference(name, f"differs in {', '.join(keys)}"))
        elif sizes[0][name] != sizes[1][name] or first.read_bytes(name) != second.read_bytes(name):
            found.append(FileDifference(name, "differs"))
    return tuple(found)
