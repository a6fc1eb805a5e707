"""The configuration of a big_vision Cap / CapPa: what its leaves tell, what only a user can, and whether both agree.

The leaves tell depths, widths, heads, patch size, vocabulary, text length, biases, and whether there is a mask token.
They do not tell the grid of an image that is not square, anything about fixed sine-cosine positions but their absence,
dropout, nor the end-of-sequence token. Padding and start token are 0 in upstream's code.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ig_captioner import IGCaptionerConfig
from ig_captioner.configuration_ig_captioner import as_height_width

from .key_map_big_vision import Structure
from .reading import ConversionError


PAD, START, EOS = 0, 0, 1  # upstream's code, upstream's code, the c4_en vocabulary
NORM_EPS = 1e-6  # Flax's default
# Fields of upstream's model that change no weight and no evaluation.
TRAINING_FIELDS = {"masking_ratio", "patch_dropout", "remat_policy", "scan", "input_seq_len"}
OUTER_FIELDS = {"model", "image_size", "pad_id", "eos_id", "bos_id_used_for_shift", "mask_token_id", "seed"}
OUTER_FIXED = {
    "encoder_ln_eps": NORM_EPS,
    "decoder_ln_eps": NORM_EPS,
    "activation": "gelu_tanh",
    "pixel_range": [-1, 1],
}


@dataclass
class Given:
    """Settings that a user states, from `--config` and options: upstream's model arguments, and what goes with them."""

    model: dict = field(default_factory=dict)
    image_size: tuple[int, int] | None = None
    eos_token_id: int | None = None
    outer: dict = field(default_factory=dict)


