"""CLIP, SigLIP and their like from transformers, as baselines: cosines of images and texts.

Legend: B images, N texts, C classes, T templates, E width of the embeddings.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoProcessor

from ..data.samples import separate
from ..information_gain import mean_over_templates
from ..input_rules import format_labels
from .processes import map_batches


class ContrastiveModel:
    """A dual encoder with its processor. Scores are cosines: temperature and bias would not change a ranking."""

    def __init__(self, model: Any, processor: Any):
        """Raises ValueError for a model that does not embed images and texts."""
        if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
            raise ValueError(f"{type(model).__name__} is no dual encoder: it has no features of images and of texts")
        self.model = model.eval()
        self.processor = processor

    @classmethod
    def load(cls, name: str, device: torch.device | str = "cpu") -> "ContrastiveModel":
        """From a folder or a Hub repository, in float32. Pickled weights are refused."""
        model = AutoModel.from_pretrained(name, dtype="float32", use_safetensors=True)
        return cls(model.to(device), AutoProcessor.from_pretrained(name))

    def embed_images(self, images: Iterable[Image.Image], batch_size: int = 16) -> Tensor:
        """Unit vectors [B, E], float32 on the CPU.

        Raises:
            ValueError: for no images.
        """

        def embed(batch: list[Image.Image]) -> Tensor:
            inputs = self.processor(images=batch, return_tensors="pt").to(self.model.device)
            with torch.no_grad():
                return _unit(self.model.get_image_features(**inputs))

        parts = map_batches(embed, images, batch_size)
        if not parts:
            raise ValueError("no images to embed")
        return torch.cat(parts)

    def embed_texts(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """Unit vectors [N, E], float32 on the CPU; texts are cut to what the model can read."""
        # SigLIP was trained on texts padded to the full length, and reads others wrongly.
        padding = "max_length" if "siglip" in self.model.config.model_type else True
        longest = self.model.config.text_config.max_position_embeddings
        options = {"padding": padding, "truncation": True, "max_length": longest, "return_tensors": "pt"}

        def embed(batch: list[str]) -> Tensor:
            inputs = self.processor(text=batch, **options).to(self.model.device)
            with torch.no_grad():
                return _unit(self.model.get_text_features(**inputs))

        return torch.cat(map_batches(embed, texts, batch_size))

    def embed_classes(self, class_names: Sequence[str], templates: str | Sequence[str]) -> Tensor:
        """Unit vectors [C, E]: of each class the mean over templates, as in CLIP's evaluation."""
        texts = self.embed_texts(format_labels(list(class_names), templates))
        return F.normalize(mean_over_templates(texts.T, len(texts) // len(class_names)).T, dim=-1)

    def score_own_texts(self, questions: Iterable[tuple[Image.Image, list[str]]], batch_size: int = 16) -> list[Tensor]:
        """Cosines [K] of each image and its own texts."""
        images, texts = separate(questions)
        of_images = self.embed_images(images, batch_size)
        of_texts = self.embed_texts([text for own in texts for text in own]).split([len(own) for own in texts])
        return [own @ image for image, own in zip(of_images, of_texts, strict=True)]


def _unit(features: Any) -> Tensor:
    features = features if isinstance(features, Tensor) else features.pooler_output
    return F.normalize(features.float(), dim=-1).cpu()
