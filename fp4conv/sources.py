"""A local folder as a checkpoint to read from: which files are its weights, and where each tensor lies.

Owns the choice and the check of files (index, shards, links) and the reading of small ones. It refuses to own
what the tensors mean (`layouts/`), opens no pickle, follows no path out of the folder and writes nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fp4conv.errors import SourceError
from fp4conv.model import JSON
from fp4conv.safetensors_io import Header, Reader, TensorRef, read_header

SMALL_FILE_BYTES = 64 * 2**20  # the largest tokenizers take about half of that
_SUFFIX = ".safetensors"
_INDEX_SUFFIX = ".safetensors.index.json"
_MODEL = "model.safetensors"
_ADAPTER = "adapter_model.safetensors"
_SHARD_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d+)-of-(?P<total>\d+)\.safetensors")
_HUB_ID = re.compile(r"(hf://)?[\w.-]+/[\w.-]+(@[\w./-]+)?(/[\w./-]+)?")


@dataclass(frozen=True)
class FileEntry:
    """A regular file at the top of the folder. `weights`: tensors are read from it."""

    name: str
    nbytes: int
    mtime_ns: int
    weights: bool = False


class LocalSource:
    """A folder with safetensors files and configs. Headers are read once, here; tensors by `reader()`.

    `name` is for printing. `tensors` maps every tensor's name to its place, in natural order of the files and
    then by offset. `warnings` are things that a careful user wants to know and that stop nothing.
    """

    def __init__(self, root: Path, weight_files: Sequence[str] | None = None, *, name: str | None = None) -> None:
        """`weight_files`: read just these; None leaves the choice to the index or the names."""
        self.root = root
        self.name = str(root) if name is None else name
        listed, notes = _list_files(root)
        chosen = _choose_weights(root, listed) if weight_files is None else _Choice(tuple(weight_files))
        self.files = tuple(
            FileEntry(entry.name, entry.nbytes, entry.mtime_ns, entry.name in chosen.files) for entry in listed
        )
        for file in chosen.files:
            self._entry(file)
        self._headers = {file: read_header(root / file, file) for file in chosen.files}
        self.tensors: Mapping[str, TensorRef] = _collect(self._headers)
        self.warnings = (*notes, *chosen.warnings, *_compare_index(chosen, self.tensors))

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
        return _parse_object(self.read_bytes(name), name)

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


def open_source(text: str | Path) -> LocalSource:
    """Open the checkpoint in folder `text`: reads directory entries, headers and the index, no tensor."""
    root = _existing_folder(text)
    return LocalSource(root, name=str(text))


def open_adapter(text: str | Path) -> LocalSource:
    """Open a peft adapter's folder: the tensors of its adapter_model.safetensors."""
    root = _existing_folder(text)
    if not (root / _ADAPTER).exists():
        raise SourceError(f"has no {_ADAPTER}", where=str(text), hint="Give the folder that peft saved the adapter in.")
    return LocalSource(root, (_ADAPTER,), name=str(text))


def natural_key(name: str) -> tuple[tuple[int, str], ...]:
    """Sorts `shard-2` before `shard-10`."""
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name))


def _existing_folder(text: str | Path) -> Path:
    root = Path(text)
    where = str(text)
    if "\0" in where:
        raise SourceError("a path cannot have a NUL character", where=repr(where))
    if root.is_dir():
        return root.resolve()
    if root.exists():
        raise SourceError("is a file, expected a folder", where=where, hint=f"Give the folder: {root.parent}")
    hint = "Give the folder that has config.json and the safetensors files."
    if isinstance(text, str) and _HUB_ID.fullmatch(text):
        hint = (
            "Hub ids are not supported yet: download the model first, then give its folder:\n"
            f"  hf download {text.removeprefix('hf://')} --local-dir FOLDER"
        )
    raise SourceError("no such folder", where=where, hint=hint)


# ---- files