def read_given(config_file: str | Path | None, image_size: tuple[int, int] | None = None) -> Given:
    """Reads `--config`: JSON of upstream's `Model` arguments, or `{"model": those, "image_size": ..., "eos_id": ...}`.

    Raises:
        ConversionError: no JSON object, or image sizes that contradict each other.
    """
    content: dict = {}
    if config_file is not None:
        try:
            content = json.loads(Path(config_file).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConversionError(f"{config_file} is no JSON: {error}") from error
        if not isinstance(content, dict):
            raise ConversionError(f"{config_file} must hold a JSON object, got {type(content).__name__}")
    model = content.get("model", {key: value for key, value in content.items() if key not in OUTER_FIELDS})
    outer = {key: value for key, value in content.items() if key != "model"} if "model" in content else content
    stated = outer.get("image_size")
    if stated is not None:
        stated = (stated, stated) if isinstance(stated, int) else tuple(stated)
        if image_size not in (None, stated):
            raise ConversionError(f"image_size is {stated} in {config_file}, but {image_size} was asked for")
        image_size = stated
    return Given(model, image_size, outer.get("eos_id"), outer if "model" in content else {})


def infer_model(structure: Structure, sizes: dict[str, int]) -> dict:
    """Upstream's `Model` arguments, as far as leaves tell them."""
    mask_row = sizes["R"] - sizes["V"]
    if mask_row not in (0, 1):
        raise ConversionError(
            f"decoder/EmbedTargets/embedding has {sizes['R']} rows for a vocabulary of {sizes['V']} "
            "(decoder/LogitsDense): expected as many, or one more for the mask token"
        )
    for width, heads, size, side in (("E", "h", "d", "encoder"), ("D", "H", "G", "decoder")):
        if sizes[width] != sizes[heads] * sizes[size]:
            raise ConversionError(
                f"the {side} has {sizes[heads]} heads of {sizes[size]} at width {sizes[width]}: expected a product"
            )
    return {
        "patches": [sizes["p"], sizes["q"]],
        "emb_dim": sizes["E"],
        "mlp_dim": sizes["M"],
        "num_heads": sizes["h"],
        "num_layers": structure.encoder_layers,
        "decoder_emb_dim": sizes["D"],
        "decoder_mlp_dim": sizes["F"],
        "decoder_num_heads": sizes["H"],
        "decoder_num_layers": structure.decoder_layers,
        "decoder_bias": structure.decoder_bias,
        "vocab_size": sizes["V"],
        "seq_len": sizes.get("L"),
        "posemb_type": "learn" if structure.learned_positions else "sincos2d",
        "masked": bool(mask_row),
    }


def cross_check(inferred: dict, given: Given) -> list[str]:
    """Raises ConversionError listing every contradiction. Returns fields that could not be checked."""
    contradictions = []
    unchecked = []

    def check(name: str, stated, found) -> None:
        if stated != found:
            contradictions.append(f"{name} is {stated!r} in the config, but {found!r} in the checkpoint")

    for name, stated in given.model.items():
        if name == "masked_pred_prob":
            check("masked_pred_prob > 0", (stated or 0) > 0, inferred["masked"])
        elif name in inferred:
            encoder_field = name.removeprefix("decoder_")
            if name != encoder_field and name != "decoder_bias" and not stated:  # 0: as in the encoder
                stated = given.model.get(encoder_field, inferred[encoder_field])
            found = stated if inferred[name] is None else inferred[name]
            check(name, list(stated) if isinstance(stated, tuple) else stated, found)
        elif name not in TRAINING_FIELDS | {"enc_dropout_rate", "dec_dropout_rate"}:
            unchecked.append(name)
    for name, stated in given.outer.items():
        if name in OUTER_FIXED:
            check(name, stated, OUTER_FIXED[name])
        elif name == "mask_token_id":
            check(name, stated, inferred["vocab_size"] if inferred["masked"] else None)
        elif name in ("pad_id", "bos_id_used_for_shift"):
            check(name, stated, PAD)
        elif name not in OUTER_FIELDS:
            unchecked.append(name)
    if contradictions:
        raise ConversionError("the given config contradicts the checkpoint:\n  " + "\n  ".join(contradictions))
    return unchecked


def find_image_size(inferred: dict, patches: int | None, given: Given) -> tuple[int, int]:
    """Pixels (height, width). Raises ConversionError where only the user can know them, or they do not fit."""
    (patch_height, patch_width) = inferred["patches"]
    size = given.image_size
    if size is None:
        side = math.isqrt(patches or 0)
        if patches is None or side * side != patches:
            reason = "its positions are fixed" if patches is None else f"its {patches} patches are no square"
            raise ConversionError(
                f"the checkpoint does not tell the image size, because {reason}: give --image_size HEIGHT WIDTH"
            )
        return side * patch_height, side * patch_width
    rows = size[0] // patch_height
    columns = size[1] // patch_width
    if size[0] % patch_height or size[1] % patch_width or patches not in (None, rows * columns):
        known = "any number of" if patches is None else str(patches)
        raise ConversionError(
            f"an image of {size[0]} x {size[1]} pixels is {size[0] / patch_height:g} x {size[1] / patch_width:g} "
            f"patches of {patch_height} x {patch_width}, but the checkpoint has {known}"
        )
    return size


def find_text_length(inferred: dict, given: Given) -> int:
    """Text positions, `seq_len`, and with fixed positions the user's word for those."""
    if inferred["posemb_type"] == "learn":
        return inferred["seq_len"]
    if given.model.get("posemb_type") != "sincos2d" or not given.model.get("seq_len"):
        raise ConversionError(
            "the checkpoint has no position embeddings (encoder/pos_embedding, pos_embedding_decoder). If they are "
            "missing, it is incomplete; if they are fixed, say so, and how long texts are, with --config and "
            '{"posemb_type": "sincos2d", "seq_len": ...}'
        )
    return given.model["seq_len"]


def sincos_text_positions(length: int, width: int) -> np.ndarray:
    """[length, width] float32: upstream's fixed positions for a grid of one row, which its decoder reads."""
    omega = np.arange(width // 4, dtype=np.float32) / np.float32(width // 4 - 1)
    omega = np.float32(1) / np.power(np.float32(10_000), omega)
    angles = np.arange(length, dtype=np.float32)[:, None] * omega
    zeros = np.zeros_like(angles)
    return np.concatenate([np.sin(angles), np.cos(angles), zeros, zeros + 1], axis=1)


def build_config(inferred: dict, sizes: dict[str, int], given: Given, eos_token_id: int) -> IGCaptionerConfig:
    """The configuration of the converted model. Raises ConversionError where the user has to say more."""
    if sizes["C"] != 3:
        raise ConversionError(f"the checkpoint reads images of {sizes['C']} channels, expected 3 (RGB)")
    masking = given.model.get("masking_ratio", 1.0)
    return IGCaptionerConfig(
        vision_config=_vision_config(inferred, sizes, given),
        text_config=_text_config(inferred, given, eos_token_id),
        # the partial masking of upstream is not implemented here
        parallel_prediction_prob=(given.model.get("masked_pred_prob") or 0.0) if masking == 1.0 else 0.0,
        loss_reduction="sequence",
        # CapPa is not trained without an image: until it is tuned, log P(T) means nothing, and upstream ranks by P(T|I)
        prior_weight=0.0,
        tie_word_embeddings=False,
    )


def _vision_config(inferred: dict, sizes: dict[str, int], given: Given) -> dict:
    return {
        "hidden_size": inferred["emb_dim"],
        "intermediate_size": inferred["mlp_dim"],
        "num_hidden_layers": inferred["num_layers"],
        "num_attention_heads": inferred["num_heads"],
        "num_channels": sizes["C"],
        "image_size": _square(find_image_size(inferred, sizes.get("P"), given)),
        "patch_size": _square(inferred["patches"]),
        "position_embedding": "learned" if inferred["posemb_type"] == "learn" else "sincos2d",
        "norm_eps": NORM_EPS,
        "dropout": given.model.get("enc_dropout_rate") or 0.0,
    }


def _text_config(inferred: dict, given: Given, eos_token_id: int) -> dict:
    bias = inferred["decoder_bias"]
    dropout = given.model.get("dec_dropout_rate") or 0.0
    return {
        "vocab_size": inferred["vocab_size"],
        "hidden_size": inferred["decoder_emb_dim"],
        "intermediate_size": inferred["decoder_mlp_dim"],
        "num_hidden_layers": inferred["decoder_num_layers"],
        "num_attention_heads": inferred["decoder_num_heads"],
        "max_position_embeddings": find_text_length(inferred, given),
        "fusion": "cross_attention",
        "norm_eps": NORM_EPS,
        "norm_bias": bias,
        "mlp_bias": bias,
        "attention_bias": False,
        "head_bias": True,
        "dropout": dropout,
        "attention_dropout": dropout,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "decoder_start_token_id": START,
        "mask_token_id": inferred["vocab_size"] if inferred["masked"] else None,
    }


def _square(size) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)


def export_plan(config: IGCaptionerConfig, scan: bool) -> tuple[Structure, dict[str, int]]:
    """Structure and axes of the checkpoint that holds a model. Raises ConversionError if there can be none."""
    _check_exportable(config)
    vision = config.vision_config
    text = config.text_config
    layers = vision.num_hidden_layers, text.num_hidden_layers
    learned = vision.position_embedding == "learned"
    structure = Structure(*layers, scan, scan, decoder_bias=text.norm_bias, learned_positions=learned)
    patch = as_height_width(vision.patch_size, "patch_size")
    sizes = {"p": patch[0], "q": patch[1], "C": vision.num_channels, "P": math.prod(vision.grid_size)}
    sizes |= {"E": vision.hidden_size, "M": vision.intermediate_size, "h": vision.num_attention_heads}
    sizes |= {"D": text.hidden_size, "F": text.intermediate_size, "H": text.num_attention_heads}
    sizes |= {"L": text.max_position_embeddings, "R": text.num_embeddings, "V": text.vocab_size}
    return structure, {**sizes, "d": sizes["E"] // sizes["h"], "G": sizes["D"] // sizes["H"]}


def _check_exportable(config: IGCaptionerConfig) -> None:
    vision = config.vision_config
    text = config.text_config
    required = {
        "text_config.fusion": (text.fusion, "cross_attention"),
        "text_config.num_text_only_layers": (text.num_text_only_layers, 0),
        "text_config.position_embedding": (text.position_embedding, "learned"),
        "text_config.attention_bias": (text.attention_bias, False),
        "text_config.head_bias": (text.head_bias, True),
        "text_config.mlp_bias": (text.mlp_bias, text.norm_bias),
        "text_config.decoder_start_token_id": (text.decoder_start_token_id, START),
        "text_config.pad_token_id": (text.pad_token_id, PAD),
        "tie_word_embeddings": (config.tie_word_embeddings, False),
        "vision_config.num_register_tokens": (vision.num_register_tokens, 0),
        "vision_config.pre_norm": (vision.pre_norm, False),
    }
    for name, part in (("vision_config", vision), ("text_config", text)):
        fixed = {"norm": "layernorm", "norm_eps": NORM_EPS, "hidden_act": "gelu_pytorch_tanh", "gated_mlp": False}
        fixed |= {"norm_scale": True, "post_attention_norm": False, "mid_mlp_norm": False, "qk_norm": False}
        required |= {f"{name}.{key}": (getattr(part, key), value) for key, value in fixed.items()}
    if vision.position_embedding == "factorized":
        required["vision_config.position_embedding"] = ("factorized", "learned")
    for key in ("norm_bias", "patch_bias", "attention_bias", "mlp_bias"):
        required[f"vision_config.{key}"] = (getattr(vision, key), True)
    wrong = [f"{name} is {value!r}, not {wanted!r}" for name, (value, wanted) in required.items() if value != wanted]
    if wrong:
        raise ConversionError("big_vision's CapPa cannot hold this model:\n  " + "\n  ".join(wrong))
