"""What an operation has at hand beside its unit, and what is known of a step while its units are worked on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fp4conv.hints.runs import Run
from fp4conv.model import Weight
from fp4conv.pipeline.factors import Factors
from fp4conv.pipeline.hint_log import HintLog
from fp4conv.pipeline.shelf import Shelf
from fp4conv.plan import Plan, Step, Unit
from fp4conv.safetensors_io import Reader


@dataclass(frozen=True)
class TensorScale:
    """The scale of a set: `value`, and `exponent` where it is a power of two chosen for MXFP4 sources.

    `trained`: step -> the scale that its own frozen amax gives, which training's forward pass used. `hinted`: step ->
    the scalar of its round-trip hint where those of the set fit, empty where they do not, None where there are none.
    """

    value: float
    exponent: int | None = None
    trained: Mapping[str, float] = field(default_factory=dict)
    hinted: Mapping[str, float] | None = None


# What one piece counted, by the names in StepResult.
Counts: TypeAlias = Mapping[str, int]


@dataclass
class Progress:
    """What is known of a step while its units are worked on; merged under the run's lock.

    `sums`: what is summed over values, a float64 array [rows of all matrices] each, of which a unit fills its own
    rows: 'signal', 'noise'; 'forward_signal', 'forward_noise' against training's forward pass.
    """

    rows: int = 0
    sums: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    runs: list[Run] = field(default_factory=list)
    remaining: int = 0

    def row_sums(self, name: str, unit: Unit) -> npt.NDArray[np.float64]:
        """The unit's rows of the sum `name`, to be filled in."""
        weight = weight_of(unit.step)
        held = self.sums.get(name)
        if held is None:
            held = self.sums.setdefault(name, np.zeros(self.rows))  # atomic: two workers get the same array
        return held[unit.index * weight.n + unit.n0 : unit.index * weight.n + unit.n1]


@dataclass(frozen=True)
class Bench:
    """All that an operation needs beside its unit. `scales`: by set, filled in as scans end."""

    plan: Plan
    reader: Reader
    writers: Shelf
    factors: Factors
    scales: dict[str, TensorScale] = field(default_factory=dict)
    log: HintLog | None = None


def weight_of(step: Step) -> Weight:
    assert step.weight is not None
    return step.weight
