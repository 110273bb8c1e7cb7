"""The safetensors container: check a header, lay out a new one, read and write at known places.

Owns the file format (8 bytes of little-endian header length, a JSON header, the tensors' bytes) and
positional I/O on it. It refuses to own what a tensor means, which files make a checkpoint (`sources.py`)
and when a write is safe (`staging.py`). Nothing here maps memory or keeps tensor bytes.

Source: the format section of the safetensors README; limits and order as safetensors 0.8 has them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from fp4conv.errors import OutputError, SourceError

Buffer: TypeAlias = "bytes | bytearray | memoryview | npt.NDArray[np.generic]"

PREFIX_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # what the safetensors library refuses to go beyond
MAX_OPEN_FILES = 64
PT_METADATA: Mapping[str, str] = MappingProxyType({"format": "pt"})
_MAX_OFFSET = 2**63 - 1
_METADATA = "__metadata__"
_DOWNLOAD_AGAIN = "The file is damaged or its download was cut short: download it again."

# In the order in which the library declares them: a file's tensors are sorted by this order, last one first,
# so that wider types come first and every tensor is aligned. Bits follow as NumPy holds them: BF16 as
# uint16 and the eight-bit floats as uint8, since NumPy has no such types of its own.
_STORED_AS: Mapping[str, str] = MappingProxyType(
    {
        "BOOL": "bool",
        "U8": "uint8",
        "I8": "int8",
        "F8_E5M2": "uint8",
        "F8_E4M3": "uint8",
        "F8_E8M0": "uint8",
        "F8_E4M3FNUZ": "uint8",
        "F8_E5M2FNUZ": "uint8",
        "I16": "int16",
        "U16": "uint16",
        "F16": "float16",
        "BF16": "uint16",
        "I32": "int32",
        "U32": "uint32",
        "F32": "float32",
        "C64": "complex64",
        "F64": "float64",
        "I64": "int64",
        "U64": "uint64",
    }
)
DTYPE_BYTES: Mapping[str, int] = MappingProxyType({name: np.dtype(held).itemsize for name, held in _STORED_AS.items()})
_DTYPE_ORDER = {name: order for order, name in enumerate(_STORED_AS)}


def numpy_dtype(name: str) -> np.dtype[np.generic]:
    """The little-endian NumPy type that holds the bits of safetensors type `name`; BF16 is uint16, F8 is uint8.

    Raises SourceError for types that fp4conv does not read: sub-byte ones (F4, F6_*) and unknown names.
    """
    if name not in _STORED_AS:
        raise SourceError(f"dtype {name!r} is not one that fp4conv reads ({', '.join(_STORED_AS)})")
    return np.dtype(_STORED_AS[name]).newbyteorder("<")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's safetensors dtype name and shape; () is a scalar."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where a tensor lies: `file` is relative to the source's root, `offset` counts bytes from the file's start."""

    file: str
    name: str
    spec: TensorSpec
    offset: int


@dataclass(frozen=True)
class Header:
    """A checked header. `tensors` by offset; `nbytes` is where the data begins; `digest` is the JSON's SHA-256."""

    tensors: tuple[TensorRef, ...]
    metadata: Mapping[str, str]
    nbytes: int
    digest: str


# ---- headers: read


def header_bytes(prefix: bytes, file_bytes: int, file: str) -> int:
    """Length of the JSON header that the first eight bytes of `file` announce; SourceError where it cannot be."""
    if prefix.startswith(b"version "):
        raise SourceError(
            "this is a Git LFS pointer, not the tensors",
            where=file,
            hint="Run `git lfs pull` in the folder that was cloned.",
        )
    if len(prefix) < PREFIX_BYTES:
        found = f"the file ends after {file_bytes:,} bytes; a safetensors file has at least {PREFIX_BYTES}"
        raise SourceError(found, where=file, hint=_DOWNLOAD_AGAIN)
    length = int.from_bytes(prefix[:PREFIX_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        found = f"its first bytes announce a header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} are allowed"
        raise SourceError(found, where=file, hint="Is this a safetensors file? If so, download it again.")
    if PREFIX_BYTES + length > file_bytes:
        found = f"the header should end at byte {PREFIX_BYTES + length:,}, the file ends at {file_bytes:,}"
        raise SourceError(found, where=file, hint=_DOWNLOAD_AGAIN)
    return length


def parse_header(raw: bytes, file_bytes: int, file: str) -> Header:
    """Check the JSON header `raw` of a file of `file_bytes` bytes and place its tensors.

    Every byte of data must belong to exactly one tensor, and every shape must fill its span, as the format
    demands; else SourceError names the file and the tensor.
    """
    entries = _parse_json(raw, file)
    metadata = _parse_metadata(entries.pop(_METADATA, {}), file)
    start = PREFIX_BYTES + len(raw)
    specs: dict[tuple[object, ...], TensorSpec] = {}  # thousands of tensors have a few dozen shapes
    spans: list[tuple[int, int, str, TensorSpec]] = []
    for name, entry in entries.items():
        spec, begin, end = _parse_entry(entry, specs, where=f"{file}: tensor {name!r}")
        spans.append((begin, end, name, spec))
    spans.sort(key=lambda span: span[:2])
    _check_cover(spans, file_bytes - start, file)
    tensors = tuple(TensorRef(file, name, spec, start + begin) for begin, _, name, spec in spans)
    return Header(tensors, metadata, start, hashlib.sha256(raw).hexdigest())


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


def _parse_json(raw: bytes, file: str) -> dict[str, object]:
    def refuse(word: str) -> NoReturn:
        raise ValueError(f"{word} is not JSON")

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} comes twice")
        return found

    try:
        # RecursionError: deep nesting, which no header has and a hostile one may.
        header: object = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"the header is not valid JSON: {error}", where=file, hint=_DOWNLOAD_AGAIN) from error
    if not isinstance(header, dict) or not raw.startswith(b"{"):
        raise SourceError("the header is not a JSON object", where=file, hint=_DOWNLOAD_AGAIN)
    return header


