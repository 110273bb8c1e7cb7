"""Where machine code is kept between runs, and that no place is needed to run. Each case is a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "fp4conv"

# One small kernel, so that compiling costs little.
SCRIPT = """
import json, sys
import numpy as np, numba
from fp4conv.kernels import jit
cold = jit.is_cold()
from fp4conv.kernels import compiled, scan
out = np.empty(2, np.float32)
compiled.cast_bf16_to_f32(np.array([0x3F80, 0xC000], np.uint16), out)
hits = sum(scan.to_f32.stats.cache_hits.values())
print(json.dumps(dict(values=out.tolist(), hits=hits, cold=cold, note=jit.cache_note(),
                      path=scan.to_f32.stats.cache_path, numba_dir=numba.config.CACHE_DIR)))
"""


@dataclass(frozen=True)
class Run:
    values: list[float]
    hits: int
    cold: bool
    note: str | None
    path: str | None
    numba_dir: str


def run(root: Path, **environment: str) -> Run:
    """One process that imports fp4conv from `root`, with nothing of ours in its environment but what is given."""
    kept = {name: value for name, value in os.environ.items() if name in {"PATH", "LD_LIBRARY_PATH", "LANG"}}
    env = {**kept, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = Run(**json.loads(done.stdout))
    assert found.values == [1.0, -2.0]
    return found


def no_home(folder: Path) -> str:
    """A HOME below which nothing can be made, by root either: a file."""
    home = folder / "home"
    home.touch()
    return str(home)


def test_second_process_loads_instead_of_compiling(tmp_path: Path) -> None:
    first = run(PACKAGE.parent, XDG_CACHE_HOME=str(tmp_path), HOME=str(tmp_path / "unused"))
    second = run(PACKAGE.parent, XDG_CACHE_HOME=str(tmp_path), HOME=str(tmp_path / "unused"))
    assert (first.hits, first.cold, first.note) == (0, True, None)
    assert (second.hits, second.cold, second.note) == (1, False, None)
    assert second.path is not None
    assert Path(second.path).parent == tmp_path / "fp4conv"
    assert stat.S_IMODE((tmp_path / "fp4conv").stat().st_mode) == 0o700
    assert second.numba_dir == "", "Numba's own configuration is left alone"


def test_home_is_used_without_xdg(tmp_path: Path) -> None:
    found = run(PACKAGE.parent, HOME=str(tmp_path))
    caches = tmp_path / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    assert found.path is not None
    assert Path(found.path).parent == caches / "fp4conv"


def test_folder_named_by_the_user_wins(tmp_path: Path) -> None:
    found = run(PACKAGE.parent, NUMBA_CACHE_DIR=str(tmp_path / "mine"), HOME=str(tmp_path))
    assert found.path is not None
    assert Path(found.path).parent == tmp_path / "mine"


def test_named_folder_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    found = run(PACKAGE.parent, NUMBA_CACHE_DIR=no_home(tmp_path) + "/cache", HOME=str(tmp_path))
    assert found.path is None
    assert found.note is not None
    assert "NUMBA_CACHE_DIR cannot be written" in found.note


def test_read_only_package_and_unwritable_home(tmp_path: Path) -> None:
    root = tmp_path / "site-packages"
    shutil.copytree(PACKAGE, root / "fp4conv", ignore=shutil.ignore_patterns("__pycache__"))
    for path in root.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = sorted(root.rglob("*"))
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    home = no_home(tmp_path)
    first = run(root, HOME=home, TMPDIR=str(temporary))
    second = run(root, HOME=home, TMPDIR=str(temporary))
    assert (first.hits, second.hits, second.note) == (0, 1, None)
    ours = temporary / f"fp4conv-{os.getuid()}"
    assert stat.S_IMODE(ours.stat().st_mode) == 0o700
    assert sorted(root.rglob("*")) == before, "nothing is written into the package"
    for path in root.rglob("*"):
        path.chmod(0o755)  # so that pytest can clear its folders


def _open_to_all(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def _a_link(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(folder.parent / "elsewhere")


def _another_user(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    try:
        os.chown(folder, 12345, -1)
    except PermissionError:
        pytest.skip("only root can give a folder away")


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (_open_to_all, "can be written by others"),
        (_a_link, "is not a folder"),
        (_another_user, "belongs to another user"),
    ],
)
def test_folder_that_others_could_fill_is_refused(tmp_path: Path, prepare: object, reason: str) -> None:
    assert callable(prepare)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    folder = temporary / f"fp4conv-{os.getuid()}"
    prepare(folder)
    found = run(PACKAGE.parent, HOME=no_home(tmp_path), TMPDIR=str(temporary))
    assert (found.path, found.hits) == (None, 0)
    assert found.note is not None
    assert reason in found.note
    assert "NUMBA_CACHE_DIR" in found.note
    assert not list(temporary.rglob("*.nbi"))


def test_damaged_entries_are_compiled_again(tmp_path: Path) -> None:
    run(PACKAGE.parent, XDG_CACHE_HOME=str(tmp_path))
    for entry in tmp_path.rglob("*.nb?"):
        entry.write_bytes(b"\0" * 40)
    damaged = run(PACKAGE.parent, XDG_CACHE_HOME=str(tmp_path))
    assert (damaged.hits, damaged.note) == (0, None)
    assert run(PACKAGE.parent, XDG_CACHE_HOME=str(tmp_path)).hits == 1


def test_disk_that_fills_up_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import numpy as np

    from fp4conv.kernels import jit

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jit, "_cache_folder", lambda: (tmp_path, ""))
    monkeypatch.setattr(jit, "_failures", [])
    monkeypatch.setattr(jit._FolderCache, "save_overload", full)

    @jit.kernel
    def double(x: int) -> int:
        return x * 2

    assert double(np.int64(21)) == 42  # type: ignore[arg-type]
    note = jit.cache_note()
    assert note is not None
    assert "No space left on device" in note


def test_package_imports_without_a_compiler() -> None:
    code = "import sys, fp4conv.kernels; sys.exit('numba' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == 0
