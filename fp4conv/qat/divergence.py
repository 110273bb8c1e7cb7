"""Training whose loss is no number any longer is stopped: its weights are lost."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback

from fp4conv.errors import ValuesError

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


# train_loss is the mean over the run, told at its end: steps after the last line of the log are in it.
_WATCHED = (("loss", "loss"), ("grad_norm", "norm of the gradients"), ("train_loss", "loss"))


class _Divergence(TrainerCallback):
    def __init__(self, kind: str) -> None:
        self._kind = kind

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        for key, name in _WATCHED:
            value = float((logs or {}).get(key, 0.0))
            if not math.isfinite(value):
                raise _diverged(self._kind, f"the {name} is {value} at step {state.global_step}")


def check_finite(model: torch.nn.Module, kind: str) -> None:
    """ValuesError where the last step of all, whose loss nobody sees, has left a parameter that is not finite."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            raise _diverged(kind, f"{name} has a NaN or an Inf after the last step")


def _diverged(kind: str, what: str) -> ValuesError:
    return ValuesError(
        f"{what}: training has diverged",
        where=kind,
        hint=f"lower --{kind}-learning-rate, and give another --output",
    )


def divergence(kind: str) -> TrainerCallback:
    """A callback for a run of `kind` sft or qat; `logging_nan_inf_filter` must be off, or it is not told."""
    return _Divergence(kind)
