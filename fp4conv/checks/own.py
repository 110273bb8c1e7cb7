"""Is a result that is about to get its name what was planned? Headers, index and configs, as `verify` sees them.

A fault here is a bug of fp4conv, unless the source had it already: what a source lacks, its result lacks too.
"""

from __future__ import annotations

from pathlib import Path

from fp4conv.checks.check import Checked, check_structure
from fp4conv.checks.judge import judged
from fp4conv.checks.survey import Survey, read_configs
from fp4conv.checks.tied import tied_faults, tied_pair
from fp4conv.errors import SourceError
from fp4conv.faults import ABOUT, Found, Kind, Severity
from fp4conv.hints.values import BESIDE
from fp4conv.plan import Plan
from fp4conv.safetensors_io import ShardLayout, read_header
from fp4conv.sources.listing import INDEX_SUFFIX, parse_object

_CHUNK_BYTES = 16_000_000


class BrokenResultError(AssertionError):
    """A finished result is not what its plan says: a bug of fp4conv, never the user's."""


def check_result(plan: Plan, root: Path) -> Checked:
    """Raise BrokenResultError where the files in `root` have an error that the source has not. Reads headers alone.

    Shards that have left the folder already are taken as planned.
    """
    shards = {file: shard for file, shard in plan.shards.items() if not file.startswith(BESIDE)}
    faults = [fault for file, shard in shards.items() if (root / file).exists() for fault in _header(root, file, shard)]
    faults += _index(root, shards)
    tensors = {ref.name: ref for shard in shards.values() for ref in shard.tensors}
    configs = read_configs(root, {path.name for path in root.iterdir()}, faults)
    result = Survey(root, str(root), (), (), tensors, (), configs)
    checked = check_structure(result, parsed=False)
    faults += checked.faults
    # What one server alone misreads is no bug: a module may have a name that its lists cannot tell from another's.
    errors = [fault for fault in faults if ABOUT[fault.kind].severity is Severity.ERROR and fault.server is None]
    if plan.model.family.name == "gpt-oss":
        # Round-trip hints bring back experts that a source had in part; the planner refuses to choose so.
        errors = [fault for fault in errors if fault.kind is not Kind.SET_IN_PART]
    if errors:
        source = check_structure(plan.model.source, parsed=False)
        inherited = {(fault.kind, fault.weight) for fault in source.faults}
        errors = [fault for fault in errors if fault.weight is None or (fault.kind, fault.weight) not in inherited]
    if errors:
        first = errors[0]
        raise BrokenResultError(
            f"this is a bug in fp4conv, please report it: the finished result has {len(errors)} errors. The first, of "
            f"{first.name or first.file}: found {first.found}; expected {first.expected}. It stays in {root}, without "
            "its final name"
        )
    return checked


def tied_head_warnings(checked: Checked, server: str | None, name: str) -> tuple[str, ...]:
    """A word where the result has an output head that is not the embeddings to which its config ties it.

    Values are compared of files that are still there; `server` is the one that the result is for, `name` its own.
    """
    pair = tied_pair(checked.weights, checked.config)
    root = checked.source.root
    if pair is None:
        return ()
    if any(not (root / ref.file).exists() for weight in pair for ref in weight.parts.values()):
        return (
            f"{pair[0].name} is stored though config.json ties it to {pair[1].name}: whether it differs was not "
            f"compared, since it is not here any more; fp4conv verify does",
        )
    with checked.source.reader() as reader:
        faults = list(tied_faults(checked.weights, checked.config, reader, chunk_bytes=_CHUNK_BYTES))
    problems = judged(faults, checked.checkpoint, server, source=name)
    return tuple(f"{each.tensor}: {each.found}; {each.consequence}; next: {each.remedy}" for each in problems)


def _header(root: Path, file: str, shard: ShardLayout) -> list[Found]:
    try:
        written = {(ref.name, ref.spec, ref.offset) for ref in read_header(root / file, file).tensors}
    except SourceError as error:
        return [Found(Kind.UNREADABLE_FILE, error.what, "a whole safetensors file", file=file)]
    if written == {(ref.name, ref.spec, ref.offset) for ref in shard.tensors}:
        return []
    return [Found(Kind.UNREADABLE_FILE, "a header that was not planned", "that of the plan", file=file)]


def _index(root: Path, shards: dict[str, ShardLayout]) -> list[Found]:
    if len(shards) < 2:
        return []
    index = "model" + INDEX_SUFFIX
    planned = {ref.name: file for file, shard in shards.items() for ref in shard.tensors}
    try:
        written = parse_object((root / index).read_bytes(), index).get("weight_map")
    except (SourceError, OSError) as error:
        return [Found(Kind.UNREADABLE_FILE, str(error), "the index", file=index)]
    return [] if written == planned else [Found(Kind.WRONG_SHARD, "other places", "those of the plan", file=index)]
