"""Bring several files into the cache before they are read: for commands that read all of a checkpoint."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from fp4conv.hub.client import Stopped, download, in_cache
from fp4conv.model import Pinned

AT_ONCE = 3


def bring(pinned: Pinned, names: Sequence[str], on_fetch: Callable[[int, int], None] | None = None) -> None:
    """Download what the cache lacks of the files `names`; the first error stops the others.

    `on_fetch` is told of bytes as they come, and how many there are in all.
    """
    missing = [name for name in names if in_cache(pinned, name) is None]
    total = sum(pinned.files[name].nbytes for name in missing)
    stop = threading.Event()

    def tell(nbytes: int) -> None:
        if stop.is_set():
            raise Stopped
        if on_fetch is not None:
            on_fetch(nbytes, total)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        coming = [pool.submit(download, pinned, name, on_bytes=tell) for name in missing]
        try:
            for each in as_completed(coming):
                each.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
