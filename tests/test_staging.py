"""The output folder: absent until whole, the same bytes after a kill anywhere, and nothing left behind by a refusal.

The kills run a small writer (four steps, two files) in processes of their own: once at every change that the run
makes to the file system, which Python's audit events name, and at random moments by SIGKILL.
"""

# ruff: noqa: PT012 -- an error raised inside the staging area is what these tests are about

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fp4conv.errors import OutputError, ResumeError, SourceError, ValuesError
from fp4conv.safetensors_io import Writer
from fp4conv.staging import JOURNAL_NAME, Staging, stage

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def staged(
    destination: Path, fingerprint: str = "f", *, overwrite: bool = False, nbytes: int = 100
) -> Iterator[Staging]:
    with stage(
        destination,
        fingerprint=fingerprint,
        command=f"fp4conv convert SRC {destination}",
        nbytes=nbytes,
        overwrite=overwrite,
    ) as out:
        yield out


def everything(folder: Path) -> dict[str, bytes | None]:
    """Every path below `folder` with its bytes; None for a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def leave_half_done(destination: Path, fingerprint: str = "f", *, overwrite: bool = False) -> Path:
    """A DST.partial with one finished step, as an interrupted run leaves it."""
    with staged(destination, fingerprint, overwrite=overwrite) as out:
        out.write_file("half.bin", b"half")
        out.record("one", {"amax": 1.5})
        out.checkpoint()
    return destination.with_name(destination.name + ".partial")


def make_folder(folder: Path, content: str = "old") -> Path:
    folder.mkdir(parents=True)
    (folder / "precious.safetensors").write_text(content)
    return folder


# ---- the plain path


def test_destination_appears_whole_and_alone(tmp_path: Path) -> None:
    target = tmp_path / "new" / "deep" / "dst"
    with staged(target) as out:
        assert out.root == tmp_path / "new" / "deep" / "dst.partial"
        assert out.finished == {}
        assert not out.started
        out.start()
        out.write_file("config.json", b"{}")
        out.write_file("1_Pooling/config.json", b"[]")
        out.record("one", {"x": 1})
        assert not target.exists()
        out.commit()
        assert out.root == target
    assert everything(tmp_path / "new") == {
        "deep": None,
        "deep/dst": None,
        "deep/dst/config.json": b"{}",
        "deep/dst/1_Pooling": None,
        "deep/dst/1_Pooling/config.json": b"[]",
    }


def test_relative_destination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with staged(Path("dst")) as out:
        monkeypatch.chdir("/")
        out.commit()
    assert (tmp_path / "dst").is_dir()


def test_finished_steps_come_back(tmp_path: Path) -> None:
    partial = leave_half_done(tmp_path / "dst")
    assert (partial / "half.bin").read_bytes() == b"half"
    with staged(tmp_path / "dst") as out:
        assert out.finished == {"one": {"amax": 1.5}}
        assert out.started
        assert not out.complete
        out.record("two", {"sqnr_db": float("inf"), "name": "é\n"})
        out.record("three", {})  # never checkpointed, so it is not there next time
        with pytest.raises(OutputError, match="cannot be written: Input/output"):
            out.checkpoint(fail_to_sync)
        out.checkpoint()
        out.record("four", {})
    with staged(tmp_path / "dst") as out:
        assert set(out.finished) == {"one", "two", "three"}
        assert out.finished["two"] == {"sqnr_db": float("inf"), "name": "é\n"}
        out.commit()
    assert everything(tmp_path) == {"dst": None, "dst/half.bin": b"half"}


def fail_to_sync() -> None:
    raise ConnectionError(errno.EIO, os.strerror(errno.EIO))


def test_steps_recorded_while_syncing_wait_for_the_next_checkpoint(tmp_path: Path) -> None:
    with staged(tmp_path / "dst") as out:
        out.record("one", {})
        out.checkpoint(lambda: out.record("late", {}))
    with staged(tmp_path / "dst") as out:
        assert set(out.finished) == {"one"}


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/../../x", "/etc/x", "a\\b", "a\0b", JOURNAL_NAME, f"a/{JOURNAL_NAME}"]
)
def test_names_cannot_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    with staged(tmp_path / "dst") as out, pytest.raises(OutputError, match="not a name for a file inside"):
        out.write_file(name, b"")
    assert everything(tmp_path) == {}


# ---- refusals that leave everything as it was


def refused(destination: Path, **options: object) -> OutputError:
    values: dict[str, object] = {"fingerprint": "f", "command": "c", "nbytes": 100, **options}
    with pytest.raises(OutputError) as caught, stage(destination, **values):  # type: ignore[arg-type]
        pytest.fail("was not refused")
    return caught.value


def test_existing_destination(tmp_path: Path) -> None:
    make_folder(tmp_path / "dst")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "dst")
    before = everything(tmp_path)
    error = refused(tmp_path / "dst")
    assert error.where == str(tmp_path / "dst")
    assert "--overwrite" in str(error.hint)
    assert "is a file" in refused(tmp_path / "file", overwrite=True).what
    assert "symbolic link" in refused(tmp_path / "link", overwrite=True).what
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", [".", "/", "..", "x/.."])
def test_destination_without_a_name(name: str) -> None:
    assert "not a name for a new folder" in refused(Path(name)).what


def test_destination_and_source_apart(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "models" / "src")
    (tmp_path / "alias").symlink_to(tmp_path / "models")
    (tmp_path / "inside").symlink_to(source)
    make_folder(tmp_path / "d.partial" / "src")
    before = everything(tmp_path)
    for destination, message in (
        (source, "is the source itself"),
        (tmp_path / "alias" / "src", "is the source itself"),
        (tmp_path / "models" / ".." / "models" / "src", "is the source itself"),
        (source / "dst", "lies inside the source"),
        (source / "deep" / "dst", "lies inside the source"),
        (tmp_path / "inside" / "dst", "lies inside the source"),
        (tmp_path / "alias" / "src" / "dst", "lies inside the source"),
        (tmp_path / "models", "lies inside it"),
        (tmp_path, "lies inside it"),
    ):
        for root in (source, tmp_path / "alias" / "src"):
            assert message in refused(destination, source_root=root, overwrite=True).what
    nested = tmp_path / "d.partial" / "src"
    assert "lies inside it" in refused(tmp_path / "d", source_root=nested, overwrite=True).what
    assert everything(tmp_path) == before


def test_a_sibling_whose_name_begins_alike_is_apart(tmp_path: Path) -> None:
    make_folder(tmp_path / "src")
    with stage(tmp_path / "src2", fingerprint="f", command="c", nbytes=1, source_root=tmp_path / "src") as out:
        out.commit()
    assert (tmp_path / "src2").is_dir()


def test_disk_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=12_340_000_000))
    error = refused(tmp_path / "new" / "dst", nbytes=65_400_000_000)
    assert error.what == "the disk is too small: 65.4 GB are needed, 12.3 GB are free"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2_000_000))
    error = refused(tmp_path / "new" / "dst", nbytes=8_000_000)
    assert error.what == "the disk is too small: 8.00 MB are needed, 2.00 MB are free"
    assert error.hint
    assert everything(tmp_path) == {}


def test_what_the_partial_holds_counts_as_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = leave_half_done(tmp_path / "dst")
    Writer(partial / "shard", 1 << 20).close()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 19))
    assert "too small" in refused(tmp_path / "other", nbytes=1 << 20).what
    with staged(tmp_path / "dst", nbytes=1 << 20) as out:
        out.commit()


def test_parent_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    error = refused(tmp_path / "file" / "new" / "dst")
    assert "cannot be made" in error.what
    assert everything(tmp_path) == {"file": b""}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_parent_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    assert "cannot be made: Permission denied" in refused(tmp_path / "locked" / "dst").what


def test_mkdir_refused_by_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Path.mkdir

    def refuse_partial(path: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        if path.name.endswith(".partial"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        whole(path, mode, parents, exist_ok)

    monkeypatch.setattr(Path, "mkdir", refuse_partial)
    error = refused(tmp_path / "new" / "dst")
    assert "cannot be made: Permission denied" in error.what
    assert error.hint == "Give another DST."
    assert everything(tmp_path) == {}


# ---- errors inside


def test_error_before_the_first_step_leaves_nothing(tmp_path: Path) -> None:
    for error in (SourceError("bad"), KeyboardInterrupt(), RuntimeError("a bug")):
        with pytest.raises(type(error)) as caught, staged(tmp_path / "a" / "b" / "dst") as out:
            out.write_file("config.json", b"{}")
            raise error
        assert "kept" not in str(caught.value)
        assert everything(tmp_path) == {}


def test_error_after_the_start_keeps_the_work_and_says_so(tmp_path: Path) -> None:
    target = tmp_path / "dst"
    with pytest.raises(SourceError) as caught, staged(target) as out:
        out.start()
        raise SourceError("bad", hint="Mend it.")
    assert str(caught.value).splitlines()[1:] == [
        "  Mend it.",
        f"  What is done is kept in {target}.partial. The same command goes on from there:",
        f"    fp4conv convert SRC {target}",
    ]
    with pytest.raises(KeyboardInterrupt, match="The same command goes on"), staged(target) as out:
        out.record("one", {})
        out.checkpoint()
        raise KeyboardInterrupt
    with pytest.raises(OutputError, match="The same command goes on"), staged(target) as out:
        assert set(out.finished) == {"one"}
        raise OutputError("disk full")
    assert (tmp_path / "dst.partial").is_dir()


def test_a_value_that_cannot_be_written_is_answered_with_what_other_options_need(tmp_path: Path) -> None:
    """The same command would fail again; another one is refused beside what was done, unless it says --overwrite."""
    target = tmp_path / "dst"
    with pytest.raises(ValuesError) as caught, staged(target) as out:
        out.start()
        raise ValuesError("NaN", hint="--exclude it")
    assert str(caught.value).splitlines()[1:] == [
        "  --exclude it",
        "  Other options begin anew, and need --overwrite.",
        f"  What is done is kept in {target}.partial. The same command goes on from there:",
        f"    fp4conv convert SRC {target}",
    ]


def test_leaving_without_commit_keeps_only_started_work(tmp_path: Path) -> None:
    with staged(tmp_path / "dst") as out:
        out.write_file("config.json", b"{}")
    assert everything(tmp_path) == {}
    with staged(tmp_path / "dst") as out:
        out.start()
    assert (tmp_path / "dst.partial").is_dir()


def test_destination_that_appears_meanwhile_is_not_lost(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="appeared while"), staged(tmp_path / "dst") as out:
        make_folder(tmp_path / "dst")
        out.commit()
    assert (tmp_path / "dst" / "precious.safetensors").read_text() == "old"
    shutil.rmtree(tmp_path / "dst")
    with staged(tmp_path / "dst") as out:
        assert out.complete
        out.commit()
    assert everything(tmp_path) == {"dst": None}


# ---- whose half-done folder it is


def test_half_done_folder_of_another_command(tmp_path: Path) -> None:
    partial = leave_half_done(tmp_path / "dst", "first")
    before = everything(tmp_path)
    error = refused(tmp_path / "dst", fingerprint="second")
    assert isinstance(error, ResumeError)
    assert f"another command:\n    fp4conv convert SRC {tmp_path / 'dst'}" in error.what
    assert "Run that command" in str(error.hint)
    assert f"delete {partial}" in str(error.hint)
    assert "--overwrite" in str(error.hint)
    with pytest.raises(ResumeError, match="the source or fp4conv has changed") as caught, staged(tmp_path / "dst", "2"):
        pass
    assert "Run that command" not in str(caught.value)
    assert f"delete {partial}" in str(caught.value.hint)
    assert "--overwrite" in str(caught.value.hint)
    assert everything(tmp_path) == before
    with staged(tmp_path / "dst", "second", overwrite=True) as out:
        assert out.finished == {}
        assert set(everything(partial)) == {JOURNAL_NAME}
        out.commit()
    assert everything(tmp_path) == {"dst": None}


def test_folder_in_the_way_that_is_not_ours_is_never_removed(tmp_path: Path) -> None:
    make_folder(tmp_path / "dst.partial")
    error = refused(tmp_path / "dst", overwrite=True)
    assert isinstance(error, ResumeError)
    assert "no journal" in error.what
    (tmp_path / "dst.partial" / JOURNAL_NAME).write_text('{"fp4conv": 2}\n')
    assert "no journal" in refused(tmp_path / "dst", overwrite=True).what
    assert (tmp_path / "dst.partial" / "precious.safetensors").exists()
    make_folder(tmp_path / "x")
    make_folder(tmp_path / "x.replaced")
    error = refused(tmp_path / "x", overwrite=True)
    assert error.where == str(tmp_path / "x.replaced")
    assert (tmp_path / "x.replaced" / "precious.safetensors").exists()
    assert not (tmp_path / "x.partial").exists()


def test_empty_leftovers_of_a_kill_are_taken(tmp_path: Path) -> None:
    (tmp_path / "dst.partial").mkdir()
    with staged(tmp_path / "dst") as out:
        out.commit()
    (tmp_path / "b.partial").mkdir()
    (tmp_path / "b.partial" / JOURNAL_NAME).write_text('{"fp4conv": 1, "fing')
    with staged(tmp_path / "b") as out:
        out.commit()
    assert everything(tmp_path) == {"dst": None, "b": None}


@pytest.mark.parametrize(
    "torn", ['{"done": "two", "payl', '{"done": "two", "payload": {}}', "\0" * 40, '{"other": 1}\n']
)
def test_torn_tail_is_ignored(tmp_path: Path, torn: str) -> None:
    journal = leave_half_done(tmp_path / "dst") / JOURNAL_NAME
    whole = journal.read_text()
    journal.write_text(whole + torn)
    with staged(tmp_path / "dst") as out:
        assert set(out.finished) == {"one"}
        out.record("three", {})
        out.checkpoint()
    assert journal.read_text().startswith(whole)
    assert [json.loads(line).get("done") for line in journal.read_text().splitlines()] == [None, "one", "three"]


def test_running_process_holds_the_folder(tmp_path: Path) -> None:
    with staged(tmp_path / "dst"):
        for overwrite in (False, True):
            error = refused(tmp_path / "dst", fingerprint="other", overwrite=overwrite)
            assert isinstance(error, ResumeError)
            assert "a running process" in error.what
        assert (tmp_path / "dst.partial" / JOURNAL_NAME).exists()
    assert everything(tmp_path) == {}


# ---- overwrite


def test_overwrite_keeps_the_old_until_the_new_is_whole(tmp_path: Path) -> None:
    make_folder(tmp_path / "dst")
    with staged(tmp_path / "dst", overwrite=True) as out:
        out.write_file("new", b"new")
        assert (tmp_path / "dst" / "precious.safetensors").read_text() == "old"
        out.commit()
    assert everything(tmp_path) == {"dst": None, "dst/new": b"new"}


def test_failed_overwrite_leaves_the_old(tmp_path: Path) -> None:
    make_folder(tmp_path / "dst")
    with pytest.raises(SourceError), staged(tmp_path / "dst", overwrite=True):
        raise SourceError("bad")
    assert everything(tmp_path) == {"dst": None, "dst/precious.safetensors": b"old"}


def killed_between_the_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "dst")
    whole = Path.rename

    def stop_at_second(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise KeyboardInterrupt
        return whole(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stop_at_second)
        with pytest.raises(KeyboardInterrupt), staged(tmp_path / "dst", overwrite=True) as out:
            out.write_file("new", b"new")
            out.commit()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst.partial", "dst.replaced"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_swap_is_finished_by_the_same_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool) -> None:
    killed_between_the_renames(tmp_path, monkeypatch)
    with staged(tmp_path / "dst", overwrite=overwrite) as out:
        assert out.complete
        out.commit()
    assert everything(tmp_path) == {"dst": None, "dst/new": b"new"}


def test_swap_is_undone_by_another_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed_between_the_renames(tmp_path, monkeypatch)
    assert isinstance(refused(tmp_path / "dst", fingerprint="other"), ResumeError)
    assert (tmp_path / "dst" / "precious.safetensors").read_text() == "old"
    with staged(tmp_path / "dst", "other", overwrite=True) as out:
        assert (tmp_path / "dst" / "precious.safetensors").read_text() == "old"
        assert not out.complete
        out.commit()
    assert everything(tmp_path) == {"dst": None}


def test_folder_called_replaced_that_is_not_ours_survives_the_swap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_between_the_renames(tmp_path, monkeypatch)
    (tmp_path / "dst.replaced").rename(tmp_path / "elsewhere")
    make_folder(tmp_path / "dst.replaced", "mine")
    with staged(tmp_path / "dst", overwrite=True) as out:
        out.commit()
    assert (tmp_path / "dst.replaced" / "precious.safetensors").read_text() == "mine"


# ---- kills

WRITER = """
import os, sys
from pathlib import Path
from fp4conv.safetensors_io import Writer
from fp4conv.staging import stage

