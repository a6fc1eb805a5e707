"""Everything this package uses of transformers that transformers does not document as public, in one place.

A new release of transformers that moves or renames something has to be answered here, and nowhere else.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import wraps
from typing import Any


@contextmanager
def only_errors(*loggers: str) -> Iterator[None]:
    """Keeps what these loggers say below the level ERROR from being printed."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


# transformers imports torchao wherever it is installed, which reports every library that does not fit the machine.
with only_errors("torchao", "torch.utils._pytree"):
    from transformers import PreTrainedConfig, PreTrainedModel

    # Fills parameters, but leaves alone those that `from_pretrained` has loaded.
    from transformers import initialization as init
    from transformers.modeling_outputs import BaseModelOutputWithPast
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # Decorators of `forward` that every model in transformers wears: arguments that are not given come from the config,
    # and `output_hidden_states` and `output_attentions` are served by hooks.
    from transformers.utils.generic import merge_with_config_defaults
    from transformers.utils.output_capturing import OutputRecorder, capture_outputs


# What transformers calls the cache of keys and values, as an argument of `forward` and as a field of its output:
# `past_key_values` up to 5.23, `cache` from 5.24 on.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"


CACHE_NAMES = ("cache", "past_key_values")


def rename_cache(arguments: dict[str, Any], name: str) -> dict[str, Any]:
    """The named `arguments` of a call, with the cache under `name`, whichever of its two names it was given by."""
    renamed = {key: value for key, value in arguments.items() if key not in CACHE_NAMES}
    given = [arguments[key] for key in CACHE_NAMES if arguments.get(key) is not None]
    if len(given) > 1:
        raise ValueError("cache and past_key_values are two names of one argument, but both were given")
    if given:
        renamed[name] = given[0]
    return renamed


def accepts_both_cache_names(forward: Callable) -> Callable:
    """Wraps a `forward` with an argument `cache` so that it takes `past_key_values` as well."""

    @wraps(forward)
    def forward_with_either_name(self, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **rename_cache(kwargs, "cache"))

    return forward_with_either_name


def build_from_config(model_class: type[PreTrainedModel], config: PreTrainedConfig, **kwargs: Any) -> Any:
    """Builds a `model_class` with random weights. `kwargs` are `dtype` and `attn_implementation`, as in AutoModel's."""
    return model_class._from_config(config, **kwargs)


def attention_implementation(config: PreTrainedConfig) -> str:
    """Name of the attention function that a model with `config` uses: "eager", "sdpa", ..."""
    return config._attn_implementation


def attention_function(name: str, eager: Callable) -> Callable:
    """The attention function registered under `name`, or `eager` for "eager". Raises KeyError for unknown names."""
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)


__all__ = [
    "CACHE_NAME",
    "OutputRecorder",
    "accepts_both_cache_names",
    "attention_function",
    "attention_implementation",
    "build_from_config",
    "capture_outputs",
    "init",
    "merge_with_config_defaults",
    "rename_cache",
]
