"""Starts a captioner from a public image encoder; its text decoder is new and has to be trained.

    python -m conversion.init_from_pretrained --encoder google/siglip-base-patch16-224 --tokenizer DIR --output_dir out

Encoders: transformers' SigLIP and SigLIP 2 (fixed resolution), ViT, and DINOv2 with or without registers. What they
have and this package's encoder has not is rewritten so that the features of the patches stay the same: a class token
becomes one more register token with its position added (attention does not mind the order of tokens), and DINOv2's
layer scale is multiplied into the projections before it. CLIP needs a norm in front of the blocks, which is missing.
"""

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from ig_captioner import (
    IGCaptionerConfig,
    IGCaptionerForConditionalGeneration,
    IGCaptionerImageProcessor,
    IGCaptionerProcessor,
    IGCaptionerVisionConfig,
    IGCaptionerVisionModel,
)
from ig_captioner.configuration_ig_captioner import as_height_width
from ig_captioner.hub import check_target, new_folder

from .reading import ConversionError
from .writing import save_and_reload, write_card


@dataclass(frozen=True)
class Family:
    """How transformers names the parts of an encoder. Modules are source -> ours; `dropped` are prefixes."""

    model: str
    blocks: str
    block: dict[str, str]
    modules: dict[str, str]
    positions: str
    mean_std: tuple[tuple[float, ...], tuple[float, ...]]
    dropped: tuple[str, ...] = ()


MLP = {"mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"}
HALVES = ((0.5,) * 3, (0.5,) * 3)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SIGLIP_BLOCK = {"layer_norm1": "self_attn_norm", "layer_norm2": "mlp_norm", "self_attn.out_proj": "self_attn.o_proj"}
SIGLIP_BLOCK |= {f"self_attn.{name}_proj": f"self_attn.{name}_proj" for name in "qkv"}
ATTENTION = {f"attention.{name}_proj": f"self_attn.{name}_proj" for name in "qkvo"}
PATCHES = {"embeddings.patch_embeddings.projection": "embeddings.projection", "layernorm": "norm"}
SIGLIP = Family(
    "SiglipVisionModel",
    "encoder.layers",
    {**SIGLIP_BLOCK, **MLP},
    {"embeddings.patch_embedding": "embeddings.projection", "post_layernorm": "norm"},
    "embeddings.position_embedding.weight",
    HALVES,
    ("head.",),
)
VIT = Family(
    "ViTModel",
    "layers",
    {"layernorm_before": "self_attn_norm", "layernorm_after": "mlp_norm", **ATTENTION, **MLP},
    PATCHES,
    "embeddings.position_embeddings",
    HALVES,
    ("pooler.", "embeddings.mask_token"),
)
DINO_BLOCK = {"norm1": "self_attn_norm", "norm2": "mlp_norm", **ATTENTION, **MLP}
DINO_DROPPED = ("embeddings.mask_token",)
DINO_PARTS = ("encoder.layer", DINO_BLOCK, PATCHES, "embeddings.position_embeddings", IMAGENET, DINO_DROPPED)
FAMILIES = {
    "siglip": SIGLIP,
    "siglip_vision_model": SIGLIP,
    "vit": VIT,
    "dinov2": Family("Dinov2Model", *DINO_PARTS),
    "dinov2_with_registers": Family("Dinov2WithRegistersModel", *DINO_PARTS),
}
REFUSED = {
    "siglip2": "its NaFlex patches are cut and placed differently (fixed-resolution SigLIP 2 works)",
    "siglip2_vision_model": "its NaFlex patches are cut and placed differently (fixed-resolution SigLIP 2 works)",
    "clip": "it has a norm in front of its blocks, which this package's encoder has not",
    "clip_vision_model": "it has a norm in front of its blocks, which this package's encoder has not",
}


SUMMARY = "The image encoder comes from elsewhere; the decoder is random and has to be trained."


@dataclass
class Report:
    """loaded and dropped: names in the source. difference: of features, relative to the largest one."""

    directory: Path
    loaded: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    difference: float = 0.0
    notes: list[str] = field(default_factory=list)


