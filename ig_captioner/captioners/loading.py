"""Loads a captioner and its processors, or says why this package cannot score with it.

Nothing here runs code from a checkpoint unless `trust_remote_code=True` asks for it, and pickled weights are refused.
"""

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..input_rules import tell
from .prompts import Processors


# Classes that AutoModelForImageTextToText loads but whose texts have no log P, token after token.
NOT_AUTOREGRESSIVE = {
    "diffusion_gemma": "it writes blocks of text by diffusion, not one token after the other",
    "evolla": "it reads proteins, not images",
    "instructblipvideo": "it reads videos, not images",
    "pi0": "it writes the actions of a robot, not text",
    "udop": "it reads words and their boxes beside the image",
}
# Captioners that transformers files under causal language models.
CAUSAL_CAPTIONERS = ("phi4_multimodal",)


def load_captioner(
    name: str | Path,
    *,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> tuple[PreTrainedModel, Processors]:
    """A captioner in evaluation mode, and its processors.

    Args:
        name: a folder, or the name of a repository on the Hub.
        device: where the model goes; not together with `device_map`.
        trust_remote_code: lets code from the repository run, for models that transformers does not know.
        kwargs: for `from_pretrained`, such as `dtype`, `device_map`, `quantization_config` or `revision`.

    Raises:
        ValueError: saying why this model cannot be scored with, or that its weights do not fill it.
        OSError: no such folder or repository.
    """
    if device is not None and kwargs.get("device_map") is not None:
        raise ValueError(f"device {device!r} and device_map {kwargs['device_map']!r} were both given")
    name = os.fspath(name)
    hub = hub_options(kwargs)
    described = PreTrainedConfig.get_config_dict(name, **hub)[0]
    if not described:
        raise OSError(f"there is no model in {name!r}: it has no config.json")
    if reason := why_refused(described, trust_remote_code):
        raise ValueError(f"{name!r} cannot be scored with: {reason}")
    auto_class = auto_class_for(described)
    model = _load_weights(auto_class, name, trust_remote_code, **kwargs)
    if device is not None:
        model.to(device)
    return model.eval(), load_processors(name, trust_remote_code=trust_remote_code, **hub)


def hub_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those arguments that say where files come from."""
    return {name: kwargs[name] for name in ("revision", "token", "cache_dir", "local_files_only") if name in kwargs}


def why_refused(config: dict[str, Any], trust_remote_code: bool = False) -> str | None:
    """Why a model with this `config.json` cannot be scored with, or None."""
    model_type = config.get("model_type")
    if model_type in NOT_AUTOREGRESSIVE:
        return f"{model_type} models do not fit: {NOT_AUTOREGRESSIVE[model_type]}"
    if model_type not in CONFIG_MAPPING:
        if not config.get("auto_map"):
            return f"transformers {transformers.__version__} knows no model of type {model_type!r}"
        if not trust_remote_code:
            return (
                f"models of type {model_type!r} bring their own code; if you have read it and trust it, "
                "pass trust_remote_code=True (--trust-remote-code)"
            )
        return None
    config_class = CONFIG_MAPPING[model_type]
    if config_class in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return _why_wrong_class(config, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[config_class].__name__)
    if model_type in CAUSAL_CAPTIONERS:
        return None
    if config_class in MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING:
        return (
            f"{model_type} models compare images and texts but write none; use transformers' own pipeline, "
            "pipeline('zero-shot-image-classification', model=...)"
        )
    if config_class in MODEL_FOR_CAUSAL_LM_MAPPING:
        return f"{model_type} models read no images"
    return f"{model_type} models do not write texts about images"


def _why_wrong_class(config: dict[str, Any], expected: str) -> str | None:
    """Another head was saved: its text decoder is missing or was trained for something else."""
    saved = (config.get("architectures") or [expected])[0]
    saved_class = getattr(transformers, saved, None)
    if saved == expected or saved_class is None:
        return None
    if saved_class.can_generate():
        return f"it is a {saved}, not a {expected}"
    return f"it is a {saved}, which compares images and texts but writes none, not a {expected}"


def auto_class_for(config: dict[str, Any]) -> Any:
    """The Auto class under which transformers, or the repository's own code, files a captioner."""
    model_type = config.get("model_type")
    own_code = config.get("auto_map") or {}
    if model_type in CAUSAL_CAPTIONERS:
        return AutoModelForCausalLM
    if model_type not in CONFIG_MAPPING and "AutoModelForImageTextToText" not in own_code:
        return AutoModelForCausalLM
    return AutoModelForImageTextToText


def _load_weights(auto_class: Any, name: str, trust_remote_code: bool, **kwargs: Any) -> PreTrainedModel:
    arguments = {"dtype": "auto", **kwargs, "use_safetensors": True, "output_loading_info": True}
    try:
        model, report = auto_class.from_pretrained(name, trust_remote_code=trust_remote_code, **arguments)
    except OSError as error:
        if "safetensors" not in str(error):
            raise
        raise ValueError(
            f"{name!r} has no weights in safetensors; pickled ones are refused, because unpickling runs code: {error}"
        ) from error
    missing = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if missing:
        raise ValueError(
            f"the weights of {name!r} do not fill a {type(model).__name__}: {', '.join(missing[:3])} "
            f"({len(missing)} in all) would be random"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        tell(f"{name!r} holds an adapter, so that {model.name_or_path!r}, which it names, was loaded with it")
    return model


def load_processors(name: str, **kwargs: Any) -> Processors:
    """Processor, tokenizer and image processor of a checkpoint; old ones have no processor."""
    try:
        processor = AutoProcessor.from_pretrained(name, **kwargs)
    except (OSError, ValueError):
        processor = None
    if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
        tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
        return Processors(tokenizer, AutoImageProcessor.from_pretrained(name, **kwargs))
    return Processors(processor.tokenizer, processor.image_processor, processor)
