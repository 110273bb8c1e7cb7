"""What a training step has taken so far, over every process that was stopped and gone on from: seconds and memory.

The trainer writes it into each checkpoint with its own state, so that the two are whole together or not at all. What a
killed process did after its last checkpoint is done again, and counts when it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState


@dataclass(frozen=True)
class Spent:
    """`seconds` on the clock, loading and saving too. `peak_bytes`: the most memory that was held at a time."""

    seconds: float = 0.0
    peak_bytes: int = 0


class SpentMeter(TrainerCallback, ExportableState):
    """Counts on from `before`, the checkpoint's; `peak` says what this process has held at the most."""

    def __init__(self, before: Spent, started: float, peak: Callable[[], int]) -> None:
        """`started`: time.monotonic() when this process began with the step."""
        self._before = before
        self._started = started
        self._peak = peak

    def now(self) -> Spent:
        seconds = self._before.seconds + time.monotonic() - self._started
        return Spent(seconds, max(self._before.peak_bytes, self._peak()))

    def state(self) -> dict[str, object]:
        """As the trainer writes it beside its own state, under the name of this class."""
        return {"args": {}, "attributes": asdict(self.now())}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """A checkpoint of an earlier release has no entry, and the trainer only writes over those that it finds."""
        state.stateful_callbacks.setdefault(type(self).__name__, {})


def spent_of(state: Mapping[str, object]) -> Spent:
    """What a trainer_state.json says; nothing where no meter wrote into it."""
    match state.get("stateful_callbacks"):
        case {SpentMeter.__name__: {"attributes": {"seconds": float(seconds), "peak_bytes": int(peak_bytes)}}}:
            return Spent(seconds, peak_bytes)
    return Spent()
