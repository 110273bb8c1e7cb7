"""A plan as a value: every tensor of the result with its file, its place and how it comes about.

Owns the types and what follows from them by arithmetic (sizes, units of work, memory). `planner.py` makes a
plan, `pipeline.py` runs it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import TypeAlias

from fp4conv.deltas import LowRank
from fp4conv.errors import PlanError
from fp4conv.formats import ScaleRule, Ties
from fp4conv.hints.values import BESIDE, Hints, Kept, facts_bytes
from fp4conv.layouts.parts import Part
from fp4conv.model import Decoded, LoraMerged, Model, Stored, Weight
from fp4conv.safetensors_io import ShardLayout, TensorRef
from fp4conv.servers import Verdict

# Measured: interpreter, NumPy, Numba with LLVM and the loaded kernels, before the first block is read.
BASE_BYTES = 300_000_000
# Rows are taken in blocks of about this size: large enough to stream, small enough to stay in the cache.
UNIT_BYTES = 8_000_000
# A matrix that has to be turned is best read whole: up to this size.
MATRIX_BYTES = 64_000_000


class Action(str, Enum):
    COPY = "copy"  # bytes as they are
    CAST = "cast"  # dense to another dense dtype
    QUANTIZE = "quantize"  # dense to a block format
    DEQUANTIZE = "dequantize"  # a block format to dense
    TRANSCODE = "transcode"  # one block format to another
    REBLOCK = "reblock"  # NVFP4 in blocks of 32 to blocks of 16: every scale twice
    REQUANTIZE = "requantize"  # NVFP4 to NVFP4 under another tensor scale: the one that its set shares
    MERGE = "merge"  # with adapters, to dense; a merged weight that becomes a block format is quantised


_BY_ROWS = (Action.QUANTIZE, Action.DEQUANTIZE, Action.TRANSCODE, Action.REBLOCK, Action.REQUANTIZE)


@dataclass(frozen=True)
class ScaleOf:
    """An F32 scale that follows from scalars of the source: the largest of `amax` divided by `divisor`."""

    amax: tuple[TensorRef, ...]
    divisor: float


@dataclass(frozen=True)
class Reciprocal:
    """An F32 scale that is 1 / `ref`, rounded once: the other way to store a tensor or input scale.

    `key`: '<module>.tensor_scale' or '<module>.input_scale'. `exact`: what it is said to have been before it became
    `ref`; it counts where its reciprocal is `ref`.
    """

    ref: TensorRef
    key: str
    exact: float | None = None


# Copied from there, these bytes, computed from those scalars, or (None) what the step's kernel makes.
Origin: TypeAlias = TensorRef | bytes | ScaleOf | Reciprocal | None


@dataclass(frozen=True)
class Output:
    """One tensor of the result at its place."""

    part: Part
    file: str
    offset: int
    origin: Origin = None


@dataclass(frozen=True)
class Step:
    """All that is written of one weight (or of one calibration tensor, then `weight` is None).

    `group` names the weights that share a tensor scale with this one; it is set where that scale has to be
    found first. `target`: the block format or dense dtype of the result, in lower case. `amax`: the largest
    magnitude that training froze, which then decides the tensor scale rather than the values. `beside`: bytes that
    round-trip hints of the whole weight take in memory. `tensor_scale`: the one to encode by, where it is known
    beforehand.
    """

    key: str
    action: Action
    outputs: tuple[Output, ...]
    target: str
    weight: Weight | None = None
    group: str | None = None
    amax: TensorRef | None = None
    beside: int = 0
    tensor_scale: float | None = None

    @property
    def computed(self) -> tuple[Output, ...]:
        return tuple(output for output in self.outputs if output.origin is None)

    @property
    def bytes_read(self) -> int:
        copied = sum(o.origin.spec.nbytes for o in self.outputs if isinstance(o.origin, TensorRef))
        return copied + (self.weight.nbytes if self.weight and self.action is not Action.COPY else 0)

    @property
    def bytes_written(self) -> int:
        return sum(output.part.spec.nbytes for output in self.outputs)

    @property
    def merged(self) -> LoraMerged | None:
        """The weight's node where adapters change it."""
        value = self.weight.value if self.weight else None
        return value if isinstance(value, LoraMerged) else None

    @property
    def by_rows(self) -> bool:
        """Whether it is worked on in rows of matrices; else value by value."""
        if self.action is Action.MERGE:
            return self.merged is not None and self.merged.by_rows
        return self.action in _BY_ROWS

    @property
    def scan_bytes(self) -> int:
        """Bytes read beforehand to find the tensor scale."""
        return self.weight.nbytes if self.group and self.weight and self.amax is None else 0


