"""Information gain for any captioner of the Hub: `CaptionScorer`. None of this travels with checkpoints.

Reading order: `prompts` (images and texts to tensors), `prefix` (image and prompt, read), `families` (what differs
from model to model), `readers` (texts after a prefix), `verification` (the choice of a reader, checked), `loading`,
`scorer`, `own`, `pipelines`.
"""

from .pipelines import zero_shot_pipeline
from .scorer import CaptionScorer, TokenGain
from .verification import Verification


__all__ = ["CaptionScorer", "TokenGain", "Verification", "zero_shot_pipeline"]
