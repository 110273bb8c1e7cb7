"""The scripts of the repository on machines other than this one: which Python they take, and what they say without."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("bash", "cat", "cksum", "dirname")


def write_python(folder: Path, name: str, version: tuple[int, int], *, venv: bool = True) -> None:
    """A stand-in for an interpreter that answers what environment.sh asks, as that version would."""
    path = folder / name
    without = "" if venv else "sys.modules['ensurepip'] = None; "
    pretend = f"import sys; sys.version_info = {(*version, 0)}; {without}exec(sys.argv[1])"
    path.write_text(
        "#!/bin/sh\n"
        f'[ "$1" = --version ] && echo "Python {version[0]}.{version[1]}.0" && exit\n'
        f'exec {sys.executable} -I -c "{pretend}" "$2"\n'
    )
    path.chmod(0o755)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A folder to be the whole PATH: the few tools that the scripts use, and no Python yet."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found is not None
        (folder / tool).symlink_to(found)
    return folder


def find_python(path: Path, kind: str = "plain", **variables: str) -> subprocess.CompletedProcess[str]:
    program = f"source {ROOT}/scripts/environment.sh; find_python {kind}"
    environment = {"PATH": str(path), **variables}
    command = [str(path / "bash"), "-euo", "pipefail", "-c", program, "scripts/demo"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_first_python_that_is_new_enough_is_taken(path: Path) -> None:
    write_python(path, "python3", (3, 9))
    write_python(path, "python3.11", (3, 11))
    assert find_python(path).stdout == "python3.11\n"


def test_any_of_3_10_will_do_but_tests_prefer_a_newer_one(path: Path) -> None:
    write_python(path, "python3", (3, 10))
    assert find_python(path, "test").stdout == "python3\n"
    write_python(path, "python3.12", (3, 12))
    assert find_python(path).stdout == "python3\n"
    assert find_python(path, "test").stdout == "python3.12\n"


def test_a_python_named_by_the_user_comes_first(path: Path, tmp_path: Path) -> None:
    write_python(path, "python3", (3, 12))
    write_python(tmp_path, "mine", (3, 13))
    assert find_python(path, PYTHON=str(tmp_path / "mine")).stdout == f"{tmp_path}/mine\n"


def test_no_python_is_said_with_what_to_do(path: Path) -> None:
    write_python(path, "python3", (3, 9))
    found = find_python(path)
    assert found.returncode == 1
    assert found.stderr == (
        "No Python of 3.10 or newer was found (Python 3.9.0).\n"
        "Install one, or name one that is not on the PATH: PYTHON=/path/to/python3 scripts/demo\n"
    )


def test_servers_need_3_11(path: Path) -> None:
    write_python(path, "python3", (3, 10))
    found = find_python(path, "servers")
    assert found.returncode == 1
    assert found.stderr.startswith("No Python of 3.11 or newer was found (Python 3.10.0).\n")
    write_python(path, "python3.12", (3, 12))
    assert find_python(path, "servers").stdout == "python3.12\n"


def test_a_missing_venv_module_is_said_with_the_package_to_install(path: Path) -> None:
    write_python(path, "python3", (3, 11), venv=False)
    found = find_python(path)
    assert found.returncode == 1
    assert found.stderr.endswith("On Debian and Ubuntu: sudo apt install python3.11-venv\n")
    write_python(path, "python3.12", (3, 12))
    assert find_python(path).stdout == "python3.12\n", "another Python that has it is taken instead"


def test_make_checkpoint_makes_one_of_about_the_size(tmp_path: Path) -> None:
    out = tmp_path / "made"
    command = [
        sys.executable,
        str(ROOT / "scripts" / "make_checkpoint"),
        str(out),
        "--size",
        "6MB",
        "--family",
        "qwen3-moe",
    ]
    subprocess.run(command, check=True, capture_output=True)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert abs(index["metadata"]["total_size"] / 6e6 - 1) < 0.05
    again = subprocess.run(command, check=False, capture_output=True, text=True)
    assert again.returncode == 1
    assert "holds something already" in again.stderr