def _list_files(root: Path) -> tuple[tuple[FileEntry, ...], tuple[str, ...]]:
    """The regular files at the top, in natural order, and a warning for each link that leads elsewhere."""
    entries: list[FileEntry] = []
    warnings: list[str] = []
    try:
        paths = sorted(root.iterdir(), key=lambda path: natural_key(path.name))
    except OSError as error:
        raise SourceError(f"cannot be listed: {error.strerror}", where=str(root)) from error
    for path in paths:
        if path.name.startswith("."):
            continue
        if path.is_symlink() and not _link_is_safe(path):
            if path.name.endswith((_SUFFIX, "config.json", _INDEX_SUFFIX)):
                raise SourceError(
                    f"is a link that leads out of the folder, to {path.readlink()}",
                    where=path.name,
                    hint="Replace the link by the file, or give the folder where the files are.",
                )
            if not path.is_dir():
                warnings.append(f"{path.name}: left out, it is a link that leads out of the folder")
            continue
        status = path.stat()
        if stat.S_ISREG(status.st_mode):
            entries.append(FileEntry(path.name, status.st_size, status.st_mtime_ns))
    return tuple(entries), tuple(warnings)


def _link_is_safe(path: Path) -> bool:
    """A link within the folder, or the Hugging Face cache's snapshots/REVISION/... -> ../../blobs/HASH."""
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):  # dangling, or a loop of links
        return False
    root = path.parent
    if root in target.parents:
        return True
    snapshots = next((parent for parent in root.parents if parent.name == "snapshots"), None)
    return snapshots is not None and target.parent == snapshots.parent / "blobs"


def _parse_object(raw: bytes, name: str) -> dict[str, JSON]:
    try:
        parsed: JSON = json.loads(raw.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        found = f"not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}"
        raise SourceError(found, where=name, hint="Download the file again, or mend it.") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"not valid JSON: {error}", where=name, hint="Download the file again.") from error
    if not isinstance(parsed, dict):
        raise SourceError(f"expected a JSON object, found a {type(parsed).__name__}", where=name)
    return parsed


# ---- which files are the weights


@dataclass(frozen=True)
class _Choice:
    files: tuple[str, ...]
    index: str = ""
    weight_map: Mapping[str, str] | None = None
    warnings: tuple[str, ...] = ()


def _choose_weights(root: Path, listed: Sequence[FileEntry]) -> _Choice:
    names = [entry.name for entry in listed]
    shards = [name for name in names if name.endswith(_SUFFIX)]
    indexes = [name for name in names if name.endswith(_INDEX_SUFFIX)]
    if indexes:
        return _choose_by_index(root, shards, indexes)
    if _MODEL in shards:
        return _Choice((_MODEL,), warnings=_unread([name for name in shards if name != _MODEL], _MODEL))
    weights = [name for name in shards if name != _ADAPTER]
    if not weights:
        raise _no_weights(root, names)
    main = [name for name in weights if not name.startswith("consolidated")] or weights
    _check_numbering(main)
    return _Choice(tuple(main))


