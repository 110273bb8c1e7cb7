"""The files of a result while they are written: opened when first asked for, closed when they are whole."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from types import TracebackType
from typing import TypeAlias

from fp4conv.plan import Plan
from fp4conv.safetensors_io import Buffer, Writer
from fp4conv.staging import Staging


class Nowhere:
    """In place of a file that has been given away: a step that is done again writes the same bytes there."""

    def write(self, offset: int, buffer: Buffer) -> None:
        """The bytes are where the file is."""

    def write_strided(self, offset: int, buffer: Buffer, *, row_bytes: int, row_stride: int, rows: int) -> None:
        """The bytes are where the file is."""


Sink: TypeAlias = "Writer | Nowhere"


class Shelf:
    """Writers by file name. Safe to share between threads."""

    def __init__(self, plan: Plan, out: Staging, *, sent: Collection[str] = ()) -> None:
        self._shards = plan.shards
        self._out = out
        self._lock = threading.Lock()
        self._given: Mapping[str, Nowhere] = {name: Nowhere() for name in sent}
        self._open: dict[str, Writer] = {}

    def __getitem__(self, name: str) -> Sink:
        return self._open.get(name) or self._given.get(name) or self._opened(name)

    def __enter__(self) -> Shelf:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for name in list(self._open):
            self.close(name)

    def open_all(self) -> None:
        """Claim the space of every file now, so that a full disk shows before the first tensor."""
        for name in self._shards:
            if name not in self._given:
                self._opened(name)

    def syncs(self) -> list[Callable[[], None]]:
        """What puts the bytes of each open file on the disk."""
        with self._lock:
            return [writer.sync for writer in self._open.values()]

    def close(self, name: str) -> None:
        with self._lock:
            writer = self._open.pop(name, None)
        if writer is not None:
            writer.close()

    def _opened(self, name: str) -> Writer:
        shard = self._shards[name]
        with self._lock:
            if name not in self._open:
                path = self._out.path(name)
                path.parent.mkdir(exist_ok=True)
                writer = self._open[name] = Writer(path, shard.nbytes)
                writer.write(0, shard.header)
            return self._open[name]