@dataclass(frozen=True)
class Unit:
    """Rows n0:n1 of the matrix `index` of a step's weight: one read, one kernel, one write."""

    step: Step
    index: int
    n0: int
    n1: int


@dataclass(frozen=True)
class Span:
    """Elements start:stop of output `output` of a step, flat: what is copied or cast value by value."""

    step: Step
    output: int
    start: int
    stop: int


@dataclass(frozen=True)
class PlannedFile:
    """A small file of the result: `content`, or a copy of the source's file of the same name."""

    name: str
    nbytes: int
    content: bytes | None = None


@dataclass(frozen=True)
class Plan:
    """What one conversion will do. `shards`: file name -> layout. `coding`: the rules that new codes follow."""

    model: Model
    target: str
    layout: str
    rule: ScaleRule | None
    ties: Ties
    steps: tuple[Step, ...]
    shards: Mapping[str, ShardLayout]
    files: tuple[PlannedFile, ...]
    servers: tuple[Verdict, ...]
    warnings: tuple[str, ...]
    version: str
    hints: Hints = field(default_factory=Hints)
    kept: Kept | None = None

    @property
    def total_bytes(self) -> int:
        """What the result takes on the disk, but for hints whose number is not known before they are counted."""
        return sum(shard.nbytes for shard in self.shards.values()) + sum(file.nbytes for file in self.files)

    @property
    def disk_bytes(self) -> int:
        """Upper bound of what is on the disk while it runs.

        Codes that have to be noted are left out: values collapse only where scales are far outside the range of the
        dense type, and room for every code of a model would be a quarter of the result.
        """
        return self.total_bytes + (self.kept.record_bytes + len(facts_bytes(self.kept.facts)) if self.kept else 0)

    @property
    def bytes_read(self) -> int:
        return sum(step.bytes_read for step in self.steps) + self.scan_bytes + adapter_bytes(self.steps)

    @property
    def scan_bytes(self) -> int:
        """Bytes read beforehand to find tensor scales."""
        return sum(step.scan_bytes for step in self.steps)

    @cached_property
    def factor_bytes(self) -> int:
        """The most that the factors of one weight take in memory."""
        return max((_factor_bytes(step.merged) for step in self.steps if step.merged), default=0)

    @property
    def model_steps(self) -> tuple[Step, ...]:
        """The steps without those that only copy hints."""
        return tuple(step for step in self.steps if not step.key.startswith(BESIDE))

    def count(self, *actions: Action) -> int:
        return sum(step.action in actions for step in self.model_steps)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that the bytes of the result follow from; equal plans write equal bytes."""
        digest = hashlib.sha256(self.model.source.fingerprint().encode())
        facts = [self.version, self.target, self.layout, self.rule, self.ties]
        facts += [adapter.fingerprint for adapter in self.model.adapters]
        facts += sorted({step.merged.rounding for step in self.steps if step.merged})
        digest.update(json.dumps(facts).encode())
        for name, shard in self.shards.items():
            digest.update(name.encode() + b"\0" + shard.header)
        for step in self.steps:
            literals = [o.origin.hex() for o in step.outputs if isinstance(o.origin, bytes)]
            amax = step.amax.name if step.amax else None
            digest.update(json.dumps([step.key, step.action, step.target, step.group, literals, amax]).encode())
        digest.update(json.dumps([len(self.hints.weights), self.kept is not None]).encode())
        for file in self.files:
            digest.update(file.name.encode() + b"\0" + (file.content or b""))
        return digest.hexdigest()


def adapter_bytes(steps: Iterable[Step]) -> int:
    """Bytes read of adapters, each tensor once."""
    refs = {(ref.file, ref.name): ref for step in steps if step.merged for ref in step.merged.delta_refs}
    return sum(ref.spec.nbytes for ref in refs.values())


def _factor_bytes(merged: LoraMerged) -> int:
    return sum(d.rows.held_bytes + d.columns.held_bytes for d in merged.deltas if isinstance(d, LowRank))


def reserved_bytes(plan: Plan, workers: int) -> int:
    """What adapters take of the memory: the factors of two weights stay, and a worker may hold those of a third."""
    return (2 + workers) * plan.factor_bytes


def block_budget(max_memory: int, workers: int, reserved: int = 0) -> int:
    """Bytes that one worker may hold; PlanError when `max_memory` leaves too little to work with."""
    budget = (max_memory - BASE_BYTES - reserved) // workers
    if budget < 1_000_000:
        least = BASE_BYTES + reserved + workers * 1_000_000
        raise PlanError(
            f"--max-memory {max_memory:,} bytes leaves no room for {workers} workers",
            hint=f"give at least {least // 1_000_000 + 1}MB, or fewer --workers",
        )
    return min(budget, MATRIX_BYTES)


def bytes_per_row(step: Step) -> int:
    """What a worker holds for one row of N while it works on `step`: input, output and, where needed, F32 between."""
    weight = step.weight
    assert weight is not None
    held = sum(ref.spec.nbytes for ref in weight.value.refs)
    held += sum(output.part.spec.nbytes for output in step.computed)
    if step.merged is not None:
        held += _merge_bytes(step.merged) * weight.elements
    if _needs_f32(step, weight):
        held += 4 * weight.elements
    held += step.beside
    if step.amax is not None:  # the comparison with training's forward pass: two decodings and a float64 difference
        held += 17 * weight.elements
    return max(1, held // (weight.matrices * weight.n))


def _merge_bytes(merged: LoraMerged) -> int:
    """What a value takes on its way through a merge: the decoded base, the F32 sum, a rounded copy."""
    decoded = 0 if isinstance(merged.base, Stored) else 4
    compared = 5 if merged.beside else 0
    return compared + decoded + 4 + (2 if merged.base.refs[0].spec.dtype == "F16" or not merged.deltas else 0)


def _needs_f32(step: Step, weight: Weight) -> bool:
    if isinstance(weight.base, Stored):
        return weight.base.ref.spec.dtype == "F16"
    return step.action in (Action.TRANSCODE, Action.REQUANTIZE) or step.target == "f16"


def turned(step: Step) -> bool:
    """Whether some part of the weight lies K-major on one side: then rows of N are not contiguous there."""
    weight = step.weight
    assert weight is not None
    inside = weight.base.kn if isinstance(weight.base, Decoded) else weight.kn
    return inside or any(output.part.kn for output in step.computed)


def units(step: Step, budget: int) -> Iterator[Unit | Span]:
    """Cut a step into pieces that fit in `budget` bytes: whole rows of matrices, so that no sum depends on the cut."""
    for number, output in enumerate(step.outputs):
        by_value = step.action in (Action.CAST, Action.MERGE) and not step.by_rows
        if isinstance(output.origin, TensorRef) or (by_value and output.origin is None):
            elements, chunk = output.part.spec.elements, min(budget, UNIT_BYTES) // 8
            yield from (Span(step, number, i, min(i + chunk, elements)) for i in range(0, elements, chunk))
    if step.by_rows:
        yield from matrix_units(step, budget)


def matrix_units(step: Step, budget: int) -> Iterator[Unit]:
    """The units of rows of a step's weight."""
    weight = step.weight
    assert weight is not None
    assert weight.is_matrix
    per_row = bytes_per_row(step)
    if per_row > budget:
        raise PlanError(
            f"one row needs {per_row:,} bytes of memory, a worker may hold {budget:,}",
            where=weight.name,
            hint="give more --max-memory or fewer --workers",
        )
    most = budget if turned(step) else min(budget, UNIT_BYTES)
    rows = min(weight.n, max(1, most // per_row))
    for index in range(weight.matrices):
        for n0 in range(0, weight.n, rows):
            yield Unit(step, index, n0, min(n0 + rows, weight.n))


def peak_bytes(plan: Plan, max_memory: int, workers: int) -> int:
    """Upper bound of resident memory: a constant and what the workers hold, whatever the model's size."""
    reserved = reserved_bytes(plan, workers)
    budget = block_budget(max_memory, workers, reserved)
    largest = UNIT_BYTES
    for step in plan.steps:
        if step.weight is not None and step.by_rows:
            unit = next(matrix_units(step, budget))
            largest = max(largest, (unit.n1 - unit.n0) * bytes_per_row(step))
    return BASE_BYTES + reserved + workers * min(budget, largest)
