"""Arguments of commands that describe a captioner: which one, how it is asked, where log P(T) comes from."""

import argparse
import os
from typing import Any

from ..checkpoint import choose_device, dtype_on
from ..data.folders import list_images
from .own import OwnCaptionScorer
from .scorer import CaptionScorer


PRIOR = ("prior_source", "reference_images", "reference_mean")


def load_scorer(arguments: argparse.Namespace) -> CaptionScorer | OwnCaptionScorer:
    """The captioner that `--model` names, of this package or any other, on its device."""
    device = choose_device(arguments.device)
    options = {"prompt": arguments.prompt, "trust_remote_code": arguments.trust_remote_code}
    dtype = dtype_on(device, getattr(arguments, "dtype", "auto"))
    return CaptionScorer.from_pretrained(arguments.model, device=device, dtype=dtype, **options)


def read_prior(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `compile_labels` of a scorer: those of `PRIOR` that were given, folders as their images."""
    given = {name: getattr(arguments, name) for name in PRIOR if getattr(arguments, name) is not None}
    if "reference_images" in given:
        names = given["reference_images"]
        given["reference_images"] = [
            photo for name in names for photo in (list_images(name) if os.path.isdir(name) else [name])
        ]
        if not given["reference_images"]:
            raise ValueError(f"no images in {names!r}")
    return given
