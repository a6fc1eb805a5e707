"""The public names of the package; importing this registers its classes with the Auto classes of transformers.

The package's `__init__.py` imports this, but for the command line, whose commands import what they need.
"""

import transformers

from . import compat_ig_captioner  # noqa: F401 (before all others: it imports the noisy part of transformers quietly)
from .compiled_labels import CompiledLabels, compile_labels
from .configuration_ig_captioner import (
    IGCaptionerConfig,
    IGCaptionerTextConfig,
    IGCaptionerVisionConfig,
)
from .information_gain import information_gain
from .input_rules import IGCaptionerWarning
from .modeling_ig_captioner import (
    IGCaptionerForConditionalGeneration,
    IGCaptionerForZeroShotImageClassification,
    IGCaptionerModel,
    IGCaptionerPreTrainedModel,
    IGCaptionerVisionModel,
)
from .pipeline_ig_captioner import IGZeroShotImageClassificationPipeline
from .processing_ig_captioner import IGCaptionerImageProcessor, IGCaptionerProcessor


def register() -> None:
    """Makes the Auto classes of transformers load saved models with the classes of this package."""
    transformers.AutoConfig.register("ig_captioner", IGCaptionerConfig, exist_ok=True)
    transformers.AutoConfig.register("ig_captioner_vision_model", IGCaptionerVisionConfig, exist_ok=True)
    transformers.AutoModel.register(IGCaptionerConfig, IGCaptionerModel, exist_ok=True)
    transformers.AutoModel.register(IGCaptionerVisionConfig, IGCaptionerVisionModel, exist_ok=True)
    transformers.AutoModelForImageTextToText.register(
        IGCaptionerConfig, IGCaptionerForConditionalGeneration, exist_ok=True
    )
    transformers.AutoModelForZeroShotImageClassification.register(
        IGCaptionerConfig, IGCaptionerForZeroShotImageClassification, exist_ok=True
    )
    transformers.AutoProcessor.register(IGCaptionerConfig, IGCaptionerProcessor, exist_ok=True)
    transformers.AutoImageProcessor.register(
        IGCaptionerConfig,
        image_processor_classes={"pil": IGCaptionerImageProcessor, "torchvision": IGCaptionerImageProcessor},
        exist_ok=True,
    )


def _scorer_for(pipeline):
    from .captioners.pipelines import scorer_for

    return scorer_for(pipeline)


IGZeroShotImageClassificationPipeline.scorer_for = staticmethod(_scorer_for)

register()

__all__ = [
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
    "compile_labels",
    "information_gain",
]
