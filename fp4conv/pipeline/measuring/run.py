"""Measure a model: workers take bands of its tensors in order; a set's amax is known before it is encoded on trial."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np

from fp4conv.model import Decoded, Model
from fp4conv.pipeline.matrices import Scratch
from fp4conv.pipeline.measuring.bands import Band, Flat, bands, check_fits, sum_rows
from fp4conv.pipeline.measuring.estimating import Trial, Trials, trials_of
from fp4conv.pipeline.measuring.looking import Look, look_at_band, look_at_flat
from fp4conv.pipeline.measuring.pairs import Pair, ShapesApart, clusters, match
from fp4conv.pipeline.measuring.sides import Side
from fp4conv.pipeline.measuring.tally import BlockTally, ErrorTally, ValueTally
from fp4conv.pipeline.measuring.threads import run_tasks
from fp4conv.pipeline.scalars import read_scalar
from fp4conv.plan import block_budget
from fp4conv.report.facts import ErrorFacts, Estimate, ValueFacts
from fp4conv.safetensors_io import Reader


@dataclass(frozen=True)
class TensorMeasure:
    """What was found of one tensor. `unquantisable`: it has values that no trial encoding takes, NaN or Inf."""

    values: ValueFacts
    error: ErrorFacts | None = None
    estimates: tuple[Estimate, ...] = ()
    unquantisable: bool = False


@dataclass(frozen=True)
class Measured:
    """`tensors`: name -> what was found. The rest as in Matched. `notes`: why there are no estimates."""

    tensors: Mapping[str, TensorMeasure]
    only_here: tuple[str, ...] = ()
    only_there: tuple[str, ...] = ()
    apart: tuple[ShapesApart, ...] = ()
    unread: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def measure(
    model: Model,
    *,
    reference: Model | None = None,
    estimate: Sequence[str] = (),
    names: frozenset[str] | None = None,
    with_values: bool = True,
    max_memory: int,
    workers: int,
    on_total: Callable[[int], None] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Measured:
    """Go through the values of `model` (of the weights in `names`) once.

    Gives the facts of each tensor's values (not `with_values=False`), its error against `reference`, and for each
    format in `estimate` the error that a conversion by each of its rules would make. Values that are NaN or Inf are
    counted, never refused. `on_total` is told the bytes that will be read, `on_bytes` those that were.
    """
    matched = match(model, reference, names)
    trials = trials_of(model, estimate) if estimate else Trials()
    budget = block_budget(max_memory, workers, _reserved(matched.pairs, trials, workers))
    jobs = [_Job(pair, trials.by_weight.get(pair.weight.name, ())) for pair in matched.pairs]
    jobs += [_Job(pair, trials.by_weight[pair.weight.name], scan_only=True) for pair in _others(model, jobs, trials)]
    for job in jobs:
        check_fits(job.pair, budget, bool(job.trials))
    if on_total:
        on_total(sum(job.nbytes(trials.groups) for job in jobs))
    with ExitStack() as stack:
        reader = stack.enter_context(model.source.reader())
        other = stack.enter_context(reference.source.reader()) if reference else reader
        runner = _Runner(
            jobs, trials.groups, (reader, other), budget, with_values=with_values, on_bytes=on_bytes or (lambda _: None)
        )
        run_tasks(runner.tasks(), runner.work, workers, local=_Scratches, stop=runner.stop)
    return Measured(runner.results, matched.only_here, matched.only_there, matched.apart, matched.unread, trials.notes)


@dataclass
class _Scratches:
    """The memory of one worker: a side each, and what trial encodings write."""

    own: Scratch = field(default_factory=Scratch)
    other: Scratch = field(default_factory=Scratch)
    trial: Scratch = field(default_factory=Scratch)


@dataclass
class _Job:
    """A pair, and what is known of it while its bands are worked on. `remaining`: bands, once they were cut."""

    pair: Pair
    trials: tuple[Trial, ...]
    remaining: int = 0
    values: ValueTally = field(default_factory=ValueTally)
    blocks: BlockTally | None = None
    error: ErrorTally | None = None
    attempts: dict[Trial, ErrorTally] = field(default_factory=dict)
    scales: tuple[float, float] = (1.0, 1.0)
    unquantisable: bool = False
    scan_only: bool = False  # of a set that was asked for in part: its amax counts

    def nbytes(self, groups: Mapping[str, str]) -> int:
        scanned = self.pair.weight.nbytes if self.pair.weight.name in groups else 0
        return scanned + (0 if self.scan_only else self.pair.nbytes)


@dataclass
class _Set:
    """Weights that share an NVFP4 tensor scale. `amax`: name -> the largest magnitude of its values."""

    jobs: list[_Job]
    remaining: int
    amax: dict[str, float] = field(default_factory=dict)
    ready: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class _Task:
    job: _Job
    band: Band | Flat
    scan: bool = False
    set: _Set | None = None


class _Runner:
    def __init__(
        self,
        jobs: Sequence[_Job],
        groups: Mapping[str, str],
        readers: tuple[Reader, Reader],
        budget: int,
        *,
        with_values: bool,
        on_bytes: Callable[[int], None],
    ) -> None:
        self._jobs = {job.pair.weight.name: job for job in jobs}
        self._groups = groups
        self._readers = readers
        self._budget = budget
        self._with_values = with_values
        self._advance = on_bytes
        self._lock = threading.Lock()
        self.stop = threading.Event()
        self.results: dict[str, TensorMeasure] = {}

    # ---- the order of work: a set is scanned one set ahead, so that it comes from the page cache the second time

    def tasks(self) -> Iterator[_Task]:
        waiting: Iterator[_Task] = iter(())
        for pairs in clusters([job.pair for job in self._jobs.values()], dict(self._groups)):
            jobs = [self._jobs[pair.weight.name] for pair in pairs]
            shared = jobs[0].pair.weight.name in self._groups
            group = _Set(jobs, 0) if shared else None
            if group is not None:
                pieces = [(job, band) for job in jobs for band in self._bands(job)]
                group.remaining = len(pieces)
                yield from (_Task(job, band, True, group) for job, band in pieces)
            yield from waiting
            waiting = self._looks([job for job in jobs if not job.scan_only], group)
        yield from waiting

    def _looks(self, jobs: Sequence[_Job], group: _Set | None) -> Iterator[_Task]:
        for job in jobs:
            pieces = self._bands(job)
            self._open(job)
            job.remaining = len(pieces)
            if not pieces:
                with self._lock:
                    self._close(job)
            yield from (_Task(job, band, False, group) for band in pieces)

    def _bands(self, job: _Job) -> list[Band | Flat]:
        return list(bands(job.pair, self._budget, bool(job.trials)))

    def _open(self, job: _Job) -> None:
        """Make room for its sums and read its scalars; on the thread that asks for the first band."""
        pair, rows = job.pair, sum_rows(job.pair)
        job.scales = (self._tensor_scale(0, pair), self._tensor_scale(1, pair))
        if isinstance(pair.weight.base, Decoded):
            job.blocks = BlockTally(pair.weight.base, job.scales[0])
        if pair.reference is not None:
            job.error = ErrorTally(np.zeros((4, rows)))
        job.attempts = {trial: ErrorTally(np.zeros((4, rows))) for trial in job.trials}

    def _tensor_scale(self, side: int, pair: Pair) -> float:
        """As it is stored, whatever it is: figures of a damaged tensor are figures too."""
        weight = pair.reference if side else pair.weight
        base = weight.base if weight is not None else None
        if not isinstance(base, Decoded) or base.tensor_scale is None:
            return 1.0
        return read_scalar(self._readers[side], base.tensor_scale)

    # ---- one piece

    def work(self, task: _Task, memory: _Scratches) -> None:
        job = task.job
        if task.scan:
            self._scan(task, memory)
            self._advance(_share(task.band, job.pair, job.pair.weight.nbytes))
            return
        if task.set is not None:
            while not task.set.ready.wait(0.1):
                if self.stop.is_set():
                    return
        look = Look(
            job.pair,
            self._own(job, memory),
            self._other(job, memory),
            job.error,
            job.blocks.special if job.blocks else None,
            [(trial, self._trial_scale(trial, task), tally) for trial, tally in job.attempts.items()],
            memory.trial,
            self._with_values,
        )
        found = look_at_flat(look, task.band) if isinstance(task.band, Flat) else look_at_band(look, task.band)
        with self._lock:
            job.values.add(found.values)
            if job.blocks is not None and found.blocks is not None:
                job.blocks.add(found.blocks)
            if job.error is not None:
                job.error.add(found.error, found.pairs)
            for trial, error in found.trials.items():
                job.attempts[trial].add(error, found.pairs)
            job.unquantisable |= found.unquantisable
            job.remaining -= 1
            if not job.remaining:
                self._close(job)
        self._advance(_share(task.band, job.pair, job.pair.nbytes))

    def _own(self, job: _Job, memory: _Scratches) -> Side:
        return Side(job.pair.weight, self._readers[0], memory.own, job.scales[0])

    def _other(self, job: _Job, memory: _Scratches) -> Side | None:
        other = job.pair.reference
        return None if other is None else Side(other, self._readers[1], memory.other, job.scales[1])

    def _scan(self, task: _Task, memory: _Scratches) -> None:
        """The largest magnitude of one piece of a weight whose set shares a tensor scale."""
        job, group = task.job, task.set
        assert group is not None
        look = Look(job.pair, self._own(job, memory), None, None, None, [], memory.trial, True)
        assert isinstance(task.band, Band)
        found = look_at_band(look, task.band)
        tally = ValueTally()
        tally.add(found.values)
        name = job.pair.weight.name
        with self._lock:
            group.amax[name] = max(group.amax.get(name, 0.0), tally.amax)
            group.remaining -= 1
            if not group.remaining:
                group.ready.set()

    def _trial_scale(self, trial: Trial, task: _Task) -> float:
        """The tensor scale that convert would find: from the largest amax of the set, frozen or of its values."""
        if not trial.format.tensor_scale or task.set is None:
            return 1.0
        from fp4conv.codecs.nvfp4 import tensor_scale

        largest = 0.0
        for job in task.set.jobs:
            own = next((each for each in job.trials if (each.format, each.rule) == (trial.format, trial.rule)), None)
            if own is not None and own.amax is not None:
                largest = max(largest, read_scalar(self._readers[0], own.amax))
            else:
                largest = max(largest, task.set.amax.get(job.pair.weight.name, 0.0))
        return tensor_scale(largest, trial.rule)

    def _close(self, job: _Job) -> None:
        """The last piece is done: facts of what was added up. Needs the lock."""
        estimates = (
            ()
            if job.unquantisable
            else tuple(
                Estimate(trial.format.name, trial.rule.value, tally.facts()) for trial, tally in job.attempts.items()
            )
        )
        self.results[job.pair.weight.name] = TensorMeasure(
            job.blocks.facts() if job.blocks else job.values.facts(),
            job.error.facts() if job.error else None,
            estimates,
            job.unquantisable,
        )
        job.error, job.attempts, job.blocks = None, {}, None


def _others(model: Model, jobs: Sequence[_Job], trials: Trials) -> Iterator[Pair]:
    """The weights that share a tensor scale with some that were asked for, and were not asked for themselves."""
    names = {job.pair.weight.name for job in jobs}
    sets = {trials.groups[name] for name in names if name in trials.groups}
    others = frozenset(name for name, group in trials.groups.items() if group in sets and name not in names)
    yield from match(model, None, others).pairs if others else ()


def _share(band: Band | Flat, pair: Pair, nbytes: int) -> int:
    """The part of `nbytes` of a tensor that a piece stands for."""
    if isinstance(band, Flat):
        return nbytes * (band.stop - band.start) // pair.weight.elements
    return nbytes * (band.n1 - band.n0) // (pair.weight.matrices * pair.weight.n)


def _reserved(pairs: Sequence[Pair], trials: Trials, workers: int) -> int:
    """What the sums of rows take: those of the tensors that are worked on at a time."""
    largest = 0
    for pair in pairs:
        sums = (pair.reference is not None) + len(trials.by_weight.get(pair.weight.name, ()))
        largest = max(largest, 4 * 8 * sums * sum_rows(pair))
    return (workers + 1) * largest
