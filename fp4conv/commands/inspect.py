"""`inspect`: what a checkpoint holds, and what quantisation did, or would do, to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from fp4conv.commands.convert import DEFAULT_MEMORY, resources
from fp4conv.errors import UsageError
from fp4conv.formats import BLOCK_FORMATS
from fp4conv.layouts import parse
from fp4conv.model import Decoded, Model
from fp4conv.report.facts import Inspected, TensorFacts, describe
from fp4conv.sources import OnFetch, bring_weights, open_source

if TYPE_CHECKING:
    from fp4conv.pipeline.measuring import Measured
    from fp4conv.report.page import PagePlace


def inspect(
    source: str | Path,
    *,
    reference: str | Path | None = None,
    estimate: Sequence[str] | None = None,
    tensor: str | None = None,
    headers_only: bool = False,
    html: str | Path | None = None,
    max_memory: int | str = DEFAULT_MEMORY,
    workers: int | None = None,
    on_total: Callable[[int], None] | None = None,
    on_bytes: Callable[[int], None] | None = None,
    on_fetch: OnFetch | None = None,
) -> Inspected:
    """What the tensors of the checkpoint in `source` are: formats, shapes, sizes, and figures of their values.

        found = fp4conv.inspect("my-llama-nvfp4", reference="my-llama")
        worst = min((each for each in found.tensors if each.error), key=lambda each: each.error.sqnr_db)

    `source`: a folder, or a repository on the Hub.
    `reference`: a checkpoint in any format and layout that has the same tensors; each gets its error against it.
    `estimate`: formats ('mxfp4', 'nvfp4') to which a conversion is tried in memory, by each of their scale rules;
    by default both where nothing is in four bits yet and there is no `reference`. `tensor` is a glob that picks tensors
    by name: only theirs are read; sizes are those of the whole checkpoint. `headers_only` reads no values. `html`: a
    file to write as a page that shows the result; new or an older page, and outside of the folders that are read.
    Values are streamed within `max_memory` (bytes, or text such as '1GB') by `workers` threads, by default one a core;
    no figure depends on either. `on_total` is told the bytes that will be read before they are, `on_bytes` those that
    were, `on_fetch` those that came from the Hub and those in all.

    Raises SourceError for a folder that is no checkpoint, UsageError for a glob that matches nothing,
    OutputError where no page may be written.
    """
    threads, memory = resources(workers, max_memory)
    page = None if html is None else _page_place(html, source, reference)
    model = parse(open_source(source))
    found = describe(model)
    names = _picked(found, tensor)
    if headers_only:
        if reference is not None or estimate:
            raise UsageError("--headers-only reads no values: leave it out to compare or to estimate")
    else:
        from fp4conv.pipeline.measuring import measure  # compiled kernels: only who reads values pays for them

        formats = _formats(model, estimate, compares=reference is not None)
        against = parse(open_source(reference)) if reference is not None else None
        for source_model in (model, against) if names is None else ():
            if source_model is not None:
                bring_weights(source_model.source, on_fetch)
        measured = measure(
            model,
            reference=against,
            estimate=formats,
            names=names,
            max_memory=memory,
            workers=threads,
            on_total=on_total,
            on_bytes=on_bytes,
        )
        found = _with_values(found, measured, against)
    if names is not None:
        found = replace(found, tensors=tuple(facts for facts in found.tensors if facts.name in names))
    if page is not None:
        page.write(found)
    return found


def _page_place(html: str | Path, source: str | Path, reference: str | Path | None) -> PagePlace:
    """Where the page may go, asked before anything is read."""
    from fp4conv.report.page import PagePlace  # plotly: only who wants a page needs it

    return PagePlace.of(html, source, *(() if reference is None else (reference,)))


def _picked(found: Inspected, tensor: str | None) -> frozenset[str] | None:
    if tensor is None:
        return None
    picked = frozenset(facts.name for facts in found.tensors if fnmatchcase(facts.name, tensor))
    if not picked:
        raise UsageError(
            f"--tensor {tensor!r} matches no tensor of {found.source}",
            hint="list the names with: fp4conv inspect SRC --headers-only --csv",
        )
    return picked


def _formats(model: Model, estimate: Sequence[str] | None, *, compares: bool) -> tuple[str, ...]:
    """The formats to try; UsageError where the model is in four bits already."""
    quantised = next((weight for weight in model.weights if isinstance(weight.base, Decoded)), None)
    if estimate is None:
        return () if quantised is not None or compares else tuple(BLOCK_FORMATS)
    for name in estimate:
        if name not in BLOCK_FORMATS:
            raise UsageError(f"--as {name!r} is none of {', '.join(BLOCK_FORMATS)}")
    if estimate and quantised is not None:
        raise UsageError(
            f"--as estimates what quantising would do, and this checkpoint is in {quantised.format_name} already",
            hint="give --reference with what it was made from to see what it did",
        )
    return tuple(dict.fromkeys(estimate))


def _with_values(found: Inspected, measured: Measured, reference: Model | None) -> Inspected:
    tensors = tuple(_measured_facts(facts, measured) for facts in found.tensors)
    return replace(
        found,
        tensors=tensors,
        reference=reference.source.name if reference else None,
        only_in_source=measured.only_here,
        only_in_reference=measured.only_there,
        shapes_apart=tuple((each.name, each.found, each.expected) for each in measured.apart),
        without_estimate=measured.notes,
        warnings=(*found.warnings, *_notes(tensors, measured)),
    )


def _measured_facts(facts: TensorFacts, measured: Measured) -> TensorFacts:
    own = measured.tensors.get(facts.name)
    if own is None:
        return facts
    return replace(facts, values=own.values, error=own.error, estimates=own.estimates)


def _notes(tensors: Sequence[TensorFacts], measured: Measured) -> list[str]:
    """Whatever was left out of a figure, by name."""
    notes: list[str] = []
    bad = [f"{facts.name}: {facts.values.nan:,}" for facts in tensors if facts.values and facts.values.nan]
    dead = [
        f"{facts.name}: {facts.values.dead_blocks:,}" for facts in tensors if facts.values and facts.values.dead_blocks
    ]
    negative = [facts.name for facts in tensors if facts.values and facts.values.negative_scales]
    untried = [name for name, own in measured.tensors.items() if own.unquantisable]
    apart = [f"{each.name}: {each.found}, there {each.expected}" for each in measured.apart]
    for names, words in (
        (bad, "have NaN or Inf values, which no figure counts"),
        (dead, "have block scales of zero over codes that are not zero"),
        (negative, "have negative block scales, which readers take differently"),
        (untried, "have no estimate: convert would refuse their NaN or Inf values"),
        (measured.unread, "are of a type whose values are not read"),
        (measured.only_here, "are not in the reference, so that nothing is known of their error"),
        (measured.only_there, "are in the reference alone"),
        (apart, "have another shape in the reference, and were not compared"),
    ):
        if names:
            notes.append(
                f"{len(names):,} tensor{'s' * (len(names) > 1)} {_singular(words, len(names))} ({_few(names)})"
            )
    return notes


def _singular(words: str, count: int) -> str:
    verb, _, rest = words.partition(" ")
    return words if count > 1 else f"{ {'have': 'has', 'are': 'is'}[verb] } {rest}"


def _few(names: Iterable[str]) -> str:
    known = list(names)
    return "; ".join(known[:3]) + (f"; and {len(known) - 3:,} more" if known[3:] else "")
