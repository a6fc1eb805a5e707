"""From a training configuration to a model and its processor."""

import dataclasses
import fnmatch
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ig_captioner.configuration_ig_captioner import (
    IGCaptionerConfig,
    IGCaptionerTextConfig,
    IGCaptionerVisionConfig,
    as_height_width,
)
from ig_captioner.modeling_ig_captioner import IGCaptionerForConditionalGeneration
from ig_captioner.processing_ig_captioner import IGCaptionerImageProcessor, IGCaptionerProcessor

from .augmentation import ImageSettings
from .config import TrainConfig


# What a run may change of a model that it starts from.
OBJECTIVE_FIELDS = (
    "conditional_weight",
    "unconditional_weight",
    "parallel_prediction_prob",
    "loss_reduction",
    "prior_weight",
    "prior_source",
)


def build_model(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, checkpoint: Path | None = None
) -> IGCaptionerForConditionalGeneration:
    """From a run's checkpoint, from `init_from`, or with random weights; parameters in float32.

    Raises:
        ValueError: for a `model` section that does not fit the tokenizer, the captions, or what `init_from` has fixed.
    """
    source: Path | str | None = checkpoint / "model" if checkpoint else config.init_from
    if source:
        changes = {} if checkpoint else objective_of(config.model, IGCaptionerConfig.from_pretrained(source))
        model = IGCaptionerForConditionalGeneration.from_pretrained(
            source, dtype=torch.float32, attn_implementation=config.attn_implementation, **changes
        )
    else:
        model_config = build_model_config(config.model, tokenizer)
        model = IGCaptionerForConditionalGeneration.from_config(
            model_config, dtype=torch.float32, attn_implementation=config.attn_implementation
        )
    longest = model.config.text_config.max_position_embeddings
    if config.data.max_length > longest:
        raise ValueError(f"data.max_length {config.data.max_length} is more than the model's {longest} positions")
    if len(tokenizer) > model.config.text_config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model {model.config.text_config.vocab_size}")
    freeze(model, config.freeze)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model


def objective_of(values: dict[str, Any], config: IGCaptionerConfig) -> dict[str, Any]:
    """The part of a `model` section that may change what `init_from` says; raises ValueError if another part would."""
    for name, value in values.items():
        if name not in OBJECTIVE_FIELDS:
            has = getattr(config, name, None)
            fields = value if isinstance(value, dict) else {name: value}
            for field, wanted in fields.items():
                found = getattr(has, field, None) if isinstance(value, dict) else has
                if found != wanted:
                    raise ValueError(f"model.{name}: {field} is {wanted!r}, but the model of init_from has {found!r}")
    return {name: value for name, value in values.items() if name in OBJECTIVE_FIELDS}


def freeze(model: torch.nn.Module, patterns: list[str]) -> None:
    """Takes the parameters whose names match a pattern out of training.

    Raises:
        ValueError: a pattern matches no parameter, or nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        names = fnmatch.filter(parameters, pattern)
        if not names:
            raise ValueError(f"freeze: no parameter matches {pattern!r}; names are like {', '.join([*parameters][:3])}")
        for name in names:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError(f"freeze: {patterns} leave nothing to train")


def build_model_config(values: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> IGCaptionerConfig:
    """The model's configuration; vocabulary size and special tokens are the tokenizer's unless given."""
    sections = {"vision_config": IGCaptionerVisionConfig, "text_config": IGCaptionerTextConfig}
    for prefix, config_class, keys in [("model", IGCaptionerConfig, values)] + [
        (f"model.{name}", sub_class, values.get(name) or {}) for name, sub_class in sections.items()
    ]:
        known = {item.name for item in dataclasses.fields(config_class)}
        for key in keys:
            if key not in known:
                raise ValueError(f"unknown key {prefix}.{key}; {config_class.__name__} has {', '.join(sorted(known))}")
    text = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "mask_token_id": tokenizer.mask_token_id,
        **(values.get("text_config") or {}),
    }
    return IGCaptionerConfig(**{**values, "text_config": text})


def build_processor(
    config: TrainConfig, model_config: IGCaptionerConfig, tokenizer: PreTrainedTokenizerBase
) -> IGCaptionerProcessor:
    """The image processor of `init_from`, whose encoder expects its pixel statistics, or the default one."""
    height, width = as_height_width(model_config.vision_config.image_size, "image_size")
    size = {"height": height, "width": width}
    if config.init_from:
        return IGCaptionerProcessor(IGCaptionerImageProcessor.from_pretrained(config.init_from, size=size), tokenizer)
    return IGCaptionerProcessor(IGCaptionerImageProcessor(size=size), tokenizer)


def image_settings(image_processor: IGCaptionerImageProcessor) -> ImageSettings:
    """What an image processor does, for images that are not to go through it one by one."""
    size = (image_processor.size["height"], image_processor.size["width"])
    statistics = tuple(image_processor.image_mean), tuple(image_processor.image_std)
    return ImageSettings(size, image_processor.resample, *statistics)
