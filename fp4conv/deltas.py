"""What an adapter does to one weight, as values: low-rank products, added vectors, and how the sum is rounded.

Owns the arithmetic's description, not the arithmetic (`kernels/merge.py`) and not where peft keeps what
(`lora/`). Nothing is read here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from fp4conv.safetensors_io import TensorRef


@dataclass(frozen=True)
class Factor:
    """One side of a low-rank product, along one axis of the weight.

    As peft stores it: lora_A is [r x experts, features] with the expert slowest, lora_B (`transposed`) is
    [features, r x experts] with the expert fastest. `experts` are those of the stored tensor. `expert`: which one this
    weight takes, or None when the weight has all of them, a matrix each. `start`: the first of the weight's features.
    """

    ref: TensorRef
    transposed: bool
    rank: int
    experts: int = 1
    expert: int | None = None
    start: int = 0

    @property
    def features(self) -> int:
        """How many features the stored tensor has, at least those of the weight."""
        return self.ref.spec.shape[0 if self.transposed else 1]

    @property
    def held_bytes(self) -> int:
        """What it takes in memory as F32."""
        return 4 * self.ref.spec.elements


@dataclass(frozen=True)
class LowRank:
    """delta = scaling x rows^T columns: [N, K] for each matrix of the weight.

    `magnitude`: DoRA's F32 [N]; then the result is m x (W + delta) / row norm of (W + delta). `linear`: of a
    linear layer; where peft wraps a parameter or an embedding, its merge rounds the delta before it adds it.
    """

    adapter: str
    rows: Factor
    columns: Factor
    scaling: float
    magnitude: TensorRef | None = None
    linear: bool = True

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        both = (self.rows.ref, self.columns.ref)
        return both if self.magnitude is None else (*both, self.magnitude)


@dataclass(frozen=True)
class Added:
    """delta = scaling x a tensor of the weight's own shape (lora_bias)."""

    adapter: str
    ref: TensorRef
    scaling: float

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        return (self.ref,)


Delta: TypeAlias = LowRank | Added
