"""The order in which a plan's work is done, and what lies on the disk meanwhile: arithmetic over a plan.

Owns the order and the smallest disk that it needs. It refuses to own the disk: `pipeline/holding` watches that.

Files are needed from the first moment that touches them until the last, and room is given in that order alone. So
when everything before a moment is done, what is held is what that moment needs, and a bound that holds the largest
of those sums never comes to a standstill.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from fp4conv.errors import PlanError
from fp4conv.hints.values import BESIDE
from fp4conv.plan import Output, Plan, Reciprocal, ScaleOf, Step
from fp4conv.safetensors_io import TensorRef
from fp4conv.sizes import as_option, format_size

# The names of the journal, so that no tensor's name can be taken for a set's.
STEP, SCALE = "step ", "scale "


class Side(str, Enum):
    SOURCE = "source"
    RESULT = "result"


@dataclass(frozen=True)
class Piece:
    """A file that takes room on the disk for a part of the run."""

    side: Side
    name: str
    nbytes: int


@dataclass(frozen=True)
class Moment:
    """Work that is begun as one: a step, or (with `group`) the search for the tensor scale of a set."""

    steps: tuple[Step, ...]
    group: str | None = None

    @property
    def key(self) -> str:
        """What the journal calls it."""
        return STEP + self.steps[0].key if self.group is None else SCALE + self.group


def moments(steps: Iterable[Step], known: Collection[str] = ()) -> Iterator[Moment]:
    """The work in order; a set's scan comes one set ahead of its encoding. `known`: sets whose scale is found."""
    waiting: Sequence[Step] = ()
    for cluster in _clusters(tuple(steps)):
        group = cluster[0].group
        if group and group not in known:
            yield Moment(tuple(cluster), group)
        yield from (Moment((step,)) for step in waiting)
        waiting = cluster
    yield from (Moment((step,)) for step in waiting)


def _clusters(steps: Sequence[Step]) -> Iterator[Sequence[Step]]:
    """Steps that share a tensor scale together, at the place of the first; every other step alone.

    Steps that only copy hints follow what else is read from the same file: at the end, where the plan has them, they
    would keep every file of the source until then.
    """
    groups: dict[str, list[Step]] = {}
    for step in steps:
        if not step.key.startswith(BESIDE):
            groups.setdefault(step.group or f"\0{step.key}", []).append(step)
    last = {file: key for key, members in groups.items() for step in members for file in source_files(step)}
    after: dict[str | None, list[Step]] = {}
    for step in steps:
        if step.key.startswith(BESIDE):
            keys = [last[file] for file in source_files(step) if file in last]
            after.setdefault(keys[-1] if keys else None, []).append(step)
    for key, members in groups.items():
        yield members
        yield from ([step] for step in after.get(key, ()))
    yield from ([step] for step in after.get(None, ()))


def source_files(step: Step) -> tuple[str, ...]:
    """Files of the source that a step reads tensors from, without those of adapters."""
    refs = list(step.weight.base.refs) if step.weight is not None else []
    for output in step.outputs:
        refs += _origin_refs(output)
    if step.amax is not None:
        refs.append(step.amax)
    return tuple(dict.fromkeys(ref.file for ref in refs))


def _origin_refs(output: Output) -> tuple[TensorRef, ...]:
    match output.origin:
        case TensorRef():
            return (output.origin,)
        case ScaleOf(amax=amax):
            return amax
        case Reciprocal(ref=ref):
            return (ref,)
    return ()


def pieces_of(plan: Plan, moment: Moment, source_bytes: Mapping[str, int]) -> tuple[Piece, ...]:
    """What a moment needs on the disk, but for what is `resident`.

    `source_bytes`: the files of the source that are brought here, and their sizes.
    """
    found: dict[Piece, None] = {}
    for step in moment.steps:
        for file in (*source_files(step), *_hint_files(plan, step)):
            if file in source_bytes:
                found[Piece(Side.SOURCE, file, source_bytes[file])] = None
        for output in step.outputs if moment.group is None else ():
            if not output.file.startswith(BESIDE):
                found[Piece(Side.RESULT, output.file, plan.shards[output.file].nbytes)] = None
    return tuple(found)


def _hint_files(plan: Plan, step: Step) -> tuple[str, ...]:
    hinted = step.weight is not None and step.weight.name in plan.hints.weights
    return tuple(file.name for file in plan.hints.files) if hinted else ()


def resident(plan: Plan) -> frozenset[str]:
    """Shards that stay until the end: copies of hints, of which digests are made when everything is there."""
    return frozenset(name for name in plan.shards if name.startswith(BESIDE))


def resident_bytes(plan: Plan) -> int:
    """What lies on the disk until the end: `resident`, small files, records of hints while they are collected."""
    going = set(plan.shards) - resident(plan)
    return plan.disk_bytes - sum(plan.shards[name].nbytes for name in going)


def smallest_disk(plan: Plan, source_bytes: Mapping[str, int], *, result_stays: bool = False) -> int:
    """The least room in bytes in which the plan can be run when files go as soon as nothing needs them.

    `result_stays`: those of the source go, those of the result do not.
    """
    first: dict[Piece, int] = {}
    last: dict[Piece, int] = {}
    for number, moment in enumerate(moments(plan.steps)):
        for piece in pieces_of(plan, moment, source_bytes):
            first.setdefault(piece, number)
            last[piece] = number
    if result_stays:
        last |= {piece: number for piece in first if piece.side is Side.RESULT}
    change: dict[int, int] = {}
    for piece, number in first.items():
        change[number] = change.get(number, 0) + piece.nbytes
        change[last[piece] + 1] = change.get(last[piece] + 1, 0) - piece.nbytes
    held = most = 0
    for number in sorted(change):
        held += change[number]
        most = max(most, held)
    return most + resident_bytes(plan)


def disk_bound(
    plan: Plan, source_bytes: Mapping[str, int], asked: int | None, *, result_stays: bool = False, beside: int = 0
) -> int:
    """The bound to keep to: what was asked for, or twice the least. PlanError where that is too little.

    `beside`: bytes of other files that come and stay.
    """
    least = smallest_disk(plan, source_bytes, result_stays=result_stays) + beside
    if asked is None:
        return 2 * least
    if asked < least:
        raise PlanError(
            f"--max-disk {format_size(asked)} is too little: files that are needed together take {format_size(least)}",
            hint=f"the least that works is --max-disk {as_option(least)}; a smaller --max-shard-size needs less",
        )
    return asked
