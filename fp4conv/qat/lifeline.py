"""Processes that train together end with the one that started them, however that one ends.

torch's launcher gives them sessions of their own: Ctrl-C does not reach them, and a launcher that is killed leaves them
behind, training on, into a folder that the same command then writes to as well. So each waits for the end of the
standard input that it has inherited: a pipe whose other end the starting process alone holds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import NoReturn


def run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run `command`, its standard output onto standard error, and return its exit code.

    What it has started, and called `end_with_starter`, ends when this returns, raises, or is killed.
    """
    reading, writing = os.pipe()  # neither is inherited but as standard input
    try:
        done = subprocess.run(list(command), check=False, stdin=reading, stdout=sys.stderr, env=dict(environment))
    finally:
        os.close(reading)
        os.close(writing)
    return done.returncode


def end_with_starter() -> None:
    """Have this process end, with exit code 1, as soon as the one that called `run` lets go of it."""
    threading.Thread(target=_wait_for_the_end, name="lifeline", daemon=True).start()


def end() -> NoReturn:
    """End this process, which has done its part, with exit code 0: at once, without taking the interpreter down.

    A thread of gloo that still holds the last tensor would ask the interpreter for its lock then, and abort the process
    (pytorch/pytorch issue 190489). Destroying the process groups does not end these threads for certain.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _wait_for_the_end() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)
