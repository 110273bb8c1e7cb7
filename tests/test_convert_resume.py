"""The same bytes whatever the workers, the memory and the kills; DST absent until whole; SRC never written."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from checkpoints import bf16, noise, read_raw, tree, write_model

import fp4conv
from fp4conv.errors import PlanError, ResumeError
from fp4conv.pipeline.matrices import Scratch
from fp4conv.plan import BASE_BYTES
from fp4conv.staging import JOURNAL_NAME
from fp4conv.synthetic import write_checkpoint

Reference = Callable[[str], Path]
ROOT = Path(__file__).resolve().parent.parent
LAYER = "model.layers.0"


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows and matrices so large that small memories cut them: dense, and K-major experts; not all rows alike."""
    rng = np.random.default_rng(5)
    experts = rng.standard_normal((3, 512, 768)) * np.exp(rng.standard_normal((3, 1, 768)))
    tensors = {
        f"{LAYER}.self_attn.sinks": noise((4,)),
        f"{LAYER}.mlp.experts.gate_up_proj": bf16(experts),
        f"{LAYER}.mlp.experts.down_proj": bf16(rng.standard_normal((3, 384, 512))),
        f"{LAYER}.self_attn.q_proj.weight": noise((1024, 512), 1),
        f"{LAYER}.self_attn.k_proj.weight": noise((256, 512), 2),
        f"{LAYER}.self_attn.v_proj.weight": noise((256, 512), 3),
        "model.norm.weight": noise((512,), 4),
    }
    folder = tmp_path_factory.mktemp("wide") / "src"
    return write_model(folder, tensors, {"model_type": "gpt_oss", "num_hidden_layers": 1})


@pytest.fixture(scope="module")
def wide_quantised(wide: Path) -> Mapping[str, Path]:
    """The same model in both block formats."""
    made = {name: wide.parent / name for name in ("mxfp4", "nvfp4")}
    for name, folder in made.items():
        fp4conv.convert(wide, folder, to=name)
    return made


CONVERSIONS = [
    ("bf16", "mxfp4", {}),
    ("bf16", "nvfp4", {"modules": "all"}),
    ("bf16", "f16", {}),
    ("mxfp4", "nvfp4", {}),
    ("mxfp4", "bf16", {}),
    ("nvfp4", "bf16", {}),
    ("nvfp4", "mxfp4", {"scale_rule": "even"}),
]


@pytest.mark.parametrize("conversion", CONVERSIONS, ids=lambda conversion: "-".join(conversion[:2]))
def test_bytes_do_not_depend_on_workers_or_memory(
    wide: Path, wide_quantised: Mapping[str, Path], tmp_path: Path, conversion: tuple[str, str, Mapping[str, str]]
) -> None:
    source, to, options = conversion
    folder = {"bf16": wide, **wide_quantised}[source]
    results = {}
    cuts = [
        (1, "1GB"),
        (2, "1GB"),
        (5, "1GB"),
        (1, BASE_BYTES + 1_000_000),
        (3, BASE_BYTES + 3_300_000),
        (2, 417_000_000),
    ]
    for number, (workers, memory) in enumerate(cuts):
        out = tmp_path / str(number)
        result = fp4conv.convert(folder, out, to=to, workers=workers, max_memory=memory, **options)  # type: ignore[arg-type]
        results[number] = (tree(out), result.sqnr_db, result.per_tensor, result.lossy_blocks, result.bytes_written)
    assert len({repr(found) for found in results.values()}) == 1


