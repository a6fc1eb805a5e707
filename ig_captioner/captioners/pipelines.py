"""The zero-shot pipeline for any captioner: one call, and what to do when transformers has loaded the wrong class."""

from pathlib import Path
from typing import Any

import torch
from transformers import Pipeline
from transformers.utils import logging

from ..pipeline_ig_captioner import IGZeroShotImageClassificationPipeline
from .loading import load_processors, why_refused
from .own import OwnCaptionScorer
from .prompts import Processors
from .scorer import CaptionScorer


logger = logging.get_logger(__name__)

TASK = "zero-shot-image-classification"
# Arguments of `CaptionScorer.from_pretrained`; all others are for the pipeline.
LOADING = (
    *("prompt", "dtype", "reading_mode", "trust_remote_code", "device_map", "quantization_config"),
    *("attn_implementation", "revision", "token", "cache_dir", "local_files_only"),
)


def zero_shot_pipeline(
    model: str | Path | CaptionScorer, *, device: str | int | torch.device | None = None, **kwargs: Any
) -> IGZeroShotImageClassificationPipeline:
    """The zero-shot pipeline of any captioner, this package's own and those of the Hub.

    Args:
        model: a folder, the name of a repository on the Hub, or a scorer.
        device: where the model goes.
        kwargs: `prompt`, `dtype`, `trust_remote_code` and so on for `CaptionScorer.from_pretrained`; the others are
            defaults for calls of the pipeline, such as `candidate_labels` or `prior_weight`.

    Raises:
        ValueError: saying why this model cannot be scored with.
    """
    loading = {name: kwargs.pop(name) for name in LOADING if name in kwargs}
    if isinstance(model, CaptionScorer):
        if loading:
            raise ValueError(f"the model is loaded already, but {next(iter(loading))} came with it")
        scorer = model
    else:
        scorer = CaptionScorer.from_pretrained(model, **loading)
    if device is not None:
        kwargs["device"] = device
    elif getattr(scorer.model, "hf_device_map", None) is None:
        kwargs["device"] = scorer.model.device
    if isinstance(scorer, OwnCaptionScorer):
        parts = {"tokenizer": scorer.processor.tokenizer, "image_processor": scorer.processor.image_processor}
        return IGZeroShotImageClassificationPipeline(model=scorer.model, task=TASK, **parts, **kwargs)
    parts = {"tokenizer": scorer.processors.tokenizer, "image_processor": scorer.processors.image_processor}
    return IGZeroShotImageClassificationPipeline(model=scorer.model, task=TASK, scorer=scorer, **parts, **kwargs)


def scorer_for(pipeline: Pipeline) -> CaptionScorer:
    """Makes the scorer of a pipeline whose model has no `score`.

    `pipeline("zero-shot-image-classification", model=<a BLIP captioner>)` loads a BlipModel, whose text tower is not in
    the checkpoint: random weights, and scores without meaning. Such a model is replaced by the one that was saved.

    Raises:
        ValueError: saying why the model cannot be scored with.
    """
    model = pipeline.model
    name = model.name_or_path
    is_trusted = type(model).__module__.startswith("transformers_modules")
    saved = (model.config.architectures or [type(model).__name__])[0]
    if reason := why_refused({**model.config.to_dict(), "architectures": [saved]}, trust_remote_code=is_trusted):
        raise ValueError(f"a {saved} cannot be scored with: {reason}")
    if saved != type(model).__name__:
        if not name:
            raise ValueError(
                f"this {type(model).__name__} comes from the checkpoint of a {saved}, and its weights may be random: "
                "load it with ig_captioner.zero_shot_pipeline(...)"
            )
        logger.warning(f"{name} holds a {saved}, but a {type(model).__name__} was loaded: loading the right class")
        return CaptionScorer.from_pretrained(name, device=pipeline.device, dtype=model.dtype)
    if pipeline.processor is not None:
        processors = Processors(pipeline.tokenizer, pipeline.image_processor, pipeline.processor)
    elif name:
        processors = load_processors(name, trust_remote_code=is_trusted)
    else:
        processors = Processors(pipeline.tokenizer, pipeline.image_processor)
    return CaptionScorer(model.eval(), processors)
