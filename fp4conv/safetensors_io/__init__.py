"""The safetensors container: check a header, lay out a new one, read and write at known places.

Owns the file format and positional I/O on it. It refuses to own what a tensor means, which files make a checkpoint
(`sources`) and when a write is safe (`staging`).
"""

from __future__ import annotations

from fp4conv.safetensors_io.files import MAX_OPEN_FILES, Buffer, Reader, Writer, as_bytes, header_at, read_header
from fp4conv.safetensors_io.header import (
    DTYPE_BYTES,
    MAX_HEADER_BYTES,
    PREFIX_BYTES,
    PT_METADATA,
    Header,
    ShardLayout,
    TensorRef,
    TensorSpec,
    header_bytes,
    is_text,
    lay_out,
    numpy_dtype,
    parse_header,
)

__all__ = [
    "DTYPE_BYTES",
    "MAX_HEADER_BYTES",
    "MAX_OPEN_FILES",
    "PREFIX_BYTES",
    "PT_METADATA",
    "Buffer",
    "Header",
    "Reader",
    "ShardLayout",
    "TensorRef",
    "TensorSpec",
    "Writer",
    "as_bytes",
    "header_at",
    "header_bytes",
    "is_text",
    "lay_out",
    "numpy_dtype",
    "parse_header",
    "read_header",
]
