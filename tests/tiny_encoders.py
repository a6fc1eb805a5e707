"""Tiny, random encoders of transformers, one of each kind of input and output."""

import torch
from transformers import (
    ConvNextConfig,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    EfficientNetConfig,
    HieraConfig,
    PreTrainedConfig,
    ResNetConfig,
    SiglipVisionConfig,
    SwinConfig,
    ViTMAEConfig,
)

from ig_captioner import IGCaptionerConfig, IGCaptionerForConditionalGeneration
from tiny import tiny_config


VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
SMALL_VIT = {**VIT, "intermediate_size": 24, "initializer_range": 0.3}
STAGES = {"depths": [1, 1], "image_size": 32}
# name: configuration, and the expected width, rows, columns and leading tokens
ENCODERS: dict[str, tuple[PreTrainedConfig, tuple[int, int, int, int]]] = {
    "vit_mae": (ViTMAEConfig(**SMALL_VIT), (16, 4, 4, 1)),
    "dinov2": (Dinov2WithRegistersConfig(**VIT, mlp_ratio=2, num_register_tokens=2), (16, 4, 4, 3)),
    "dinov3": (DINOv3ViTConfig(**SMALL_VIT, num_register_tokens=2), (16, 4, 4, 3)),
    "siglip2": (SiglipVisionConfig(**SMALL_VIT), (16, 4, 4, 0)),
    "convnext": (ConvNextConfig(**STAGES, hidden_sizes=[8, 16], num_stages=2), (16, 4, 4, 0)),
    "swin": (SwinConfig(**STAGES, patch_size=4, embed_dim=8, num_heads=[2, 2], window_size=4), (16, 4, 4, 0)),
    "hiera": (
        HieraConfig(image_size=[64, 64], embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2]),
        (64, 2, 2, 0),
    ),
    "resnet": (
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", image_size=32),
        (16, 4, 4, 0),
    ),
    "efficientnet": (
        EfficientNetConfig(
            image_size=32,
            width_coefficient=0.25,
            depth_coefficient=0.1,
            hidden_dim=320,
            hidden_act="relu6",
            kernel_sizes=[3, 5],
            in_channels=[32, 16],
            out_channels=[16, 24],
            strides=[1, 2],
            num_block_repeats=[1, 2],
            expand_ratios=[1, 6],
        ),
        (320, 8, 8, 0),
    ),
}
CONVOLUTIONAL = ("convnext", "resnet", "efficientnet")
FIVE_TOKENS = {"image_token_grids": [2, 1], "image_token_norm": True, "image_position_embedding": "sincos2d"}


def encoder_config(name: str, text: dict | None = None, **kwargs) -> IGCaptionerConfig:
    """A tiny captioner with one of `ENCODERS`; the text configuration is that of `tiny_config`."""
    fields = {**tiny_config(text).text_config.to_dict(), "encoder_hidden_size": None}
    return IGCaptionerConfig(vision_config=ENCODERS[name][0], text_config=fields, **kwargs)


def encoder_model(name: str, model_class=IGCaptionerForConditionalGeneration, attn="sdpa", **kwargs):
    """A random model in evaluation mode, with batch norms that have seen something."""
    torch.manual_seed(0)
    model = model_class.from_config(encoder_config(name, **kwargs), attn_implementation=attn).eval()
    for module_name, buffer in model.named_buffers():
        if module_name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
        elif module_name.endswith("running_mean"):
            buffer.normal_(std=0.1)
    return model


def images_for(model, number: int = 3) -> torch.Tensor:
    return torch.randn(number, 3, *model.config.image_size, generator=torch.Generator().manual_seed(1))
