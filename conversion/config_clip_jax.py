"""The configuration of a clip-jax CapPa: upstream's `config.json`, checked against the leaves.

Unlike big_vision's, these leaves do not tell enough: norms without parameters, rotary positions, activations and
special tokens leave no trace in them. So `config.json` is required; what it does not mention has upstream's default.
"""

import json
import math
from pathlib import Path

from ig_captioner import IGCaptionerConfig

from .key_map_clip_jax import TEXT_AXES, VISION_AXES, Axes, Structure, Tower
from .reading import ConversionError


NORM_EPS = 1e-6  # Flax's default
ACTIVATIONS = {"gelu": "gelu_pytorch_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}
REQUIRED = ("hidden_size", "num_layers", "num_heads", "mlp_dim", "use_rmsnorm", "ln_type")
TEXT_REQUIRED = (*REQUIRED, "vocab_size", "max_length", "position_embedding_type")
VISION_REQUIRED = (*REQUIRED, "image_size", "patch_size")
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id")
DEFAULTS = {"activations": ["relu"], "normalize_qk": False, "use_bias": False, "force_scale": False}
DEFAULTS |= {"attention_dropout": 0.0, "mlp_dropout_rate": 0.0, "pool_type": None, "use_causal_mask": False}
TEXT_DEFAULTS = {**DEFAULTS, "masked_pred_prob": 0.75, "is_decoder": False}
VISION_DEFAULTS = {**DEFAULTS, "position_embedding_type": "sincos2d", "position_embedding_shape": [16, 16]}
VISION_DEFAULTS |= {"position_embedding_factorized": False, "registers": 0, "keep_registers": False}
# Fields that change no weight and no evaluation in float32.
NO_EFFECT = {"float32_logits", "dtype", "unroll", "remat_policy", "num_queries", "gradient_checkpointing"}
OUTER_NO_EFFECT = {"projection_dim", "logit_scale_init_value", "logit_bias_init_value", "dtype"}


def read_config(file: str | Path) -> tuple[dict, list[str]]:
    """`config.json` with upstream's defaults filled in, and what in it is not known here.

    Raises:
        ConversionError: no such configuration, or one of a model that is no CapPa or cannot be held.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        text = dict(content["text_config"])
        vision = dict(content["vision_config"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConversionError(f"{file} is no configuration of clip-jax: {error!r}") from error
    missing = [f"text_config.{key}" for key in TEXT_REQUIRED if key not in text]
    missing += [f"text_config.{key}" for key in TOKENS if text.get(key) is None]
    missing += [f"vision_config.{key}" for key in VISION_REQUIRED if key not in vision]
    if missing:
        raise ConversionError(f"{file} does not say {', '.join(missing)}")
    unknown = [f"text_config.{key}" for key in text.keys() - {*TEXT_REQUIRED, *TOKENS, *TEXT_DEFAULTS, *NO_EFFECT}]
    unknown += [f"vision_config.{key}" for key in vision.keys() - {*VISION_REQUIRED, *VISION_DEFAULTS, *NO_EFFECT}]
    unknown += list(content.keys() - {"text_config", "vision_config", *OUTER_NO_EFFECT})
    config = {"text": {**TEXT_DEFAULTS, **text}, "vision": {**VISION_DEFAULTS, **vision}}
    _check_supported(config["text"], config["vision"], str(file))
    return config, sorted(unknown)


def _check_supported(text: dict, vision: dict, file: str) -> None:
    wrong = []

    def check(name: str, value, *supported) -> None:
        if value not in supported:
            wrong.append(f"{name} is {value!r}, supported: {', '.join(map(repr, supported))}")

    check("text_config.is_decoder", text["is_decoder"], True)
    check("text_config.use_causal_mask", text["use_causal_mask"], True)
    check("vision_config.use_causal_mask", vision["use_causal_mask"], False)
    check("text_config.position_embedding_type", text["position_embedding_type"], "rotary", "learnt")
    check("vision_config.position_embedding_type", vision["position_embedding_type"], "learnt", "sincos2d")
    if vision["registers"]:
        check("vision_config.keep_registers", vision["keep_registers"], True)
    for name, tower in (("text_config", text), ("vision_config", vision)):
        check(f"{name}.pool_type", tower["pool_type"], None)
        check(f"{name}.ln_type", tower["ln_type"], "preln", "normformer")
        act, *gate = tower["activations"]
        check(f"{name}.activations[0]", act, *ACTIVATIONS)
        check(f"{name}.activations[1:]", gate, [], ["linear"])
    if wrong:
        raise ConversionError(f"{file} describes a model that cannot be converted:\n  " + "\n  ".join(wrong))


def find_structure(config: dict) -> Structure:
    """Leaves that the checkpoint has, from [`read_config`]."""
    text = config["text"]
    vision = config["vision"]
    kinds = {"learnt": "factorized" if vision["position_embedding_factorized"] else "learned"}
    positions = kinds.get(vision["position_embedding_type"], "sincos2d")
    return Structure(
        _tower(vision, positions, registers=bool(vision["registers"])),
        _tower(text, "learned" if text["position_embedding_type"] == "learnt" else "rotary"),
    )


def _tower(config: dict, positions: str, registers: bool = False) -> Tower:
    return Tower(
        layers=config["num_layers"],
        gated=len(config["activations"]) == 2,
        bias=config["use_bias"],
        rmsnorm=config["use_rmsnorm"],
        scale=config["force_scale"],
        normformer=config["ln_type"] == "normformer",
        qk_norm=config["normalize_qk"],
        positions=positions,
        registers=registers,
    )


def cross_check(config: dict, sizes: dict[str, int]) -> None:
    """Raises ConversionError listing every size in which the configuration and the leaves differ."""
    text = config["text"]
    vision = config["vision"]
    stated = {"vocab_size": (text["vocab_size"], sizes["V"])}
    stated["text_config.max_length"] = (text["max_length"], sizes.get("L", text["max_length"]))
    stated["vision_config.patch_size"] = (vision["patch_size"], sizes["p"])
    stated["vision_config.patch_size "] = (vision["patch_size"], sizes["q"])
    stated["vision_config.registers"] = (vision["registers"], sizes.get("N", 0))
    stated["the number of channels"] = (3, sizes["C"])
    towers: list[tuple[str, dict, Axes]] = [("text", text, TEXT_AXES), ("vision", vision, VISION_AXES)]
    for name, tower, axes in towers:
        stated[f"{name}_config.hidden_size"] = (tower["hidden_size"], sizes[axes.width])
        stated[f"{name}_config.num_heads"] = (tower["num_heads"], sizes[axes.heads])
        stated[f"{name}_config.mlp_dim"] = (tower["mlp_dim"], sizes[axes.mlp])
        stated[f"{name}_config: heads times their size"] = (tower["hidden_size"], sizes[axes.heads] * sizes[axes.size])
    wrong = [f"{k.strip()} is {a} in the config, but {b} in the checkpoint" for k, (a, b) in stated.items() if a != b]
    if wrong:
        raise ConversionError("the given config contradicts the checkpoint:\n  " + "\n  ".join(wrong))


def find_grid(config: dict, sizes: dict[str, int], image_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the position table: stated, or those of an image, or a square.

    Upstream resamples the table, linearly with aligned ends, where an image has another grid; so does the model.

    Raises:
        ConversionError: the positions are not as many as stated, or nothing tells their grid.
    """
    vision = config["vision"]
    if any(side % vision["patch_size"] for side in image_size):
        raise ConversionError(f"an image of {image_size} pixels is not made of patches of {vision['patch_size']}")
    of_image = (image_size[0] // vision["patch_size"], image_size[1] // vision["patch_size"])
    if "P" not in sizes:
        grid = (sizes["Y"], sizes["X"]) if "Y" in sizes else of_image
    else:
        side = math.isqrt(sizes["P"])
        grid = of_image if math.prod(of_image) == sizes["P"] else (side, side)
    stated = vision["position_embedding_shape"]
    if stated is not None and vision["position_embedding_type"] == "learnt":
        expected = (math.prod(stated),) if "P" in sizes else tuple(stated)
        found = (sizes["P"],) if "P" in sizes else grid
        if expected != found:
            raise ConversionError(
                f"vision_config.position_embedding_shape is {stated} in the config, but the checkpoint has "
                f"{' and '.join(map(str, found))} positions"
            )
        return stated[0], stated[1]
    if math.prod(grid) != sizes.get("P", math.prod(grid)):
        raise ConversionError(
            f"the checkpoint has {sizes['P']} positions, which are neither a square nor those of an image of "
            f"{image_size[0]} x {image_size[1]} pixels: state vision_config.position_embedding_shape"
        )
    return grid


def build_config(config: dict, structure: Structure, sizes: dict[str, int], grid: tuple[int, int]) -> IGCaptionerConfig:
    """The configuration of the converted model."""
    text = config["text"]
    vision = config["vision"]
    height = grid[0] * vision["patch_size"]
    width = grid[1] * vision["patch_size"]
    vision_config = {
        **_tower_config(vision, structure.vision),
        "image_size": height if height == width else [height, width],
        "patch_size": vision["patch_size"],
        "patch_bias": structure.vision.bias,
        "num_register_tokens": vision["registers"],
    }
    text_config = {
        **_tower_config(text, structure.text),
        "vocab_size": text["vocab_size"],
        "max_position_embeddings": text["max_length"],
        "fusion": "cross_attention",
        "head_bias": True,
        "decoder_start_token_id": text["bos_token_id"],
        **{name: text[name] for name in TOKENS},
    }
    return IGCaptionerConfig(
        vision_config=vision_config,
        text_config=text_config,
        parallel_prediction_prob=text["masked_pred_prob"],
        loss_reduction="sequence",
        # not trained without an image: until it is tuned, log P(T) means nothing
        prior_weight=0.0,
        tie_word_embeddings=False,
    )


def _tower_config(config: dict, tower: Tower) -> dict:
    """Fields that both towers share."""
    return {
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["mlp_dim"],
        "num_hidden_layers": tower.layers,
        "num_attention_heads": config["num_heads"],
        "position_embedding": tower.positions,
        "hidden_act": ACTIVATIONS[config["activations"][0]],
        "gated_mlp": tower.gated,
        "norm": "rmsnorm" if tower.rmsnorm else "layernorm",
        "norm_eps": NORM_EPS,
        "norm_bias": tower.norm_bias,
        "norm_scale": tower.norm_scale,
        "post_attention_norm": tower.normformer,
        "mid_mlp_norm": tower.normformer,
        "qk_norm": tower.qk_norm,
        "attention_bias": tower.bias,
        "mlp_bias": tower.bias,
        "attention_dropout": config["attention_dropout"],
    }
