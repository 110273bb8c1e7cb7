"""The files of a folder and the small JSON among them; no path leads out of it."""

from __future__ import annotations

import json
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from fp4conv.errors import SourceError
from fp4conv.families import natural_key
from fp4conv.model import JSON

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
# sentence-transformers numbers the modules of its pipeline; fp4conv/ holds round-trip hints.
_KNOWN_FOLDER = re.compile(r"\d+_\w+|fp4conv")


@dataclass(frozen=True)
class FileEntry:
    """A regular file of the folder. `weights`: tensors are read from it."""

    name: str
    nbytes: int
    mtime_ns: int
    weights: bool = False


def list_files(root: Path) -> tuple[tuple[FileEntry, ...], tuple[str, ...]]:
    """The regular files at the top, in sentence-transformers' module folders ('1_Pooling/config.json') and in fp4conv/.

    In natural order, with a warning for each link that leads elsewhere.
    """
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
            if path.name.endswith((SUFFIX, "config.json", INDEX_SUFFIX)):
                raise _bad_link(path)
            if not path.is_dir():
                warnings.append(f"{path.name}: left out, it is a link that leads out of the folder")
            continue
        if _KNOWN_FOLDER.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            inside = [file for file in sorted(path.iterdir()) if file.is_file() and _stays_inside(file)]
            entries += [_entry(file, f"{path.name}/{file.name}") for file in inside]
        elif stat.S_ISREG(path.stat().st_mode):
            entries.append(_entry(path, path.name))
    return tuple(entries), tuple(warnings)


def _entry(path: Path, name: str) -> FileEntry:
    status = path.stat()
    return FileEntry(name, status.st_size, status.st_mtime_ns)


def _bad_link(path: Path) -> SourceError:
    if not path.exists():
        hint = "The download is not complete: download the file again."
        return SourceError(f"is a link to {path.readlink()}, which is not there", where=path.name, hint=hint)
    hint = "Replace the link by the file, or give the folder where the files are."
    return SourceError(f"is a link that leads out of the folder, to {path.readlink()}", where=path.name, hint=hint)


def _stays_inside(path: Path) -> bool:
    return not path.is_symlink() or _link_is_safe(path)


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


def parse_object(raw: bytes, name: str) -> dict[str, JSON]:
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
