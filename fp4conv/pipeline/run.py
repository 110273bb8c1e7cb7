"""Run a plan on one machine: workers take pieces in order; the journal says what is done and safe.

Every output byte has a known place, so there is no queue of results and no order among workers. A set's scan
comes one set ahead of its encoding: by the time a worker needs a tensor scale it is nearly always there, and
the source's bytes are still in the page cache when they are read the second time.
"""

from __future__ import annotations

import math
import struct
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeAlias

from fp4conv.hints.runs import runs_from
from fp4conv.hints.values import LOG
from fp4conv.layouts.parts import TENSOR_SCALE
from fp4conv.model import JSON
from fp4conv.pipeline.bench import Bench, Counts, Progress, TensorScale
from fp4conv.pipeline.factors import Factors
from fp4conv.pipeline.hint_log import HintLog
from fp4conv.pipeline.holding import Holding
from fp4conv.pipeline.matrices import Scratch
from fp4conv.pipeline.operations import work
from fp4conv.pipeline.results import Outcome, StepResult
from fp4conv.pipeline.scalars import scale_of
from fp4conv.pipeline.scales import Scan
from fp4conv.pipeline.settle import reciprocal, turned_over
from fp4conv.pipeline.shelf import Shelf
from fp4conv.pipeline.supply import Supply
from fp4conv.plan import (
    Output,
    Plan,
    Reciprocal,
    ScaleOf,
    Span,
    Step,
    Unit,
    adapter_bytes,
    block_budget,
    reserved_bytes,
    units,
)
from fp4conv.safetensors_io import DTYPE_BYTES, TensorRef
from fp4conv.staging import Staging
from fp4conv.streaming import SCALE, STEP, Moment, Side, moments, resident

CHECKPOINT_SECONDS = 2.0

Told: TypeAlias = Callable[[int], None]


class Taker(Protocol):
    """Who gets the shards of the result as they become whole, while others are made; but for those of hints."""

    @property
    def sent(self) -> Collection[str]:
        """Files that it had for good before this run began: they are not on the disk, and not to be made again."""
        ...

    def take(self, file: str, gone: Callable[[], None]) -> None:
        """`file` is whole and on the disk, and nothing writes to it any more. `gone`: it takes no room any more."""
        ...

    def check(self) -> None:
        """Raise what went wrong with it since it was last asked."""
        ...


@dataclass(frozen=True)
class _Task:
    """One piece of a moment's work: of a step, or (with `scan`) of the search for a tensor scale."""

    piece: Unit | Span
    moment: Moment
    scan: Scan | None = None


def run(
    plan: Plan,
    out: Staging,
    *,
    max_memory: int,
    workers: int,
    progress: Told | None = None,
    resumed: Told | None = None,
    taker: Taker | None = None,
    supply: Supply | None = None,
    max_disk: int | None = None,
) -> Outcome:
    """Write every shard of `plan` into `out`. `progress` is called with bytes of the source as they are done.

    `resumed` is called once with those that an earlier run has done; where it is None, `progress` is. `taker` gets
    each shard when it is whole. `supply` brings the source's files, where they are not here. With `max_disk`, no more
    bytes lie on the disk at any time; the caller has checked that this is enough (`streaming.smallest_disk`).
    On any error, or Ctrl-C, what is done is journalled before the exception goes on.
    """
    budget = block_budget(max_memory, workers, reserved_bytes(plan, workers))
    with ExitStack() as stack:
        reader = stack.enter_context(supply.reader() if supply else plan.model.source.reader())
        brought = supply.source_bytes if supply else {}
        out.start()
        sent = frozenset(taker.sent if taker else ())
        log = HintLog(out.path(LOG)) if plan.kept else None
        if log is not None:
            stack.callback(log.close)
        out.forget(_lost_steps(plan, out, log, sent))
        holding = Holding(plan, source_bytes=brought, bound=max_disk, finished=out.finished, sent=sent)
        if _drop_unadmitted(plan, out, holding, sent):
            out.forget(_lost_steps(plan, out, log, sent))
            holding = Holding(plan, source_bytes=brought, bound=max_disk, finished=out.finished, sent=sent)
        finished = out.finished
        if log is not None:
            log.go_on_after(run for payload in finished.values() for run in runs_from(payload.get("runs")))
        shelf = stack.enter_context(Shelf(plan, out, sent=sent))
        if not holding.bounded:
            shelf.open_all()
        bench = Bench(plan, reader, shelf, Factors(reader, 2 * plan.factor_bytes), {}, log)
        tell = progress or (lambda _: None)
        runner = _Runner(bench, out, budget=budget, progress=tell, holding=holding, taker=taker, supply=supply)
        runner.take_over(finished, resumed)
        if supply is not None:
            stack.callback(supply.stop)
            supply.start(holding)
        runner.run(workers)
        return _outcome(runner.results, runner.scales, runner.bytes_read)


