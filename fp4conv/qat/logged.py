"""What the trainer logs, for callbacks that want nothing else of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from transformers import TrainerCallback

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


class Logged(TrainerCallback):
    """A callback whose `logged` gets each line of the trainer's log: 'loss', 'grad_norm', ..., others at the end."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        self.logged(state, logs or {})

    def logged(self, state: TrainerState, line: Mapping[str, float]) -> None:
        raise NotImplementedError
