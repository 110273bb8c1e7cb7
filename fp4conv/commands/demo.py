"""`demo`: the whole tour on a small gpt-oss-shaped checkpoint that it makes itself."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fp4conv.commands.convert import convert
from fp4conv.commands.open import open as open_checkpoint
from fp4conv.errors import OutputError
from fp4conv.model import JSON
from fp4conv.report.converted import ConvertResult
from fp4conv.synthetic import write_checkpoint

DEMO_BYTES = 60_000_000
# Folder of the result, its source, and the arguments of `convert` beside them.
TOUR = (
    ("mxfp4", "bf16", "mxfp4"),
    ("nvfp4", "mxfp4", "nvfp4"),
    ("bf16-again", "mxfp4", "bf16"),
)


@dataclass(frozen=True)
class Stop:
    """One conversion of the tour. `exact`: every value of the result equals its source's."""

    name: str
    result: ConvertResult
    exact: bool


@dataclass(frozen=True)
class Tour:
    folder: Path
    source_bytes: int
    stops: tuple[Stop, ...]

    def to_json(self) -> dict[str, JSON]:
        stops: list[JSON] = [{"name": s.name, "exact": s.exact, **s.result.to_json()} for s in self.stops]
        return {"folder": str(self.folder), "source_bytes": self.source_bytes, "conversions": stops}


def demo(
    folder: str | Path | None = None,
    *,
    nbytes: int = DEMO_BYTES,
    seed: int = 0,
    on_stop: Callable[[str], None] | None = None,
) -> Tour:
    """Make a BF16 checkpoint, convert it to MXFP4, that to NVFP4 and back to BF16, and compare all values.

    In `folder`, which must not exist or be empty, or in a temporary one that is removed afterwards. `on_stop` is
    told what comes next. Raises OutputError where the folder cannot be used.
    """
    with _place(folder) as root:
        tell = on_stop or (lambda _: None)
        tell("making a small gpt-oss checkpoint in BF16")
        write_checkpoint(root / "bf16", nbytes=nbytes, family="gpt-oss", seed=seed)
        stops = []
        for name, source, to in TOUR:
            tell(f"converting {source} to {to}")
            result = convert(root / source, root / name, to=to)
            stops.append(Stop(name, result, _same_values(root / source, root / name)))
        size = sum(file.stat().st_size for file in (root / "bf16").iterdir())
        return Tour(root, size, tuple(stops))


@contextmanager
def _place(folder: str | Path | None) -> Iterator[Path]:
    if folder is not None:
        yield _empty(Path(folder))
        return
    with tempfile.TemporaryDirectory(prefix="fp4conv-demo-") as made:
        yield Path(made)


def _empty(folder: Path) -> Path:
    """`folder`, which has nothing in it; OutputError where it has."""
    try:
        full = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except (OSError, ValueError) as error:
        found = error.strerror if isinstance(error, OSError) else str(error)
        raise OutputError(f"cannot be used: {found}", where=ascii(str(folder))[:300]) from error
    if full:
        hint = "Give a folder that does not exist yet, or leave it out: then the demo removes what it made."
        raise OutputError("is not an empty folder", where=str(folder), hint=hint)
    return folder


def _same_values(left: Path, right: Path) -> bool:
    """Whether every tensor of two checkpoints decodes to the same numbers; reads them one at a time."""
    with open_checkpoint(left) as a, open_checkpoint(right) as b:
        return set(a.names) == set(b.names) and all(
            np.array_equal(a.read(name).astype(np.float32), b.read(name).astype(np.float32)) for name in a.names
        )
