"""Parameter groups, optimisers, the learning-rate schedule, and the moving average of the weights.

The schedule is a pure function of the run's progress in [0, 1], which may be counted in steps or in minutes, so it has
no state to save: the training loop calls `set_learning_rate` before each step.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .adafactor import Adafactor
from .config import OptimizerConfig
from .muon import Muon
from .sharding import sharded_like


# Parts of a parameter's name that mark lookup tables: no weight decay, and never Muon, which is for linear maps.
TABLE_NAMES = ("position_embedding", "register_tokens")


def group_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Splits the trainable parameters by what an optimiser may do to them.

    Returns:
        `hidden`: 2-D weights between hidden states (Muon's domain; weight decay);
        `decayed`: other weights with two or more dimensions, as convolutions and an untied head (weight decay);
        `plain`: norms, biases, token embeddings, positions, register tokens (no weight decay).
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: dict[str, list[nn.Parameter]] = {"hidden": [], "decayed": [], "plain": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or id(parameter) in tables or any(part in name for part in TABLE_NAMES):
            groups["plain"].append(parameter)
        elif parameter.ndim == 2 and "lm_head" not in name:
            groups["hidden"].append(parameter)
        else:
            groups["decayed"].append(parameter)
    return groups


def make_optimizers(
    model: nn.Module, config: OptimizerConfig, muon_dtype: torch.dtype = torch.bfloat16
) -> list[torch.optim.Optimizer]:
    """AdamW or Adafactor for all parameters, or Muon for the hidden matrices followed by AdamW for the rest.

    Each group keeps its peak rate as `peak_lr`, for `set_learning_rate`.

    Args:
        muon_dtype: of Muon's Newton-Schulz iterations.
    """
    groups = group_parameters(model)
    optimizers: list[torch.optim.Optimizer] = []
    adamw_lr = config.lr
    if config.name == "muon":
        hidden = groups.pop("hidden")
        adamw_lr = config.lr if config.adamw_lr is None else config.adamw_lr
        muon = Muon(
            hidden,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.muon_momentum,
            ns_steps=config.muon_ns_steps,
            adjust_lr=config.muon_adjust_lr,
            dtype=muon_dtype,
        )
        optimizers.append(muon)
    others = [
        {"params": parameters, "weight_decay": 0.0 if name == "plain" else config.weight_decay}
        for name, parameters in groups.items()
        if parameters
    ]
    if config.name == "adafactor":
        momentum = config.adafactor_momentum
        cap = config.adafactor_beta2_cap
        optimizers.append(Adafactor(others, lr=config.lr, momentum=momentum, beta2_cap=cap))
    else:
        optimizers.append(torch.optim.AdamW(others, lr=adamw_lr, betas=config.betas, eps=config.eps, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def learning_rate_factor(progress: float, config: OptimizerConfig) -> float:
    """Learning rate as a fraction of its peak, at `progress` in [0, 1] of the run.

    `rsqrt` is big_vision's: the peak over the square root of progress in units of the warm-up, here at least 1 %.
    """
    progress = min(max(progress, 0.0), 1.0)
    warmup = config.warmup_fraction
    cooldown = config.cooldown_fraction
    if progress < warmup:
        return progress / warmup
    after_warmup = (progress - warmup) / max(1e-9, 1.0 - warmup)
    falling = {
        "constant": 1.0,
        "linear": config.min_lr_ratio + (1 - config.min_lr_ratio) * (1 - after_warmup),
        "cosine": config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * after_warmup)),
        "rsqrt": 1.0 / math.sqrt(max(1.0, progress / max(warmup, 0.01))),
    }
    factor = falling[config.schedule]
    return factor * (1.0 - progress) / cooldown if progress > 1.0 - cooldown else factor


def set_learning_rate(optimizers: list[Any], factor: float) -> None:
    """Sets every group to `factor` times its own peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


class MovingAverage:
    """Exponential moving average of a model's parameters, kept in float32.

    The decay of update t is `min(decay, (1 + t) / (10 + t))`, so that the random start is forgotten quickly.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.average = {
            name: parameter.detach().float().clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        current = dict(model.named_parameters())
        latest = [current[name].detach().float() for name in self.average]
        torch._foreach_lerp_(list(self.average.values()), latest, 1.0 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrites the model's parameters with the average."""
        for name, parameter in model.named_parameters():
            if name in self.average:
                parameter.copy_(self.average[name])

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model holds the average inside the `with` block, and its own weights again afterwards."""
        own = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if name in self.average}
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name in own:
                        parameter.copy_(own[name])

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises KeyError if a parameter is missing in `state`."""
        self.updates = state["updates"]
        average: dict[str, Tensor] = state["average"]
        for name, tensor in self.average.items():
            tensor.copy_(sharded_like(average[name], tensor))
