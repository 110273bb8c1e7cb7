"""Which files of a run are on the disk: given room in the order of the work, ended when nothing needs them, let go.

Owns the count of bytes against the bound. It refuses to own the files: whoever made or fetched one removes it, and
then says so with `free`.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence

from fp4conv.plan import Plan
from fp4conv.streaming import Moment, Piece, Side, moments, pieces_of, resident_bytes


class Holding:
    """The files that a run needs, in the order in which it first needs them. Safe to share between threads.

    A file is admitted when it and all before it fit into `bound` bytes (None: at once), it has ended when all its
    work is done, and it is gone when its owner frees it.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        source_bytes: Mapping[str, int] | None = None,
        bound: int | None = None,
        finished: Collection[str] = (),
        sent: Collection[str] = (),
    ) -> None:
        """`source_bytes`: files of the source that are fetched, and their sizes. `finished`: keys of the journal.

        `sent`: files of the result that an earlier run has given away.
        """
        self._needs: dict[str, tuple[Piece, ...]] = {}
        left: dict[Piece, int] = {}
        for moment in moments(plan.steps):
            pieces = self._needs[moment.key] = pieces_of(plan, moment, source_bytes or {})
            for piece in pieces:
                left[piece] = left.get(piece, 0) + (moment.key not in finished)
        self._left = left
        self._gone = {piece for piece, count in left.items() if _is_over(piece, count, sent)}
        self._order = [piece for piece in left if piece not in self._gone]
        self._done = set(finished) & set(self._needs)
        self._ended = [piece for piece in self._order if not left[piece]]
        self._bound = bound
        self._used = resident_bytes(plan) if bound is not None else 0
        self._admitted: set[Piece] = set()
        self._ready: set[Piece] = set()
        self._next = 0
        self._change = threading.Condition()
        self._admit()

    @property
    def bounded(self) -> bool:
        return self._bound is not None

    def ahead(self, side: Side) -> tuple[str, ...]:
        """Names of the files that have, or had, a part in this run, in the order of the work."""
        return tuple(piece.name for piece in self._order if piece.side is side)

    def admitted(self, side: Side) -> tuple[str, ...]:
        """Names of the files that have room now, in the order of the work."""
        with self._change:
            return tuple(piece.name for piece in self._order if piece.side is side and piece in self._admitted)

    def wait_for_room(self, side: Side, known: Collection[str], timeout: float) -> tuple[str, ...]:
        """What `admitted` says once it has a name that `known` lacks, or after `timeout` seconds."""
        with self._change:
            self._change.wait_for(lambda: any(name not in known for name in self.admitted(side)), timeout)
            return self.admitted(side)

    def ready(self, name: str) -> None:
        """The file `name` of the source has come."""
        with self._change:
            self._ready |= {piece for piece in self._admitted if (piece.side, piece.name) == (Side.SOURCE, name)}
            self._change.notify_all()

    def wait(self, moment: Moment, stop: threading.Event) -> bool:
        """Return when every file that `moment` needs is there; False when `stop` was set before."""
        while True:
            with self._change:
                if self._has(moment.key) or self._change.wait_for(lambda: self._has(moment.key), 0.1):
                    return True
            if stop.is_set():
                return False

    def done(self, key: str) -> None:
        """The moment `key` is done, though its record may not be on the disk yet."""
        with self._change:
            if key in self._done:
                return
            self._done.add(key)
            for piece in self._needs[key]:
                self._left[piece] -= 1
                if not self._left[piece] and piece not in self._gone:
                    self._ended.append(piece)

    def take_ended(self) -> Sequence[Piece]:
        """The files whose last moment has been done since the last call."""
        with self._change:
            ended, self._ended = self._ended, []
        return ended

    @property
    def has_ended(self) -> bool:
        return bool(self._ended)

    def free(self, piece: Piece) -> None:
        """`piece` takes no room any more."""
        with self._change:
            if piece in self._gone:
                return
            self._gone.add(piece)
            if piece in self._admitted:
                self._admitted.discard(piece)
                self._used -= piece.nbytes
            self._admit()
            self._change.notify_all()

    def _has(self, key: str) -> bool:
        return all(
            piece in self._gone or (piece in self._admitted and (piece.side is Side.RESULT or piece in self._ready))
            for piece in self._needs[key]
        )

    def _admit(self) -> None:
        while self._next < len(self._order):
            piece = self._order[self._next]
            if self._bound is not None and self._used + piece.nbytes > self._bound:
                return
            self._used += piece.nbytes
            self._admitted.add(piece)
            self._next += 1


def _is_over(piece: Piece, left: int, sent: Collection[str]) -> bool:
    """Whether a file has no part in this run: given away before, or (of the source) with no work left."""
    return piece.name in sent if piece.side is Side.RESULT else not left