def test_memory_that_cannot_hold_a_row_is_refused(tmp_path: Path) -> None:
    source = write_model(tmp_path / "src", {"model.layers.0.mlp.down_proj.weight": bf16(np.ones((1, 1_000_000)))})
    with pytest.raises(PlanError, match=r"down_proj.*one row needs"):
        fp4conv.convert(source, tmp_path / "dst", to="nvfp4", workers=1, max_memory=BASE_BYTES + 1_000_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


# ---- kills


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("big") / "src"
    write_checkpoint(folder, nbytes=24_000_000, family="gpt-oss", seed=3, max_shard_bytes=7_000_000)
    return folder


# As the command, with a journal every few milliseconds and a pause a unit, so that a kill finds it half done.
SLOW = """
import importlib, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job, and its children, ignore it
run = importlib.import_module("fp4conv.pipeline.run")
run.CHECKPOINT_SECONDS = 0.01
work = run.work
def slow(*arguments):
    time.sleep(0.015)
    return work(*arguments)
run.work = slow
from fp4conv.cli import main
main()
"""


def start(source: Path, destination: Path, *options: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, "convert", str(source), str(destination), "--quiet", *options],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def journal_lines(destination: Path) -> int:
    try:
        return len((destination.with_name(destination.name + ".partial") / JOURNAL_NAME).read_bytes().splitlines())
    except OSError:
        return 0


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "words",
    ["--to nvfp4 --modules all", "--to mxfp4 --scale-rule even", "--to nvfp4 --max-shard-size 5MB"],
)
def test_sigkill_at_random_moments_then_the_same_command(
    checkpoint: Path, tmp_path: Path, words: str, overwrite: bool
) -> None:
    moments, target = random.Random(words), tmp_path / "dst"
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in checkpoint.iterdir()}
    if overwrite:
        target.mkdir()
        (target / "old.safetensors").write_text("old")
    options = (*words.split(), *["--overwrite"] * overwrite)
    progressed = 0
    for _ in range(3):
        process = start(checkpoint, target, *options, "--workers", str(moments.choice([1, 2, 4])))
        wanted, until = journal_lines(target) + moments.randint(1, 9), time.monotonic() + 60
        while process.poll() is None and journal_lines(target) < wanted and time.monotonic() < until:
            time.sleep(0.003)
        time.sleep(moments.uniform(0, 0.02))
        process.kill()
        process.communicate()
        if process.returncode == 0 or (target / "config.json").exists():
            break
        progressed = max(progressed, journal_lines(target))
        kept = [folder / "old.safetensors" for folder in (target, tmp_path / "dst.replaced")]  # between the two renames
        assert any(path.exists() for path in kept) == overwrite
        assert overwrite or not target.exists()
    assert progressed > 2
    ended = (target / "config.json").exists() and not (target / JOURNAL_NAME).exists()
    if not ended:  # a kill may also come when all is done
        memory = str(BASE_BYTES + moments.choice([5_000_000, 50_000_000, 700_000_000]))
        process = start(checkpoint, target, *options, "--max-memory", memory)
        assert process.communicate()[1] == b""
        assert process.returncode == 0
    given = iter(word.removeprefix("--").replace("-", "_") for word in words.split())
    fp4conv.convert(checkpoint, tmp_path / "whole", **dict(zip(given, given, strict=True)))  # type: ignore[arg-type]
    assert tree(target) == tree(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "whole"]
    assert before == {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in checkpoint.iterdir()}


