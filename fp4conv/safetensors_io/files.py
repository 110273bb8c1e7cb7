"""Positional reads and writes of safetensors files, safe to share between threads.

Nothing here maps memory, keeps tensor bytes or queues work: every byte has a known place.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from fp4conv.errors import OutputError, SourceError
from fp4conv.safetensors_io.header import DOWNLOAD_AGAIN, PREFIX_BYTES, Header, header_bytes, parse_header

Buffer: TypeAlias = "bytes | bytearray | memoryview | npt.NDArray[np.generic]"

MAX_OPEN_FILES = 64


def read_header(path: Path, file: str | None = None) -> Header:
    """Read and check the header of the file at `path`; `file` is the name that refs and errors carry."""
    file = path.name if file is None else file
    try:
        with path.open("rb") as stream:
            file_bytes = os.fstat(stream.fileno()).st_size
            length = header_bytes(stream.read(PREFIX_BYTES), file_bytes, file)
            return parse_header(stream.read(length), file_bytes, file)
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}", where=file) from error


def as_bytes(buffer: Buffer) -> memoryview:
    """The bytes of a C-contiguous buffer, without a copy."""
    if isinstance(buffer, np.ndarray):
        assert buffer.flags.c_contiguous, "I/O needs a contiguous array"
        buffer = buffer.reshape(-1).view(np.uint8).data  # by way of uint8: bfloat16 and its kin have no buffer
    view = memoryview(buffer)
    return view.cast("B") if view.nbytes else memoryview(b"")


@dataclass
class _OpenFile:
    descriptor: int
    users: int = 0


class Reader:
    """Positional reads from the files of one folder; safe to share between threads.

    Files are opened when first read, at most `MAX_OPEN_FILES` that nobody is reading stay open. Names are
    joined to `root` as they are: whoever made them has checked them. A subclass may find files elsewhere.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._open: OrderedDict[str, _OpenFile] = OrderedDict()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            for held in self._open.values():
                os.close(held.descriptor)
            self._open.clear()

    def find(self, file: str) -> Path:
        """Where `file` lies."""
        return self._root / file

    def read_into(self, file: str, offset: int, buffer: Buffer) -> None:
        """Fill `buffer` with the bytes of `file` from `offset`; SourceError when the file ends before."""
        target = as_bytes(buffer)
        with self._descriptor(file) as descriptor:
            self._fill(descriptor, file, offset, target)

    def read_strided(
        self, file: str, offset: int, buffer: Buffer, *, row_bytes: int, row_stride: int, rows: int
    ) -> None:
        """Fill `buffer` with `rows` runs of `row_bytes` bytes, whose starts lie `row_stride` bytes apart in `file`."""
        target = as_bytes(buffer)
        assert target.nbytes == rows * row_bytes, "the buffer must hold the rows and no more"
        with self._descriptor(file) as descriptor:
            if row_bytes == row_stride:
                self._fill(descriptor, file, offset, target)
                return
            for row in range(rows):
                run = target[row * row_bytes : (row + 1) * row_bytes]
                self._fill(descriptor, file, offset + row * row_stride, run)

    def _fill(self, descriptor: int, file: str, offset: int, target: memoryview) -> None:
        done = 0
        while done < target.nbytes:
            try:
                count = os.preadv(descriptor, [target[done:]], offset + done)
            except OSError as error:
                raise SourceError(f"cannot be read at byte {offset + done:,}: {error.strerror}", where=file) from error
            if count == 0:
                found = f"the file ends at byte {offset + done:,}, expected at least {offset + target.nbytes:,}"
                raise SourceError(f"{found}: it changed while it was read", where=file, hint=DOWNLOAD_AGAIN)
            done += count

    def is_open(self, file: str) -> bool:
        with self._lock:
            return file in self._open

    def forget(self, file: str) -> None:
        """Close `file`, which is about to be removed, unless somebody is reading it."""
        with self._lock:
            held = self._open.get(file)
            if held is not None and held.users == 0:
                os.close(self._open.pop(file).descriptor)

    @contextmanager
    def _descriptor(self, file: str) -> Iterator[int]:
        with self._lock:
            held = self._open.get(file)
            if held is None:
                try:
                    held = _OpenFile(os.open(self.find(file), os.O_RDONLY | os.O_CLOEXEC))
                except OSError as error:
                    raise SourceError(f"cannot be opened: {error.strerror}", where=file) from error
                self._open[file] = held
            self._open.move_to_end(file)
            held.users += 1
            self._close_idle()
        try:
            yield held.descriptor
        finally:
            with self._lock:
                held.users -= 1

    def _close_idle(self) -> None:
        idle = [file for file, held in self._open.items() if held.users == 0]
        for file in idle[: max(0, len(self._open) - MAX_OPEN_FILES)]:
            os.close(self._open.pop(file).descriptor)


