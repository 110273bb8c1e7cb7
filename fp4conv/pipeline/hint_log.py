"""Noted records on their way to their place: appended in any order, then sorted into one file.

How many blocks need a record is known when all were decoded, so their places are not: they go to a log, each
unit's as one run, and the journal holds with each step where its runs are. When everything is decoded, the runs are
copied in the order of the blocks. What comes out depends on the blocks alone, not on who noted them when.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fp4conv.errors import OutputError
from fp4conv.hints.runs import Run
from fp4conv.hints.values import INDEX_BYTES
from fp4conv.kernels.hints import NO_HINT

U8 = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.int64]


class HintLog:
    """The log: append and read, safe to share between threads. Made at the first record."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._descriptor = -1
        self._end = 0

    def holds(self, runs: Iterable[Run]) -> bool:
        """Whether the file of an earlier run is long enough for `runs`."""
        end = max((run.offset + run.nbytes for run in runs), default=0)
        return end == 0 or (self._path.is_file() and self._path.stat().st_size >= end)

    def go_on_after(self, runs: Iterable[Run]) -> None:
        """What lies behind `runs` belongs to units that nobody vouches for: it is overwritten."""
        self._end = max((run.offset + run.nbytes for run in runs), default=0)

    def append(self, first: int, plane: U8, index: Numbers, codes: U8) -> Run | None:
        """Add a unit's records: `plane` [blocks] of scale bytes or NO_HINT, `codes` [C, half] of the blocks `index`,
        which count from `first`. None where there is nothing to add.
        """
        numbers = np.flatnonzero(plane != NO_HINT)
        if not numbers.size and not index.size:
            return None
        run = Run(first, plane.size, numbers.size, len(index), codes.shape[1], 0)
        chunks = [numbers.astype("<u4"), plane[numbers]] if run.sparse else [plane]
        chunks = chunks if numbers.size else []
        content = b"".join(chunk.tobytes() for chunk in (*chunks, index.astype("<u4"), codes))
        with self._lock:
            offset, self._end = self._end, self._end + len(content)
            self._open()
        self._pwrite(content, offset)
        return Run(run.first, run.blocks, run.scales, run.codes, run.half, offset)

    def read(self, run: Run) -> tuple[U8, Numbers, U8]:
        """(plane, index, codes) as they were appended."""
        self._open()
        content = os.pread(self._descriptor, run.nbytes, run.offset)
        assert len(content) == run.nbytes, "the log was checked to be long enough"
        plane = np.full(run.blocks, NO_HINT, np.uint8)
        held = content[: run.scale_bytes]
        if run.scales and run.sparse:
            split = run.scales * INDEX_BYTES
            plane[np.frombuffer(held[:split], "<u4")] = np.frombuffer(held[split:], np.uint8)
        elif run.scales:
            plane[:] = np.frombuffer(held, np.uint8)
        rest, split = content[run.scale_bytes :], run.codes * INDEX_BYTES
        codes = np.frombuffer(rest[split:], np.uint8).reshape(run.codes, run.half)
        return plane, np.frombuffer(rest[:split], "<u4").astype(np.int64), codes

    def sync(self) -> None:
        if self._descriptor >= 0:
            os.fsync(self._descriptor)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def remove(self) -> None:
        self.close()
        self._path.unlink(missing_ok=True)

    def _open(self) -> None:
        if self._descriptor < 0:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            try:
                self._path.parent.mkdir(exist_ok=True)
                self._descriptor = os.open(self._path, flags, 0o666)
            except OSError as error:
                raise OutputError(f"cannot be created: {error.strerror}", where=str(self._path)) from error

    def _pwrite(self, content: bytes, offset: int) -> None:
        done = 0
        try:
            while done < len(content):
                done += os.pwrite(self._descriptor, content[done:], offset + done)
        except OSError as error:
            hint = "Free some space and run the same command again, or convert without hints: --no-hints"
            raise OutputError(f"cannot be written: {error.strerror}", where=str(self._path), hint=hint) from error
