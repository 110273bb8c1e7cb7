"""Run a function in a process of its own, forked from this one: what is imported here is there at once, and what the
function does to it, or its death, leaves no trace here.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Generic, TypeVar

T = TypeVar("T")
TIMEOUT_SECONDS = 300


@dataclass(frozen=True)
class Answer(Generic[T]):
    """`value`, or the `error` that ended the process in one line, and the innermost function that it came from."""

    value: T | None
    error: str = ""
    where: str = ""


def isolated(function: Callable[[], T], package: str) -> Answer[T]:
    """`function()` in a forked process. `where` names the innermost function of `package` that an error came from."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryFile() as log:
        child = context.Process(target=_child, args=(theirs, log.fileno(), function, package))
        child.start()
        theirs.close()
        late = not ours.poll(TIMEOUT_SECONDS)
        if late:
            child.kill()
        try:
            answer: Answer[T] = pickle.loads(ours.recv_bytes())
        except EOFError:
            answer = Answer(None, f"no answer in {TIMEOUT_SECONDS} s" if late else "")
        child.join()
        if not answer.error and answer.value is None:
            answer = Answer(None, f"the process ended with {_end(child.exitcode or 0)}: {_last_line(log)}")
    return answer


def _end(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _last_line(log: IO[bytes]) -> str:
    log.seek(0)
    return "".join(log.read().decode(errors="replace").strip().splitlines()[-1:])


def _child(pipe: multiprocessing.connection.Connection, log: int, function: Callable[[], T], package: str) -> None:
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        answer: Answer[T] = Answer(function())
    except BaseException as error:  # noqa: BLE001 - whatever a server raises on a checkpoint is the answer
        answer = Answer(None, _one_line(error), _place(error, package))
    pipe.send_bytes(pickle.dumps(answer))
    pipe.close()
    os._exit(0)  # engines leave threads behind that would wait for each other


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _place(error: BaseException, package: str) -> str:
    inside = f"/{package}/"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if inside in frame.filename]
    if not frames:
        return ""
    return f"{package}/{frames[-1].filename.rsplit(inside, 1)[1]}:{frames[-1].name}"
