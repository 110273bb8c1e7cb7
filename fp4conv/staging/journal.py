"""The journal of a half-done output: who makes it, and which of its steps are done.

Owns one file of JSON lines, locked for as long as it is open. A kill may tear its last line and nothing else, so a
reader stops at the first line that is not whole. It refuses to own what a step is, and the folder around it.

    {"fp4conv": 1, "fingerprint": ..., "command": ..., "pins": {REPOSITORY@REVISION: COMMIT}}    the head, always first
    {"done": KEY, "payload": {...}}                       one step, its bytes on the disk
    {"complete": true}                                    every file is whole; only the renames are left
    {"replaces": INODE}                                   the folder that is being moved out of the way
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from fp4conv.errors import OutputError, ResumeError
from fp4conv.model import JSON

JOURNAL_NAME = ".fp4conv-journal.jsonl"
_VERSION = 1


class Journal:
    """An open and locked journal.

    `fingerprint` is None where no whole head was found: a run was killed before it wrote anything.
    """

    def __init__(self, path: Path, *, look: bool = False) -> None:
        """Open or make the journal at `path`, or (`look`) just read it. ResumeError when a running process holds it."""
        flags = os.O_RDONLY if look else os.O_RDWR | os.O_CREAT | os.O_APPEND
        self._descriptor = _open_locked(path, flags)
        self._look = look
        self.fingerprint: str | None = None
        self.command = ""
        self.pins: dict[str, str] = {}
        self.finished: dict[str, dict[str, JSON]] = {}
        self.complete = False
        self.replaces: int | None = None
        self._load()

    def begin(self, fingerprint: str, command: str, pins: Mapping[str, str]) -> None:
        """Start over with a new head, which is on the disk when this returns."""
        os.ftruncate(self._descriptor, 0)
        self.finished, self.complete, self.replaces = {}, False, None
        self.fingerprint, self.command, self.pins = fingerprint, command, dict(pins)
        head: dict[str, JSON] = {"fp4conv": _VERSION, "fingerprint": fingerprint, "command": command}
        self._append([{**head, "pins": dict(pins)}])

    def append_done(self, steps: Sequence[tuple[str, Mapping[str, JSON]]]) -> None:
        """Add finished steps; they are on the disk when this returns."""
        self._append([{"done": key, "payload": dict(payload)} for key, payload in steps])

    def keep(self, steps: Sequence[tuple[str, Mapping[str, JSON]]]) -> None:
        """Write the journal anew with just these finished steps. A kill in between leaves none, which is safe."""
        assert self.fingerprint is not None, "a journal without a head has no steps"
        self.begin(self.fingerprint, self.command, self.pins)
        self.append_done(steps)

    def append_complete(self) -> None:
        self.complete = True
        self._append([{"complete": True}])

    def append_replaces(self, inode: int) -> None:
        self.replaces = inode
        self._append([{"replaces": inode}])

    def close(self) -> None:
        """Give up the lock."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _append(self, lines: Sequence[dict[str, JSON]]) -> None:
        text = memoryview("".join(json.dumps(line) + "\n" for line in lines).encode())
        before = os.fstat(self._descriptor).st_size
        try:
            while text:
                text = text[os.write(self._descriptor, text) :]
            os.fsync(self._descriptor)
        except OSError:
            os.ftruncate(self._descriptor, before)  # half a line would swallow the next one
            raise

    def _load(self) -> None:
        text = b""
        while piece := os.read(self._descriptor, 1 << 20):
            text += piece
        whole = 0
        for raw in text.splitlines(keepends=True):
            if not raw.endswith(b"\n") or not self._take(raw):
                break
            whole += len(raw)
        if whole < len(text) and not self._look:
            os.ftruncate(self._descriptor, whole)  # so that the next line starts on a line of its own
        os.lseek(self._descriptor, 0, os.SEEK_END)

    def _take(self, raw: bytes) -> bool:
        """Use one line; False when it is not a whole line of ours."""
        try:
            line: JSON = json.loads(raw)
        except ValueError:
            return False
        match line:
            case {"fp4conv": 1, "fingerprint": str(fingerprint), "command": str(command), **rest}:
                self.fingerprint, self.command = fingerprint, command
                pins = rest.get("pins")
                self.pins = {key: str(value) for key, value in pins.items()} if isinstance(pins, dict) else {}
            case {"done": str(key), "payload": dict(payload)} if self.fingerprint is not None:
                self.finished[key] = payload
            case {"complete": True} if self.fingerprint is not None:
                self.complete = True
            case {"replaces": int(inode)} if self.fingerprint is not None:
                self.replaces = inode
            case _:
                return False
        return True


def _open_locked(path: Path, flags: int) -> int:
    while True:
        try:
            descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise OutputError(f"cannot be opened: {error.strerror}", where=str(path)) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise ResumeError(
                "a running process is writing here",
                where=str(path.parent),
                hint="Wait until it is done, or stop it; then the same command goes on.",
            ) from error
        except OSError:
            pass  # some network file systems have no locks; two runs at once are then the user's to avoid
        if _still_there(path, descriptor):
            return descriptor
        os.close(descriptor)  # it was put away between our open and our lock


def _still_there(path: Path, descriptor: int) -> bool:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    held = os.fstat(descriptor)
    return (found.st_dev, found.st_ino) == (held.st_dev, held.st_ino)
