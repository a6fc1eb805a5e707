"""FSDP2: weights, gradients, optimiser state and moving average divided among the processes.

An Accelerate configuration switches it on (`configs/accelerate/fsdp2.yaml`); the launcher says so in the environment.
The sharding itself is done here with `fully_shard`, the same on GPUs and on CPUs, where Accelerate (1.15) would make it
plain data parallelism without a word. Everything is gathered after use, the embedding too: what is kept from before an
optimiser step, or from an evaluation with the moving average, would be out of date in the next forward pass.

In a checkpoint everything is whole, so that a run may be resumed with or without FSDP2, on any number of processes.
"""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel


def is_sharding_wanted(accelerator: Accelerator) -> bool:
    """Returns whether the launcher asks for FSDP. Raises ValueError if it cannot be had."""
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return False
    if not torch.distributed.is_initialized():
        raise ValueError("FSDP needs a launcher (accelerate launch, torchrun), even for one process")
    if (version := FullyShardedDataParallelPlugin().fsdp_version) != 2:
        raise ValueError(f"fsdp_config: fsdp_version must be 2, got {version}")
    return True


def shard(model: PreTrainedModel, mixed_precision: str) -> None:
    """Divides the parameters among the processes, in place: one unit per layer, and one of all the rest.

    Under "bf16" weights are gathered and used in bfloat16, gradients are summed in float32.
    """
    plugin = FullyShardedDataParallelPlugin()
    for module in units(model):
        fully_shard(
            module,
            reshard_after_forward=module is model or plugin.reshard_after_forward,
            mp_policy=precision_of(module, mixed_precision),
            offload_policy=plugin.cpu_offload,
        )
    for name in ("compile_texts", "score"):  # of the evaluation during training
        register_fsdp_forward_method(model, name)


def precision_of(module: nn.Module, mixed_precision: str) -> MixedPrecisionPolicy:
    """A batch norm's weights stay in float32, as its running statistics do: PyTorch takes no others together."""
    if mixed_precision == "bf16" and not isinstance(module, _BatchNorm):
        return MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    return MixedPrecisionPolicy()


def units(model: PreTrainedModel) -> Iterator[nn.Module]:
    """The layers of encoder and decoder, as their classes name them, inner ones first, and the model itself.

    Batch norms are units of their own, because their precision is.
    """
    for module in reversed([*model.modules()]):
        is_layer = type(module).__name__ in model._no_split_modules
        if module is model or is_layer or (isinstance(module, _BatchNorm) and module.affine):
            yield module


def gathered(value: Any, keep: bool = True) -> Any:
    """Nested dictionaries and lists with their sharded tensors gathered on the CPU, on all processes at once.

    Args:
        keep: False where the result is not needed; then each of them is None.
    """
    if isinstance(value, DTensor):
        tensor = value.full_tensor()
        return tensor.cpu() if keep else None
    if isinstance(value, dict):
        return {name: gathered(item, keep) for name, item in value.items()}
    return [gathered(item, keep) for item in value] if isinstance(value, list) else value


def model_weights(model: PreTrainedModel, keep: bool = True) -> dict[str, Any]:
    """The model's `state_dict`, gathered, with tied weights once. On all processes at once; `keep` as above."""
    state = model.state_dict()
    return gathered({name: tensor for name, tensor in state.items() if name not in model.all_tied_weights_keys}, keep)


def sharded_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor divided as the parameter is that it belongs to; means over its first dimension stay whole."""
    if not isinstance(parameter, DTensor) or not tensor.ndim:
        return tensor
    mesh = parameter.device_mesh
    placements = parameter.placements if tensor.shape[0] == parameter.shape[0] else [Replicate()] * mesh.ndim
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def shard_optimizer_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A whole `state_dict` as the optimiser's parameters are divided."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    sharded = {
        number: {
            name: sharded_like(value, parameters[number]) if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    return {**state, "state": sharded}
