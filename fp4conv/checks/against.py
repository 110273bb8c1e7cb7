"""What a comparison with the source found, as a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Against:
    """`tensors`: those that were compared; `same`: how many have the same values throughout. `sqnr_db`: of all
    together, and a tensor in `per_tensor`; None where nothing differs. `lossless`: complete, and all the same.
    """

    source: str
    lossless: bool
    tensors: int
    same: int
    sqnr_db: float | None
    per_tensor: Mapping[str, float | None]