def header_at(reader: Reader, file: str, nbytes: int) -> Header:
    """Read and check the header of `file`, which has `nbytes` bytes, by positional reads alone."""
    prefix = bytearray(PREFIX_BYTES)
    reader.read_into(file, 0, prefix)
    raw = bytearray(header_bytes(bytes(prefix), nbytes, file))
    reader.read_into(file, PREFIX_BYTES, raw)
    return parse_header(bytes(raw), nbytes, file)


class Writer:
    """Positional writes to one preallocated file of `nbytes` bytes; safe to share between threads.

    A file of that size that is there already keeps its bytes, and `reused` is true: an interrupted run goes
    on. Any other is made anew, its space claimed at once where the file system can, so that a full disk
    shows before the first tensor and not at the last. OutputError names the file.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        self._path = path
        self._nbytes = nbytes
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise OutputError(f"cannot be created: {error.strerror}", where=str(path)) from error
        found = os.fstat(self._descriptor).st_size
        self.reused = found == nbytes and nbytes > 0
        if not self.reused:
            try:
                self._preallocate()
            except OSError as error:
                os.close(self._descriptor)
                path.unlink(missing_ok=True)
                self._refuse(error)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def write(self, offset: int, buffer: Buffer) -> None:
        """Put `buffer` at byte `offset`."""
        source = as_bytes(buffer)
        assert offset >= 0, "a write before the file"
        assert offset + source.nbytes <= self._nbytes, "a write beyond the planned size"
        done = 0
        try:
            while done < source.nbytes:
                done += os.pwrite(self._descriptor, source[done:], offset + done)
        except OSError as error:
            self._refuse(error)

    def write_strided(self, offset: int, buffer: Buffer, *, row_bytes: int, row_stride: int, rows: int) -> None:
        """Put the `rows` runs of `row_bytes` bytes in `buffer` at starts that lie `row_stride` bytes apart."""
        source = as_bytes(buffer)
        assert source.nbytes == rows * row_bytes, "the buffer must hold the rows and no more"
        if row_bytes == row_stride:
            self.write(offset, source)
            return
        for row in range(rows):
            self.write(offset + row * row_stride, source[row * row_bytes : (row + 1) * row_bytes])

    def sync(self) -> None:
        """Return when every byte written so far is on the disk."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            self._refuse(error)

    def _preallocate(self) -> None:
        os.ftruncate(self._descriptor, 0)
        # macOS has no posix_fallocate; some file systems (ZFS, NFS 3 with musl) refuse it.
        if hasattr(os, "posix_fallocate") and self._nbytes:
            try:
                os.posix_fallocate(self._descriptor, 0, self._nbytes)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                    raise
        os.ftruncate(self._descriptor, self._nbytes)

    def _refuse(self, error: OSError) -> NoReturn:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(self._path.parent).free
            found = f"the disk is full: the file needs {self._nbytes / 1e9:.2f} GB in all, {free / 1e9:.2f} GB are free"
            hint = "Free some space, or write to another disk."
            raise OutputError(found, where=str(self._path), hint=hint) from error
        raise OutputError(f"cannot be written: {error.strerror}", where=str(self._path)) from error
