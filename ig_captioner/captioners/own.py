"""This package's own captioners with the interface of `CaptionScorer`; their `score` is exact by construction."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..checkpoint import caption_tokens, load_model, load_processor
from ..compiled_labels import CompiledLabels, compile_labels, encode_for
from ..information_gain import information_gain, token_means_over_references
from ..input_rules import default_templates
from ..modeling_ig_captioner import IGCaptionerForConditionalGeneration
from ..scoring_ig_captioner import IGCaptionerScoreOutput
from .prompts import PreparedImage
from .scorer import CaptionScorer, TextTokens, TokenGain, as_compiled, as_images, text_tokens
from .verification import Verification


class OwnCaptionScorer(CaptionScorer):
    """A captioner of this package: trained with and without images, so it has no prompt and its own log P(T)."""

    def __init__(self, model: IGCaptionerForConditionalGeneration, processor: Any):
        self.model = model
        self.processor = processor
        self.default_prior_source = model.config.prior_source
        self.default_prior_weight = model.config.prior_weight
        self.default_templates = default_templates(model.config)
        self.verification = Verification("tree")
        self._last_verified: tuple[CompiledLabels, CompiledLabels] | None = None

    @classmethod
    def load(cls, name: str | Path, *, device: Any = None, **kwargs: Any) -> "OwnCaptionScorer":
        """Reads a folder or repository; `kwargs` are for the model's `from_pretrained`."""
        model = load_model(IGCaptionerForConditionalGeneration, name, **kwargs)
        return cls(model if device is None else model.to(device), load_processor(name))

    def score(
        self,
        images: Any,
        texts: Sequence[str] | CompiledLabels,
        *,
        reference_images: Sequence[Any] | None = None,
        **options: Any,
    ) -> IGCaptionerScoreOutput:
        """As `CaptionScorer.score`; a float tensor [B, channels, height, width] is taken for `pixel_values`."""
        if reference_images is not None:
            options["reference_pixel_values"] = self._pixels(reference_images)
        labels = as_compiled(texts)
        given: dict[str, Any] = {"input_ids": self._verified(labels)} if labels is not None else self._encode(texts)
        with torch.no_grad():
            scores = self.model.score(self._pixels(images), **given, **options)
        return IGCaptionerScoreOutput(*(values.cpu() for values in scores.to_tuple()))

    @torch.no_grad()
    def log_likelihoods(self, images: Any, texts: Sequence[str]) -> Tensor:
        """As `CaptionScorer.log_likelihoods`."""
        return self.model.score(self._pixels(images), **self._encode(texts)).caption_log_likelihood.cpu()

    def _encode(self, texts: Any) -> dict[str, Tensor]:
        if not texts:
            raise ValueError("there must be at least one text, got an empty list")
        return encode_for(self.model, self.processor.tokenizer, list(texts))

    def _verified(self, labels: CompiledLabels) -> CompiledLabels:
        """Labels compared with model and tokenizer; once, as long as the same are scored."""
        if self._last_verified is None or self._last_verified[0] is not labels:
            labels.check_tokenizer(self.model, self.processor.tokenizer)
            texts = labels.texts.verified_for(self.model).to(self.model.device)
            self._last_verified = labels, replace(labels, texts=texts)
        return self._last_verified[1]

    def compile_labels(
        self,
        labels: Sequence[str],
        templates: str | Sequence[str] | None = None,
        *,
        reference_images: Sequence[Any] | None = None,
        **options: Any,
    ) -> CompiledLabels:
        """As `CaptionScorer.compile_labels`."""
        if reference_images is not None:
            options["reference_pixel_values"] = self._pixels(reference_images)
        templates = self.default_templates if templates is None else templates
        return compile_labels(self.model, self.processor.tokenizer, list(labels), templates, **options)

    @torch.no_grad()
    def tokens_of_texts(self, image: Any, texts: Sequence[str]) -> list[TextTokens]:
        """As `CaptionScorer.tokens_of_texts`, without an image for log P(token)."""
        compiled = self.model.compile_texts(**self._encode(texts), with_fingerprint=False)
        caption = self.model.edge_log_likelihoods(compiled, self._pixels(image))[0].cpu()
        return text_tokens(compiled.trie, caption, self.model.edge_log_likelihoods(compiled).cpu())

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Makes tokens of texts, and texts of tokens."""
        return self.processor.tokenizer

    @torch.no_grad()
    def token_gains(
        self, image: Any, text: str, *, prior_weight: float | None = None, **options: Any
    ) -> list[TokenGain]:
        """As `CaptionScorer.token_gains`; log P(token) without an image unless there are `reference_images`."""
        references = options.pop("reference_images", None)
        mean = options.pop("reference_mean", "arithmetic")
        if options:
            raise ValueError(f"unknown arguments {sorted(options)} with values {list(options.values())}")
        texts = compile_labels(self.model, self.processor.tokenizer, [text], "{}").texts
        path = texts.trie.text_edges[0]
        caption = self.model.edge_log_likelihoods(texts, self._pixels(image))[0, path].cpu()
        seen = None if references is None else self._pixels(references)
        without = self.model.edge_log_likelihoods(texts, seen)[:, path].cpu()
        prior = token_means_over_references(without, mean)
        gains = information_gain(caption, prior, self.default_prior_weight if prior_weight is None else prior_weight)
        words = [self.processor.tokenizer.decode([token]) for token in texts.trie.edge_tokens[path].tolist()]
        columns = (caption.tolist(), prior.tolist(), gains.tolist())
        return [TokenGain(*row) for row in zip(words, *columns, strict=True)]

    def caption(self, images: Any, max_new_tokens: int | None = None, **options: Any) -> list[str]:
        """As `CaptionScorer.caption`, all images at once."""
        limit = caption_tokens(max_new_tokens, self.model.config.text_config)
        written = self.model.generate(pixel_values=self._pixels(images), max_new_tokens=limit, **options)
        return [text.strip() for text in self.processor.batch_decode(written, skip_special_tokens=True)]

    def prepare(self, image: Image.Image) -> Tensor:
        """`pixel_values` [1, channels, height, width]: a photo is large."""
        return read_pixels(self.processor.image_processor, image)["pixel_values"]

    def preparer(self) -> Callable[[Image.Image], PreparedImage]:
        """As `CaptionScorer.preparer`."""
        return partial(read_pixels, self.processor.image_processor)

    def _pixels(self, images: Any) -> Tensor:
        """`pixel_values` [B, channels, height, width] on the model's device, of its dtype."""
        if isinstance(images, list):
            images = [image["pixel_values"] if isinstance(image, PreparedImage) else image for image in images]
        if isinstance(images, list) and images and all(map(_are_pixels, images)):
            images = torch.cat(images)
        if not _are_pixels(images):
            images = self.processor.image_processor(images=list(as_images(images)), return_tensors="pt")["pixel_values"]
        return images.to(self.model.device, self.model.dtype)

    def fingerprint(self) -> str:
        """The model's own."""
        return self.model.fingerprint()

    def describe(self) -> dict[str, str]:
        """Family, prompt, reading mode and prior, in words."""
        return {
            "family": f"{self.model.config.model_type}, this package's own",
            "prompt": "none",
            "reading mode": "tree, exact by construction",
            "prior": self.default_prior_source,
        }


def read_pixels(image_processor: Any, image: Image.Image) -> PreparedImage:
    """`pixel_values` [1, channels, height, width] of an RGB image."""
    return PreparedImage(image_processor(images=[image], return_tensors="pt"))


def _are_pixels(images: Any) -> bool:
    return isinstance(images, Tensor) and images.ndim == 4 and images.is_floating_point()


CaptionScorer.own_class = OwnCaptionScorer
