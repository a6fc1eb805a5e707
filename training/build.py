"""From a training configuration to a model and its processor."""

import dataclasses
import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from ig_captioner.configuration_ig_captioner import (
    IGCaptionerConfig,
    IGCaptionerTextConfig,
    IGCaptionerVisionConfig,
)
from ig_captioner.encoders import image_processor_for, load_encoder, unused_parameters
from ig_captioner.modeling_ig_captioner import IGCaptionerForConditionalGeneration
from ig_captioner.processing_ig_captioner import IGCaptionerImageProcessor, IGCaptionerProcessor
from ig_captioner.vision_ig_captioner import is_frozen

from .augmentation import ImageSettings
from .config import TrainConfig, UsageError, flatten, set_nested


# What a run may change of a model that it starts from.
OBJECTIVE_FIELDS = (
    "conditional_weight",
    "unconditional_weight",
    "parallel_prediction_prob",
    "loss_reduction",
    "prior_weight",
    "prior_source",
)


def load_tokenizer(config: TrainConfig, checkpoint: Path | None = None) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a run.

    Raises:
        UsageError: there is none, or it has other tokens than the one that the checkpoint was trained with.
    """
    if not config.tokenizer:
        raise UsageError("tokenizer is not set: name a folder that `python -m training.train_tokenizer` has written")
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"tokenizer {config.tokenizer!r} cannot be loaded: {reason}") from error
    if checkpoint and AutoTokenizer.from_pretrained(checkpoint / "model").get_vocab() != tokenizer.get_vocab():
        raise UsageError(f"tokenizer {config.tokenizer!r} has other tokens than the one of {checkpoint}")
    return tokenizer


def build_model(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Path | None = None,
    changed: Sequence[str] = (),
) -> IGCaptionerForConditionalGeneration:
    """From a run's checkpoint, from `init_from`, or with random weights; parameters in float32.

    Args:
        changed: dotted keys of settings that are other than when the checkpoint was written.

    Raises:
        UsageError: for a `model` section that does not fit the tokenizer, the captions, or what `init_from` has fixed.
    """
    source: Path | str | None = checkpoint / "model" if checkpoint else config.init_from
    if source:
        model_config = IGCaptionerConfig.from_pretrained(source)
        if checkpoint:
            model_config = apply_changes(model_config, config, changed)
        else:
            model_config = checked_config(model_config.to_dict() | objective_of(config.model, model_config))
        model = IGCaptionerForConditionalGeneration.from_pretrained(
            source, config=model_config, dtype=torch.float32, attn_implementation=config.attn_implementation
        )
    else:
        encoder = load_encoder(config.encoder_from) if config.encoder_from else None
        model_config = build_model_config(config.model, tokenizer, encoder and encoder.config)
        model = IGCaptionerForConditionalGeneration.from_config(
            model_config, dtype=torch.float32, attn_implementation=config.attn_implementation
        )
        if encoder is not None:
            model.model.vision_model.load_state_dict(encoder.state_dict(), strict=True)
    longest = model.config.text_config.max_position_embeddings
    if config.data.max_length > longest:
        raise UsageError(f"data.max_length {config.data.max_length} is more than the model's {longest} positions")
    if len(tokenizer) > model.config.text_config.vocab_size:
        raise UsageError(f"the tokenizer has {len(tokenizer)} tokens, the model {model.config.text_config.vocab_size}")
    freeze(model, config.freeze)
    freeze_unused(model)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model


def objective_of(values: dict[str, Any], config: IGCaptionerConfig) -> dict[str, Any]:
    """The part of a `model` section that may change what `init_from` says; raises UsageError if another part would."""
    for name, value in values.items():
        if name not in OBJECTIVE_FIELDS:
            has = getattr(config, name, None)
            fields = value if isinstance(value, dict) else {name: value}
            for field, wanted in fields.items():
                found = getattr(has, field, None) if isinstance(value, dict) else has
                if found != wanted:
                    raise UsageError(f"model.{name}: {field} is {wanted!r}, but the model of init_from has {found!r}")
    return {name: value for name, value in values.items() if name in OBJECTIVE_FIELDS}


def apply_changes(saved: IGCaptionerConfig, config: TrainConfig, changed: Sequence[str]) -> IGCaptionerConfig:
    """The configuration of a checkpoint's model with the `model.*` settings that have changed.

    One that is no longer given gets the value that a new run would start with.
    """
    keys = [key.removeprefix("model.") for key in changed if key.startswith("model.")]
    if not keys:
        return saved
    fresh = IGCaptionerConfig.from_pretrained(config.init_from) if config.init_from else IGCaptionerConfig()
    given = flatten(config.model)
    defaults = flatten(fresh.to_dict())
    values = saved.to_dict()
    for key in keys:
        set_nested(values, key, given.get(key, defaults.get(key)))
    return checked_config(values)


def checked_config(values: dict[str, Any]) -> IGCaptionerConfig:
    """The model's configuration. Raises UsageError with the reason where it refuses a value."""
    try:
        return IGCaptionerConfig(**values)
    except (TypeError, ValueError) as error:
        raise UsageError(f"model: {' '.join(str(error).split())}") from error


