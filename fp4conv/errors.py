"""The closed family of errors that fp4conv raises about the user's data and the user's request.

Each says what happened, to which file or tensor, and what to do next. A bug of ours is an `assert`
or an ordinary exception, never one of these; nothing here knows how a message is printed.
"""

from __future__ import annotations


class Fp4convError(Exception):
    """Base of every error that a user can cause or mend.

    `what` is one sentence: what was found and what was expected. `where` names the file or tensor.
    `hint` is the next thing to try. `exit_code` is what the command line returns.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.what = what
        self.where = where
        self.hint = hint
        super().__init__(self.__str__())

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}\n  {self.hint}" if self.hint else head


class SourceError(Fp4convError):
    """The input cannot be read as a checkpoint: missing, truncated, inconsistent or hostile."""


class PlanError(Fp4convError):
    """The request cannot be met for this model; found from headers and configs, before any write."""


class ValuesError(Fp4convError):
    """A value cannot be represented: NaN or Inf to be quantised, or an overflow on rounding."""


class OutputError(Fp4convError):
    """The destination cannot be written: it exists, lies inside the source, or the disk is too small."""


class ResumeError(OutputError):
    """A half-done destination belongs to another command, another source or a running process."""


class UsageError(Fp4convError):
    """The words of the command do not fit together."""

    exit_code = 2
