"""What stops a run in the middle, a full disk or GPU or Ctrl-C, with what to do. Nothing done is lost by it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fp4conv.commands.convert import free_bytes
from fp4conv.errors import Fp4convError, OutputError, PlanError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_LITTLE = 1 << 20  # where less is free, a library's own error of writing is taken for a full disk


@contextmanager
def shortages(root: Path) -> Iterator[None]:
    """Turns what says that memory or the disk of `root` is at an end into errors of fp4conv, and nothing else."""
    try:
        yield
    except Fp4convError:
        raise
    except KeyboardInterrupt as stopped:
        stopped.args = stopped.args or ("The same command goes on from the last finished step or checkpoint.",)
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise _full(root) from error
        raise OutputError(
            f"{error.strerror or error}", where=str(error.filename or root), hint="the same command goes on from here"
        ) from error
    except Exception as error:
        # torch and safetensors have classes of their own for it, which differ by release.
        if type(error).__name__ == "OutOfMemoryError":
            raise PlanError(
                f"the GPU's memory is at an end: {(str(error).splitlines() or [''])[0]}",
                where=str(root),
                hint="a smaller --batch-size (with more --gradient-accumulation), --max-length or --eval-batch-size, "
                "--gradient-checkpointing, --lora, or more --gpus; with other settings it is another --output",
            ) from error
        if type(error).__name__ in ("SafetensorError", "RuntimeError") and free_bytes(root) < _LITTLE:
            raise _full(root) from error
        raise


def _full(root: Path) -> OutputError:
    return OutputError("the disk is full", where=str(root), hint="make room; then the same command goes on from here")