def freeze(model: torch.nn.Module, patterns: list[str]) -> None:
    """Takes the parameters whose names match a pattern out of training.

    Raises:
        UsageError: a pattern matches no parameter, or nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        names = fnmatch.filter(parameters, pattern)
        if not names:
            raise UsageError(f"freeze: no parameter matches {pattern!r}; names are like {', '.join([*parameters][:3])}")
        for name in names:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise UsageError(f"freeze: {patterns} leave nothing to train")


def freeze_unused(model: IGCaptionerForConditionalGeneration) -> None:
    """Takes the parameters of the encoder out of training that no feature depends on."""
    encoder = model.model.vision_model
    if model.config.has_own_encoder or is_frozen(encoder):
        return
    for name in unused_parameters(encoder):
        encoder.get_parameter(name).requires_grad_(False)


def build_model_config(
    values: dict[str, Any], tokenizer: PreTrainedTokenizerBase, encoder: PreTrainedConfig | None = None
) -> IGCaptionerConfig:
    """The model's configuration; vocabulary size and special tokens are the tokenizer's unless given.

    Args:
        encoder: configuration of a pretrained encoder, in place of a `vision_config` among the `values`.
    """
    if encoder is not None:
        if values.get("vision_config"):
            raise UsageError(f"model.vision_config is that of encoder_from, but {values['vision_config']} were given")
        values = {**values, "vision_config": encoder}
    sections: dict[str, Any] = {"text_config": IGCaptionerTextConfig}
    vision = values.get("vision_config") or {}
    if isinstance(vision, dict) and "model_type" not in vision:  # those of transformers take any field
        sections["vision_config"] = IGCaptionerVisionConfig
    for prefix, config_class, keys in [("model", IGCaptionerConfig, values)] + [
        (f"model.{name}", sub_class, values.get(name) or {}) for name, sub_class in sections.items()
    ]:
        known = {item.name for item in dataclasses.fields(config_class)}
        for key in keys:
            if key not in known:
                raise UsageError(f"unknown key {prefix}.{key}; {config_class.__name__} has {', '.join(sorted(known))}")
    text = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "mask_token_id": tokenizer.mask_token_id,
        **(values.get("text_config") or {}),
    }
    return checked_config({**values, "text_config": text})


def build_processor(
    config: TrainConfig,
    model_config: IGCaptionerConfig,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Path | None = None,
) -> IGCaptionerProcessor:
    """The image processor of the checkpoint, of `init_from` or of `encoder_from`, whose encoder expects its pixel
    statistics, or the default one."""
    height, width = model_config.image_size
    size = {"height": height, "width": width}
    source = checkpoint / "model" if checkpoint else config.init_from
    if source:
        # others may have been trained on images of another size than their configuration says (DINOv2)
        options = {"size": size} if model_config.has_own_encoder else {}
        return IGCaptionerProcessor(IGCaptionerImageProcessor.from_pretrained(source, **options), tokenizer)
    if config.encoder_from:
        return IGCaptionerProcessor(image_processor_for(config.encoder_from), tokenizer)
    return IGCaptionerProcessor(IGCaptionerImageProcessor(size=size), tokenizer)


def image_settings(image_processor: IGCaptionerImageProcessor) -> ImageSettings:
    """Returns what an image processor does, for images that do not go through it one by one."""
    size = (image_processor.size["height"], image_processor.size["width"])
    statistics = tuple(image_processor.image_mean), tuple(image_processor.image_std)
    return ImageSettings(size, image_processor.resample, *statistics, image_processor.crop_pct)
