"""The learning-rate schedule, by transformers' name: its options, and whether training can follow it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fp4conv.errors import UsageError

if TYPE_CHECKING:
    from fp4conv.qat.settings import Settings

_WITH_FLOOR = frozenset({"cosine_with_min_lr", "cosine_warmup_with_min_lr"})


def schedule_options(name: str, floor: float) -> dict[str, float]:
    """What transformers is told of the schedule `name` beside that; `floor`: a share of the learning rate."""
    return {"min_lr_rate": floor} if name in _WITH_FLOOR else {}


def check_schedule(settings: Settings) -> None:
    """UsageError for a schedule that transformers has not, or that follows from more than the number of a step."""
    from transformers import SchedulerType

    names = [one.value for one in SchedulerType]
    usable = [name for name in names if _is_function_of_steps(name, settings.min_lr_rate)]
    if settings.scheduler not in usable:
        known = settings.scheduler in names
        why = "which takes more than a rate, a warm-up and a floor" if known else "which transformers does not know"
        raise UsageError(
            f"scheduler is {settings.scheduler!r}, {why}",
            hint=f"choose one of {', '.join(usable)}",
        )


def _is_function_of_steps(name: str, floor: float) -> bool:
    """Whether transformers makes it without options of its own; others follow a loss that no evaluation gives."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    options = schedule_options(name, floor)
    try:
        made = get_scheduler(
            name, optimizer, num_warmup_steps=1, num_training_steps=2, scheduler_specific_kwargs=options
        )
    except (TypeError, ValueError):
        return False
    return isinstance(made, torch.optim.lr_scheduler.LambdaLR)
