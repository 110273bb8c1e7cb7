"""Training whose loss is no number any longer is stopped: its weights are lost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from fp4conv.errors import ValuesError
from fp4conv.qat.logged import Logged

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainerState


# train_loss is the mean over the run, told at its end: steps after the last line of the log are in it.
_WATCHED = (("loss", "loss"), ("grad_norm", "norm of the gradients"), ("train_loss", "loss"))


class _Divergence(Logged):
    def __init__(self, kind: str) -> None:
        self._kind = kind

    def logged(self, state: TrainerState, line: Mapping[str, float]) -> None:
        for key, name in _WATCHED:
            value = float(line.get(key, 0.0))
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
