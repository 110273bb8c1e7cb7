"""Where a page may be written: asked before hours of reading, not after them."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fp4conv.errors import OutputError
from fp4conv.report.facts import Inspected
from fp4conv.report.page.document import page, plotting_library

_OPENING = b"<!doctype html>"


@dataclass(frozen=True)
class PagePlace:
    """A file that may be written: new, or a page already, and in none of the folders that are only read."""

    path: Path

    @classmethod
    def of(cls, file: str | Path, *sources: str | Path) -> PagePlace:
        """`sources`: the folders that are read. Raises OutputError, and UsageError where plotly is missing."""
        plotting_library()
        named = Path(file)
        try:
            path = named.resolve()
            _check(path, named)
        except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a loop of links; ValueError: no encoding
            found = error.strerror if isinstance(error, OSError) else str(error)
            raise OutputError(f"cannot be written: {found}", where=ascii(str(named))[:300]) from error
        for source in sources:
            folder = Path(source)
            if folder.is_dir() and path.is_relative_to(folder.resolve()):
                hint = "A checkpoint that is read is never written to: name a file elsewhere."
                raise OutputError(f"lies inside {source}", where=str(named), hint=hint)
        return cls(path)

    def write(self, found: Inspected) -> int:
        """Write the page of `found` and return its bytes; whoever opens the file sees the old page or the new one."""
        text = page(found).encode()
        try:
            descriptor, name = tempfile.mkstemp(dir=self.path.parent, prefix=".page.")
            unfinished = Path(name)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(text)
                    os.fchmod(file.fileno(), 0o666 & ~_mask())  # as any new file, where mkstemp's are private
                    file.flush()
                    os.fsync(file.fileno())
                unfinished.replace(self.path)
            except BaseException:
                unfinished.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise OutputError(f"cannot be written: {error.strerror}", where=str(self.path)) from error
        return len(text)


def _check(path: Path, named: Path) -> None:
    if not path.parent.is_dir():
        raise OutputError(f"there is no folder {path.parent}", where=str(named), hint="Make it first.")
    if path.is_dir():
        raise OutputError("is a folder, not a file", where=str(named), hint="Name a file in it, like model.html.")
    if not path.exists():
        return
    if not path.is_file():
        raise OutputError("is no plain file", where=str(named), hint="Name a file, like model.html.")
    with path.open("rb") as file:
        start = file.read(len(_OPENING))
    if start and start.lower() != _OPENING:
        hint = "Only an older page is overwritten: remove the file, or give another name."
        raise OutputError("exists and is no HTML page", where=str(named), hint=hint)


def _mask() -> int:
    """The process's umask, which only setting it tells."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