def whole_already(plan: Plan, out: Staging) -> Outcome | None:
    """What an earlier run measured that wrote every file and was stopped before the last rename; else None."""
    there = not _missing(plan, out, frozenset()) and all(out.path(file.name).is_file() for file in plan.files)
    if not out.complete or not there:
        return None
    return _outcome(*_from_journal(out.finished), bytes_read=0)


def _outcome(results: Mapping[str, StepResult], scales: Mapping[str, TensorScale], bytes_read: int) -> Outcome:
    hinted = {group: scale.hinted for group, scale in scales.items() if scale.hinted is not None}
    used = sum(map(bool, hinted.values()))
    split = tuple(sorted(group for group, members in hinted.items() if len(set(members.values())) > 1))
    return Outcome(results, used, len(hinted) - used, bytes_read, split)


def _from_journal(
    finished: Mapping[str, Mapping[str, JSON]],
) -> tuple[dict[str, StepResult], dict[str, TensorScale]]:
    """What finished steps measured, and the tensor scales that were found."""
    results, scales = {}, {}
    for key, payload in finished.items():
        if key.startswith(SCALE):
            scales[key.removeprefix(SCALE)] = _scale_from(payload)
        elif key.startswith(STEP):
            results[key.removeprefix(STEP)] = StepResult.from_payload(payload)
    return results, scales


def _missing(plan: Plan, out: Staging, sent: frozenset[str]) -> set[str]:
    """Shards that are gone, or not as this plan made them; but for those that were `sent`."""

    def is_there(file: str) -> bool:
        path = out.path(file)
        return path.is_file() and path.stat().st_size == plan.shards[file].nbytes

    return {file for file in plan.shards if file not in sent and not is_there(file)}


def _drop_unadmitted(plan: Plan, out: Staging, holding: Holding, sent: frozenset[str]) -> bool:
    """Remove shards of an earlier run that a smaller bound has no room for yet; whether there were any."""
    kept = {*holding.admitted(Side.RESULT), *sent, *resident(plan)}
    there = [out.path(name) for name in plan.shards if name not in kept and out.path(name).exists()]
    for path in there:
        path.unlink()
    return bool(there)


def _lost_steps(plan: Plan, out: Staging, log: HintLog | None, sent: frozenset[str]) -> list[str]:
    """Steps that the journal calls done, but whose files are gone, or are not as this plan made them."""
    missing = _missing(plan, out, sent)
    lost = {STEP + step.key for step in plan.steps if any(output.file in missing for output in step.outputs)}
    if log is not None:
        runs = {key: runs_from(payload.get("runs")) for key, payload in out.finished.items()}
        lost |= {key for key, found in runs.items() if not log.holds(found)}
    return sorted(lost & set(out.finished))


