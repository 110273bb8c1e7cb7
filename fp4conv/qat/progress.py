"""Training's progress on standard error: a bar with the loss; where that is no terminal, a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tqdm import tqdm

from fp4conv.qat.logged import Logged

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_LINE_EVERY = 30.0  # seconds


class _Bar(Logged):
    def __init__(self, name: str) -> None:
        self._name = name
        self._bar: tqdm[object] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        if state.is_world_process_zero:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self._name, unit="step")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def logged(self, state: TrainerState, line: Mapping[str, float]) -> None:
        if self._bar is not None and "loss" in line:
            self._bar.set_postfix(loss=f"{float(line['loss']):.3f}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if self._bar is not None:
            self._bar.close()


class _Lines(Logged):
    """For a log file: 'sft: step 250 of 1,500, loss 0.412, 0.06 s a step'."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._told = float("-inf")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self._from = (state.global_step, time.monotonic())

    def logged(self, state: TrainerState, line: Mapping[str, float]) -> None:
        now = time.monotonic()
        last = state.global_step == state.max_steps
        if not state.is_world_process_zero or "loss" not in line:
            return
        if now - self._told < _LINE_EVERY and not last:
            return
        self._told = now
        step, started = self._from
        pace = (now - started) / max(1, state.global_step - step)
        words = (
            f"step {state.global_step:,} of {state.max_steps:,}, loss {float(line['loss']):.3f}, {pace:.2g} s a step"
        )
        sys.stderr.write(f"{self._name}: {words}\n")
        sys.stderr.flush()


def progress(name: str) -> TrainerCallback:
    return _Bar(name) if sys.stderr.isatty() else _Lines(name)