STEPS, STEP_BYTES = 4, 4096

def run(destination, fingerprint, overwrite, pause=lambda: None):
    with stage(Path(destination), fingerprint=fingerprint, command="c", nbytes=STEPS * STEP_BYTES,
               overwrite=overwrite) as out:
        if out.complete:
            return out.commit()
        out.start()
        with Writer(out.root / "shard", STEPS * STEP_BYTES) as writer:
            for step in range(STEPS):
                if str(step) in out.finished:
                    assert writer.reused
                    continue
                pause()
                writer.write(step * STEP_BYTES, bytes([65 + step]) * STEP_BYTES)
                out.record(str(step), {})
                pause()
                out.checkpoint(writer.sync)
        out.write_file("config.json", fingerprint.encode())
        out.commit()
"""

# Audit events that come just before a change to the file system, and opens that create.
KILLER = '''
EVENTS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}

def die_at(count, events=EVENTS):
    seen = 0
    def hook(event, args):
        nonlocal seen
        if event in events or events is EVENTS and event == "open" and args[2] & os.O_CREAT:
            seen += 1
            if seen == count:
                os._exit(9)
    sys.addaudithook(hook)

def child(count, *args, events=EVENTS):
    """Runs the writer in a fork that dies at change `count` of those in `events`; its exit status."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            die_at(count, events)
            run(*args)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

