"""What the pipeline holds while it writes: the folder, the finished steps, and the way to the final name."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath

from fp4conv.errors import OutputError
from fp4conv.model import JSON
from fp4conv.staging.journal import JOURNAL_NAME, Journal
from fp4conv.staging.places import Places, check_replaceable, is_inode, remove_contents, sync_folder, sync_tree


class Staging:
    """A claimed output folder. Safe to share between threads; made by `stage`.

    `root` is DST.partial, and DST after `commit`. `finished` maps the steps of earlier runs to what they recorded.
    `complete`: an earlier run wrote every file and was stopped before the last rename, so only `commit` is left.
    """

    def __init__(
        self, places: Places, journal: Journal, *, root: Path, made: tuple[Path, ...], overwrite: bool
    ) -> None:
        self.root = root
        self.finished: Mapping[str, Mapping[str, JSON]] = dict(journal.finished)
        self.complete = journal.complete
        self.started = bool(journal.finished) or journal.complete
        self._places = places
        self._journal = journal
        self._made = made
        self._overwrite = overwrite
        self._lock = threading.Lock()
        self._pending: list[tuple[str, Mapping[str, JSON]]] = []
        self._left = False

    @property
    def resume_hint(self) -> str:
        return f"What is done is kept in {self.root}. The same command goes on from there:\n    {self._journal.command}"

    def start(self) -> None:
        """Tensor data are about to be written: from now on an error keeps the folder."""
        self.started = True

    def record(self, key: str, payload: Mapping[str, JSON]) -> None:
        """Step `key` has written its bytes. Counts for a later run only after the next `checkpoint`."""
        with self._lock:
            self.started = True
            self._pending.append((key, dict(payload)))

    def note(self, key: str, payload: Mapping[str, JSON]) -> None:
        """Journal at once what has no bytes here that would have to be on the disk first."""
        with self._lock:
            self.started = True
            self.finished = {**self.finished, key: dict(payload)}
            try:
                self._journal.append_done([(key, payload)])
            except OSError as error:
                where = str(self.root / JOURNAL_NAME)
                raise OutputError(f"cannot be written: {error.strerror}", where=where) from error

    def forget(self, keys: Collection[str]) -> None:
        """Take steps of earlier runs back: their bytes are gone. On the disk before this returns."""
        if not keys:
            return
        self.finished = {key: payload for key, payload in self.finished.items() if key not in keys}
        with self._lock:
            self._journal.keep(list(self.finished.items()))

    def checkpoint(self, *syncs: Callable[[], None]) -> tuple[str, ...]:
        """Journal the steps recorded so far, after `syncs` have put their bytes on the disk; returns their keys.

        Steps that other threads record while `syncs` run wait for the next call: their bytes may not be down yet.
        """
        with self._lock:
            pending, self._pending = self._pending, []
        try:
            for sync in syncs:
                sync()
            if pending:
                with self._lock:
                    self._journal.append_done(pending)
        except BaseException as error:
            with self._lock:
                self._pending = pending + self._pending
            if isinstance(error, OSError):
                where = str(self.root / JOURNAL_NAME)
                raise OutputError(f"cannot be written: {error.strerror}", where=where) from error
            raise
        return tuple(key for key, _ in pending)

    def path(self, name: str) -> Path:
        """Where file `name` of the output goes; OutputError when that would not be inside the folder."""
        parts = PurePosixPath(name).parts
        hostile = not parts or name.startswith("/") or ".." in parts or any(char in name for char in "\\\0")
        if hostile or JOURNAL_NAME in parts:
            raise OutputError(f"{name!r} is not a name for a file inside the output folder", where=str(self.root))
        return self.root.joinpath(*parts)

    def write_file(self, name: str, content: bytes) -> None:
        """Write a small file, whose name may have folders ('1_Pooling/config.json')."""
        path = self.path(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except OSError as error:
            raise OutputError(f"cannot be written: {error.strerror}", where=str(path)) from error

    def commit(self) -> None:
        """Put every file on the disk and give the folder its final name. Call it last: nothing is written after."""
        assert not self._left, "commit comes once"
        self.started = True
        self.checkpoint()
        try:
            if self.root != self._places.target:
                self._rename()
            self._tidy()
        except OSError as error:
            raise OutputError(
                f"cannot be completed: {error.strerror}", where=str(error.filename or self.root)
            ) from error
        self._journal.close()
        self._left = True

    def drop(self) -> None:
        """Remove the folder: what was made in it is somewhere else. Call it last, in place of `commit`."""
        assert not self._left, "the end comes once"
        try:
            discard(self._places, self._made)
        except OSError as error:
            raise OutputError(f"cannot be removed: {error.strerror}", where=str(self.root)) from error
        self._journal.close()
        self._left = True

    def leave(self) -> bool:
        """Let go of the folder; True when it stays for a later run, False when it is committed or removed."""
        if self._left:
            return self.started and self.root == self._places.partial
        self._left = True
        try:
            if not self.started and self.root == self._places.partial:
                with suppress(OSError):  # the error that brought us here matters more
                    discard(self._places, self._made)
        finally:
            self._journal.close()
        return self.started and self.root == self._places.partial

    def _rename(self) -> None:
        target, partial, replaced = self._places.target, self._places.partial, self._places.replaced
        if not self._journal.complete:
            sync_tree(partial)
            self._journal.append_complete()
        if target.exists() or target.is_symlink():
            if not self._overwrite:
                raise OutputError(
                    "appeared while its new content was written",
                    where=str(target),
                    hint="Move it away and run the same command again, or add --overwrite.",
                )
            check_replaceable(target)
            self._journal.append_replaces(target.lstat().st_ino)
            target.rename(replaced)
        partial.rename(target)
        self.root = target
        sync_folder(target.parent)

    def _tidy(self) -> None:
        """Remove what only an unfinished output needs; the journal last, since it names the folder to remove."""
        if is_inode(self._places.replaced, self._journal.replaces):
            shutil.rmtree(self._places.replaced)
        (self.root / JOURNAL_NAME).unlink()
        sync_folder(self.root)


def discard(places: Places, made: tuple[Path, ...]) -> None:
    """Remove DST.partial, journal last, and the parents that were made for it."""
    remove_contents(places.partial, keep=JOURNAL_NAME)
    (places.partial / JOURNAL_NAME).unlink(missing_ok=True)
    places.partial.rmdir()
    for folder in reversed(made):
        try:
            folder.rmdir()
        except OSError:  # someone else put something there meanwhile
            return
