"""Tensors that several weights make together: where each one's rows lie in it.

OpenAI's layout of gpt-oss has q, k and v in one tensor; a step writes its part at its own place in that tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from fp4conv.errors import PlanError
from fp4conv.layouts.parts import Part
from fp4conv.safetensors_io import TensorSpec

_Item = TypeVar("_Item")


def bundled(items: Sequence[_Item], parts_of: Callable[[_Item], Iterable[Part]]) -> Iterator[list[_Item]]:
    """`items` in order; those that share a stacked tensor come together, at the place of the first."""
    homes: dict[str, list[_Item]] = {}
    bundles: list[list[_Item]] = []
    for item in items:
        shared = next((part.name for part in parts_of(item) if part.stack is not None), None)
        if shared is None:
            bundles.append([item])
        elif shared in homes:
            homes[shared].append(item)
        else:
            homes[shared] = [item]
            bundles.append(homes[shared])
    return iter(bundles)


class Stacked:
    """The tensors that `parts` make. PlanError where a part of a stacked one is missing or does not fit."""

    def __init__(self, parts: Sequence[Part]) -> None:
        members: dict[str, list[Part]] = {}
        for part in parts:
            members.setdefault(part.name, []).append(part)
        self._starts: dict[tuple[str, tuple[int, int] | None], int] = {}
        self.specs = [(name, self._stack(name, same)) for name, same in members.items()]

    def start(self, part: Part) -> int:
        """Bytes from the beginning of its tensor to the part."""
        return self._starts[part.name, part.stack]

    def _stack(self, name: str, parts: list[Part]) -> TensorSpec:
        parts = sorted(parts, key=lambda part: part.stack or (0, 1))
        found = [part.stack for part in parts]
        count = len(parts) if parts[0].stack is None else parts[0].stack[1]
        assert parts[0].stack is not None or count == 1, f"two tensors of the name {name}"
        kinds = {(part.spec.dtype, part.spec.shape[1:]) for part in parts}
        if (parts[0].stack is not None and found != [(i, count) for i in range(count)]) or len(kinds) > 1:
            described = ", ".join(f"{part.spec.dtype} {list(part.spec.shape)}" for part in parts)
            raise PlanError(
                f"is made of {count} tensors stacked along their rows, and the model has for it: {described}",
                where=name,
                hint="all of them must be there, in one dtype; or choose another --layout",
            )
        start = 0
        for part in parts:
            self._starts[name, part.stack] = start
            start += part.spec.nbytes
        rows = sum(part.spec.shape[0] for part in parts) if count > 1 else None
        spec = parts[0].spec
        return spec if rows is None else TensorSpec(spec.dtype, (rows, *spec.shape[1:]))
