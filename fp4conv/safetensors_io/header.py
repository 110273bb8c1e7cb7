"""The header of a safetensors file, read and written: 8 bytes of little-endian length, then JSON.

Pure: bytes in, places out. Whoever calls has read the bytes or will write them.

Source: the format section of the safetensors README; limits and order as safetensors 0.8 has them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NoReturn

import numpy as np

from fp4conv.errors import SourceError

PREFIX_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # what the safetensors library refuses to go beyond
PT_METADATA: Mapping[str, str] = MappingProxyType({"format": "pt"})
_MAX_OFFSET = 2**63 - 1
_MAX_AXES = 64  # a hostile shape of a million axes would take hours to multiply
_METADATA = "__metadata__"
DOWNLOAD_AGAIN = "The file is damaged or its download was cut short: download it again."

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
        raise SourceError(found, where=file, hint=DOWNLOAD_AGAIN)
    length = int.from_bytes(prefix[:PREFIX_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        found = f"its first bytes announce a header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} are allowed"
        raise SourceError(found, where=file, hint="Is this a safetensors file? If so, download it again.")
    if PREFIX_BYTES + length > file_bytes:
        found = f"the header should end at byte {PREFIX_BYTES + length:,}, the file ends at {file_bytes:,}"
        raise SourceError(found, where=file, hint=DOWNLOAD_AGAIN)
    return length


def parse_header(raw: bytes, file_bytes: int, file: str) -> Header:
    """Check the JSON header `raw` of a file of `file_bytes` bytes and place its tensors.

    Every byte of data must belong to exactly one tensor, and every shape must fill its span, as the format
    demands; else SourceError names the file and the tensor.
    """
    entries = _parse_json(raw, file)
    metadata = _parse_metadata(entries.pop(_METADATA, {}), file)
    if b"\\u" in raw:  # only an escape can spell one
        _refuse_half_characters((*entries, *metadata, *metadata.values()), file)
    start = PREFIX_BYTES + len(raw)
    specs: dict[tuple[object, ...], tuple[TensorSpec, int]] = {}
    spans: list[tuple[int, int, str, TensorSpec]] = []
    for name, entry in entries.items():
        try:
            spec, begin, end = _parse_entry(entry, specs)
        except SourceError as error:
            raise SourceError(error.what, where=f"{file}: tensor {name!r}", hint=error.hint) from error
        spans.append((begin, end, name, spec))
    spans.sort(key=lambda span: span[:2])
    _check_cover(spans, file_bytes - start, file)
    tensors = tuple(TensorRef(file, name, spec, start + begin) for begin, _, name, spec in spans)
    return Header(tensors, metadata, start, hashlib.sha256(raw).hexdigest())


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
        raise SourceError(f"the header is not valid JSON: {error}", where=file, hint=DOWNLOAD_AGAIN) from error
    if not isinstance(header, dict) or not raw.startswith(b"{"):
        raise SourceError("the header is not a JSON object", where=file, hint=DOWNLOAD_AGAIN)
    return header


def is_text(name: str) -> bool:
    """Whether `name` can be written as UTF-8: a JSON escape can spell half of a surrogate pair, which cannot."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_half_characters(names: Iterable[str], file: str) -> None:
    for name in names:
        if not is_text(name):
            found = f"the name {ascii(name)[:80]} has half of a surrogate pair, which is no character"
            raise SourceError(found, where=file, hint=DOWNLOAD_AGAIN)


def _parse_metadata(found: object, file: str) -> Mapping[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise SourceError(f"{_METADATA} of the header must map strings to strings", where=file)
    return found


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_OFFSET  # type(): True is an int by isinstance


def _parse_entry(entry: object, specs: dict[tuple[object, ...], tuple[TensorSpec, int]]) -> tuple[TensorSpec, int, int]:
    """(spec, begin, end) of one tensor; offsets count from the end of the header.

    `specs` keeps what was checked once: thousands of tensors have a few dozen shapes.
    """
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise SourceError("its header entry must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or len(shape) > _MAX_AXES or not all(map(_is_size, shape)):
        raise SourceError(f"its shape must be a list of sizes, found {str(shape)[:80]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise SourceError(f"its data_offsets must be two byte offsets, found {str(offsets)[:80]}")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        known = ", ".join(DTYPE_BYTES)
        raise SourceError(f"its dtype {str(dtype)[:80]!r} is not one that fp4conv reads ({known})")
    key = (dtype, *shape)
    found = specs.get(key)
    if found is None:
        spec = TensorSpec(dtype, tuple(shape))
        found = specs[key] = (spec, spec.nbytes)
    spec, nbytes = found
    begin, end = offsets
    if end - begin != nbytes:
        raise SourceError(
            f"{dtype} {list(shape)} takes {nbytes:,} bytes, its data_offsets span {end - begin:,}", hint=DOWNLOAD_AGAIN
        )
    return spec, begin, end


def _check_cover(spans: Sequence[tuple[int, int, str, TensorSpec]], data_bytes: int, file: str) -> None:
    reached = 0
    for begin, end, name, _ in spans:
        if begin != reached:
            kind = "overlaps the one before" if begin < reached else "leaves a hole before it"
            found = f"its data begins at {begin:,}, expected {reached:,}: it {kind}"
            raise SourceError(found, where=f"{file}: tensor {name!r}", hint=DOWNLOAD_AGAIN)
        reached = end
    if reached > data_bytes:
        found = f"the file is truncated: it holds {data_bytes:,} bytes of tensors, its header promises {reached:,}"
        raise SourceError(found, where=file, hint=DOWNLOAD_AGAIN)
    if reached < data_bytes:
        found = f"{data_bytes - reached:,} bytes after the last tensor belong to none"
        raise SourceError(found, where=file, hint=DOWNLOAD_AGAIN)


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
