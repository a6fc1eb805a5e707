"""Counts the floating-point operations of a training step, and estimates the cost of a run.

    python -m training.flops --config training/configs/b16.yaml [--peak_tflops 989] [--mfu 0.4]

Only matrix products count, two operations per multiplication and addition, with padding and the masked half of causal
attention included (they are computed), but in the head, which reads only labelled tokens. The backward pass takes
twice the forward pass, so that a step takes three; what gradient checkpointing computes again does not count, and of a
frozen encoder only the forward pass does.

Legend: B images, P image tokens, L text tokens.
"""

import argparse
import time

import torch
from transformers import PreTrainedConfig

from ig_captioner.configuration_ig_captioner import (
    IGCaptionerConfig,
    IGCaptionerTextConfig,
    IGCaptionerVisionConfig,
    as_height_width,
)
from ig_captioner.encoders import forward_flops

from .config import TrainConfig, load_config


def block_flops(config: IGCaptionerVisionConfig | IGCaptionerTextConfig, queries: int, others: int = 0) -> int:
    """One self-attention and MLP over `queries` tokens, which attend to themselves and to `others` kept keys."""
    size = config.hidden_size
    projections = 4 * size**2 + (3 if config.gated_mlp else 2) * size * config.intermediate_size
    return 2 * queries * projections + 4 * queries * (queries + others) * size


def encoder_flops(config: PreTrainedConfig) -> int:
    """The forward pass of the encoder, for one image. One of transformers is run on the meta device and counted."""
    if not isinstance(config, IGCaptionerVisionConfig):
        return forward_flops(config)
    rows, columns = config.grid_size
    height, width = as_height_width(config.patch_size, "patch_size")
    patches = 2 * rows * columns * config.num_channels * height * width * config.hidden_size
    return patches + config.num_hidden_layers * block_flops(config, config.layout.tokens)


def decoder_flops(config: IGCaptionerConfig, length: int) -> int:
    """The forward pass of the decoder over one image and its text [L], with and without the image.

    The two paths share the text-only layers, unless some texts may be predicted in parallel.
    """
    text = config.text_config
    tokens = config.num_image_tokens
    size = text.hidden_size
    fusion_layers = text.num_hidden_layers - text.num_text_only_layers
    text_only = text.num_text_only_layers * block_flops(text, length)
    if text.fusion == "prefix":
        reading = 2 * tokens * text.encoder_hidden_size * size
        reading += (fusion_layers - 1) * block_flops(text, tokens) + 4 * tokens * size**2
        conditional = fusion_layers * block_flops(text, length, tokens)
    else:
        reading = fusion_layers * 4 * tokens * text.encoder_hidden_size * size
        cross_attention = 4 * length * size**2 + 4 * length * tokens * size
        conditional = fusion_layers * (block_flops(text, length) + cross_attention)
    embedding = head = 0
    if text.embedding_size is not None:
        embedding = head = 2 * length * text.embedding_size * size
    total = reading + embedding + text_only + conditional + head
    if config.unconditional_weight > 0:
        total += fusion_layers * block_flops(text, length) + head
        total += embedding + text_only if config.parallel_prediction_prob > 0 else 0
    return total


def head_flops(config: IGCaptionerConfig, tokens: int) -> int:
    """The forward pass of the head over so many tokens, with and without the image."""
    paths = 2 if config.unconditional_weight > 0 else 1
    return paths * 2 * tokens * config.text_config.embedding_width * config.text_config.vocab_size


def training_flops(config: IGCaptionerConfig, images: int, length: int, tokens: int, encoder_passes: int = 3) -> int:
    """Forward and backward pass over B images with texts [B, L], of which `tokens` are labelled.

    Args:
        encoder_passes: 3 where the encoder is trained, 1 where it is frozen, 0 where its features are cached.
    """
    encoder = encoder_passes * encoder_flops(config.vision_config) if encoder_passes else 0
    return images * (encoder + 3 * decoder_flops(config, length)) + 3 * head_flops(config, tokens)


def encoder_passes(frozen: bool, config: TrainConfig) -> int:
    """See `training_flops`."""
    return 0 if config.data.feature_cache else 1 if frozen else 3


def measure_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of the best of five products of square matrices: what this device reaches, not its data
    sheet. On a CPU with the threads and the load of the moment."""
    size = 512 if device.type == "cpu" else 8192
    generator = torch.Generator(device).manual_seed(0)  # the run's random numbers stay untouched
    first, second = torch.randn(2, size, size, device=device, dtype=dtype, generator=generator)
    seconds = []
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(first, second)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])  # the first one also chooses an algorithm


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--peak_tflops", type=float, default=989.0, help="of one device; H100 and H200 in bf16: 989")
    parser.add_argument("--mfu", type=float, default=0.4, help="assumed share of the peak")
    options = parser.parse_args(arguments)
    config = load_config(options.config)
    model = IGCaptionerConfig(**config.model)
    length = config.data.max_length
    if config.steps is None:
        raise SystemExit(f"{options.config} ends by the clock: set max_steps or max_samples")
    samples = config.steps * config.batch_size
    frozen = "model.vision_model.*" in config.freeze
    per_sample = training_flops(model, 1, length, length, encoder_passes(frozen, config))
    seconds = samples * per_sample / (options.peak_tflops * 1e12 * options.mfu)
    print(f"{per_sample / 1e9:.1f} GFLOP per sample of {length} tokens, {samples / 1e6:.0f} M samples")
    print(f"{samples * per_sample / 1e18:.1f} EFLOP; at {options.mfu:.0%} of {options.peak_tflops:g} TFLOP/s")
    print(f"{samples / seconds:.0f} samples/s on one device, {seconds / 3600:.0f} device hours")


if __name__ == "__main__":
    main()
