"""Where a run's source bytes come from when they are not on the disk yet: brought ahead, and dropped behind."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from fp4conv.hub.bringing import AT_ONCE
from fp4conv.hub.client import Stopped, download, in_cache
from fp4conv.hub.reader import HubReader
from fp4conv.model import Pinned
from fp4conv.pipeline.holding import Holding
from fp4conv.plan import Plan
from fp4conv.safetensors_io import Reader
from fp4conv.sources import ADAPTER
from fp4conv.sources.listing import SUFFIX
from fp4conv.sources.remote import is_wanted
from fp4conv.staging import Staging
from fp4conv.streaming import Side

# In DST.partial; the name is hidden, so that no reader of checkpoints takes what is in it for the result's.
FOLDER = ".source"
_GRACE_SECONDS = 5.0
_LOOK_SECONDS = 0.2


class Supply(Protocol):
    """Brings files of the source, in the order in which `Holding` gives them room."""

    @property
    def source_bytes(self) -> Mapping[str, int]:
        """What each file takes on the disk."""
        ...

    def reader(self) -> Reader:
        """A reader of them, and of what it brings no file for."""
        ...

    def start(self, holding: Holding) -> None:
        """Begin: `holding` says what has room, and is told what has come."""
        ...

    def check(self) -> None:
        """Raise what has gone wrong."""
        ...

    def drop(self, name: str) -> None:
        """No step needs this file any longer."""
        ...

    def stop(self) -> None:
        """The run is over, or has failed."""
        ...


class FromHub:
    """A `Supply` from a repository: by way of the cache, or (`folder`) through a folder that is this run's own.

    From the folder a file goes when no step needs it any longer; what an interrupted run left there is used. Several
    files come at once. `on_bytes` is told of bytes as they come, also those that are here already.
    """

    def __init__(
        self, plan: Plan, pinned: Pinned, *, folder: Path | None = None, on_bytes: Callable[[int], None] | None = None
    ) -> None:
        self._pinned = pinned
        self._folder = folder
        self._on_bytes = on_bytes or (lambda _: None)
        self.source_bytes: Mapping[str, int] = source_bytes(plan, pinned, streamed=folder is not None)
        self._here: dict[str, Path] = {}
        self._wanted: frozenset[str] = frozenset()
        self._begun: set[str] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._threads: list[threading.Thread] = []
        self._reader = HubReader(pinned, self._where)

    def reader(self) -> Reader:
        return self._reader

    def start(self, holding: Holding) -> None:
        if self._folder is not None:
            # Xet may keep chunks of what it brings, up to 10 GB elsewhere on the disk: beyond the bound, for nothing.
            os.environ.setdefault("HF_XET_CHUNK_CACHE_SIZE_BYTES", "0")
        self._clear(holding.admitted(Side.SOURCE))
        self._wanted = frozenset(holding.ahead(Side.SOURCE))
        done = self.source_bytes.keys() - self._wanted  # by an earlier run
        self._on_bytes(sum(self._pinned.files[name].nbytes for name in done))
        for number in range(min(AT_ONCE, len(self._wanted))):
            name = f"fp4conv-fetch-{number}"
            self._threads.append(threading.Thread(target=self._work, args=(holding,), name=name, daemon=True))
            self._threads[-1].start()

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def drop(self, name: str) -> None:
        self._reader.forget(name)
        path = self._here.pop(name, None)
        if path is None or self._folder is None or self._folder not in path.parents:
            return
        path.unlink(missing_ok=True)
        for note in self._notes(name):
            note.unlink(missing_ok=True)

    def stop(self) -> None:
        """A download that hangs in the network is left behind after a few seconds."""
        self._stop.set()
        for thread in self._threads:
            thread.join(_GRACE_SECONDS)

    def _where(self, name: str) -> Path | None:
        return self._here.get(name) or in_cache(self._pinned, name)

    # ---- threads

    def _work(self, holding: Holding) -> None:
        try:
            while not self._stop.is_set():
                name = self._next(holding)
                if name is not None:
                    self._here[name] = self._fetch(name)
                    holding.ready(name)
                elif self._begun >= self._wanted:
                    return
        except Stopped:
            return
        except BaseException as error:  # noqa: BLE001 - raised by `check` in the main thread
            self._failure = self._failure or error
            self._stop.set()

    def _next(self, holding: Holding) -> str | None:
        """The first file that has room and that nobody has begun with; None where there is none for a moment."""
        with self._lock:
            known = frozenset(self._begun)
        room = holding.wait_for_room(Side.SOURCE, known, _LOOK_SECONDS)
        with self._lock:
            name = next((name for name in room if name not in self._begun), None)
            if name is not None:
                self._begun.add(name)
        return name

    def _fetch(self, name: str) -> Path:
        path = in_cache(self._pinned, name)
        if path is None:
            return download(self._pinned, name, folder=self._folder, on_bytes=self._tell)
        self._tell(self._pinned.files[name].nbytes)
        return path

    def _tell(self, nbytes: int) -> None:
        if self._stop.is_set():
            raise Stopped
        self._on_bytes(nbytes)

    # ---- the folder

    def _clear(self, admitted: tuple[str, ...]) -> None:
        """Remove what an interrupted run left in the folder and has no room now, and halves of downloads."""
        if self._folder is None or not self._folder.is_dir():
            return
        keep = {self._folder / self._pinned.path(name) for name in admitted}
        for path in [path for path in self._folder.rglob("*") if path.is_file()]:
            beside = path.relative_to(self._folder).parts[0] == ".cache"
            if path.suffix == ".incomplete" or (not beside and path not in keep):
                path.unlink()

    def _notes(self, name: str) -> list[Path]:
        """What huggingface_hub keeps beside a file that it brought into a folder: where it is from, and a lock."""
        assert self._folder is not None
        path = self._folder / ".cache" / "huggingface" / "download" / self._pinned.path(name)
        return [path.with_name(path.name + suffix) for suffix in (".metadata", ".lock")]


# What is kept beside a file in a folder: a few hundred bytes each, in blocks of the disk.
_BESIDE_BYTES = 8192


def source_bytes(plan: Plan, pinned: Pinned, *, streamed: bool) -> dict[str, int]:
    """The files of the source that a plan reads, and what each takes of the disk beside the result meanwhile."""
    wanted = {file.name: file.nbytes for file in plan.model.source.files if file.weights}
    wanted |= {file.name: file.nbytes for file in plan.hints.files}
    if not streamed:
        return wanted
    return {name: 0 if in_cache(pinned, name) else nbytes + _BESIDE_BYTES for name, nbytes in wanted.items()}


def cached_bytes(plan: Plan) -> int:
    """What comes into the cache also when the source is streamed, and stays there: adapters, small files."""
    copied = {file.name for file in plan.files if file.content is None}
    total = 0
    if plan.model.source.pinned is not None:
        streamed = source_bytes(plan, plan.model.source.pinned, streamed=False)
        for file in plan.model.source.files:
            read = is_wanted(file.name) and not file.name.endswith(SUFFIX)
            if file.name not in streamed and (file.name in copied or read):
                total += file.nbytes
    for adapter in plan.model.adapters:
        files = adapter.pinned.files if adapter.pinned is not None else {}
        small = {name for name in files if is_wanted(name) and not name.endswith(SUFFIX)}
        total += sum(files[name].nbytes for name in files.keys() & {ADAPTER, *small})
    return total


def remove_source(out: Staging) -> None:
    """Remove what a streamed source has left, in this run or in one that was stopped: it is no part of the result."""
    shutil.rmtree(out.path(FOLDER), ignore_errors=True)


def bring_adapters(plan: Plan) -> None:
    """Download adapters that are on the Hub into the cache: they are small, and needed from first to last."""
    for adapter in plan.model.adapters:
        if adapter.pinned is not None:
            download(adapter.pinned, ADAPTER)


def bring_hints(plan: Plan) -> None:
    """Download the round-trip hints of a source on the Hub into the cache: they are read more than once."""
    if plan.model.source.pinned is not None:
        for file in plan.hints.files:
            download(plan.model.source.pinned, file.name)
