"""Vision encoders of transformers: which can be used, how one is called, and where its patches are.

Encoders differ in what they take (their first argument, extra ones for an unusual image size, the noise of a masked
autoencoder) and in what comes out: a map [B, E, rows, columns] (convolutions), or tokens [B, P, E] with class and
register tokens in front. Nothing here is a list of models: arguments are read from the signature of `forward`, width
and grid from one pass over an image without data (torch's meta device). The rest of the package sees tokens [B, P, E].

Legend: B images, P image tokens, E encoder width.
"""

import copy
import inspect
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import CONFIG_MAPPING, MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

from .compat_ig_captioner import attention_implementation, build_from_config


# Fields that an encoder may have, with the values that we set: a masked autoencoder sees every patch, and heads and
# pooling layers, which the decoder does not read, are left out.
FIELDS_SET = {"mask_ratio": 0.0, "vision_use_head": False, "do_pooling": False}
VIDEO_FIELDS = ("num_frames", "frames_per_clip", "tubelet_size")
MAX_LEADING_TOKENS = 16  # class and register tokens; more would be a grid that was not recognised


@dataclass(frozen=True)
class ImageLayout:
    """The tokens of one image: `leading` class and register tokens, `rows` x `columns` patches, `trailing` registers.

    width is E.
    """

    width: int
    rows: int
    columns: int
    leading: int = 0
    trailing: int = 0

    @property
    def tokens(self) -> int:
        return self.leading + self.rows * self.columns + self.trailing


# Configuration


def vision_part(config: PreTrainedConfig | dict) -> PreTrainedConfig:
    """The configuration of an encoder: a config, or a dict with its `model_type`; of a CLIP or LLaVA its vision part.

    Raises:
        ValueError: for a type that transformers does not know, or an encoder that cannot be used, with the reason.
    """
    if isinstance(config, dict):
        fields = dict(config)
        model_type = fields.pop("model_type")
        if model_type not in CONFIG_MAPPING:
            raise ValueError(f"vision_config: transformers has no model of type {model_type!r}")
        config = CONFIG_MAPPING[model_type](**fields)
    if isinstance(nested := getattr(config, "vision_config", None), PreTrainedConfig):
        config = nested
    encoder_class(config)
    config = copy.deepcopy(config)
    for name, value in FIELDS_SET.items():
        if hasattr(config, name):
            setattr(config, name, value)
    return config


