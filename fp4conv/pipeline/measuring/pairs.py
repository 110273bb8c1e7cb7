"""Which tensor of a reference each tensor of a model is compared with, and how the two are walked together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fp4conv.model import Model, Stored, Weight

# Kept out: NumPy's only complex type, which no model has; its values have no order and no single difference.
UNREAD = ("C64",)


@dataclass(frozen=True)
class Pair:
    """A weight, and where there is one its counterpart in the reference.

    `by_rows`: walked in rows of matrices, else flat, value by value. `kn`: both are taken K-major, since one of them
    lies so in a dense tensor.
    """

    weight: Weight
    reference: Weight | None
    by_rows: bool
    kn: bool

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (self.reference.nbytes if self.reference else 0)


@dataclass(frozen=True)
class ShapesApart:
    """A tensor that is on both sides in other shapes, or in types that cannot be told apart value by value."""

    name: str
    found: str
    expected: str


@dataclass(frozen=True)
class Matched:
    """`only_here`, `only_there`: names that the other side lacks. `unread`: of types whose values are not read."""

    pairs: tuple[Pair, ...]
    only_here: tuple[str, ...] = ()
    only_there: tuple[str, ...] = ()
    apart: tuple[ShapesApart, ...] = ()
    unread: tuple[str, ...] = ()


def match(model: Model, reference: Model | None, names: frozenset[str] | None = None) -> Matched:
    """Every weight of `model` (those in `names`) with its counterpart of the same name and shape in `reference`."""
    there = {weight.name: weight for weight in reference.weights} if reference else {}
    pairs: list[Pair] = []
    only_here: list[str] = []
    apart: list[ShapesApart] = []
    unread: list[str] = []
    for weight in model.weights:
        if names is not None and weight.name not in names:
            continue
        other = there.get(weight.name)
        if _dtype(weight) in UNREAD or (other is not None and _dtype(other) in UNREAD):
            unread.append(weight.name)
            continue
        if reference is not None and other is None:
            only_here.append(weight.name)
        elif other is not None and (found := _shapes_apart(weight, other)):
            apart.append(found)
            other = None
        pairs.append(_pair(weight, other))
    here = {weight.name for weight in model.weights}
    only_there = tuple(name for name in there if name not in here and (names is None or name in names))
    return Matched(tuple(pairs), tuple(only_here), only_there, tuple(apart), tuple(unread))


def _dtype(weight: Weight) -> str:
    return weight.base.ref.spec.dtype if isinstance(weight.base, Stored) else ""


def _shapes_apart(weight: Weight, other: Weight) -> ShapesApart | None:
    if weight.shape != other.shape:
        return ShapesApart(weight.name, str(list(weight.shape)), str(list(other.shape)))
    turned = not isinstance(weight.base, Stored) and not isinstance(other.base, Stored) and weight.kn != other.kn
    if turned and weight.n != weight.k:
        return ShapesApart(weight.name, "[in, out]", "[out, in]")
    return None


def _pair(weight: Weight, other: Weight | None) -> Pair:
    """Dense tensors of one shape lie alike whatever is thought of their axes; a packed one knows which way it lies."""
    sides = [side for side in (weight, other) if side is not None]
    packed = next((side for side in sides if not isinstance(side.base, Stored)), None)
    if packed is None:
        return Pair(weight, other, weight.is_matrix, weight.is_matrix and weight.kn)
    kn = packed.kn and any(isinstance(side.base, Stored) for side in sides)
    return Pair(replace(weight, kn=packed.kn), replace(other, kn=packed.kn) if other is not None else None, True, kn)


def clusters(pairs: Sequence[Pair], group_of: dict[str, str]) -> Iterator[list[Pair]]:
    """Pairs whose weights share a tensor scale together, at the place of the first; every other pair alone."""
    found: dict[str, list[Pair]] = {}
    for pair in pairs:
        found.setdefault(group_of.get(pair.weight.name, f"\0{pair.weight.name}"), []).append(pair)
    yield from found.values()
