"""Two models, tensor by tensor: are their values the same, and if not, how far apart are they?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fp4conv.model import Model
from fp4conv.pipeline.measuring.pairs import ShapesApart
from fp4conv.pipeline.measuring.run import measure
from fp4conv.report.facts import ErrorFacts


@dataclass(frozen=True)
class TensorComparison:
    """A tensor that both have. `error`: of the first against the second."""

    name: str
    error: ErrorFacts

    @property
    def same(self) -> bool:
        """Every value is the same number: -0.0 is 0.0, and NaN is NaN."""
        return not self.error.differ


@dataclass(frozen=True)
class Compared:
    """`tensors`: those that both have in one shape. `only_first`, `only_second`: names that one of them lacks.

    `apart`: of other shapes. `unread`: of types whose values are not compared.
    """

    tensors: tuple[TensorComparison, ...]
    only_first: tuple[str, ...] = ()
    only_second: tuple[str, ...] = ()
    apart: tuple[ShapesApart, ...] = ()
    unread: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every tensor of either is in the other, in the same shape."""
        return not (self.only_first or self.only_second or self.apart or self.unread)

    @property
    def same(self) -> bool:
        return self.complete and all(each.same for each in self.tensors)


def compare(
    first: Model,
    second: Model,
    *,
    names: frozenset[str] | None = None,
    max_memory: int,
    workers: int,
    on_total: Callable[[int], None] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Compared:
    """Compare the values of two models in any formats and layouts; see `measure` for the arguments."""
    found = measure(
        first,
        reference=second,
        names=names,
        with_values=False,
        max_memory=max_memory,
        workers=workers,
        on_total=on_total,
        on_bytes=on_bytes,
    )
    tensors = tuple(
        TensorComparison(weight.name, error)
        for weight in first.weights
        if weight.name in found.tensors and (error := found.tensors[weight.name].error) is not None
    )
    return Compared(tensors, found.only_here, found.only_there, found.apart, found.unread)
