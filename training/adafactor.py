"""Adafactor in big_vision's form, with which Cap and CapPa were trained: factored second moments (arXiv 1804.04235),
a bound of beta2 (arXiv 2106.04560), momentum in half precision.

torch's Adafactor always scales with the parameter's size, and neither it nor transformers' has the bound, the size
below which nothing is factored, or such a momentum.

Differences from big_vision, whose weights have other shapes: attention's projections are matrices here, [heads * head,
width], there [width, heads, head], of which two of the three dimensions are factored; and layers are not stacked.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


EPSILON = 1e-30  # added to squared gradients
SMALLEST_FACTORED = 32  # both factored dimensions have at least this size


def factored_dimensions(shape: torch.Size) -> tuple[int, int] | None:
    """The two largest dimensions, (second largest, largest); of equal ones the later counts as larger."""
    if len(shape) < 2:
        return None
    *_, second, largest = sorted(range(len(shape)), key=lambda dimension: (shape[dimension], dimension))
    return (second, largest) if shape[second] >= SMALLEST_FACTORED else None


def mean_over(tensor: Tensor, dimension: int) -> Tensor:
    """The mean, kept as a dimension of size 1; of a sharded tensor (FSDP2) whole on every process."""
    mean = tensor.mean(dim=dimension, keepdim=True)
    return mean.redistribute(placements=[Replicate()] * mean.device_mesh.ndim) if isinstance(mean, DTensor) else mean


class Adafactor(torch.optim.Optimizer):
    """Gradients over the root of a factored second moment, then momentum; no clipping of its own.

    With schedule s in [0, 1], a step is `parameter -= s * (lr * momentum + weight_decay * parameter)`: the decay is not
    multiplied by the learning rate. s is `lr / peak_lr` of a group.

    Args:
        beta2_exponent, beta2_cap: beta2 of step t = 1, 2, ... is `min(beta2_cap, 1 - t ** -beta2_exponent)`.
        momentum: beta1, without bias correction; kept in bfloat16.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        beta2_exponent: float = 0.8,
        beta2_cap: float = 0.999,
    ) -> None:
        defaults = {"lr": lr, "peak_lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, defaults | {"beta2_exponent": beta2_exponent, "beta2_cap": beta2_cap})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """As in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            decay = group["weight_decay"] * group["lr"] / group["peak_lr"]
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = self.update(parameter, group)
                    parameter.mul_(1 - decay).sub_(update.to(parameter.dtype), alpha=group["lr"])
        return loss

    def update(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """The new momentum, float32, before it is rounded for the state."""
        state = self.state[parameter]
        gradient = parameter.grad.float()
        state["step"] = state.get("step", 0) + 1
        beta2 = min(group["beta2_cap"], 1 - state["step"] ** -group["beta2_exponent"])
        squares = gradient.square() + EPSILON
        dimensions = factored_dimensions(parameter.shape)
        if dimensions is None:
            scaled = gradient * self.running_mean(state, "square", squares, beta2).rsqrt()
        else:
            second, largest = dimensions
            rows = self.running_mean(state, "rows", mean_over(squares, largest), beta2)
            columns = self.running_mean(state, "columns", mean_over(squares, second), beta2)
            scaled = gradient * (rows / mean_over(rows, second)).rsqrt() * columns.rsqrt()
        momentum = scaled * (1 - group["momentum"])
        if "momentum" in state:
            momentum = momentum + group["momentum"] * state["momentum"].float()
        state["momentum"] = momentum.bfloat16()  # a state that was loaded is float32, with the same values
        return momentum

    @staticmethod
    def running_mean(state: dict[str, Any], name: str, value: Tensor, beta2: float) -> Tensor:
        """`beta2 * old + (1 - beta2) * value`; beta2 is 0 in the first step."""
        state[name] = beta2 * state[name] + (1 - beta2) * value if name in state else value
        return state[name]
