"""Facts of a captioner and of its prompt, told without reading its weights."""

from pathlib import Path

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from .families import Family, family_of
from .loading import auto_class_for, load_processors, why_refused


def describe_captioner(name: str | Path, prompt: str | None = None) -> dict[str, str]:
    """Family, prompt, reading mode and prior of a folder or repository, in words.

    Args:
        prompt: the instruction, if not the family's own.

    Raises:
        ValueError: saying why texts cannot be scored with it.
    """
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    described = {**config.to_dict(), "architectures": config.architectures}
    if reason := why_refused(described):
        raise ValueError(f"{str(name)!r} cannot be scored with: {reason}")
    with torch.device("meta"):
        model = auto_class_for(described).from_config(config)
    model.generation_config = _generation_config(name, model)
    family = family_of(model)
    instruction = family.prompt if prompt is None else prompt
    asked = family.prompt_class(model, load_processors(str(name)), instruction)
    return {
        "family": f"{config.model_type} ({type(model).__name__}), read as {type(family).__name__}",
        "prompt": repr(asked.context),
        "text_ends_with": str(asked.tokenizer.convert_ids_to_tokens(asked.end_token_id)),
        "reading_mode": f"{static_mode(family)}, if first use finds it right",
        "prior_source": family.prior_source,
    }


def static_mode(family: Family) -> str:
    """The reading mode that rules about the family allow; a prompt and its cache may forbid more."""
    return "tree" if family.no_tree is None and family.takes_positions else "rows"


def _generation_config(name: str | Path, model: PreTrainedModel) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(name)
    except OSError:
        return model.generation_config
