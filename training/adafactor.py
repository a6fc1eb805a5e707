"""Adafactor in big_vision's form, with which Cap and CapPa were trained: factored second moments (arXiv 1804.04235),
a bound of beta2 (arXiv 2106.04560), momentum in half precision.

torch's Adafactor always scales with the parameter's size, and neither it nor transformers' has the bound, the size
below which nothing is factored, or such a momentum.

Under FSDP2 a step computes with the shards that a process holds, and sums over processes only where a mean runs over
the divided dimension: an operation on a DTensor takes many times as long to start as one on its shard.

Differences from big_vision, whose weights have other shapes: attention's projections are matrices here, [heads * head,
width], there [width, heads, head], of which two of the three dimensions are factored; and layers are not stacked.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed
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


def shard_of(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def mean_over(values: Tensor, dimension: int, parameter: Tensor) -> Tensor:
    """The mean, kept as a dimension of size 1, of what this process holds of values that are divided as `parameter`."""
    if not isinstance(parameter, DTensor):
        return values.mean(dim=dimension, keepdim=True)
    total = values.sum(dim=dimension, keepdim=True)
    for axis, placement in enumerate(parameter.placements):
        if placement.is_shard(dimension):
            torch.distributed.all_reduce(total, group=parameter.device_mesh.get_group(axis))
    return total / parameter.shape[dimension]


def divided_as(parameter: Tensor, values: Tensor, dimension: int | None) -> Tensor:
    """A tensor of the state, of what this process holds of it: a mean over `dimension`, or None for the whole shape."""
    if not isinstance(parameter, DTensor):
        return values
    shape = [1 if axis == dimension else size for axis, size in enumerate(parameter.shape)]
    placements = [
        Replicate() if dimension is not None and placement.is_shard(dimension) else placement
        for placement in parameter.placements
    ]
    like = torch.empty(shape, device="meta")
    return DTensor.from_local(
        values, parameter.device_mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
    )


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
                    shard_of(parameter).mul_(1 - decay).sub_(update.to(parameter.dtype), alpha=group["lr"])
        return loss

    def update(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """The new momentum of this process's shard, float32, before it is rounded for the state."""
        state = self.state[parameter]
        gradient = shard_of(parameter.grad).float()
        state["step"] = state.get("step", 0) + 1
        beta2 = min(group["beta2_cap"], 1 - state["step"] ** -group["beta2_exponent"])
        squares = gradient.square() + EPSILON
        dimensions = factored_dimensions(parameter.shape)
        if dimensions is None:
            scaled = gradient * self.running_mean(parameter, "square", squares, beta2, None).rsqrt()
        else:
            second, largest = dimensions
            rows = self.running_mean(parameter, "rows", mean_over(squares, largest, parameter), beta2, largest)
            columns = self.running_mean(parameter, "columns", mean_over(squares, second, parameter), beta2, second)
            scaled = gradient * (rows / mean_over(rows, second, parameter)).rsqrt() * columns.rsqrt()
        momentum = scaled * (1 - group["momentum"])
        if "momentum" in state:
            momentum = momentum + group["momentum"] * shard_of(state["momentum"]).float()
        if "momentum" in state and state["momentum"].dtype == torch.bfloat16:
            shard_of(state["momentum"]).copy_(momentum)
        else:  # a state that was loaded is float32, with the same values
            state["momentum"] = divided_as(parameter, momentum.bfloat16(), None)
        return momentum

    def running_mean(self, parameter: Tensor, name: str, values: Tensor, beta2: float, dimension: int | None) -> Tensor:
        """`beta2 * old + (1 - beta2) * values`, this process's shard; beta2 is 0 in the first step."""
        state = self.state[parameter]
        if name not in state:
            state[name] = divided_as(parameter, values, dimension)
            return values
        return shard_of(state[name]).mul_(beta2).add_(values, alpha=1 - beta2)