def _parse_metadata(found: object, file: str) -> Mapping[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise SourceError(f"{_METADATA} of the header must map strings to strings", where=file)
    return found


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_OFFSET  # type(): True is an int by isinstance


def _parse_entry(
    entry: object, specs: dict[tuple[object, ...], TensorSpec], *, where: str
) -> tuple[TensorSpec, int, int]:
    """(spec, begin, end) of one tensor; offsets count from the end of the header."""
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise SourceError("its header entry must have dtype, shape and data_offsets", where=where)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        raise SourceError(f"its shape must be a list of sizes, found {str(shape)[:80]}", where=where)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise SourceError(f"its data_offsets must be two byte offsets, found {str(offsets)[:80]}", where=where)
    key = (dtype, *shape) if isinstance(dtype, str) else ()
    spec = specs.get(key)
    if spec is None:
        if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
            known = ", ".join(DTYPE_BYTES)
            raise SourceError(f"its dtype {str(dtype)[:80]!r} is not one that fp4conv reads ({known})", where=where)
        spec = specs[key] = TensorSpec(dtype, tuple(shape))
    begin, end = offsets
    if end - begin != spec.nbytes:
        found = f"{spec.dtype} {list(spec.shape)} takes {spec.nbytes:,} bytes, its data_offsets span {end - begin:,}"
        raise SourceError(found, where=where, hint=_DOWNLOAD_AGAIN)
    return spec, begin, end


def _check_cover(spans: Sequence[tuple[int, int, str, TensorSpec]], data_bytes: int, file: str) -> None:
    reached = 0
    for begin, end, name, _ in spans:
        if begin != reached:
            kind = "overlaps the one before" if begin < reached else "leaves a hole before it"
            found = f"its data begins at {begin:,}, expected {reached:,}: it {kind}"
            raise SourceError(found, where=f"{file}: tensor {name!r}", hint=_DOWNLOAD_AGAIN)
        reached = end
    if reached > data_bytes:
        found = f"the file is truncated: it holds {data_bytes:,} bytes of tensors, its header promises {reached:,}"
        raise SourceError(found, where=file, hint=_DOWNLOAD_AGAIN)
    if reached < data_bytes:
        found = f"{data_bytes - reached:,} bytes after the last tensor belong to none"
        raise SourceError(found, where=file, hint=_DOWNLOAD_AGAIN)


# ---- headers: written


@dataclass(frozen=True)
class ShardLayout:
    """A shard to be written: `header` are the file's first bytes, `tensors` are in file order, `nbytes` is all."""

    header: bytes
    tensors: tuple[TensorRef, ...]
    nbytes: int


def lay_out(
    tensors: Sequence[tuple[str, TensorSpec]], metadata: Mapping[str, str] | None = PT_METADATA, *, file: str = ""
) -> ShardLayout:
    """Place `tensors` in a new file in the order and with the header bytes of the safetensors library.

    The order of the argument does not matter. `file` is what the refs carry. Sizes never depend on `file`.
    """
    assert len({name for name, _ in tensors}) == len(tensors), "a name comes twice"
    ordered = sorted(tensors, key=lambda tensor: (-_DTYPE_ORDER[tensor[1].dtype], tensor[0].encode()))
    entries: dict[str, object] = {}
    if metadata is not None:
        entries[_METADATA] = dict(sorted(metadata.items()))
    end = 0
    for name, spec in ordered:
        begin, end = end, end + spec.nbytes
        entries[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the data begins at a multiple of eight
    header = len(text).to_bytes(PREFIX_BYTES, "little") + text
    refs: list[TensorRef] = []
    offset = len(header)
    for name, spec in ordered:
        refs.append(TensorRef(file, name, spec, offset))
        offset += spec.nbytes
    return ShardLayout(header, tuple(refs), offset)


# ---- positional I/O


def _as_bytes(buffer: Buffer) -> memoryview:
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
    joined to `root` as they are: whoever made them has checked them.
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

    def read_into(self, file: str, offset: int, buffer: Buffer) -> None:
        """Fill `buffer` with the bytes of `file` from `offset`; SourceError when the file ends before."""
        target = _as_bytes(buffer)
        with self._descriptor(file) as descriptor:
            self._fill(descriptor, file, offset, target)

    def read_strided(
        self, file: str, offset: int, buffer: Buffer, *, row_bytes: int, row_stride: int, rows: int
    ) -> None:
        """Fill `buffer` with `rows` runs of `row_bytes` bytes, whose starts lie `row_stride` bytes apart in `file`."""
        target = _as_bytes(buffer)
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
                raise SourceError(f"{found}: it changed while it was read", where=file, hint=_DOWNLOAD_AGAIN)
            done += count

    @contextmanager
    def _descriptor(self, file: str) -> Iterator[int]:
        with self._lock:
            held = self._open.get(file)
            if held is None:
                try:
                    held = _OpenFile(os.open(self._root / file, os.O_RDONLY | os.O_CLOEXEC))
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
        source = _as_bytes(buffer)
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
        source = _as_bytes(buffer)
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
