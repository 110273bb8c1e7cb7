"""Taking hold of DST.partial: every refusal comes before the first write, and old leftovers are mended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from fp4conv.errors import OutputError, ResumeError
from fp4conv.staging.journal import JOURNAL_NAME, Journal
from fp4conv.staging.output import Staging, discard
from fp4conv.staging.places import (
    Places,
    check_apart,
    check_replaceable,
    check_room,
    is_inode,
    make_parents,
    remove_contents,
    sync_folder,
)


def claim(
    destination: Path,
    *,
    fingerprint: str,
    command: str,
    pins: Mapping[str, str],
    nbytes: int,
    source_root: Path | None,
    overwrite: bool,
) -> Staging:
    """The staging area for this command: a new one, the one that it left, or a complete one to rename."""
    places = Places.of(destination)
    if source_root is not None:
        check_apart(places, source_root)
    _check_kind(places)
    committed = _settle_target(places, fingerprint)
    if committed is not None:
        return Staging(places, committed, root=places.target, made=(), overwrite=overwrite)
    journal = _open_partial(places)
    if journal is None:
        _check_target(places, overwrite)
        check_room(places, nbytes)
        return _begin(places, fingerprint, command, pins, overwrite)
    try:
        if not _goes_on(places, journal, fingerprint=fingerprint, command=command, nbytes=nbytes, overwrite=overwrite):
            remove_contents(places.partial, keep=JOURNAL_NAME)
            journal.begin(fingerprint, command, pins)
    except BaseException:
        journal.close()
        raise
    return Staging(places, journal, root=places.partial, made=(), overwrite=overwrite)


def pins_of(destination: Path, command: str | None = None) -> Mapping[str, str]:
    """The commits that the half-done output of `destination` began with; with `command`, only if it is that one's.

    Empty where there is none, whatever the reason: `claim` will say what is wrong.
    """
    try:
        path = Places.of(destination).partial / JOURNAL_NAME
        found = _looked_at(path) if path.is_file() else None
    except OutputError:
        return {}
    return found.pins if found is not None and command in (None, found.command) else {}


def check(
    destination: Path,
    *,
    fingerprint: Callable[[], str],
    command: str,
    source_root: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Raise what `claim` would, but for a disk too small, and write nothing. `fingerprint` is asked if it matters."""
    places = Places.of(destination)
    if source_root is not None:
        check_apart(places, source_root)
    _check_kind(places)
    leftover: int | None = None
    if (places.target / JOURNAL_NAME).is_file():
        done = _looked_at(places.target / JOURNAL_NAME)
        if done.complete and done.fingerprint == fingerprint():
            return
        leftover = done.replaces if done.complete else None
    journal = _open_partial(places, look=True)
    if journal is not None:
        journal.close()
        same = journal.fingerprint == fingerprint()
        moved = not places.target.exists() and is_inode(places.replaced, journal.replaces)
        if journal.fingerprint is not None and not same and not overwrite:
            raise _refusal(places, journal, command)
        if moved:
            return
    _check_target(places, overwrite, leftover)


def _looked_at(path: Path) -> Journal:
    journal = Journal(path, look=True)
    journal.close()
    return journal


def _check_kind(places: Places) -> None:
    for path in (places.target, places.partial):
        if path.is_symlink():
            found = "is a symbolic link, which a rename would replace"
            raise OutputError(found, where=str(path), hint="Give the folder that it leads to.")
        if path.exists() and not path.is_dir():
            raise OutputError("is a file, expected a folder to make", where=str(path), hint="Give another destination.")


def _settle_target(places: Places, fingerprint: str) -> Journal | None:
    """Mend a DST whose run was killed after its rename; its journal when it is what this command makes."""
    path = places.target / JOURNAL_NAME
    if not path.is_file():
        return None
    journal = Journal(path)
    if journal.complete and journal.fingerprint == fingerprint:
        return journal
    try:
        if journal.complete:
            if is_inode(places.replaced, journal.replaces):
                remove_contents(places.replaced, keep="")
                places.replaced.rmdir()
            path.unlink()
    finally:
        journal.close()
    return None


