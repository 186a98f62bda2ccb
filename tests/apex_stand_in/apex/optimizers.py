"""``FusedAdam`` as Apex has it: steps counted by group, moments by parameter, and a ``zero_grad`` without arguments."""

from __future__ import annotations

import math
from typing import Any

import amp_C
import torch


class FusedAdam(torch.optim.Optimizer):
    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
    ) -> None:
        assert adam_w_mode and bias_correction and not (amsgrad or capturable or master_weights)
        defaults = {"lr": lr, "bias_correction": True, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def zero_grad(self) -> None:  # type: ignore[override]  # as in Apex
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            first, second = group["betas"]
            amp_C.CALLS.append(("multi_tensor_adam", group["step"]))
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if len(state) == 0:
                    state["exp_avg"] = torch.zeros_like(parameter).float()
                    state["exp_avg_sq"] = torch.zeros_like(parameter).float()
                average, square = state["exp_avg"], state["exp_avg_sq"]
                average.mul_(first).add_(parameter.grad, alpha=1 - first)
                square.mul_(second).addcmul_(parameter.grad, parameter.grad, value=1 - second)
                root = square.sqrt() / math.sqrt(1 - second ** group["step"]) + group["eps"]
                update = average / (1 - first ** group["step"]) / root + group["weight_decay"] * parameter
                parameter.add_(update, alpha=-group["lr"])