class _Runner:
    def __init__(
        self,
        bench: Bench,
        out: Staging,
        *,
        budget: int,
        progress: Told,
        holding: Holding,
        taker: Taker | None,
        supply: Supply | None,
    ) -> None:
        self._bench = bench
        self._out = out
        self._budget = budget
        self._advance = progress
        self._holding = holding
        self._taker = taker
        self._supply = supply
        self._scans: dict[str, Scan] = {}
        self._states: dict[str, Progress] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._errors: list[BaseException] = []
        self._todo: Sequence[Step] = bench.plan.steps
        self._tasks = self._make_tasks()
        self.results: dict[str, StepResult] = {}
        self.bytes_read = 0

    @property
    def scales(self) -> Mapping[str, TensorScale]:
        return self._bench.scales

    def take_over(self, finished: Mapping[str, Mapping[str, JSON]], resumed: Told | None) -> None:
        """Leave out what an earlier run has done, and count it as progress."""
        plan = self._bench.plan
        self._todo = [step for step in plan.steps if STEP + step.key not in finished]
        self.results, scales = _from_journal(finished)
        self._bench.scales.update(scales)
        left = sum(step.bytes_read for step in self._todo)
        left += sum(step.scan_bytes for step in self._todo if step.group not in scales)
        self.bytes_read = left + adapter_bytes(self._todo)
        tell = resumed if resumed is not None and finished else self._advance
        tell(plan.bytes_read - left)

    # ---- the order of work

    def _make_tasks(self) -> Iterator[_Task]:
        for moment in moments(self._todo, frozenset(self._bench.scales)):
            group = moment.group
            if group is None:
                yield from self._step_tasks(moment)
                continue
            scan = self._scans[group] = Scan(group, moment.steps, self._budget, self._bench.plan.hints.weights)
            yield from (_Task(piece, moment, scan) for piece in scan.pieces())

    def _step_tasks(self, moment: Moment) -> Iterator[_Task]:
        (step,) = moment.steps
        pieces = list(units(step, self._budget))
        rows = step.weight.matrices * step.weight.n if step.weight and step.weight.is_matrix else 0
        self._states[step.key] = Progress(rows, remaining=max(1, len(pieces)))
        if not pieces:  # a tensor without elements, or one whose bytes the plan knows
            pieces = [Span(step, 0, 0, 0)]
        yield from (_Task(piece, moment) for piece in pieces)

    # ---- threads

    def run(self, workers: int) -> None:
        threads = [threading.Thread(target=self._work, name=f"fp4conv-{i}", daemon=True) for i in range(workers)]
        for thread in threads:
            thread.start()
        try:
            last = time.monotonic()
            while any(thread.is_alive() for thread in threads):
                for thread in threads:
                    thread.join(0.05)
                if self._taker is not None:
                    self._taker.check()
                if self._supply is not None:
                    self._supply.check()
                starved = self._holding.bounded and self._holding.has_ended  # others may wait for its room
                if starved or time.monotonic() - last >= CHECKPOINT_SECONDS:
                    self._checkpoint()
                    last = time.monotonic()
        except BaseException as error:  # noqa: BLE001 - raised again below, after what is done was kept
            self._errors.insert(0, error)
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()
            self._checkpoint()
        if self._errors:
            raise self._errors[0]

    def _checkpoint(self) -> None:
        """Put everything written on the disk, journal it, and let go of the files that are then done with."""
        ended = self._holding.take_ended()
        syncs = self._bench.writers.syncs()
        self._out.checkpoint(*syncs, *([self._bench.log.sync] if self._bench.log else []))
        for piece in ended:
            if piece.side is Side.SOURCE:
                assert self._supply is not None, "nobody else brings files"
                self._supply.drop(piece.name)
                self._holding.free(piece)
            else:
                self._bench.writers.close(piece.name)
                if self._taker is not None:
                    self._taker.take(piece.name, partial(self._holding.free, piece))

    def _work(self) -> None:
        scratch = Scratch()
        try:
            while not self._stop.is_set():
                with self._lock:
                    task = next(self._tasks, None)
                if task is None:
                    return
                self._do(task, scratch)
        except BaseException as error:  # noqa: BLE001 - handed to the main thread, which raises it
            with self._lock:
                self._errors.append(error)
            self._stop.set()

    def _do(self, task: _Task, scratch: Scratch) -> None:
        step = task.piece.step
        if not self._holding.wait(task.moment, self._stop):
            return
        if task.scan is not None:
            scale = task.scan.look(self._bench, task.piece, scratch)
            if scale is not None:
                self._bench.scales[task.scan.group] = scale
                self._out.record(task.moment.key, _scale_payload(scale))
                self._holding.done(task.moment.key)
                task.scan.ready.set()
        else:
            if step.group and step.group not in self._bench.scales:
                while not self._scans[step.group].ready.wait(0.1):
                    if self._stop.is_set():
                        return
            state = self._states[step.key]
            counts = work(self._bench, task.piece, state, scratch) if _has_work(task.piece) else {}
            with self._lock:
                self._complete_piece(step, state, counts)
        self._advance(_source_bytes(task))

    def _complete_piece(self, step: Step, state: Progress, counts: Counts) -> None:
        """Count one piece as done; after the last one, write what is left of the step and record it. Needs the lock."""
        state.counts.update(counts)
        state.remaining -= 1
        if state.remaining:
            return
        self._write_known(step)
        # fsum rounds once, so the order in which rows were done does not show
        result = StepResult(
            {name: math.fsum(rows.tolist()) for name, rows in state.sums.items()},
            dict(state.counts),
            tuple(sorted(state.runs)),
        )
        self.results[step.key] = result
        del self._states[step.key]
        self._out.record(STEP + step.key, result.payload())
        self._holding.done(STEP + step.key)

    def _write_known(self, step: Step) -> None:
        """The bytes that the plan knows, and the tensor scale that the scan found."""
        for output in step.outputs:
            content = self._known_bytes(step, output)
            if content is not None:
                self._bench.writers[output.file].write(output.offset, content)

    def _known_bytes(self, step: Step, output: Output) -> bytes | None:
        origin = output.origin
        if isinstance(origin, bytes):
            return origin
        if isinstance(origin, Reciprocal):
            return f32_bytes(turned_over(self._bench.reader, origin))
        if isinstance(origin, ScaleOf):
            value = scale_of(self._bench, origin)
        elif origin is None and output.part.kind == TENSOR_SCALE:
            assert step.group is not None
            found = self._bench.scales[step.group]
            value = (found.hinted or {}).get(step.key, found.value)
            if found.hinted and self._bench.plan.hints.weights[step.key].inverse:
                return f32_bytes(value if output.part.inverse else reciprocal(value, step.key))
        else:
            return None
        return f32_bytes(reciprocal(value, step.key) if output.part.inverse else value)


