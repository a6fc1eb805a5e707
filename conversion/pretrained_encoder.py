"""An encoder of transformers, as it is or rewritten as this package's: which weight becomes which, and whether the
features stay the same.

What the sources have and our encoder has not is rewritten so that the features of the patches do not change: a class
token becomes one more register token with its position added (attention does not mind the order of tokens), and
DINOv2's layer scale is multiplied into the projections before it. CLIP normalises only the class token at its end;
here, as in open_clip, that norm is applied to all tokens.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ig_captioner import IGCaptionerVisionConfig, IGCaptionerVisionModel
from ig_captioner.configuration_ig_captioner import as_height_width
from ig_captioner.encoders import load_encoder

from .reading import ConversionError


MAX_DIFFERENCE = 1e-3  # of outputs, relative to the largest one


@dataclass
class Taken:
    """A record of what was taken from a source. loaded and dropped: its names.

    difference: of outputs, relative to the largest one; None where nothing was rewritten.
    """

    source: str
    loaded: list[str]
    dropped: list[str]
    difference: float | None = None


@dataclass(frozen=True)
class Family:
    """Names that transformers gives the parts of an encoder. Modules are source -> ours; `dropped` are prefixes.

    unapplied_norm: a final norm that the source does not apply to its patches. fields: of our configuration.
    """

    model: str
    blocks: str
    block: dict[str, str]
    modules: dict[str, str]
    positions: str
    mean_std: tuple[tuple[float, ...], tuple[float, ...]]
    dropped: tuple[str, ...] = ()
    class_token: str = ""
    unapplied_norm: str = ""
    fields: dict[str, bool] = field(default_factory=dict)


MLP = {"mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"}
HALVES = ((0.5,) * 3, (0.5,) * 3)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
# SigLIP is written after CLIP
CLIP_BLOCK = {"layer_norm1": "self_attn_norm", "layer_norm2": "mlp_norm", "self_attn.out_proj": "self_attn.o_proj"}
CLIP_BLOCK |= {f"self_attn.{name}_proj": f"self_attn.{name}_proj" for name in "qkv"} | MLP
CLIP_MODULES = {"embeddings.patch_embedding": "embeddings.projection", "post_layernorm": "norm"}
CLIP_POSITIONS = "embeddings.position_embedding.weight"
SIGLIP = Family("SiglipVisionModel", "encoder.layers", CLIP_BLOCK, CLIP_MODULES, CLIP_POSITIONS, HALVES, ("head.",))
CLIP = Family(
    "CLIPVisionModel",
    "encoder.layers",
    CLIP_BLOCK,
    {**CLIP_MODULES, "pre_layrnorm": "pre_norm"},
    CLIP_POSITIONS,
    OPENAI,
    class_token="embeddings.class_embedding",
    unapplied_norm="post_layernorm",
    fields={"pre_norm": True, "patch_bias": False},
)
ATTENTION = {f"attention.{name}_proj": f"self_attn.{name}_proj" for name in "qkvo"}
PATCHES = {"embeddings.patch_embeddings.projection": "embeddings.projection", "layernorm": "norm"}
VIT = Family(
    "ViTModel",
    "layers",
    {"layernorm_before": "self_attn_norm", "layernorm_after": "mlp_norm", **ATTENTION, **MLP},
    PATCHES,
    "embeddings.position_embeddings",
    HALVES,
    ("pooler.", "embeddings.mask_token"),
    "embeddings.cls_token",
)
SWIGLU = {f"mlp.{name}_proj": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
DINO_BLOCK = {"norm1": "self_attn_norm", "norm2": "mlp_norm", **ATTENTION, **MLP, **SWIGLU}
DINO_PARTS = ("encoder.layer", DINO_BLOCK, PATCHES, "embeddings.position_embeddings", IMAGENET)
DINO_TOKENS = (("embeddings.mask_token",), "embeddings.cls_token")
REGISTERS = "embeddings.register_tokens"
FAMILIES = {
    "siglip": SIGLIP,
    "siglip_vision_model": SIGLIP,
    "clip": CLIP,
    "clip_vision_model": CLIP,
    "vit": VIT,
    "dinov2": Family("Dinov2Model", *DINO_PARTS, *DINO_TOKENS),
    "dinov2_with_registers": Family("Dinov2WithRegistersModel", *DINO_PARTS, *DINO_TOKENS),
}


def find_family(encoder: str | Path) -> Family | None:
    """Returns how an encoder is rewritten as ours, or None if it can only be taken as it is."""
    return FAMILIES.get(AutoConfig.from_pretrained(encoder).model_type)


def load_source(
    model_class: type[PreTrainedModel], name: str | Path, optional: tuple[str, ...] = ()
) -> tuple[PreTrainedModel, list[str]]:
    """A model as transformers runs it, and the names of weights beside it that are not the model's.

    Args:
        optional: prefixes of weights that may be missing.

    Raises:
        ConversionError: weights that are missing, misshapen or not finite, or a damaged file.
        OSError: no such folder or repository, or no safetensors in it (pickles are never loaded).
    """
    arguments = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        source, report = model_class.from_pretrained(name, dtype=torch.float32, **arguments)
    except SafetensorError as error:
        raise ConversionError(f"the weights of {name} are truncated or damaged: {error}") from error
    weights = source.state_dict()
    wrong = {
        "is missing": [key for key in report["missing_keys"] if not key.startswith(optional)],
        "has the wrong shape": [key for key, *_ in report["mismatched_keys"]],
        "is not finite": [key for key, weight in weights.items() if not bool(weight.isfinite().all())],
    }
    lines = [f"{key} {reason}" for reason, keys in wrong.items() for key in sorted(keys)]
    if lines:
        raise ConversionError(f"the weights of {name} cannot be used:\n  " + "\n  ".join(lines))
    return source.eval(), sorted(report["unexpected_keys"])


def vision_config(family: Family, source: PreTrainedConfig) -> IGCaptionerVisionConfig:
    """Our encoder with the source's architecture."""
    if not getattr(source, "qkv_bias", True):
        raise ConversionError("an encoder with qkv_bias=False is not supported")
    inner = getattr(source, "intermediate_size", None) or int(source.hidden_size * source.mlp_ratio)
    gated = getattr(source, "use_swiglu_ffn", False)
    if gated:  # DINOv2's giants keep two thirds, rounded up to a multiple of 8
        inner = (int(inner * 2 / 3) + 7) // 8 * 8
    return IGCaptionerVisionConfig(
        hidden_size=source.hidden_size,
        intermediate_size=inner,
        num_hidden_layers=source.num_hidden_layers,
        num_attention_heads=source.num_attention_heads,
        num_channels=source.num_channels,
        image_size=source.image_size,
        patch_size=source.patch_size,
        hidden_act="silu" if gated else source.hidden_act,
        gated_mlp=gated,
        norm_eps=source.layer_norm_eps,
        num_register_tokens=bool(family.class_token) + (getattr(source, "num_register_tokens", None) or 0),
        **family.fields,
    )


