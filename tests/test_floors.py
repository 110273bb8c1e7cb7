"""The house stands: imports go down a floor or sideways, and training libraries stay in their room.

The floors are those of docs/architecture.md. Imports are read from the syntax tree, so one hidden in a function or
behind TYPE_CHECKING counts too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "fp4conv"

# A module, or a package with all that lies in it -> its floor. The longest match counts.
FLOORS = {
    "errors": 0,
    "faults": 0,
    "formats": 0,
    "patterns": 0,
    "sizes": 0,
    "version": 0,
    "kernels": 1,
    "codecs": 2,
    "modelopt_state": 2,
    "safetensors_io": 2,
    "deltas": 3,
    "families": 3,
    "lora": 3,
    "model": 3,
    "readings": 3,
    "servers": 3,
    "training_state": 3,
    "layouts": 4,
    "companions": 5,
    "hub": 5,
    "hints": 5,
    "input_scales": 5,
    "plan": 5,
    "planner": 5,
    "repair": 5,
    "selection": 5,
    "sources": 5,
    "stacking": 5,
    "staging": 5,
    "streaming": 5,
    "synthetic": 5,
    "training_rules": 5,
    "checks": 6,
    "pipeline": 6,
    "publishing": 6,
    "report": 6,
    "commands": 7,
    "qat": 7,
    "cli": 8,
    "": 9,
    "__main__": 9,
}
TRAINING_LIBRARIES = {"accelerate", "datasets", "modelopt", "peft", "torch", "transformers", "trl"}
TRAINING_ROOM = "qat"
TRAINING_COMMANDS = {"commands.qat", "commands.calibrate"}  # the only ones that may open the training room


def test_imports_go_down_or_sideways() -> None:
    assert list(violations(PACKAGE)) == []


def test_each_floor_is_lived_in_by_someone() -> None:
    """A renamed module leaves a stale row; a row for a room that is yet to be built is named here."""
    yet_to_come = {"__main__", "cli", "hub", "pipeline", "qat", "servers"}
    rooms = {name.partition(".")[0] for name in package_modules(PACKAGE)}
    assert set(FLOORS) - rooms <= yet_to_come


@pytest.mark.parametrize(
    ("planted", "expected"),
    [
        ({"errors.py": "from fp4conv import plan\n"}, "errors:1: floor 0 imports fp4conv.plan of floor 5"),
        ({"errors.py": "from .plan import Plan\n"}, "errors:1: floor 0 imports fp4conv.plan of floor 5"),
        ({"errors.py": "import fp4conv\n"}, "errors:1: floor 0 imports fp4conv of floor 9"),
        ({"plan.py": "from fp4conv import convert, errors\n"}, "plan:1: floor 5 imports fp4conv of floor 9"),
        ({"errors.py": "from fp4conv import convert\n"}, "errors:1: floor 0 imports fp4conv of floor 9"),
        ({"codecs/dense.py": "from ..plan import Plan\n"}, "codecs.dense:1: floor 2 imports fp4conv.plan of floor 5"),
        (
            {"codecs/dense.py": "def f() -> None:\n    import fp4conv.plan\n"},
            "codecs.dense:2: floor 2 imports fp4conv.plan of floor 5",
        ),
        ({"novelty.py": ""}, "novelty: has no floor; give it one in FLOORS"),
        ({"plan.py": "def f() -> None:\n    import torch.nn\n"}, "plan:2: imports torch, which only qat/ may"),
        ({"plan.py": "from transformers import AutoModel\n"}, "plan:1: imports transformers, which only qat/ may"),
        ({"commands/convert.py": "from fp4conv.qat import run\n"}, "commands.convert:1: imports the training room"),
    ],
)
def test_a_planted_violation_is_caught(tmp_path: Path, planted: dict[str, str], expected: str) -> None:
    write_package(tmp_path, planted)
    assert list(violations(tmp_path)) == [expected]


def test_what_is_allowed_passes(tmp_path: Path) -> None:
    allowed = {
        "plan.py": "from fp4conv import errors, sources\nfrom .codecs import dense\nimport numpy\n",
        "codecs/dense.py": "from . import __name__ as n\ndef f() -> None:\n    import numba\n",
        "qat/__init__.py": "import torch\n",
        "commands/qat.py": "from fp4conv.qat import run\n",
        "__init__.py": "from fp4conv.commands.convert import convert\n",
    }
    write_package(tmp_path, allowed)
    assert list(violations(tmp_path)) == []


def write_package(root: Path, planted: dict[str, str]) -> None:
    """A small package with one module in a few of the rooms, and `planted` on top."""
    rooms = ("__init__.py", "errors.py", "plan.py", "sources.py", "codecs/__init__.py", "codecs/dense.py",
             "qat/__init__.py", "commands/__init__.py", "commands/convert.py")  # fmt: skip
    for name, text in {**dict.fromkeys(rooms, ""), **planted}.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)


def violations(root: Path) -> Iterator[str]:
    """Every import of the package at `root` that the house rules forbid, as `module:line: what is wrong`."""
    modules = package_modules(root)
    for name, path in modules.items():
        floor = floor_of(name)
        if floor is None:
            yield f"{name}: has no floor; give it one in FLOORS"
            continue
        for line, target in imports(name, path, modules):
            where = f"{name}:{line}"
            yield from (f"{where}: {wrong}" for wrong in judge(name, floor, target))


def judge(name: str, floor: int, target: str) -> Iterator[str]:
    """What is wrong with `name` importing `target`, a dotted name from the top."""
    first, _, inside = target.partition(".")
    if first in TRAINING_LIBRARIES and not in_room(name, TRAINING_ROOM):
        yield f"imports {first}, which only {TRAINING_ROOM}/ may"
    if first != "fp4conv":
        return
    above = floor_of(inside)
    if above is not None and above > floor:
        yield f"floor {floor} imports {target} of floor {above}"
    elif in_room(inside, TRAINING_ROOM) and not in_room(name, TRAINING_ROOM) and name not in TRAINING_COMMANDS:
        yield "imports the training room"


def in_room(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def floor_of(name: str) -> int | None:
    rooms = [room for room in FLOORS if in_room(name, room)]
    return FLOORS[max(rooms, key=len)] if rooms else None


def package_modules(root: Path) -> dict[str, Path]:
    """Dotted name below the package -> file; the package itself is "", a sub-package goes by its own name."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, modules: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """(line, dotted target) of each import statement; a name that is a module counts as that module."""
    package = [part for part in ["fp4conv", *name.split(".")] if part]
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *(node.module.split(".") if node.module else [])])
            named = [f"{origin}.{alias.name}" for alias in node.names]
            targets = {full if full.removeprefix("fp4conv.") in modules else origin for full in named}
            yield from ((node.lineno, target) for target in sorted(targets))
