"""What a model needs so that several processes can train it together, by FSDP2 or DeepSpeed ZeRO-3.

Owns what these do not see by themselves. How the processes are started is `launch`'s, which parameters are trained is
`train`'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback

from fp4conv.errors import ValuesError

if TYPE_CHECKING:
    import transformers


def tell_apart(model: torch.nn.Module) -> None:
    """Give the parameters of `model` that have no values yet addresses that differ.

    By those, accelerate finds the sharded parameter for each that the optimizer has; without values all are 0.
    """
    for number, parameter in enumerate(model.parameters(), 1):
        if parameter.is_meta:
            parameter.data_ptr = _Address(number)


class _Address:
    def __init__(self, number: int) -> None:
        self._number = number

    def __call__(self) -> int:
        return self._number


class OptimizerCheck(TrainerCallback):
    """ValuesError, before the first step, where the optimizer has not just the parameters that are trained."""

    def on_train_begin(
        self,
        args: transformers.TrainingArguments,
        state: transformers.TrainerState,
        control: transformers.TrainerControl,
        **kwargs: object,
    ) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        assert isinstance(model, torch.nn.Module)
        if args.deepspeed_plugin is not None:
            return  # its optimizer has flat parts of its own making
        trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        held = {id(one) for group in optimizer.param_groups for one in group["params"]}  # type: ignore[attr-defined]
        if trained != held:
            raise ValuesError(
                "the optimizer has other parameters than those that are trained: this release of accelerate does not "
                "see how processes share the model",
                where=f"{len(held):,} parameters, expected {len(trained):,}",
                hint="--sharding zero3, or install the releases of fp4conv[qat]",
            )
