"""A checkpoint to read from, in a folder or on the Hub: which files are its weights, and where each tensor lies.

Owns the choice and the check of files (index, shards, links) and the reading of small ones. It refuses to own what
the tensors mean (`layouts/`) and how the Hub is spoken to (`hub/`), opens no pickle, follows no path out of the folder
and writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fp4conv.errors import SourceError
from fp4conv.hub.client import download, pin, snapshot_folder
from fp4conv.hub.names import HubName, parse_name
from fp4conv.model import Pinned, Source
from fp4conv.sources.listing import FileEntry
from fp4conv.sources.local import SMALL_FILE_BYTES, LocalSource, existing_folder
from fp4conv.sources.remote import HubSource, belongs, is_wanted
from fp4conv.sources.weights import ADAPTER

__all__ = [
    "ADAPTER",
    "SMALL_FILE_BYTES",
    "FileEntry",
    "HubSource",
    "LocalSource",
    "bring_weights",
    "folder_of",
    "open_adapter",
    "open_source",
]

_AT_ONCE = 3


def open_source(text: str | Path, pins: Mapping[str, str] | None = None) -> Source:
    """Open the checkpoint in folder `text`, or in the repository of that name on the Hub.

    Reads the list of files, headers, the index and small configs, no tensor. An existing folder wins over a
    repository. `pins`: repository@revision -> the commit to take, where an earlier run has begun with one.
    """
    name = _on_hub(text)
    if name is not None:
        return HubSource(name, pins=pins or {})
    return LocalSource(existing_folder(text), name=str(text))


def open_adapter(text: str | Path, pins: Mapping[str, str] | None = None) -> Source:
    """Open a peft adapter, in a folder or on the Hub: the tensors of its adapter_model.safetensors."""
    name = _on_hub(text)
    if name is not None:
        return HubSource(name, (ADAPTER,), pins=pins or {})
    root = existing_folder(text)
    if not (root / ADAPTER).exists():
        raise SourceError(f"has no {ADAPTER}", where=str(text), hint="Give the folder that peft saved the adapter in.")
    return LocalSource(root, (ADAPTER,), name=str(text))


def bring_weights(source: Source) -> None:
    """Download the weights of a source on the Hub into the cache: all of them will be read, perhaps more than once."""
    if source.pinned is not None:
        _bring(source.pinned, [file.name for file in source.files if file.weights])


def folder_of(text: str | Path) -> Path:
    """The folder that `text` names; of a repository on the Hub the cache's, after all of the checkpoint came down."""
    name = _on_hub(text)
    if name is None:
        return existing_folder(text)
    pinned = pin(name)
    _bring(pinned, [file for file in pinned.files if belongs(file) and is_wanted(file)])
    return snapshot_folder(pinned)


def _bring(pinned: Pinned, names: Sequence[str]) -> None:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(lambda name: download(pinned, name), names))


def _on_hub(text: str | Path) -> HubName | None:
    """The repository that `text` names, unless it is a path, or something of that name is here."""
    name = parse_name(text) if isinstance(text, str) else None
    return None if name is None or Path(text).exists() else name
