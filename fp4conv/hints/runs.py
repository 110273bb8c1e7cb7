"""Runs: where the records of one unit lie in the log that they are collected in, and what they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from fp4conv.hints.values import INDEX_BYTES, SPARSE_BYTES
from fp4conv.model import JSON


@dataclass(frozen=True, order=True)
class Run:
    """The records of one unit in the log: of the `blocks` blocks from `first` on `scales` have a noted scale byte,
    `codes` noted codes of `half` bytes each, and they begin at byte `offset`.
    """

    first: int
    blocks: int
    scales: int
    codes: int
    half: int
    offset: int

    @property
    def sparse(self) -> bool:
        return is_sparse(self.scales, self.blocks)

    @property
    def scale_bytes(self) -> int:
        return stored_bytes(self.scales, self.blocks)

    @property
    def nbytes(self) -> int:
        return self.scale_bytes + self.codes * (INDEX_BYTES + self.half)

    def payload(self) -> list[JSON]:
        return list(astuple(self))


def is_sparse(count: int, blocks: int) -> bool:
    """Whether numbers and bytes of `count` blocks are smaller than a byte for each of `blocks`."""
    return count * SPARSE_BYTES < blocks


def stored_bytes(count: int, blocks: int) -> int:
    """What `count` noted scale bytes of `blocks` blocks take."""
    if not count:
        return 0
    return count * SPARSE_BYTES if is_sparse(count, blocks) else blocks


def runs_from(found: JSON) -> tuple[Run, ...]:
    """Runs as the journal holds them."""
    rows: Sequence[JSON] = found if isinstance(found, list) else ()
    return tuple(Run(*(int(str(number)) for number in row)) for row in rows if isinstance(row, list))
