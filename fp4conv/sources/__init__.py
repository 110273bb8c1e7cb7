"""A checkpoint to read from, in a folder or on the Hub: which files are its weights, and where each tensor lies.

Owns the choice and the check of files (index, shards, links) and the reading of small ones. It refuses to own what
the tensors mean (`layouts/`) and how the Hub is spoken to (`hub/`), opens no pickle, follows no path out of the folder
and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

from fp4conv.errors import SourceError
from fp4conv.hub.bringing import bring
from fp4conv.hub.client import pin, snapshot_folder
from fp4conv.hub.names import HubName, parse_name
from fp4conv.model import Source
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
    "OnFetch",
    "bring_weights",
    "folder_of",
    "open_adapter",
    "open_source",
]

OnFetch: TypeAlias = Callable[[int, int], None]  # bytes that have come, and how many there are in all


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
    root = existing_folder(text, holds=f"adapter_config.json and {ADAPTER}")
    if not (root / ADAPTER).exists():
        raise SourceError(f"has no {ADAPTER}", where=str(text), hint="Give the folder that peft saved the adapter in.")
    return LocalSource(root, (ADAPTER,), name=str(text))


def bring_weights(source: Source, on_fetch: OnFetch | None = None) -> None:
    """Download the weights of a source on the Hub into the cache: all of them will be read, perhaps more than once."""
    if source.pinned is not None:
        bring(source.pinned, [file.name for file in source.files if file.weights], on_fetch)


def folder_of(text: str | Path, on_fetch: OnFetch | None = None, pins: dict[str, str] | None = None) -> Path:
    """The folder that `text` names; of a repository on the Hub the cache's, after all of the checkpoint came down.

    `pins`: repository@revision -> the commit to take, as in `open_source`; a commit that is found is added.
    """
    name = _on_hub(text)
    if name is None:
        return existing_folder(text)
    known, key = {} if pins is None else pins, f"{name.repo}@{name.revision}"
    pinned = pin(name, known.get(key))
    known[key] = pinned.commit
    bring(pinned, [file for file in pinned.files if belongs(file) and is_wanted(file)], on_fetch)
    return snapshot_folder(pinned)


def _on_hub(text: str | Path) -> HubName | None:
    """The repository that `text` names, unless it is a path, or something of that name is here."""
    name = parse_name(text) if isinstance(text, str) else None
    return None if name is None or Path(text).exists() else name