def encoder_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that `AutoModel` would build. Raises ValueError if it takes anything but single images."""
    name = f"vision_config of type {config.model_type!r}"
    if type(config) not in MODEL_MAPPING:
        raise ValueError(f"{name}: AutoModel knows no such model")
    found = MODEL_MAPPING[type(config)]
    model_class = found[0] if isinstance(found, tuple) else found
    arguments = inspect.signature(model_class.forward).parameters
    if model_class.main_input_name != "pixel_values" or "pixel_values" not in arguments:
        raise ValueError(f"{name}: {model_class.__name__} does not take pixel_values")
    if "input_ids" in arguments:
        raise ValueError(f"{name}: {model_class.__name__} reads text as well; give the vision part of its config")
    if video := [field for field in VIDEO_FIELDS if getattr(config, field, None) is not None]:
        raise ValueError(f"{name}: {model_class.__name__} takes videos ({video[0]} in its config)")
    needed = [
        argument.name
        for argument in arguments.values()
        if argument.default is argument.empty
        and argument.kind in (argument.POSITIONAL_OR_KEYWORD, argument.KEYWORD_ONLY)
        and argument.name not in ("self", "pixel_values")
    ]
    if needed:
        raise ValueError(
            f"{name}: {model_class.__name__} needs {', '.join(needed)} beside pixel_values (as NaFlex does, whose "
            "patches are cut by the processor); an encoder of fixed resolution would do"
        )
    return model_class


def size_of(config: PreTrainedConfig, default: int = 224) -> tuple[int, int]:
    """`(height, width)` of the images an encoder was made for; `default` squared where its config has none (ResNet)."""
    size = getattr(config, "image_size", None) or default
    return (size, size) if isinstance(size, int) else (size[0], size[1])


# The model


def build_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    """The encoder with random weights, without a pooling layer where that can be left out."""
    model_class = encoder_class(config)
    options: dict[str, Any] = {}
    wanted = attention_implementation(config)
    if wanted is not None and not _supports_attention(model_class, wanted):
        options["attn_implementation"] = "eager"
    if "add_pooling_layer" in inspect.signature(model_class.__init__).parameters:
        options["add_pooling_layer"] = False
    return build_from_config(model_class, config, **options)


def _supports_attention(model_class: type[PreTrainedModel], implementation: str) -> bool:
    """Convolutional encoders have no attention to choose, and refuse anything but "eager"."""
    flags = {"sdpa": "_supports_sdpa", "flash": "_supports_flash_attn", "flex": "_supports_flex_attn"}
    return all(getattr(model_class, flag) for name, flag in flags.items() if name in implementation)


def run_encoder(encoder: PreTrainedModel, pixel_values: Tensor) -> Tensor:
    """Encodes images [B, channels, height, width]: to tokens [B, P, E], or to a map [B, E, rows, columns].

    Raises:
        ValueError: for an output of another shape.
    """
    pixel_values = pixel_values.to(encoder.dtype)
    if is_convolutional(encoder):
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
    features = encoder(pixel_values=pixel_values, **_extra_arguments(encoder, pixel_values)).last_hidden_state
    if features.ndim not in (3, 4):
        raise ValueError(
            f"{type(encoder).__name__} returns features of shape {tuple(features.shape)}, neither tokens [B, P, E] nor "
            "a map [B, E, rows, columns]"
        )
    return features


def _extra_arguments(encoder: PreTrainedModel, pixel_values: Tensor) -> dict[str, Any]:
    """Arguments that `forward` needs beside the pixels."""
    config = encoder.config
    known = inspect.signature(type(encoder).forward).parameters
    height, width = pixel_values.shape[-2:]
    extra: dict[str, Any] = {}
    if "interpolate_pos_encoding" in known and (height, width) != size_of(config):
        extra["interpolate_pos_encoding"] = True
    if "noise" in known and (patch := patch_size_of(config)):
        # a masked autoencoder shuffles its patches by this noise, even where it masks none
        patches = (height // patch[0]) * (width // patch[1])
        extra["noise"] = torch.arange(patches, device=pixel_values.device).float().expand(pixel_values.shape[0], -1)
    return extra


def is_convolutional(encoder: nn.Module) -> bool:
    """Tells whether there are convolutions beyond the one that cuts the patches: they are faster with channels last."""
    return sum(isinstance(module, nn.Conv2d) for module in encoder.modules()) > 1


def keep_frozen_in_evaluation(encoder: nn.Module) -> None:
    """Puts a frozen encoder, or the frozen batch norms of a partly trained one, into evaluation mode."""
    if is_frozen(encoder):
        encoder.eval()
    for module in encoder.modules():
        if isinstance(module, _BatchNorm) and module.affine and is_frozen(module):
            module.eval()


def is_frozen(module: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in module.parameters())


# Where the patches are


def patch_size_of(config: PreTrainedConfig) -> tuple[int, int] | None:
    """`(height, width)` of a patch in pixels; None where the configuration has no such field."""
    patch = getattr(config, "patch_size", None)
    if not patch:
        return None
    return (patch, patch) if isinstance(patch, int) else tuple(patch)


def find_layout(
    features: Tensor, image_size: tuple[int, int], config: PreTrainedConfig, trailing: int = 0
) -> ImageLayout:
    """Finds the patches in `features`: a map, or tokens [B, P, E] with `trailing` registers.

    The grid is that of the config's patch size if it has one, or else (encoders that merge patches, as Swin) the finest
    one whose cells divide the image evenly, with as few leading tokens as possible.

    Raises:
        ValueError: if no grid fits.
    """
    if features.ndim == 4:
        return ImageLayout(features.shape[1], features.shape[2], features.shape[3])
    tokens = features.shape[1] - trailing
    width = features.shape[2]
    height, width_in_pixels = image_size
    if patch := patch_size_of(config):
        rows = height // patch[0]
        columns = width_in_pixels // patch[1]
        if 0 <= tokens - rows * columns <= MAX_LEADING_TOKENS:
            return ImageLayout(width, rows, columns, tokens - rows * columns, trailing)
    for leading in range(MAX_LEADING_TOKENS + 1):
        for cell in range(1, max(image_size) + 1):
            rows, columns = math.ceil(height / cell), math.ceil(width_in_pixels / cell)
            if rows * columns == tokens - leading:
                return ImageLayout(width, rows, columns, leading, trailing)
    raise ValueError(
        f"{features.shape[1]} tokens of an encoder of type {config.model_type!r} for an image of {image_size} pixels "
        "are no grid of patches: image_token_grids must be None"
    )


def layout_of(config: PreTrainedConfig, image_size: tuple[int, int] | None = None) -> ImageLayout:
    """Layout of what an encoder returns for one image, found by running it on the meta device.

    Args:
        image_size: `(height, width)` in pixels; by default that of the configuration, see `size_of`.
    """
    return _layout_of(config.to_json_string(), image_size or size_of(config))  # JSON, as a cache needs equal arguments


@lru_cache(maxsize=64)
def _layout_of(config_json: str, image_size: tuple[int, int]) -> ImageLayout:
    config = vision_part(json.loads(config_json))
    with torch.device("meta"):
        encoder = build_encoder(config).eval()
        pixel_values = torch.zeros(1, getattr(config, "num_channels", 3), *image_size)
    try:
        with torch.no_grad():
            features = run_encoder(encoder, pixel_values)
    except Exception as error:  # whatever a model may raise
        raise ValueError(
            f"vision_config of type {config.model_type!r} does not take images of {image_size} pixels: {error}"
        ) from error
    return find_layout(features, image_size, config)


def as_tokens(features: Tensor) -> Tensor:
    """Tokens as they are, a map row by row: [B, P, E]."""
    return features.flatten(2).transpose(1, 2) if features.ndim == 4 else features


def as_map(features: Tensor, layout: ImageLayout) -> Tensor:
    """The patches [B, E, rows, columns], without class and register tokens."""
    if features.ndim == 4:
        return features
    patches = features[:, layout.leading : features.shape[1] - layout.trailing]
    return patches.transpose(1, 2).unflatten(2, (layout.rows, layout.columns))


def mean_over_grids(patches: Tensor, grids: Sequence[int]) -> Tensor:
    """The means over the cells of each g x g grid, row by row, grid after grid: a map to [B, sum of g * g, E]."""
    return torch.cat([F.adaptive_avg_pool2d(patches, grid).flatten(2) for grid in grids], dim=2).transpose(1, 2)
