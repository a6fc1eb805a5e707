"""Pretrained encoders of transformers: their weights, and an image processor that prepares photos as theirs does.

`load_encoder` reads any model that `vision_ig_captioner` can use, from a folder or a repository on the Hub.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from .processing_ig_captioner import IGCaptionerImageProcessor
from .vision_ig_captioner import build_encoder, encoder_class, run_encoder, size_of, vision_part


CONVNEXT_CROPS_BELOW = 384  # pixels: its processor cuts out the centre of smaller images only


def load_encoder(source: str | Path) -> PreTrainedModel:
    """The encoder of a folder or repository in float32 and evaluation mode, without what the decoder never reads.

    Our own encoder is taken out of a whole captioner, too, and those of CLIP or SigLIP out of the whole model.

    Raises:
        ValueError: for an encoder that cannot be used, or weights that do not fill it.
        OSError: no such folder or repository, or no safetensors in it (pickles are never loaded).
    """
    config = vision_part(AutoConfig.from_pretrained(source))
    model_class = encoder_class(config)
    options: dict[str, Any] = {"dtype": torch.float32, "use_safetensors": True}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        loaded, report = model_class.from_pretrained(source, config=config, **options)
    except SafetensorError as error:
        raise ValueError(f"the weights of {source} are truncated or damaged: {error}") from error
    weights = loaded.state_dict()
    encoder = build_encoder(config)
    wanted = encoder.state_dict().keys()
    wrong = {
        "is missing": {str(key) for key in report["missing_keys"]},
        "has the wrong shape": {str(key) for key, *_ in report["mismatched_keys"]},
        "is not finite": {key for key, weight in weights.items() if not bool(weight.isfinite().all())},
    }
    lines = [f"{key} {reason}" for reason, keys in wrong.items() for key in sorted(keys & wanted)]
    if lines:
        more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
        raise ValueError(f"the weights of {source} do not fill {model_class.__name__}: {', '.join(lines[:3])}{more}")
    encoder.load_state_dict({name: weights[name] for name in wanted}, strict=True)
    return encoder.eval()


def image_processor_for(source: str | Path, image_size: tuple[int, int] | None = None) -> IGCaptionerImageProcessor:
    """Ours with the pixel statistics, interpolation, size and crop of the source's own, as far as it has any.

    Args:
        image_size: `(height, width)`; the source's if not given.

    Raises:
        ValueError: for a processor that does what ours cannot.
    """
    try:
        fields, _ = IGCaptionerImageProcessor.get_image_processor_dict(source)
    except OSError:
        fields = {}
    size, crop_pct = size_and_crop(fields)
    if image_size is None:
        config = AutoConfig.from_pretrained(source)
        image_size = size or size_of(getattr(config, "vision_config", config))
    taken = ("resample", "image_mean", "image_std", "rescale_factor", "do_rescale", "do_normalize")
    options = {name: fields[name] for name in taken if fields.get(name) is not None}
    if fields.get("rescale_offset"):
        raise ValueError(f"the image processor of {source} subtracts an offset (rescale_offset), which ours cannot")
    height, width = image_size
    return IGCaptionerImageProcessor(size={"height": height, "width": width}, crop_pct=crop_pct, **options)


def size_and_crop(fields: dict[str, Any]) -> tuple[tuple[int, int] | None, float | None]:
    """`(height, width)` and `crop_pct` of an image processor of transformers, from its fields; None where it has none.

    Resizing the shorter side to 256 pixels and cutting out 224 is `crop_pct` 0.875 of 224 pixels. Ours says it itself.
    """
    size = as_size(fields.get("size"))
    crop_size = as_size(fields.get("crop_size"))
    if fields.get("do_center_crop") and crop_size and "height" in crop_size:
        height = crop_size["height"]
        width = crop_size["width"]
        edge = size.get("shortest_edge", size.get("height", min(height, width)))
        return (height, width), min(1.0, min(height, width) / edge)
    if "height" in size:
        return (size["height"], size["width"]), fields.get("crop_pct")
    if edge := size.get("shortest_edge"):
        share = fields.get("crop_pct") if edge < CONVNEXT_CROPS_BELOW else None
        return (edge, edge), share
    return None, None


def as_size(size: int | dict[str, int] | None) -> dict[str, int]:
    """Sizes as older processors have them, too: one number is a square."""
    return {"height": size, "width": size} if isinstance(size, int) else dict(size or {})


def on_meta_device(config: PreTrainedConfig) -> tuple[PreTrainedModel, Tensor]:
    """An encoder in evaluation mode and one image for it, both without data."""
    with torch.device("meta"):
        encoder = build_encoder(config)
        pixel_values = torch.zeros(1, getattr(config, "num_channels", 3), *size_of(config))
    return encoder.eval(), pixel_values


def unused_parameters(encoder: PreTrainedModel) -> list[str]:
    """Parameters that no feature depends on (a mask token, a norm of the pooled output), found on the meta device.

    Trained in several processes they would be waited for in vain.
    """
    twin, pixel_values = on_meta_device(encoder.config)
    run_encoder(twin, pixel_values).sum().backward()
    return [name for name, parameter in twin.named_parameters() if parameter.grad is None]


def forward_flops(config: PreTrainedConfig) -> int:
    """Floating-point operations of one image's forward pass, in matrix products and convolutions."""
    encoder, pixel_values = on_meta_device(config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run_encoder(encoder, pixel_values)
    return counter.get_total_flops()
