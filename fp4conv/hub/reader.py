"""Positional reads of files on the Hub: from the disk where a file has come down, by ranges where it has not."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from fp4conv.hub.client import in_cache, read_range
from fp4conv.model import Pinned
from fp4conv.safetensors_io import Buffer, Reader, as_bytes

# Scales of a few bytes lie side by side: read in blocks, a shard's come by a request or two.
BLOCK_BYTES = 1 << 18
_BLOCKS = 64
_REQUEST_BYTES = 1 << 26


class HubReader(Reader):
    """Reads what `where` says is on the disk from there, anything else by range requests, and keeps some blocks.

    An absolute name is a file of this machine (an adapter's).
    """

    def __init__(self, pinned: Pinned, where: Callable[[str], Path | None] | None = None) -> None:
        super().__init__(Path())
        self._pinned = pinned
        self._where = where or (lambda name: in_cache(pinned, name))
        self._blocks: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._block_lock = threading.Lock()

    def find(self, file: str) -> Path:
        path = self._on_disk(file)
        assert path is not None, "what is not on the disk is read by ranges"
        return path

    def read_into(self, file: str, offset: int, buffer: Buffer) -> None:
        target = as_bytes(buffer)
        if self.is_open(file) or self._on_disk(file) is not None:
            super().read_into(file, offset, target)
        else:
            self._fetch(file, offset, target)

    def read_strided(
        self, file: str, offset: int, buffer: Buffer, *, row_bytes: int, row_stride: int, rows: int
    ) -> None:
        if self.is_open(file) or self._on_disk(file) is not None:
            super().read_strided(file, offset, buffer, row_bytes=row_bytes, row_stride=row_stride, rows=rows)
            return
        target = as_bytes(buffer)
        batch = max(1, _REQUEST_BYTES // row_stride)
        for first in range(0, rows, batch):
            count = min(batch, rows - first)
            span = bytearray((count - 1) * row_stride + row_bytes)
            self._fetch(file, offset + first * row_stride, memoryview(span))
            for row in range(count):
                place = (first + row) * row_bytes
                target[place : place + row_bytes] = span[row * row_stride : row * row_stride + row_bytes]

    def _on_disk(self, file: str) -> Path | None:
        return Path(file) if Path(file).is_absolute() else self._where(file)

    def _fetch(self, file: str, offset: int, target: memoryview) -> None:
        if target.nbytes < BLOCK_BYTES:
            self._fetch_by_blocks(file, offset, target)
            return
        for start in range(0, target.nbytes, _REQUEST_BYTES):
            part = target[start : start + _REQUEST_BYTES]
            part[:] = read_range(self._pinned, file, offset + start, offset + start + part.nbytes)

    def _fetch_by_blocks(self, file: str, offset: int, target: memoryview) -> None:
        done = 0
        while done < target.nbytes:
            number, inside = divmod(offset + done, BLOCK_BYTES)
            piece = self._block(file, number)[inside : inside + target.nbytes - done]
            assert piece, "headers are checked against the size of their file"
            target[done : done + len(piece)] = piece
            done += len(piece)

    def _block(self, file: str, number: int) -> bytes:
        with self._block_lock:
            held = self._blocks.get((file, number))
        if held is None:
            start = number * BLOCK_BYTES
            held = read_range(self._pinned, file, start, min(start + BLOCK_BYTES, self._pinned.files[file].nbytes))
        with self._block_lock:
            self._blocks[file, number] = held
            self._blocks.move_to_end((file, number))
            while len(self._blocks) > _BLOCKS:
                self._blocks.popitem(last=False)
        return held