def load_source(encoder: str | Path) -> tuple[Family, PreTrainedModel]:
    """The encoder as transformers runs it. Raises ConversionError if it is of no known family, or incomplete."""
    model_type = AutoConfig.from_pretrained(encoder).model_type
    if model_type not in FAMILIES:
        reason = REFUSED.get(model_type, f"known are {', '.join(FAMILIES)}")
        raise ConversionError(f"an encoder of type {model_type!r} cannot be used: {reason}")
    family = FAMILIES[model_type]
    source, report = getattr(transformers, family.model).from_pretrained(
        encoder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    if missing := [name for name in report["missing_keys"] if not name.startswith(family.dropped)]:
        raise ConversionError(f"{encoder} lacks {len(missing)} weights, such as {sorted(missing)[0]}")
    return family, source.eval()


def vision_config(source: PreTrainedConfig) -> IGCaptionerVisionConfig:
    """Our encoder with the source's architecture."""
    for name, wanted in (("use_swiglu_ffn", False), ("qkv_bias", True)):
        if getattr(source, name, wanted) != wanted:
            raise ConversionError(f"an encoder with {name}={not wanted} is not supported")
    inner = getattr(source, "intermediate_size", None) or int(source.hidden_size * source.mlp_ratio)
    has_class_token = not source.model_type.startswith("siglip")
    return IGCaptionerVisionConfig(
        hidden_size=source.hidden_size,
        intermediate_size=inner,
        num_hidden_layers=source.num_hidden_layers,
        num_attention_heads=source.num_attention_heads,
        num_channels=source.num_channels,
        image_size=source.image_size,
        patch_size=source.patch_size,
        hidden_act=source.hidden_act,
        norm_eps=source.layer_norm_eps,
        num_register_tokens=has_class_token + (getattr(source, "num_register_tokens", None) or 0),
    )


def translate(family: Family, weights: dict[str, Tensor], report: Report) -> dict[str, Tensor]:
    """Our encoder's weights. Raises ConversionError for a weight that is neither used nor known to be dropped."""
    weights = dict(weights)
    report.dropped = sorted(name for name in weights if name.startswith(family.dropped))
    report.loaded = sorted(weights.keys() - set(report.dropped))
    for name in report.dropped:
        del weights[name]
    _fold_layer_scale(weights)
    positions = weights.pop(family.positions)
    ours = {"embeddings.position_embedding": positions}
    if (class_token := weights.pop("embeddings.cls_token", None)) is not None:
        registers = weights.pop("embeddings.register_tokens", class_token[:, :0])
        ours["embeddings.register_tokens"] = torch.cat([class_token[0] + positions[0, :1], registers[0]])
        ours["embeddings.position_embedding"] = positions[0, 1:]
    for name, weight in weights.items():
        ours[_our_name(family, name)] = weight
    return ours


def _fold_layer_scale(weights: dict[str, Tensor]) -> None:
    for scale, projection in (("layer_scale1.lambda1", "attention.o_proj"), ("layer_scale2.lambda1", "mlp.fc2")):
        for name in [name for name in weights if name.endswith(scale)]:
            factor, target = weights.pop(name), name.replace(scale, projection)
            weights[f"{target}.weight"] = weights[f"{target}.weight"] * factor[:, None]
            weights[f"{target}.bias"] = weights[f"{target}.bias"] * factor


def _our_name(family: Family, name: str) -> str:
    module, _, kind = name.rpartition(".")
    if module in family.modules:
        return f"{family.modules[module]}.{kind}"
    if module.startswith(f"{family.blocks}."):
        number, _, part = module.removeprefix(f"{family.blocks}.").partition(".")
        if part in family.block:
            return f"layers.{number}.{family.block[part]}.{kind}"
    raise ConversionError(f"the source's weight {name} has no place in this package's encoder")


@torch.no_grad()
def feature_difference(source: PreTrainedModel, ours: IGCaptionerVisionModel) -> float:
    """Largest difference of patch features on noise images, relative to the largest feature."""
    size = as_height_width(ours.config.image_size, "image_size")
    images = torch.randn(2, ours.config.num_channels, *size, generator=torch.Generator().manual_seed(0))
    patches = ours.config.grid_size[0] * ours.config.grid_size[1]
    expected = source(pixel_values=images).last_hidden_state[:, -patches:]
    found = ours(pixel_values=images).last_hidden_state[:, :patches]
    return float((found - expected).abs().max() / expected.abs().max())


def resized(ours: IGCaptionerVisionModel, image_size: tuple[int, int]) -> IGCaptionerVisionModel:
    """The encoder with its positions resampled (linearly, corners aligned) for another image size."""
    config = IGCaptionerVisionConfig(**{**ours.config.to_dict(), "image_size": list(image_size)})
    weights = ours.state_dict()
    weights["embeddings.position_embedding"] = ours.embeddings.positions(config.grid_size).detach()
    larger = IGCaptionerVisionModel._from_config(config)
    larger.load_state_dict(weights, strict=True)
    return larger


def make_processor(encoder: str | Path, family: Family, tokenizer, image_size: tuple[int, int]) -> IGCaptionerProcessor:
    """The source's mean, deviation and interpolation, and a straight resize without cropping."""
    try:
        source, _ = IGCaptionerImageProcessor.get_image_processor_dict(encoder)
    except OSError:
        source = {}
    mean, std = source.get("image_mean") or family.mean_std[0], source.get("image_std") or family.mean_std[1]
    height, width = image_size
    image_processor = IGCaptionerImageProcessor(
        size={"height": height, "width": width},
        resample=source.get("resample", IGCaptionerImageProcessor.resample),
        image_mean=list(mean),
        image_std=list(std),
    )
    return IGCaptionerProcessor(image_processor, tokenizer)


def make_config(vision: IGCaptionerVisionConfig, tokenizer, text: dict) -> IGCaptionerConfig:
    """A configuration whose special tokens are the tokenizer's; `text` are fields of the text configuration."""
    start = tokenizer.pad_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id")}
    fields = {"vocab_size": len(tokenizer), "decoder_start_token_id": start, **ids, **text}
    return IGCaptionerConfig(vision_config=vision, text_config=fields, tie_word_embeddings=not fields.get("head_bias"))


def init_from_pretrained(
    encoder: str | Path,
    tokenizer: str | Path,
    output_dir: str | Path,
    *,
    text_config: dict | None = None,
    image_size: tuple[int, int] | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Report:
    """Writes a captioner with the source's encoder and a random decoder; arguments as on the command line.

    Raises:
        ConversionError: another kind of encoder, or features that differ from the source's; nothing is left then.
        OSError: reading or writing failed.
    """
    report = Report(Path(output_dir).expanduser().resolve())
    check_target(report.directory, overwrite)
    family, source = load_source(encoder)
    ours = IGCaptionerVisionModel._from_config(vision_config(source.config)).eval()
    ours.load_state_dict(translate(family, source.state_dict(), report), strict=True)
    report.difference = feature_difference(source, ours)
    if not report.difference < 1e-3:
        raise ConversionError(f"features differ from the source's by {report.difference:.1e} of the largest one")
    native = as_height_width(ours.config.image_size, "image_size")
    if image_size not in (None, native):
        ours = resized(ours, image_size)
        report.notes.append(f"positions were resampled from images of {native} to {image_size} pixels")
    text_tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    config = make_config(ours.config, text_tokenizer, text_config or {})
    text_tokenizer.model_max_length = config.text_config.max_position_embeddings
    processor = make_processor(encoder, family, text_tokenizer, image_size or native)
    torch.manual_seed(seed)
    model = IGCaptionerForConditionalGeneration(config)
    model.model.vision_model.load_state_dict(ours.state_dict(), strict=True)
    facts = {"encoder": f"`{encoder}`, {len(report.loaded)} tensors", "decoder": "new, not trained"}
    with new_folder(report.directory) as folder:
        model = save_and_reload(model, folder, None)
        processor.save_pretrained(folder)
        write_card(folder, model, report.directory.name, None, SUMMARY, facts)
    return report


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m conversion.init_from_pretrained", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--encoder", required=True, help="folder, or repository on the Hub")
    parser.add_argument("--tokenizer", required=True, help="folder or repository; EOS behind every text, no BOS")
    parser.add_argument("--output_dir", required=True, type=Path, help="the folder to write")
    parser.add_argument("--text_config", type=Path, help="JSON of fields of IGCaptionerTextConfig (default: CapPa's)")
    parser.add_argument("--image_size", type=int, nargs=2, metavar=("H", "W"), help="pixels, if not the source's")
    parser.add_argument("--seed", type=int, default=0, help="of the decoder's random weights (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier model in --output_dir")
    options = vars(parser.parse_args(arguments))
    try:
        if options["text_config"]:
            options["text_config"] = json.loads(options["text_config"].read_text(encoding="utf-8"))
        options["image_size"] = tuple(options["image_size"]) if options["image_size"] else None
        report = init_from_pretrained(**options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"loaded {len(report.loaded)} tensors of the encoder; largest difference of features {report.difference:.1e}")
    for note in [f"dropped {name}" for name in report.dropped] + report.notes:
        print(note)
    print(f"the decoder is new: train {report.directory}")


if __name__ == "__main__":
    main()
