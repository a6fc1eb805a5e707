"""This package's own captioners behind the interface of `CaptionScorer`; their `score` is exact by construction."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .. import IGCaptionerForConditionalGeneration
from ..information_gain import information_gain, token_means_over_references
from ..label_trie import CompiledLabels, compile_labels, is_compiled
from ..processing_ig_captioner import DEFAULT_TEMPLATE
from ..release import load_model, load_processor
from ..scoring_ig_captioner import IGCaptionerScoreOutput
from .scorer import MAX_CAPTION_TOKENS, CaptionScorer, TokenGain, as_images
from .verification import Verification


class OwnCaptionScorer(CaptionScorer):
    """A captioner that was trained with and without images: no prompt, and log P(T) without an image."""

    def __init__(self, model: IGCaptionerForConditionalGeneration, processor: Any, batch_size: int = 8):
        self.model, self.processor, self.batch_size = model, processor, batch_size
        self.default_prior_source = model.config.prior_source
        self.default_prior_weight = model.config.prior_weight
        self.verification = Verification("tree")

    @classmethod
    def load(cls, name: str | Path, *, device: Any = None, batch_size: int = 8, **kwargs: Any) -> "OwnCaptionScorer":
        """Reads a folder or repository; `kwargs` are for the model's `from_pretrained`."""
        model = load_model(IGCaptionerForConditionalGeneration, name, **kwargs)
        if device is not None:
            model.to(device)
        return cls(model, load_processor(name), batch_size)
