"""A repository on the Hub as a checkpoint: its list of files is one request, its headers are ranges of shards."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from fp4conv.errors import SourceError
from fp4conv.families import natural_key
from fp4conv.hub.client import download, in_cache, pin, read_range, snapshot_folder
from fp4conv.hub.names import SCHEME, HubName
from fp4conv.hub.reader import HubReader
from fp4conv.model import JSON, Pinned
from fp4conv.safetensors_io import (
    PREFIX_BYTES,
    Header,
    Reader,
    TensorRef,
    header_bytes,
    parse_header,
    read_header,
)
from fp4conv.sources.listing import SUFFIX, FileEntry, is_read, parse_object
from fp4conv.sources.local import SMALL_FILE_BYTES, collect
from fp4conv.sources.weights import ADAPTER, WeightFiles, choose_weights, compare_index

# Most headers are shorter, so that a shard costs one request.
FIRST_BYTES = 1 << 16
_AT_ONCE = 8  # headers of a large model come in parallel


class HubSource:
    """A repository, or a folder of one, at one commit. Small files come down when they are read, into the cache.

    The same as `sources.local.LocalSource` of that folder downloaded, but that nothing is there yet: `reader()` reads
    ranges of files that the cache does not have. `root` is where the cache has, or will have, the files.
    """

    def __init__(
        self, name: HubName, weight_files: Sequence[str] | None = None, *, pins: Mapping[str, str] | None = None
    ) -> None:
        """`weight_files`: read just these; None leaves the choice to the index or the names."""
        self.name = name.text
        self.pinned: Pinned = pin(name, (pins or {}).get(f"{name.repo}@{name.revision}"))
        self.root = snapshot_folder(self.pinned)
        names = sorted((path for path in self.pinned.files if belongs(path)), key=natural_key)
        listed = [FileEntry(path, self.pinned.files[path].nbytes, 0) for path in names]
        top = [entry for entry in listed if "/" not in entry.name]
        folder = _Folder(self)
        self.files: tuple[FileEntry, ...] = tuple(listed)
        chosen = choose_weights(folder, top) if weight_files is None else self._given(weight_files)
        self.files = tuple(FileEntry(e.name, e.nbytes, e.mtime_ns, e.name in chosen.files) for e in listed)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            self._headers = dict(zip(chosen.files, pool.map(self._header, chosen.files), strict=True))
        self.tensors: Mapping[str, TensorRef] = collect(self._headers)
        self.folders = _other_folders(self.pinned)
        self.warnings = (*chosen.warnings, *compare_index(chosen, self.tensors))

    def reader(self) -> Reader:
        return HubReader(self.pinned)

    def read_bytes(self, name: str, limit: int = SMALL_FILE_BYTES) -> bytes:
        """The bytes of a file that `files` lists; SourceError when it is missing or larger than `limit` bytes."""
        if not self._has(name):
            raise SourceError("no such file in the repository", where=f"{self.name}: {name}")
        nbytes = self.pinned.files[name].nbytes
        if nbytes > limit:
            raise SourceError(f"has {nbytes:,} bytes, at most {limit:,} were expected", where=name)
        try:
            return download(self.pinned, name).read_bytes()
        except OSError as error:
            raise SourceError(f"cannot be read: {error.strerror}", where=name) from error

    def json(self, name: str) -> dict[str, JSON] | None:
        """The JSON object in file `name`; None when there is no such file."""
        return parse_object(self.read_bytes(name), name) if self._has(name) else None

    def fingerprint(self) -> str:
        """A commit never changes, so its name, the folder and the files that are read say it all."""
        weights = [entry.name for entry in self.files if entry.weights]
        facts = (self.pinned.repo, self.pinned.commit, self.pinned.folder, *weights)
        return hashlib.sha256("\0".join(facts).encode()).hexdigest()

    def _has(self, name: str) -> bool:
        return any(entry.name == name for entry in self.files)

    def _given(self, weight_files: Sequence[str]) -> WeightFiles:
        for file in weight_files:
            if not self._has(file):
                hint = "Give a repository that peft saved an adapter to." if file == ADAPTER else None
                raise SourceError(f"has no {file}", where=self.name, hint=hint)
        return WeightFiles(tuple(weight_files))

    def _header(self, file: str) -> Header:
        path = in_cache(self.pinned, file)
        if path is not None:
            return read_header(path, file)
        nbytes = self.pinned.files[file].nbytes
        raw = read_range(self.pinned, file, 0, min(FIRST_BYTES, nbytes)) if nbytes else b""
        length = header_bytes(raw[:PREFIX_BYTES], nbytes, file)
        end = PREFIX_BYTES + length
        if end > len(raw):
            raw += read_range(self.pinned, file, len(raw), end)
        return parse_header(raw[PREFIX_BYTES:end], nbytes, file)


@dataclass(frozen=True)
class _Folder:
    """The repository as `choose_weights` looks at it."""

    source: HubSource

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def incomplete(self) -> str:
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            return "HF_HUB_OFFLINE is set, and the cache does not have all: unset it to download the rest."
        return "The repository is not complete: ask its owner, or give an earlier commit: org/name@COMMIT"

    def read(self, file: str) -> bytes:
        return self.source.read_bytes(file)

    def nested(self) -> Mapping[str, str]:
        pinned = self.source.pinned
        at = f"@{pinned.revision.replace('/', '%2F')}" if pinned.revision != "main" else ""
        folders = {path.rpartition("/")[0] for path in pinned.files if path.endswith(SUFFIX) and "/" in path}
        return {inside: f"{SCHEME}{pinned.repo}{at}/{pinned.path(inside)}" for inside in folders}


def belongs(path: str) -> bool:
    """Whether a file is one of the checkpoint's: at the top, or in a folder that checkpoints have; nothing hidden."""
    folder, _, name = path.rpartition("/")
    return not name.startswith(".") and (not folder or ("/" not in folder and is_read(folder)))


def is_wanted(path: str) -> bool:
    """Whether a reader of all of a checkpoint needs it: not the same weights in other forms, and no code."""
    return path.endswith((SUFFIX, ".json", ".jinja", ".model", ".txt", "modelopt_state.pth"))


def _other_folders(pinned: Pinned) -> tuple[str, ...]:
    """Folders that nothing is read from, by the names that `list_files` gives them."""
    found = set()
    for path in pinned.files:
        first, *rest = path.split("/")
        if rest and not first.startswith(".") and not is_read(first):
            found.add(first)
        elif len(rest) > 1:
            found.add(f"{first}/{rest[0]}")
    return tuple(sorted(found))
