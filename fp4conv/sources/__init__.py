"""A folder as a checkpoint to read from: which files are its weights, and where each tensor lies.

Owns the choice and the check of files (index, shards, links) and the reading of small ones. It refuses to own what
the tensors mean (`layouts/`), opens no pickle, follows no path out of the folder and writes nothing.
"""

from __future__ import annotations

from fp4conv.sources.listing import FileEntry
from fp4conv.sources.local import SMALL_FILE_BYTES, LocalSource, open_adapter, open_source

__all__ = ["SMALL_FILE_BYTES", "FileEntry", "LocalSource", "open_adapter", "open_source"]
