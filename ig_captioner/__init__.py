"""Image captioners as zero-shot classifiers that rank texts by information gain, `log P(T|I) - log P(T)`.

Importing the package registers its classes with the Auto classes of transformers, so that saved models load without
`trust_remote_code`. The files that end in `_ig_captioner.py`, and `information_gain.py`, also travel with each
checkpoint as remote code.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
)

from .compiled_labels import CompiledLabels, compile_labels
from .configuration_ig_captioner import (
    IGCaptionerConfig,
    IGCaptionerTextConfig,
    IGCaptionerVisionConfig,
)
from .information_gain import information_gain
from .input_rules import IGCaptionerWarning
from .installed import TINY_CHECKPOINT, __version__
from .modeling_ig_captioner import (
    IGCaptionerForConditionalGeneration,
    IGCaptionerForZeroShotImageClassification,
    IGCaptionerModel,
    IGCaptionerPreTrainedModel,
    IGCaptionerVisionModel,
)
from .pipeline_ig_captioner import IGZeroShotImageClassificationPipeline
from .processing_ig_captioner import IGCaptionerImageProcessor, IGCaptionerProcessor


AutoConfig.register("ig_captioner", IGCaptionerConfig, exist_ok=True)
AutoConfig.register("ig_captioner_vision_model", IGCaptionerVisionConfig, exist_ok=True)
AutoModel.register(IGCaptionerConfig, IGCaptionerModel, exist_ok=True)
AutoModel.register(IGCaptionerVisionConfig, IGCaptionerVisionModel, exist_ok=True)
AutoModelForImageTextToText.register(IGCaptionerConfig, IGCaptionerForConditionalGeneration, exist_ok=True)
AutoModelForZeroShotImageClassification.register(
    IGCaptionerConfig, IGCaptionerForZeroShotImageClassification, exist_ok=True
)
AutoProcessor.register(IGCaptionerConfig, IGCaptionerProcessor, exist_ok=True)
AutoImageProcessor.register(
    IGCaptionerConfig,
    image_processor_classes={"pil": IGCaptionerImageProcessor, "torchvision": IGCaptionerImageProcessor},
    exist_ok=True,
)


def __getattr__(name: str):
    """Loads what scores with captioners of the Hub when it is first asked for."""
    if name in ("CaptionScorer", "zero_shot_pipeline"):
        from . import captioners

        return getattr(captioners, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _scorer_for(pipeline):
    from .captioners.pipelines import scorer_for

    return scorer_for(pipeline)


IGZeroShotImageClassificationPipeline.scorer_for = staticmethod(_scorer_for)

__all__ = [
    "TINY_CHECKPOINT",
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
