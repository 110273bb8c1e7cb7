"""The three names of one output folder, and the file-system questions about them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fp4conv.errors import OutputError
from fp4conv.sizes import format_size
from fp4conv.sources.listing import is_read


@dataclass(frozen=True)
class Places:
    """`target` is DST; `partial` the folder that is being made; `replaced` the old DST on its way out."""

    target: Path
    partial: Path
    replaced: Path

    @classmethod
    def of(cls, destination: Path) -> Places:
        """Absolute, with every link in the parents resolved; the parents need not exist."""
        name = destination.name
        if name in ("", "..") or "\0" in str(destination):
            hint = "Give the name of a folder to make."
            raise OutputError("is not a name for a new folder", where=repr(str(destination)), hint=hint)
        try:
            parent = destination.parent.resolve()
            places = cls(parent / name, parent / f"{name}.partial", parent / f"{name}.replaced")
            for path in (places.target, places.partial, places.replaced):
                _look_at(path)
        except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a loop of links; ValueError: no encoding
            found = error.strerror if isinstance(error, OSError) else str(error)
            hint = "Give a shorter name, in a folder that you may write to: .partial and .replaced are added to it."
            raise OutputError(f"cannot be made: {found}", where=ascii(str(destination))[:300], hint=hint) from error
        return places


def _look_at(path: Path) -> None:
    """OSError where no folder could have this name: too long, or not to be reached."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return


def check_replaceable(target: Path) -> None:
    """OutputError when the folder to be overwritten does not look like what fp4conv writes: it would be lost."""
    paths = list(target.iterdir())
    if not paths:
        return
    strange = sorted(path.name for path in paths if path.is_symlink() or (path.is_dir() and not is_read(path.name)))
    weights = any(path.name == "config.json" or path.name.endswith(".safetensors") for path in paths)
    if weights and not strange:
        return
    found = "has neither config.json nor safetensors files" if not weights else f"has {', '.join(strange[:5])} in it"
    raise OutputError(
        f"--overwrite would remove it with all that is in it, and it {found}: it is not a checkpoint as fp4conv "
        "writes them",
        where=str(target),
        hint="Give another destination; or look what is in that folder, and remove it yourself.",
    )


def check_apart(places: Places, source_root: Path) -> None:
    """OutputError when source and output overlap, by whatever links or spelling: compared by inode."""
    hint = "Give a destination outside the source: the source is never written to."
    source = source_root.resolve()
    if any(same_folder(folder, source) for folder in (places.target, *places.target.parents)):
        same = same_folder(places.target, source)
        found = "is the source itself" if same else f"lies inside the source {source_root}"
        raise OutputError(found, where=str(places.target), hint=hint)
    for own in (places.target, places.partial, places.replaced):
        if any(same_folder(folder, own) for folder in (source, *source.parents)):
            raise OutputError(f"the source {source_root} lies inside it", where=str(own), hint=hint)


def same_folder(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def is_inode(path: Path, inode: int | None) -> bool:
    """Whether `path` is the folder that had this inode under its old name: a rename keeps it."""
    try:
        return path.lstat().st_ino == inode
    except OSError:
        return False


def nearest_existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def allocated_bytes(folder: Path) -> int:
    """Disk space that the files below `folder` take now; 0 when there is no such folder."""
    return sum(path.lstat().st_blocks * 512 for path in _below(folder))


def check_room(places: Places, nbytes: int) -> None:
    """OutputError when the disk cannot hold `nbytes` more than what DST.partial already has."""
    needed = nbytes - allocated_bytes(places.partial)
    free = shutil.disk_usage(nearest_existing(places.target.parent)).free
    if needed > free:
        raise OutputError(
            f"the disk is too small: {format_size(needed)} are needed, {format_size(free)} are free",
            where=str(places.target),
            hint="Free some space, or write to another disk.",
        )


def make_parents(places: Places) -> tuple[Path, ...]:
    """Make the folders above DST that are missing; returns those, outermost first."""
    missing = [folder for folder in places.target.parent.parents if not folder.exists()][::-1]
    if not places.target.parent.exists():
        missing.append(places.target.parent)
    for number, folder in enumerate(missing):
        try:
            folder.mkdir()
        except OSError as error:
            for made in reversed(missing[:number]):
                made.rmdir()
            raise OutputError(
                f"cannot be made: {error.strerror}", where=str(folder), hint="Give another DST."
            ) from error
    return tuple(missing)


def remove_contents(folder: Path, *, keep: str) -> None:
    """Remove everything in `folder` but the file called `keep`."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != keep:
            path.unlink()


def sync_folder(folder: Path) -> None:
    """Return when the folder's own entries are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Return when every file and folder below, and `folder` itself, are on the disk."""
    for path in _below(folder):
        sync_folder(path)
    sync_folder(folder)


def _below(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if not path.is_symlink())
