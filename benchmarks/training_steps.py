"""Training steps to be timed: this package's, and a plain loop over transformers' VisionEncoderDecoderModel.

Both do what one optimiser step takes: batch to device, forward, backward, clipping, AdamW; captions are random tokens.
Shapes: B images, L text tokens.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, VisionEncoderDecoderModel, ViTConfig, ViTModel

from ig_captioner import IGCaptionerConfig, IGCaptionerForConditionalGeneration
from training.config import OptimizerConfig, TrainConfig
from training.data import pad_labels
from training.optim import make_optimizers

from .measure import DEVICE


VOCABULARY, LENGTH = 32_000, 64
PAD, BOS, EOS = 0, 1, 2


class Size(NamedTuple):
    """A ViT with 16-pixel patches at 224 pixels, and a decoder of half its depth and the same width."""

    name: str
    width: int
    heads: int
    batch: int


SMALL = Size("S/16", 384, 6, 16)
BASE = Size("B/16", 768, 12, 256)


def random_batch(
    size: int, shortest: int, longest: int, *, side: int = 224, vocabulary: int = VOCABULARY
) -> dict[str, Any]:
    """`pixel_values` [B, 3, side, side] and captions of evenly spread lengths, end of sequence included."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(shortest, longest, size).round().long()[torch.randperm(size, generator=generator)]
    captions = [[*torch.randint(4, vocabulary, (int(n) - 1,), generator=generator).tolist(), EOS] for n in lengths]
    return {"pixel_values": torch.randn(size, 3, side, side, generator=generator), "captions": captions}


def captioner(size: Size, text_only_layers: int = 0, **config: Any) -> IGCaptionerForConditionalGeneration:
    """Cross-attention in all layers above the text-only ones, so that with 0 of them it does the work of the peer."""
    blocks = {"hidden_size": size.width, "intermediate_size": 4 * size.width, "num_attention_heads": size.heads}
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "num_hidden_layers": 6}
    text |= {"fusion": "cross_attention", "num_text_only_layers": text_only_layers}
    return build({"vision_config": blocks, "text_config": {**blocks, **text}, **config})


def build(config: dict[str, Any]) -> IGCaptionerForConditionalGeneration:
    """With the attention that training takes by default on a CPU, and sdpa on a GPU."""
    attention = "sdpa" if DEVICE.type == "cuda" else TrainConfig.attn_implementation
    model_config = IGCaptionerConfig(**config)
    model = IGCaptionerForConditionalGeneration.from_config(model_config, attn_implementation=attention)
    return model.to(DEVICE).train()


def encoder_decoder(size: Size) -> VisionEncoderDecoderModel:
    """The same sizes in transformers' own classes: ViT, and GPT-2 with cross-attention and a tied head."""
    encoder = ViTConfig(
        hidden_size=size.width,
        intermediate_size=4 * size.width,
        num_hidden_layers=12,
        num_attention_heads=size.heads,
        image_size=224,
        patch_size=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    decoder = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=size.width,
        n_layer=6,
        n_head=size.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        add_cross_attention=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    model = VisionEncoderDecoderModel(
        encoder=ViTModel(encoder, add_pooling_layer=False), decoder=GPT2LMHeadModel(decoder)
    )
    model.config.decoder_start_token_id = BOS
    model.config.pad_token_id = PAD
    return model.to(DEVICE).train()


def autocast() -> torch.autocast:
    return torch.autocast(DEVICE.type, torch.bfloat16)


def captioner_step(
    model: IGCaptionerForConditionalGeneration, batch: dict[str, Any], config: OptimizerConfig | None = None
) -> Callable[[], None]:
    """As `training.train` does a step: captions padded to the longest, loss without full logits."""
    optimizers = make_optimizers(model, config or OptimizerConfig())
    return step_of(model, optimizers, batch["pixel_values"], pad_labels(batch["captions"]))


def plain_step(model: torch.nn.Module, batch: dict[str, Any], length: int = 0) -> Callable[[], None]:
    """The loop of a tutorial: captions padded to `length`, or 0 for the longest, one batch, loss over all logits."""
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3)]
    labels = pad_labels(batch["captions"])
    if length:
        labels = torch.nn.functional.pad(labels, (0, length - labels.shape[1]), value=-100)
    return step_of(model, optimizers, batch["pixel_values"], labels)


def step_of(
    model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], pixel_values: Tensor, labels: Tensor
) -> Callable[[], None]:
    """What all contenders have in common, from the batch on the CPU to the new weights."""

    def step() -> None:
        inputs = {"pixel_values": pixel_values.to(DEVICE, non_blocking=True)}
        inputs["labels"] = labels.to(DEVICE, non_blocking=True)
        with autocast():
            loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step