def _choose_by_index(root: Path, shards: Sequence[str], indexes: Sequence[str]) -> _Choice:
    index = _MODEL + ".index.json" if _MODEL + ".index.json" in indexes else indexes[0]
    warnings = [f"{name}: not read, {index} is" for name in indexes if name != index]
    if len(indexes) > 1 and index != _MODEL + ".index.json":
        raise SourceError(
            f"several indexes and none is {_MODEL}.index.json: {', '.join(indexes)}",
            where=str(root),
            hint="Leave just the one that names the weights.",
        )
    try:
        raw = (root / index).read_bytes()
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}", where=index) from error
    found = _parse_object(raw, index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise SourceError("its weight_map must map tensor names to shards", where=index, hint="Download it again.")
    weight_map: dict[str, str] = {}
    for tensor, shard in found.items():
        weight_map[tensor] = _check_shard_name(shard, tensor, index)
    files = sorted(set(weight_map.values()), key=natural_key)
    missing = [file for file in files if file not in shards]
    if missing:
        raise SourceError(
            f"names {len(files)} shards, {len(missing)} are missing: {_some(missing)}",
            where=index,
            hint="The download is not complete: download the missing files.",
        )
    warnings += _unread([name for name in shards if name not in files], index)
    return _Choice(tuple(files), index, weight_map, tuple(warnings))


def _check_shard_name(shard: JSON, tensor: str, index: str) -> str:
    """A shard is a plain file name: nothing that could lead out of the folder, on any system."""
    plain = isinstance(shard, str) and shard.endswith(_SUFFIX) and not shard.startswith(".")
    if not isinstance(shard, str) or not plain or any(char in shard for char in "/\\:\0"):
        found = f"tensor {tensor!r} is said to lie in {str(shard)[:200]!r}"
        raise SourceError(f"{found}; a shard must be a plain *{_SUFFIX} file name in the same folder", where=index)
    return shard


def _unread(names: Sequence[str], chosen: str) -> tuple[str, ...]:
    """A warning for weights that nothing names; adapters and Mistral's consolidated copies are well known."""
    strange = [name for name in names if name != _ADAPTER and not name.startswith("consolidated")]
    return (f"not read, since {chosen} decides what the weights are: {_some(strange)}",) if strange else ()


def _check_numbering(names: Sequence[str]) -> None:
    """Without an index only the names can tell that a shard is missing: NUMBER-of-TOTAL, counted from 1 or 0."""
    sets: dict[tuple[str, int], set[int]] = {}
    for name in names:
        match = _SHARD_NAME.fullmatch(name)
        if match:
            sets.setdefault((match["stem"], int(match["total"])), set()).add(int(match["number"]))
    for (stem, total), found in sets.items():
        # gpt-oss counts from zero and calls the last number the total: 00000-of-00002 is one of three.
        expected = set(range(total)) if 0 in found else set(range(1, total + 1))
        missing = sorted(expected - found)
        if missing:
            raise SourceError(
                f"of {total} shards {len(missing)} are missing: number {_some([str(number) for number in missing])}",
                where=f"{stem}-*{_SUFFIX}",
                hint="The download is not complete: download the missing files and the index.",
            )


def _some(names: Sequence[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _no_weights(root: Path, names: Sequence[str]) -> SourceError:
    where = str(root)
    if _ADAPTER in names or "adapter_config.json" in names:
        return SourceError(
            "this is a LoRA adapter: it has no model weights of its own",
            where=where,
            hint="Give the base model as the source and the adapter as --lora ADAPTER.",
        )
    found = [path for path in root.glob("*/*" + _SUFFIX) if path.name != _ADAPTER]
    nested = sorted(path.parent.name for path in found if not path.parent.name.startswith("."))
    if nested:
        hint = f"The folder {nested[0]} in it has some: give {root / nested[0]}"
        return SourceError("there are no safetensors files at the top of the folder", where=where, hint=hint)
    for suffixes, kind, hint in (
        ((".gguf",), "GGUF files, which fp4conv does not read", "Get the safetensors release of the model."),
        (
            (".bin", ".pt", ".pth"),
            "PyTorch pickles, which can run code and are never opened",
            "Save the model as safetensors first: model.save_pretrained(FOLDER, safe_serialization=True)",
        ),
    ):
        pickles = [name for name in names if name.endswith(suffixes)]
        if pickles:
            return SourceError(f"there are no safetensors files, only {kind}: {_some(pickles)}", where=where, hint=hint)
    holds = f"it holds {_some(names)}" if names else "it is empty"
    hint = "Give the folder that has config.json and the safetensors files."
    return SourceError(f"there are no safetensors files in the folder; {holds}", where=where, hint=hint)


# ---- tensors of all files


def _collect(headers: Mapping[str, Header]) -> dict[str, TensorRef]:
    tensors: dict[str, TensorRef] = {}
    for header in headers.values():
        for ref in header.tensors:
            if ref.name in tensors:
                raise SourceError(
                    f"tensor {ref.name!r} is also in {tensors[ref.name].file}",
                    where=ref.file,
                    hint="Two sets of weights lie in the folder: move one of them away.",
                )
            tensors[ref.name] = ref
    return tensors


def _compare_index(chosen: _Choice, tensors: Mapping[str, TensorRef]) -> tuple[str, ...]:
    """Warnings; SourceError where the index promises what the shards do not hold."""
    if chosen.weight_map is None:
        return ()
    for name, shard in chosen.weight_map.items():
        ref = tensors.get(name)
        if ref is None or ref.file != shard:
            found = "no shard has it" if ref is None else f"it is in {ref.file}"
            raise SourceError(
                f"tensor {name!r} should be in {shard}, but {found}",
                where=chosen.index,
                hint="The index and the shards are not of one download: download both again.",
            )
    extra = [name for name in tensors if name not in chosen.weight_map]
    if not extra:
        return ()
    return (f"{chosen.index}: does not name {len(extra)} tensors that its shards hold, taken along: {_some(extra)}",)
