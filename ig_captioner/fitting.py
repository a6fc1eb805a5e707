"""Compares a checkpoint's configuration with the header of its weights, before anything of their size is made.

A configuration may say anything: sizes that the weights beside it do not have, or sizes for which building the model
takes minutes and all memory. The header of a safetensors file is small, and says what there really is.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_local_safetensors_metadata
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
from transformers import PreTrainedModel

from .configuration_ig_captioner import IGCaptionerConfig


Shapes = dict[str, tuple[int, ...]]

LARGEST_SIZE = 2**31  # of anything that a configuration counts
MOST_LABELS = 100_000  # transformers makes a name for each
MOST_REFERENCE_IMAGES = 4096
MOST_PATCHES = 2**18
COUNTS_LAYERS = re.compile(r"(^|_)(layers|depths?|num_blocks\w*|num_stages)$")
LAYER = re.compile(r"(.*\blayers)\.(\d+)\.")


def read_shapes(folder: Path) -> Shapes | None:
    """The shapes of the weights in a folder by their names; None if there is no readable safetensors file."""
    try:
        files = get_local_safetensors_metadata(folder).files_metadata.values()
    except (NotASafetensorsRepoError, SafetensorsParsingError, OSError):  # whoever reads the weights says so
        return None
    return {name: tuple(tensor.shape) for file in files for name, tensor in file.tensors.items()}


def check_sizes(described: Mapping[str, Any], num_weights: int) -> None:
    """Refuses sizes that no model with so many weights has.

    Args:
        described: the content of a config.json.
        num_weights: how many tensors there are.

    Raises:
        ValueError: naming the field and its value.
    """
    for field, value in _integers(described):
        name = field.rpartition(".")[2]
        if abs(value) >= LARGEST_SIZE:
            raise ValueError(f"{field} {value} is out of all bounds")
        if name == "num_labels" and value > MOST_LABELS:
            raise ValueError(f"{field} is {value}; {MOST_LABELS} at most make sense")
        if name == "num_reference_images" and value > MOST_REFERENCE_IMAGES:
            raise ValueError(f"{field} is {value}; {MOST_REFERENCE_IMAGES} at most make sense")
        if COUNTS_LAYERS.search(name) and value > num_weights:
            raise ValueError(f"{field} is {value}, but there are only {num_weights} weights")
    vision = described.get("vision_config")
    if isinstance(vision, Mapping):
        patches = math.prod(_side(vision.get("image_size"), 1)) // math.prod(_side(vision.get("patch_size"), 1))
        if patches > MOST_PATCHES:
            raise ValueError(
                f"vision_config.image_size {vision['image_size']} makes {patches} patches; {MOST_PATCHES} at most do"
            )


def _integers(described: Any, field: str = "") -> Iterator[tuple[str, int]]:
    """All integers of a configuration with the path of their field."""
    if isinstance(described, Mapping):
        for name, value in described.items():
            yield from _integers(value, f"{field}.{name}" if field else str(name))
    elif isinstance(described, list):
        for value in described:
            yield from _integers(value, field)
    elif isinstance(described, int) and not isinstance(described, bool):
        yield field, described


def _side(size: Any, default: int) -> list[int]:
    """Height and width of what a configuration calls a size, and the default for what is none."""
    sides = size if isinstance(size, list) else [size, size]
    is_size = len(sides) == 2 and all(isinstance(side, int) and side > 0 for side in sides)
    return sides if is_size else [default, default]


def check_shapes(model_class: type[PreTrainedModel], config: IGCaptionerConfig, found: Shapes) -> None:
    """Refuses weights of other shapes, or other numbers of layers, than a configuration gives its model.

    Raises:
        ValueError: naming weights, both shapes, and the fields that say so.
    """
    try:
        with torch.device("meta"):
            expected = {name: tuple(value.shape) for name, value in model_class(config).state_dict().items()}
    except (RuntimeError, OverflowError, TypeError) as error:
        raise ValueError(f"no model can be built as config.json says: {error}") from error
    problems = [
        f"{name} is {_form(found[name])} in the weights and {_form(shape)} by the configuration"
        f"{_fields_saying(set(shape) - set(found[name]), config)}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    layers = _numbers_of_layers(expected), _numbers_of_layers(found)
    problems += [
        f"{name} are {layers[1][name]} in the weights and {number} by the configuration"
        f"{_fields_saying({number}, config)}"
        for name, number in layers[0].items()
        if layers[1].get(name, number) != number
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError("; ".join(problems[:3]) + more)


def _form(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a single number"


def _numbers_of_layers(names: Mapping[str, Any]) -> dict[str, int]:
    """Counts the layers of each list of layers."""
    numbers: dict[str, int] = {}
    for name in names:
        if match := LAYER.match(name):
            numbers[match[1]] = max(numbers.get(match[1], 0), int(match[2]) + 1)
    return numbers


def _fields_saying(values: set[int], config: IGCaptionerConfig) -> str:
    """The fields of the sections that have one of these values, in brackets; "" if there are none."""
    fields = [
        f"{section}.{name} {value}"
        for section in ("vision_config", "text_config")
        for name, value in getattr(config, section).to_dict().items()
        if isinstance(value, int) and not isinstance(value, bool) and value in values
    ]
    return f" ({', '.join(fields)})" if fields else ""
