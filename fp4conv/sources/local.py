"""A local folder as a checkpoint: every tensor's place, the small files, a fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fp4conv.errors import SourceError
from fp4conv.families import module_of
from fp4conv.model import JSON, Pinned
from fp4conv.safetensors_io import Header, Reader, TensorRef, read_header
from fp4conv.sources.listing import SUFFIX, FileEntry, list_files, parse_object
from fp4conv.sources.weights import ADAPTER, WeightFiles, choose_weights, compare_index

SMALL_FILE_BYTES = 64 * 2**20  # the largest tokenizers take about half of that


class LocalSource:
    """A folder with safetensors files and configs. Headers are read once, here; tensors by `reader()`.

    `name` is for printing. `tensors` maps every tensor's name to its place, in natural order of the files and
    then by offset. `folders` are those that nothing is read from. `warnings` are things that a careful user wants
    to know and that stop nothing.
    """

    def __init__(self, root: Path, weight_files: Sequence[str] | None = None, *, name: str | None = None) -> None:
        """`weight_files`: read just these; None leaves the choice to the index or the names."""
        self.root = root
        self.name = str(root) if name is None else name
        listing = list_files(root)
        listed = listing.files
        top = [entry for entry in listed if "/" not in entry.name]
        chosen = choose_weights(LocalFolder(root), top) if weight_files is None else WeightFiles(tuple(weight_files))
        self.files = tuple(
            FileEntry(entry.name, entry.nbytes, entry.mtime_ns, entry.name in chosen.files) for entry in listed
        )
        for file in chosen.files:
            self._entry(file)
        self._headers = {file: read_header(root / file, file) for file in chosen.files}
        self.tensors: Mapping[str, TensorRef] = collect(self._headers)
        self.folders = listing.folders
        self.warnings = (*listing.warnings, *chosen.warnings, *compare_index(chosen, self.tensors))
        self.pinned: Pinned | None = None

    @property
    def metadata(self) -> Mapping[str, str]:
        """The `__metadata__` strings of all weight files; the first file that has a key decides."""
        merged: dict[str, str] = {}
        for header in self._headers.values():
            merged = {**header.metadata, **merged}
        return merged

    def reader(self) -> Reader:
        return Reader(self.root)

    def read_bytes(self, name: str, limit: int = SMALL_FILE_BYTES) -> bytes:
        """The bytes of a file that `files` lists; SourceError when it is missing or larger than `limit` bytes."""
        entry = self._entry(name)
        if entry.nbytes > limit:
            raise SourceError(f"has {entry.nbytes:,} bytes, at most {limit:,} were expected", where=name)
        try:
            return (self.root / name).read_bytes()
        except OSError as error:
            raise SourceError(f"cannot be read: {error.strerror}", where=name) from error

    def json(self, name: str) -> dict[str, JSON] | None:
        """The JSON object in file `name`; None when there is no such file."""
        if not any(entry.name == name for entry in self.files):
            return None
        return parse_object(self.read_bytes(name), name)

    def fingerprint(self) -> str:
        """SHA-256 over every file's name, size and time, the headers, and the bytes of small JSON files.

        Another fingerprint means that a half-done conversion cannot go on from here.
        """
        digest = hashlib.sha256()
        for entry in self.files:
            digest.update(f"{entry.name}\0{entry.nbytes}\0{entry.mtime_ns}\0{int(entry.weights)}\0".encode())
            if entry.weights:
                digest.update(self._headers[entry.name].digest.encode())
            elif entry.name.endswith(".json") and entry.nbytes <= SMALL_FILE_BYTES:
                digest.update(hashlib.sha256(self.read_bytes(entry.name)).digest())
        return digest.hexdigest()

    def _entry(self, name: str) -> FileEntry:
        for entry in self.files:
            if entry.name == name:
                return entry
        raise SourceError("no such file in the folder", where=f"{self.name}: {name}")


@dataclass(frozen=True)
class LocalFolder:
    """A folder of this machine as `choose_weights` looks at it."""

    root: Path
    incomplete: str = "The download is not complete: download the missing files."

    @property
    def name(self) -> str:
        return str(self.root)

    def read(self, file: str) -> bytes:
        try:
            return (self.root / file).read_bytes()
        except OSError as error:
            raise SourceError(f"cannot be read: {error.strerror}", where=file) from error

    def nested(self) -> Mapping[str, str]:
        cached = "snapshots/*/*"  # where huggingface_hub's cache has the files of models--org--name
        found = [path for glob in ("*/*", cached) for path in self.root.glob(glob + SUFFIX) if path.name != ADAPTER]
        inside = [path.parent for path in found if not path.parent.name.startswith(".")]
        return {folder.relative_to(self.root).as_posix(): str(folder) for folder in inside}


def existing_folder(
    text: str | Path, *, holds: str = "config.json and the safetensors files", or_hub: bool = True
) -> Path:
    """The folder that `text` names, links resolved; SourceError where there is none.

    `holds`: what is looked for in it. `or_hub`: whether a repository on the Hub would have done too. Errors say both.
    """
    root = Path(text)
    where = str(text)
    if "\0" in where:
        raise SourceError("a path cannot have a NUL character", where=repr(where))
    try:
        found, there = root.is_dir(), root.exists()
    except (OSError, ValueError) as error:  # a name too long, or one with half a character
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise SourceError(f"cannot be opened: {reason}", where=ascii(where)[:300]) from error
    if found:
        return root.resolve()
    if there:
        raise SourceError("is a file, expected a folder", where=where, hint=f"Give the folder: {root.parent}")
    hint = f"Give the folder that has {holds}"
    if or_hub:
        hint += ", or a repository on the Hub: org/name, org/name@revision, hf://org/name/subfolder"
    raise SourceError("no such folder", where=where, hint=hint)


def collect(headers: Mapping[str, Header]) -> dict[str, TensorRef]:
    """All tensors by name; SourceError where two files have one of the same name."""
    tensors: dict[str, TensorRef] = {}
    for header in headers.values():
        for ref in header.tensors:
            if not module_of(ref.name):
                raise SourceError(
                    f"a tensor is called {ref.name!r}, which names no module",
                    where=ref.file,
                    hint="The tool that wrote this file damaged it: write it again.",
                )
            if ref.name in tensors:
                raise SourceError(
                    f"tensor {ref.name!r} is also in {tensors[ref.name].file}",
                    where=ref.file,
                    hint="Two sets of weights lie in the folder: move one of them away.",
                )
            tensors[ref.name] = ref
    return tensors