def everything(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
'''

EVERY_CHANGE = """
root = Path(sys.argv[1])
expected = {"dst/shard": b"".join(bytes([65 + step]) * STEP_BYTES for step in range(STEPS)), "dst/config.json": b"f"}

def scene(number, old):
    folder = root / f"{old}{number}"
    folder.mkdir()
    if old != "nothing":
        (folder / "dst" / "1_sub").mkdir(parents=True)
        (folder / "dst" / "precious.safetensors").write_bytes(b"old")
        (folder / "dst" / "1_sub" / "file").write_bytes(b"old")
    if old == "foreign":  # dies when every step is done
        assert child(1, folder / "dst", "another", True, events={"os.rename"}) == 9
        assert (folder / "dst.partial" / "shard").exists() and (folder / "dst").exists()
    if old == "swapping":  # dies between its two renames
        assert child(2, folder / "dst", "another", True, events={"os.rename"}) == 9
        assert (folder / "dst.partial" / "shard").exists() and (folder / "dst.replaced").exists()
    return folder

for old in ("nothing", "folder", "foreign", "swapping"):
    overwrite = old != "nothing"
    number = 0
    while True:
        number += 1
        folder = scene(number, old)
        status = child(number, folder / "dst", "f", overwrite)
        assert status in (0, 9), (old, number, status)
        names = sorted(path.name for path in folder.iterdir())
        whole = {k: v for k, v in everything(folder).items() if k.startswith("dst/") and ".fp4conv" not in k}
        was = {"dst/precious.safetensors": b"old", "dst/1_sub/file": b"old"} if overwrite else {}
        assert whole in (expected, was) or (overwrite and not whole and "dst.replaced" in names), (old, number, whole)
        last = status
        if status and number % 3 == 0:
            last = child(number // 2 + 1, folder / "dst", "f", overwrite)  # killed once more on the way
        if last:
            run(folder / "dst", "f", overwrite)
        assert everything(folder) == expected, (old, number, everything(folder).keys())
        assert [path.name for path in folder.iterdir()] == ["dst"], (old, number)
        if status == 0:
            break
    print(old, number)
"""

RANDOM = """
import time
def pause():
    time.sleep(0.004)
print("ready", flush=True)
run(sys.argv[1], "f", sys.argv[2] == "overwrite", pause)
"""


def script_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def test_a_kill_at_any_change_to_the_disk_is_resumed_to_the_same_bytes(tmp_path: Path) -> None:
    """With no DST before, with one to overwrite, and with what another command left when it was killed as well."""
    result = subprocess.run(
        [sys.executable, "-c", WRITER + KILLER + EVERY_CHANGE, str(tmp_path)],
        env=script_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    counts = {line.split()[0]: int(line.split()[1]) for line in result.stdout.splitlines()}
    assert counts["nothing"] >= 8  # the last number is the run that nothing killed
    assert counts["folder"] > counts["nothing"]


@pytest.mark.parametrize("old", ["nothing", "overwrite"])
def test_sigkill_at_random_moments_is_resumed_to_the_same_bytes(tmp_path: Path, old: str) -> None:
    target = tmp_path / "dst"
    if old == "overwrite":
        make_folder(target)
    shard = b"".join(bytes([65 + step]) * 4096 for step in range(4))
    done = {"dst": None, "dst/shard": shard, "dst/config.json": b"f"}
    moments = random.Random(7)
    for kills in range(40):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER + RANDOM, str(target), old],
            env=script_environment(),
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        with process.stdout:
            process.stdout.readline()
            if kills < 6:
                time.sleep(moments.uniform(0, 0.03))
                process.send_signal(signal.SIGKILL)
            status = process.wait(timeout=60)
        if everything(tmp_path) == done:  # also when the kill came a moment after the end
            break
        assert status == -signal.SIGKILL
        old_or_new = (
            target / "precious.safetensors",
            target / "shard",
            tmp_path / "dst.replaced" / "precious.safetensors",
        )
        assert old == "nothing" or any(path.exists() for path in old_or_new)
    else:
        pytest.fail("never finished")


# ---- what an overwrite may remove


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["notes.txt", "docs/thesis.txt"], "neither config.json nor safetensors"),
        (["config.json", "docs/thesis.txt"], "docs"),
        (["model.safetensors", ".git/HEAD"], ".git"),
        (["thesis.txt"], "neither config.json nor safetensors"),
    ],
)
def test_overwrite_removes_nothing_that_is_no_checkpoint(tmp_path: Path, files: list[str], says: str) -> None:
    for name in files:
        (tmp_path / "dst" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "dst" / name).write_text("mine")
    before = everything(tmp_path)
    error = refused(tmp_path / "dst", overwrite=True)
    assert error.where == str(tmp_path / "dst")
    assert says in error.what
    assert everything(tmp_path) == before


def test_overwrite_takes_the_folders_of_a_checkpoint_and_empty_ones(tmp_path: Path) -> None:
    for name in ("config.json", "1_Pooling/config.json", "fp4conv/facts.json", "additional_chat_templates/a.jinja"):
        (tmp_path / "dst" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "dst" / name).write_text("{}")
    (tmp_path / "empty").mkdir()
    for name in ("dst", "empty"):
        with staged(tmp_path / name, overwrite=True) as out:
            out.commit()
    assert everything(tmp_path) == {"dst": None, "empty": None}


def test_what_takes_the_destinations_place_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="would remove it"), staged(tmp_path / "dst", overwrite=True) as out:
        (tmp_path / "dst").mkdir()
        (tmp_path / "dst" / "thesis.txt").write_text("mine")
        out.commit()
    assert (tmp_path / "dst" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["d" * 247, "d" * 300, "d/" * 2_500 + "d", "half\ud800", "d" * 300 + "/d"])
def test_names_that_no_file_system_takes(tmp_path: Path, name: str) -> None:
    assert "cannot be made" in refused(tmp_path / name).what
    assert everything(tmp_path) == {}


def test_a_loop_of_links_above_the_destination(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "cannot be made" in refused(tmp_path / "loop" / "dst").what


def test_the_longest_name_that_fits(tmp_path: Path) -> None:
    with staged(tmp_path / ("d" * 246)) as out:
        out.commit()
    assert everything(tmp_path) == {"d" * 246: None}
