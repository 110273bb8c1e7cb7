"""The files of a folder and the small JSON among them; no path leads out of it."""

from __future__ import annotations

import json
import math
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from fp4conv.errors import SourceError
from fp4conv.families import natural_key
from fp4conv.model import JSON
from fp4conv.safetensors_io import is_text

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
# sentence-transformers numbers the modules of its pipeline; transformers keeps named chat templates in a folder;
# fp4conv/ holds round-trip hints.
_KNOWN_FOLDER = re.compile(r"[0-9]+_\w+|additional_chat_templates|fp4conv")


@dataclass(frozen=True)
class FileEntry:
    """A regular file of the folder. `weights`: tensors are read from it."""

    name: str
    nbytes: int
    mtime_ns: int
    weights: bool = False


@dataclass(frozen=True)
class Listing:
    """`folders`: those that nothing is read from, without hidden ones. A warning for each link that leads out."""

    files: tuple[FileEntry, ...]
    folders: tuple[str, ...]
    warnings: tuple[str, ...]


def is_read(folder: str) -> bool:
    """Whether files in a folder of this name, at the top of a checkpoint, belong to it: so fp4conv may write it too."""
    return _KNOWN_FOLDER.fullmatch(folder) is not None


def list_files(root: Path, refused: list[SourceError] | None = None) -> Listing:
    """The regular files at the top and in folders that `is_read` knows ('1_Pooling/config.json'), in natural order.

    A link in place of weights, index or config that leads nowhere or out is an error, which goes to `refused` if given.
    """
    entries: list[FileEntry] = []
    folders: list[str] = []
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
                if refused is None:
                    raise _bad_link(path)
                refused.append(_bad_link(path))
                continue
            if path.is_dir():
                folders.append(path.name)
            else:
                warnings.append(f"{path.name}: left out, it is a link that leads out of the folder")
            continue
        if is_read(path.name) and path.is_dir() and not path.is_symlink():
            found = sorted(path.iterdir())
            inside = [file for file in found if file.is_file() and _stays_inside(file)]
            entries += [_entry(file, f"{path.name}/{file.name}") for file in inside]
            folders += [f"{path.name}/{folder.name}" for folder in found if folder.is_dir()]
        elif path.is_dir():
            folders.append(path.name)
        elif stat.S_ISREG(path.stat().st_mode):
            entries.append(_entry(path, path.name))
    return Listing(tuple(entries), tuple(folders), tuple(warnings))


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
    """The JSON object in `raw`; SourceError where it is none, or holds what could not be written again as it is.

    Infinity, which transformers 4 writes for Mamba-2's time_step_limit, is kept although it is not JSON.
    """
    hint = "Mend the file, or download it again."
    try:
        parsed: JSON = json.loads(raw.decode("utf-8-sig"), parse_float=_number)
    except json.JSONDecodeError as error:
        found = f"not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}"
        raise SourceError(found, where=name, hint=hint) from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"not valid JSON: {error}", where=name, hint=hint) from error
    if not isinstance(parsed, dict):
        raise SourceError(f"expected a JSON object, found a {type(parsed).__name__}", where=name)
    if found := _unwritable(parsed):
        raise SourceError(found, where=name, hint=hint)
    return parsed


class _TooLarge(float):
    """A number that JSON can spell and a float cannot hold: 1e999."""


def _number(text: str) -> float:
    number = float(text)
    return _TooLarge(number) if math.isinf(number) else number


def _unwritable(parsed: dict[str, JSON]) -> str:
    """What in `parsed` is no JSON, with its key; '' where all is well."""
    todo: list[tuple[str, JSON]] = [("", parsed)]
    while todo:
        key, value = todo.pop()
        if isinstance(value, dict):
            todo += [(f"{key}.{name}" if key else name, inside) for name, inside in value.items()]
        elif isinstance(value, list):
            todo += [(key, inside) for inside in value]
        elif isinstance(value, _TooLarge):
            return f"{ascii(key)[:80]} is a number too large for any float"
        elif isinstance(value, float) and math.isnan(value):
            return f"{ascii(key)[:80]} is NaN, which is no number and no JSON"
        for text in (key, value):
            if isinstance(text, str) and not is_text(text):
                return f"{ascii(key)[:80]} has half of a surrogate pair in {ascii(text)[:80]}, which is no character"
    return ""
