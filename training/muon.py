"""Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/) with a choice of the format of its iterations.

`torch.optim.Muon` always iterates in bfloat16, which a processor without bfloat16 units emulates hundreds of times more
slowly than float32. In bfloat16 the steps here are bit-identical to torch's (`tests/test_training_muon.py`).
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor


COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, from the post: the steepest slope at 0
EPSILON = 1e-7  # smallest norm that a matrix is divided by


def orthogonalise(matrix: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """The nearest matrix with singular values around 1 (0.5 to 1.5), by Newton-Schulz iterations in `dtype`."""
    a, b, c = COEFFICIENTS
    is_tall = matrix.size(0) > matrix.size(1)
    result = matrix.to(dtype)
    if is_tall:
        result = result.T  # the products below are of the size of the rows
    result = result / result.norm().clamp(min=EPSILON)
    for _ in range(steps):
        gram = result @ result.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        result = torch.addmm(result, polynomial, result, beta=a)
    return result.T if is_tall else result


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose matrix is made orthogonal, and decoupled weight decay, for 2-D parameters.

    Args:
        adjust_lr: "original" scales the rate by `sqrt(max(1, rows / columns))`; "match_rms_adamw" by
            `0.2 * sqrt(max(rows, columns))`, which makes updates as large as AdamW's.
        dtype: of the Newton-Schulz iterations.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        ns_steps: int = 5,
        adjust_lr: Literal["original", "match_rms_adamw"] = "original",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.dtype = dtype
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, defaults | {"ns_steps": ns_steps, "adjust_lr": adjust_lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """As in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = orthogonalise(self.momentum(parameter, group), group["ns_steps"], self.dtype)
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-group["lr"] * scale_of(parameter, group["adjust_lr"]))
        return loss

    def momentum(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """Adds the gradient to its running mean, and returns their Nesterov combination."""
        state = self.state[parameter]
        gradient = parameter.grad
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(state["momentum_buffer"], group["momentum"])


def scale_of(parameter: Tensor, adjust_lr: str) -> float:
    """Factor of the learning rate for a matrix of this shape."""
    rows, columns = parameter.shape
    return math.sqrt(max(1, rows / columns)) if adjust_lr == "original" else 0.2 * math.sqrt(max(rows, columns))
