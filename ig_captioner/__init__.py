"""Image captioners as zero-shot classifiers that rank texts by information gain, `log P(T|I) - log P(T)`.

Importing the package registers its classes with the Auto classes of transformers, so that saved models load without
`trust_remote_code`. The files listed in `REMOTE_CODE_FILES` of `configuration_ig_captioner.py` also travel with each
checkpoint as remote code.
"""

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .installed import DEFAULT_CHECKPOINT, __version__


def _is_command_line() -> bool:
    """Tells whether Python was started as `ig-captioner` or `python -m ig_captioner.cli`.

    Its commands import what they need when they run, since torch and transformers take seconds.
    """
    program = getattr(sys, "argv", [""])[0]  # "-m" while Python looks for the module
    return Path(program).stem == "ig-captioner" or (program == "-m" and "ig_captioner.cli" in sys.orig_argv)


if TYPE_CHECKING:
    from .captioners import CaptionScorer, zero_shot_pipeline
if TYPE_CHECKING or not _is_command_line():
    from .api import (
        CompiledLabels,
        IGCaptionerConfig,
        IGCaptionerForConditionalGeneration,
        IGCaptionerForZeroShotImageClassification,
        IGCaptionerImageProcessor,
        IGCaptionerModel,
        IGCaptionerPreTrainedModel,
        IGCaptionerProcessor,
        IGCaptionerTextConfig,
        IGCaptionerVisionConfig,
        IGCaptionerVisionModel,
        IGCaptionerWarning,
        IGZeroShotImageClassificationPipeline,
        compile_labels,
        information_gain,
    )


def __getattr__(name: str) -> Any:
    """Loads a public name when it is first asked for: what scores captioners of the Hub; for the command line, all."""
    if name == "TINY_CHECKPOINT":
        warnings.warn("TINY_CHECKPOINT is called DEFAULT_CHECKPOINT now", DeprecationWarning, stacklevel=2)
        return DEFAULT_CHECKPOINT
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("CaptionScorer", "zero_shot_pipeline"):
        from . import captioners

        return getattr(captioners, name)
    from . import api

    globals()["information_gain"] = api.information_gain  # in place of the submodule of that name
    return getattr(api, name)


__all__ = [
    "DEFAULT_CHECKPOINT",
    "CaptionScorer",
    "CompiledLabels",
    "IGCaptionerConfig",
    "IGCaptionerForConditionalGeneration",
    "IGCaptionerForZeroShotImageClassification",
    "IGCaptionerImageProcessor",
    "IGCaptionerModel",
    "IGCaptionerPreTrainedModel",
    "IGCaptionerProcessor",
    "IGCaptionerTextConfig",
    "IGCaptionerVisionConfig",
    "IGCaptionerVisionModel",
    "IGCaptionerWarning",
    "IGZeroShotImageClassificationPipeline",
    "__version__",
    "compile_labels",
    "information_gain",
    "zero_shot_pipeline",
]