def _has_work(piece: Unit | Span) -> bool:
    return isinstance(piece, Unit) or piece.stop > piece.start


def _source_bytes(task: _Task) -> int:
    """Bytes of the source that a task has dealt with, so that they add up to the plan's total."""
    piece, step = task.piece, task.piece.step
    if isinstance(piece, Span):
        origin = step.outputs[piece.output].origin
        ref = origin if isinstance(origin, TensorRef) else (step.weight.value.refs[0] if step.weight else None)
        return (piece.stop - piece.start) * (DTYPE_BYTES[ref.spec.dtype] if ref else 0)
    assert step.weight is not None
    return step.weight.nbytes * (piece.n1 - piece.n0) // (step.weight.matrices * step.weight.n)


def f32_bytes(value: float) -> bytes:
    return struct.pack("<f", value)


# ---- the journal's payloads; float.hex keeps every bit


def _scale_payload(scale: TensorScale) -> dict[str, JSON]:
    trained: dict[str, JSON] = {key: value.hex() for key, value in scale.trained.items()}
    payload: dict[str, JSON] = {"value": scale.value.hex(), "exponent": scale.exponent, "trained": trained}
    hinted = scale.hinted
    payload["hinted"] = None if hinted is None else {key: value.hex() for key, value in hinted.items()}
    return payload


def _scale_from(payload: Mapping[str, JSON]) -> TensorScale:
    exponent, trained, hinted = payload["exponent"], payload["trained"], payload.get("hinted")
    assert isinstance(trained, dict)
    return TensorScale(
        float.fromhex(str(payload["value"])),
        exponent if isinstance(exponent, int) else None,
        {key: float.fromhex(str(value)) for key, value in trained.items()},
        {key: float.fromhex(str(value)) for key, value in hinted.items()} if isinstance(hinted, dict) else None,
    )
