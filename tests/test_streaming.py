"""A run whose result leaves the disk while it is made: never more than the bound, nothing lost, the same bytes."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
from checkpoints import tree
from watching import watched

import fp4conv
from fp4conv.commands.convert import plan_conversion, write_files
from fp4conv.errors import OutputError, PlanError
from fp4conv.pipeline.hint_files import write_hints
from fp4conv.pipeline.holding import Holding
from fp4conv.pipeline.run import run
from fp4conv.plan import Plan
from fp4conv.staging import stage
from fp4conv.streaming import (
    Side,
    disk_bound,
    moments,
    pieces_of,
    resident,
    resident_bytes,
    smallest_disk,
    source_files,
)
from fp4conv.synthetic import write_checkpoint

MEMORY = 1_000_000_000


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "src"
    write_checkpoint(folder, nbytes=24_000_000, family="gpt-oss", seed=3, max_shard_bytes=3_000_000)
    return folder


@pytest.fixture(scope="module")
def four_bits(dense: Path) -> Path:
    """NVFP4, so that a dense result copies every block scale beside it."""
    folder = dense.parent / "nvfp4"
    fp4conv.convert(dense, folder, to="nvfp4", modules="all", max_shard_size="1MB")
    return folder


class Away:
    """Takes each shard to `shelf`, a moment later, and says what it was given."""

    def __init__(self, partial: Path, shelf: Path, sent: Collection[str] = (), stop_after: int | None = None) -> None:
        self.sent = sent
        self.taken: list[str] = []
        self.peak = 0
        self._partial = partial
        self._shelf = shelf
        self._stop_after = stop_after
        self._on_the_way: list[threading.Timer] = []
        shelf.mkdir(exist_ok=True)

    def take(self, file: str, gone: Callable[[], None]) -> None:
        if self._stop_after is not None and len(self.taken) >= self._stop_after:
            raise OutputError("the way is closed")
        self.taken.append(file)
        self._on_the_way.append(threading.Timer(0.05, self._move, (file, gone)))
        self._on_the_way[-1].start()

    def settle(self) -> None:
        """Wait until all that was taken lies on the shelf."""
        for each in self._on_the_way:
            each.join()

    def check(self) -> None:
        """Nothing goes wrong between two shards."""

    def _move(self, file: str, gone: Callable[[], None]) -> None:
        (self._shelf / file).parent.mkdir(exist_ok=True)
        shutil.move(self._partial / file, self._shelf / file)
        gone()


def stream(plan: Plan, target: Path, bound: int, away: Away, workers: int = 2) -> int:
    """Run `plan` within `bound` bytes, all of the result taken away to its shelf; the most that lay there."""
    partial = target.with_name(target.name + ".partial")
    with (
        watched(partial) as peak,
        stage(target, fingerprint=plan.fingerprint, command="test", nbytes=bound) as out,
    ):
        outcome = run(plan, out, max_memory=MEMORY, workers=workers, taker=away, max_disk=bound)
        going = set(plan.shards) - resident(plan)
        while {*away.taken, *away.sent} != going or any(out.path(name).exists() for name in going):
            time.sleep(0.01)
        write_files(plan, out)
        write_hints(plan, out, outcome.results)
        out.commit()
    for path in sorted(target.rglob("*")):
        if path.is_file():
            (away._shelf / path.relative_to(target)).parent.mkdir(exist_ok=True)
            shutil.move(path, away._shelf / path.relative_to(target))
    return peak[0]


@pytest.mark.parametrize(
    ("source", "to", "options"),
    [
        ("dense", "mxfp4", {}),
        ("dense", "nvfp4", {"modules": "all"}),
        ("four_bits", "bf16", {}),
        ("four_bits", "bf16", {"hints": False}),
    ],
)
def test_the_bound_holds_and_the_bytes_are_those_of_a_local_run(
    request: pytest.FixtureRequest, tmp_path: Path, source: str, to: str, options: dict[str, object]
) -> None:
    folder = request.getfixturevalue(source)
    local = tmp_path / "local"
    fp4conv.convert(folder, local, to=to, max_shard_size="500kB", **options)  # type: ignore[arg-type]
    plan = plan_conversion(folder, to=to, max_shard_size="500kB", **options)  # type: ignore[arg-type]
    assert len(plan.shards) > 5
    bound = smallest_disk(plan, {})
    assert bound < plan.total_bytes
    away = Away(tmp_path / "dst.partial", tmp_path / "shelf")
    peak = stream(plan, tmp_path / "dst", bound, away)
    assert peak <= bound
    assert sorted(away.taken) == sorted(set(plan.shards) - resident(plan))
    assert tree(tmp_path / "shelf") == tree(local)


def test_a_stopped_run_goes_on_without_what_was_taken(dense: Path, tmp_path: Path) -> None:
    options = {"to": "nvfp4", "modules": "all", "max_shard_size": "500kB"}
    fp4conv.convert(dense, tmp_path / "local", **options)  # type: ignore[arg-type]
    plan = plan_conversion(dense, **options)  # type: ignore[arg-type]
    bound = smallest_disk(plan, {})
    first = Away(tmp_path / "dst.partial", tmp_path / "shelf", stop_after=3)
    with pytest.raises(OutputError, match="the way is closed"):
        stream(plan, tmp_path / "dst", bound, first)
    first.settle()
    sent = [name for name in first.taken if (tmp_path / "shelf" / name).exists()]
    assert len(sent) >= 3
    second = Away(tmp_path / "dst.partial", tmp_path / "shelf", sent=sent)
    assert stream(plan, tmp_path / "dst", bound, second) <= bound
    assert sorted([*sent, *second.taken]) == sorted(plan.shards)
    assert tree(tmp_path / "shelf") == tree(tmp_path / "local")


def test_a_smaller_bound_on_the_way_makes_the_rest_again(dense: Path, tmp_path: Path) -> None:
    options = {"to": "nvfp4", "modules": "all", "max_shard_size": "500kB"}
    fp4conv.convert(dense, tmp_path / "local", **options)  # type: ignore[arg-type]
    plan = plan_conversion(dense, **options)  # type: ignore[arg-type]
    first = Away(tmp_path / "dst.partial", tmp_path / "shelf", stop_after=2)
    with pytest.raises(OutputError):
        stream(plan, tmp_path / "dst", 10 * smallest_disk(plan, {}), first, workers=4)
    first.settle()
    sent = [name for name in first.taken if (tmp_path / "shelf" / name).exists()]
    bound = smallest_disk(plan, {})
    second = Away(tmp_path / "dst.partial", tmp_path / "shelf", sent=sent)
    stream(plan, tmp_path / "dst", bound, second)
    assert tree(tmp_path / "shelf") == tree(tmp_path / "local")


def test_hint_steps_are_done_beside_what_reads_the_same_file(four_bits: Path) -> None:
    """Else each file of the source would be needed until the end."""
    plan = plan_conversion(four_bits, to="bf16", max_shard_size="500kB")
    order = list(moments(plan.steps))
    assert sorted(moment.key for moment in order) == sorted("step " + step.key for step in plan.steps)
    last = {file: number for number, moment in enumerate(order) for file in source_files(moment.steps[0])}
    assert sorted(last.values()) == list(dict.fromkeys(sorted(last.values())))
    assert min(last.values()) < len(order) / 2


@pytest.mark.parametrize("fetched", [False, True])
def test_the_smallest_disk_is_the_most_that_one_moment_needs(dense: Path, fetched: bool) -> None:
    plan = plan_conversion(dense, to="nvfp4", modules="all", max_shard_size="500kB")
    source = {file.name: file.nbytes for file in plan.model.source.files if file.weights} if fetched else {}
    order = [pieces_of(plan, moment, source) for moment in moments(plan.steps)]
    spans = {
        piece: [number for number, needed in enumerate(order) if piece in needed]
        for needed in order
        for piece in needed
    }
    names = {(piece.side, piece.name) for piece in spans}
    assert names == {(Side.RESULT, name) for name in plan.shards} | {(Side.SOURCE, name) for name in source}
    held = [sum(p.nbytes for p, at in spans.items() if at[0] <= number <= at[-1]) for number in range(len(order))]
    assert smallest_disk(plan, source) == max(held) + resident_bytes(plan)


@pytest.mark.parametrize("fetched", [False, True])
def test_within_the_smallest_disk_the_work_never_stands_still(dense: Path, fetched: bool) -> None:
    """Every moment finds its files as soon as those of all earlier ones are gone; with a byte less, one does not."""
    plan = plan_conversion(dense, to="nvfp4", modules="all", max_shard_size="500kB")
    source = {file.name: file.nbytes for file in plan.model.source.files if file.weights} if fetched else {}
    bound = smallest_disk(plan, source)
    assert not _stuck(plan, Holding(plan, source_bytes=source, bound=bound))
    assert _stuck(plan, Holding(plan, source_bytes=source, bound=bound - 1))


def _stuck(plan: Plan, holding: Holding) -> bool:
    stop = threading.Event()
    stop.set()  # so that a wait looks once
    for moment in moments(plan.steps):
        for name in holding.admitted(Side.SOURCE):
            holding.ready(name)
        if not holding.wait(moment, stop):
            return True
        holding.done(moment.key)
        for piece in holding.take_ended():
            holding.free(piece)
    return False


def test_a_bound_below_the_smallest_is_refused(dense: Path) -> None:
    plan = plan_conversion(dense, to="nvfp4", modules="all", max_shard_size="500kB")
    least = smallest_disk(plan, {})
    assert disk_bound(plan, {}, least) == least
    assert disk_bound(plan, {}, None) == 2 * least
    with pytest.raises(PlanError, match=f"the least that works is --max-disk {-(-least // 10**4) / 100:g}MB"):
        disk_bound(plan, {}, least - 1)