def _open_partial(places: Places, *, look: bool = False) -> Journal | None:
    """The journal of DST.partial, None when there is no such folder or nothing in it."""
    partial = places.partial
    if not partial.exists() or not any(partial.iterdir()):
        return None
    if (partial / JOURNAL_NAME).is_file():
        journal = Journal(partial / JOURNAL_NAME, look=look)
        if journal.fingerprint is not None or [path.name for path in partial.iterdir()] == [JOURNAL_NAME]:
            return journal
        journal.close()
    raise ResumeError(
        "is in the way and has no journal that says what made it",
        where=str(partial),
        hint="Move it away, or give another destination.",
    )


def _goes_on(places: Places, journal: Journal, *, fingerprint: str, command: str, nbytes: int, overwrite: bool) -> bool:
    """Whether DST.partial is this command's; it puts an old DST that a killed swap moved away back in its place."""
    same = journal.fingerprint == fingerprint
    moved = not places.target.exists() and is_inode(places.replaced, journal.replaces)
    if same and moved:
        return True  # killed between the two renames: commit does the second
    if moved:
        places.replaced.rename(places.target)
    if journal.fingerprint is not None and not same and not overwrite:
        raise _refusal(places, journal, command)
    _check_target(places, overwrite)
    if not journal.complete or not same:
        check_room(places, nbytes)
    return same


def _refusal(places: Places, journal: Journal, command: str) -> ResumeError:
    where, over = str(places.partial), f"delete {places.partial}, or add --overwrite"
    if journal.command == command:
        found = "is the half-done output of this command, but the source or fp4conv has changed since it began"
        return ResumeError(found, where=where, hint=f"It cannot go on from there. To start over, {over}.")
    return ResumeError(
        f"is the half-done output of another command:\n    {journal.command}",
        where=where,
        hint=f"Run that command to go on with it; to start over with this one, {over}.",
    )


def _check_target(places: Places, overwrite: bool, leftover: int | None = None) -> None:
    """`leftover`: inode of a DST.replaced that is about to be removed."""
    if not places.target.exists():
        return
    if not overwrite:
        hint = "Give another destination, or add --overwrite: the old one stays until the new one is whole."
        raise OutputError("exists already", where=str(places.target), hint=hint)
    check_replaceable(places.target)
    in_the_way = places.replaced.exists() or places.replaced.is_symlink()
    if in_the_way and not is_inode(places.replaced, leftover):
        found = f"is in the way: {places.target.name} is moved there while it is overwritten"
        raise OutputError(found, where=str(places.replaced), hint="Move it away.")


def _begin(places: Places, fingerprint: str, command: str, pins: Mapping[str, str], overwrite: bool) -> Staging:
    made = make_parents(places)
    try:
        try:
            places.partial.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"cannot be made: {error.strerror}", where=str(places.partial), hint="Give another DST."
            ) from error
        journal = Journal(places.partial / JOURNAL_NAME)
    except BaseException:
        if not any(places.partial.iterdir() if places.partial.exists() else ()):
            _give_up(places, made)
        raise
    try:
        journal.begin(fingerprint, command, pins)
        sync_folder(places.partial)
        sync_folder(places.target.parent)
    except BaseException as error:
        discard(places, made)
        journal.close()
        if isinstance(error, OSError):
            raise OutputError(f"cannot be written: {error.strerror}", where=str(places.partial)) from error
        raise
    return Staging(places, journal, root=places.partial, made=made, overwrite=overwrite)


def _give_up(places: Places, made: tuple[Path, ...]) -> None:
    if places.partial.exists():
        places.partial.rmdir()
    for folder in reversed(made):
        folder.rmdir()
