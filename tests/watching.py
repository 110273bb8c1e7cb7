"""Watching how much of the disk something takes while it runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fp4conv.staging import JOURNAL_NAME


@contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """The most bytes that the files below `folder` took, looked at all the time; the journal is not counted."""
    peak, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            with suppress(FileNotFoundError):  # something went while it was looked at: look again
                files = [path for path in folder.rglob("*") if path.is_file() and path.name != JOURNAL_NAME]
                peak[0] = max(peak[0], sum(path.stat().st_size for path in files if not path.is_symlink()))
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