def translate(family: Family, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our encoder's weights. Raises ConversionError for one of the source's that is neither used nor dropped."""
    weights = {name: weight for name, weight in weights.items() if not name.startswith(family.dropped)}
    _fold_layer_scale(weights)
    positions = weights.pop(family.positions).flatten(0, -2)
    ours = {}
    if family.class_token:
        class_token = weights.pop(family.class_token).view(1, -1) + positions[:1]
        registers = weights.pop(REGISTERS)[0] if REGISTERS in weights else class_token[:0]
        ours["embeddings.register_tokens"] = torch.cat([class_token, registers])
        positions = positions[1:]
    ours["embeddings.position_embedding"] = positions
    for name, weight in weights.items():
        ours[_our_name(family, name)] = weight
    return ours


def _fold_layer_scale(weights: dict[str, Tensor]) -> None:
    last = "mlp.down_proj" if any(".mlp.down_proj." in name for name in weights) else "mlp.fc2"
    for scale, projection in (("layer_scale1.lambda1", "attention.o_proj"), ("layer_scale2.lambda1", last)):
        for name in [name for name in weights if name.endswith(scale)]:
            factor = weights.pop(name)
            target = name.replace(scale, projection)
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
def feature_difference(family: Family, source: PreTrainedModel, ours: IGCaptionerVisionModel) -> float:
    """Largest difference of patch features on noise images, relative to the largest feature."""
    size = as_height_width(ours.config.image_size, "image_size")
    images = torch.randn(2, ours.config.num_channels, *size, generator=torch.Generator().manual_seed(0))
    patches = ours.config.grid_size[0] * ours.config.grid_size[1]
    expected = source(pixel_values=images).last_hidden_state[:, -patches:]
    if family.unapplied_norm:
        expected = source.get_submodule(family.unapplied_norm)(expected)
    found = ours(pixel_values=images).last_hidden_state[:, :patches]
    return float((found - expected).abs().max() / expected.abs().max())


def load_as_it_is(encoder: str | Path) -> tuple[PreTrainedModel, Taken]:
    """The source's encoder. Raises ConversionError for one that cannot be used, and why."""
    try:
        model = load_encoder(encoder)
    except ValueError as error:
        raise ConversionError(str(error)) from error
    return model, Taken(str(encoder), sorted(model.state_dict()), [])


def load_converted(encoder: str | Path, family: Family) -> tuple[IGCaptionerVisionModel, Taken]:
    """Our encoder with the source's weights.

    Raises:
        ConversionError: an incomplete encoder, or features that differ from the source's.
    """
    source, beside = load_source(getattr(transformers, family.model), encoder, family.dropped)
    weights = source.state_dict()
    dropped = {name for name in weights if name.startswith(family.dropped)}
    ours = IGCaptionerVisionModel.from_config(vision_config(family, source.config)).eval()
    ours.load_state_dict(translate(family, weights), strict=True)
    difference = feature_difference(family, source, ours)
    if not difference < MAX_DIFFERENCE:
        raise ConversionError(f"features differ from the source's by {difference:.1e} of the largest one")
    return ours, Taken(str(encoder), sorted(weights.keys() - dropped), sorted(dropped) + beside, difference)


def resized(ours: IGCaptionerVisionModel, image_size: tuple[int, int]) -> IGCaptionerVisionModel:
    """The encoder with its positions resampled (linearly, corners aligned) for another image size."""
    config = IGCaptionerVisionConfig(**{**ours.config.to_dict(), "image_size": list(image_size)})
    weights = ours.state_dict()
    weights["embeddings.position_embedding"] = ours.embeddings.positions(config.grid_size).detach()
    larger = IGCaptionerVisionModel.from_config(config)
    larger.load_state_dict(weights, strict=True)
    return larger