def test_sqnr_of_a_resumed_run_is_that_of_a_whole_one(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "dst"
    process = start(checkpoint, target, "--to", "mxfp4", "--scale-rule", "even", "--workers", "1")
    until = time.monotonic() + 60
    while journal_lines(target) < 8 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert journal_lines(target) >= 8
    resumed = fp4conv.convert(checkpoint, target, to="mxfp4", scale_rule="even")
    whole = fp4conv.convert(checkpoint, tmp_path / "whole", to="mxfp4", scale_rule="even")
    assert resumed.per_tensor == whole.per_tensor
    assert resumed.sqnr_db == whole.sqnr_db
    assert resumed.bytes_written == whole.bytes_written
    assert 0 < resumed.bytes_read < whole.bytes_read


def interrupted(checkpoint: Path, target: Path) -> None:
    process = start(checkpoint, target, "--to", "mxfp4", "--workers", "1", "--scale-rule", "even")
    until = time.monotonic() + 60
    while journal_lines(target) < 4 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130
    assert b"goes on" in error
    assert b"convert" in error
    assert b"Traceback" not in error


def test_ctrl_c_leaves_what_the_same_command_resumes(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "dst"
    interrupted(checkpoint, target)
    assert not target.exists()
    kept = journal_lines(target)
    assert kept >= 4
    done: list[int] = []
    result = fp4conv.convert(checkpoint, target, to="mxfp4", scale_rule="even", on_bytes=done.append)
    assert done[0] > 0, "what was done before counts at once"
    assert sum(done[1:]) == result.bytes_read, "and is not read again"
    fp4conv.convert(checkpoint, tmp_path / "whole", to="mxfp4", scale_rule="even")
    assert tree(target) == tree(tmp_path / "whole")


def test_another_command_does_not_go_on_from_there(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "dst"
    interrupted(checkpoint, target)
    for options in (
        {"scale_rule": "floor"},
        {"scale_rule": "even", "ties": "down"},
        {"scale_rule": "even", "max_shard_size": "9MB"},
    ):
        with pytest.raises(ResumeError, match=r"dst\.partial"):
            fp4conv.convert(checkpoint, target, to="mxfp4", **options)  # type: ignore[arg-type]
    fp4conv.convert(checkpoint, target, to="nvfp4", scale_rule="amax", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst"]


def test_shard_that_vanished_from_the_partial_is_written_again(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "dst"
    interrupted(checkpoint, target)
    shards = list((tmp_path / "dst.partial").glob("*.safetensors"))
    assert shards
    shards[0].unlink()
    fp4conv.convert(checkpoint, target, to="mxfp4", scale_rule="even")
    fp4conv.convert(checkpoint, tmp_path / "whole", to="mxfp4", scale_rule="even")
    assert tree(target) == tree(tmp_path / "whole")


@pytest.mark.parametrize("case", [("gptoss-mxfp4", "bf16"), ("llama-bf16", "nvfp4"), ("gptoss-mxfp4", "nvfp4")])
@pytest.mark.parametrize("stopped_at", ["the rename", "the end"])
def test_a_run_stopped_when_all_was_written_reads_nothing_again(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: tuple[str, str], stopped_at: str
) -> None:
    """Only the last rename is left, or the removal of the journal: not a byte of the files is written again."""
    name, to = case
    rename, unlink, target = Path.rename, Path.unlink, tmp_path / "dst"

    def stop_rename(path: Path, other: Path) -> Path:
        if stopped_at == "the rename" and path.name == "dst.partial":
            raise KeyboardInterrupt
        return rename(path, other)

    def stop_unlink(path: Path, missing_ok: bool = False) -> None:
        if path == target / JOURNAL_NAME:
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stop_rename)
        patch.setattr(Path, "unlink", stop_unlink)
        with pytest.raises(KeyboardInterrupt):
            fp4conv.convert(reference(name), target, to=to)
    root = target if stopped_at == "the end" else tmp_path / "dst.partial"
    times = {path.name: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    told: list[int] = []
    result = fp4conv.convert(reference(name), target, to=to, on_bytes=told.append)
    assert (result.bytes_read, told) == (0, [])
    assert times.items() >= {path.name: path.stat().st_mtime_ns for path in target.rglob("*") if path.is_file()}.items()
    whole = fp4conv.convert(reference(name), tmp_path / "whole", to=to)
    assert tree(target) == tree(tmp_path / "whole")
    assert result.per_tensor == whole.per_tensor
    assert result.hints == whole.hints
    assert (
        result.bytes_written == whole.bytes_written == sum(p.stat().st_size for p in target.rglob("*") if p.is_file())
    )


def test_what_an_earlier_run_has_done_is_told_apart(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "dst"
    interrupted(checkpoint, target)
    before: list[int] = []
    done: list[int] = []
    result = fp4conv.convert(
        checkpoint, target, to="mxfp4", scale_rule="even", on_bytes=done.append, on_resume=before.append
    )
    assert len(before) == 1
    assert before[0] > 0
    assert sum(done) == result.bytes_read


# ---- atomicity, seen from outside while it runs


@pytest.mark.parametrize("overwrite", [False, True])
def test_destination_is_absent_or_old_until_it_is_whole(reference: Reference, tmp_path: Path, overwrite: bool) -> None:
    target = tmp_path / "dst"
    if overwrite:
        target.mkdir()
        (target / "old.safetensors").write_text("old")
    seen: list[bool] = []
    fp4conv.convert(
        reference("llama-bf16"),
        target,
        to="nvfp4",
        overwrite=overwrite,
        on_bytes=lambda _: seen.append((target / "old.safetensors").exists() if overwrite else not target.exists()),
    )
    assert seen
    assert all(seen)
    assert not (target / "old.safetensors").exists()
    assert (target / "config.json").exists()
    assert not (target / JOURNAL_NAME).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst"]


def test_source_is_never_written(reference: Reference, tmp_path: Path) -> None:
    source = reference("qwen3moe-bf16")
    before, stamps = tree(source), {path: path.stat().st_mtime_ns for path in source.rglob("*")}
    for to in ("bf16", "mxfp4", "nvfp4", "f32"):
        fp4conv.convert(source, tmp_path / to, to=to)
    assert tree(source) == before
    assert stamps == {path: path.stat().st_mtime_ns for path in source.rglob("*")}


def test_progress_adds_up_to_the_bytes_read(reference: Reference, tmp_path: Path) -> None:
    for name, to in (
        ("gptoss-bf16", "nvfp4"),
        ("gptoss-mxfp4", "nvfp4"),
        ("llama-nvfp4-weight-only", "nvfp4"),
        ("gptoss-mxfp4", "f16"),
    ):
        done: list[int] = []
        result = fp4conv.convert(reference(name), tmp_path / f"{name}-{to}", to=to, on_bytes=done.append)
        assert sum(done) == result.bytes_read, (name, to)
        assert result.bytes_written == sum(
            p.stat().st_size for p in (tmp_path / f"{name}-{to}").rglob("*") if p.is_file()
        )
        assert read_raw(tmp_path / f"{name}-{to}")


def test_shard_that_vanished_stays_lost_through_another_kill(checkpoint: Path, tmp_path: Path) -> None:
    """A run that was to write it again is killed as soon as its file is there, full of zeros."""
    target = tmp_path / "dst"
    interrupted(checkpoint, target)
    shard = min((tmp_path / "dst.partial").glob("*.safetensors"))
    shard.unlink()

    def killed(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fp4conv.convert(checkpoint, target, to="mxfp4", scale_rule="even", on_bytes=killed)
    assert shard.exists()
    fp4conv.convert(checkpoint, target, to="mxfp4", scale_rule="even")
    fp4conv.convert(checkpoint, tmp_path / "whole", to="mxfp4", scale_rule="even")
    assert tree(target) == tree(tmp_path / "whole")


def test_memory_does_not_grow_with_the_number_of_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker has one buffer a part: not one for each name, of which Mixtral's experts have many."""
    buffers: list[int] = []

    class Watched(Scratch):
        def array(self, purpose: str, shape: tuple[int, ...], dtype: str) -> npt.NDArray[np.generic]:
            made = super().array(purpose, shape, dtype)
            buffers.append(len(self._held))
            return made

    monkeypatch.setattr("fp4conv.pipeline.run.Scratch", Watched)
    most = []
    for experts in (2, 12):
        names = [f"model.layers.0.block_sparse_moe.experts.{e}.w{i}.weight" for e in range(experts) for i in (1, 2, 3)]
        source = write_model(tmp_path / f"of {experts}", {name: noise((64, 64)) for name in names})
        for to in ("mxfp4", "nvfp4"):
            fp4conv.convert(source, tmp_path / f"{to} of {experts}", to=to, workers=1)
            fp4conv.convert(tmp_path / f"{to} of {experts}", tmp_path / f"{to} of {experts} back", to="bf16", workers=1)
        most.append(max(buffers))
        buffers.clear()
    assert most[0] == most[1]
