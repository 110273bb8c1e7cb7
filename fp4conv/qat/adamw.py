"""AdamW for models in BF16: steps are added up in float32, and the model has their sum rounded to BF16.

BF16 has eight bits of mantissa. A step of 1e-5 on a weight of 0.02 is less than half its last place, so it would round
to nothing, and so would all that follow: at the learning rates of QAT three quarters of a model would stay as they
were. Several processes need none of this, for FSDP2 and ZeRO-3 keep float32 copies themselves.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch.optim.optimizer import ParamsT, StateDict


class Float32AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW's arithmetic on a float32 copy of each parameter, which is rounded into the parameter.

    Keeps 12 bytes a value beside the parameter and its gradient: the copy, and the two averages of Adam.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take a step. Takes no closure: nothing here evaluates the loss again."""
        assert closure is None, "the trainer gives none"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group["lr"], group["betas"], group["eps"], group["weight_decay"])

    def _step(self, parameter: torch.Tensor, rate: float, betas: tuple[float, float], eps: float, decay: float) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exact"] = parameter.detach().to(torch.float32, copy=True)
            state["mean"] = torch.zeros_like(state["exact"])
            state["square"] = torch.zeros_like(state["exact"])
        state["step"] += 1
        assert parameter.grad is not None, "step has looked"
        grad = parameter.grad.to(torch.float32)
        state["mean"].lerp_(grad, 1 - betas[0])
        state["square"].mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
        size = (state["square"].sqrt() / sqrt(1 - betas[1] ** state["step"])).add_(eps)
        change = -rate / (1 - betas[0] ** state["step"])
        state["exact"].mul_(1 - rate * decay).addcdiv_(state["mean"], size, value=change)
        parameter.copy_(state["exact"])

    def load_state_dict(self, state_dict: StateDict) -> None:
        """As saved: torch's own would round the float32 state to the dtype of the parameters."""
        super().load_state_dict(state_dict)
        groups, saved = state_dict["param_groups"], state_dict["state"]
        numbers = [number for group in groups for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in saved.get(number, {}).items():
                self.state[parameter][name] = value.to(parameter.device, copy=True) if torch.is_tensor(value) else value
