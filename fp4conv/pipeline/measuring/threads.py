"""Tasks in order to a few threads; the first error, or Ctrl-C, stops them all and is raised."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

Task = TypeVar("Task")
Local = TypeVar("Local")


def run_tasks(
    tasks: Iterator[Task],
    work: Callable[[Task, Local], None],
    workers: int,
    *,
    local: Callable[[], Local],
    stop: threading.Event,
) -> None:
    """Call `work(task, own)` for every task on `workers` threads, each with an `own` that `local` made.

    `stop` is set when something went wrong: work that waits for other work looks at it.
    """
    lock, errors = threading.Lock(), list[BaseException]()

    def loop() -> None:
        own = local()
        try:
            while not stop.is_set():
                with lock:
                    task = next(tasks, None)
                if task is None:
                    return
                work(task, own)
        except BaseException as error:  # noqa: BLE001 - handed to the main thread, which raises it
            errors.append(error)
            stop.set()

    threads = [threading.Thread(target=loop, name=f"fp4conv-{i}", daemon=True) for i in range(workers)]
    for thread in threads:
        thread.start()
    try:
        while any(thread.is_alive() for thread in threads):
            for thread in threads:
                thread.join(0.05)  # short, so that Ctrl-C is noticed
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
