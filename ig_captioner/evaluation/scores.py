"""Images and texts to a `ScoreMatrix`: one pass of the model; all else is arithmetic on it, at any prior weight.

Image to text ranks texts by log P(T|I) - w * log P(T). Text to image ranks images by log P(T|I): for a fixed text the
prior is a constant. Of classes in several templates log P(T|I) and log P(T) are means over the templates.

Legend: B images, N texts, C classes, T templates. Log-likelihoods are in nats.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..captioners.scorer import CaptionScorer, as_compiled, as_images
from ..compiled_labels import CompiledLabels, encode_for, is_compiled, refuse_prior
from ..data.samples import separate
from ..information_gain import information_gain, mean_over_templates
from ..input_rules import default_templates, format_labels
from .processes import map_batches


class ScoreMatrix(NamedTuple):
    """Scores of B images and N texts, float32 on the CPU, in nats."""

    caption_log_likelihood: Tensor
    """log P(T|I), [B, N]."""
    prior_log_likelihood: Tensor
    """log P(T), [N]."""
    text_lengths: Tensor
    """Scored tokens of each text, end-of-sequence included, [N]."""

    def information_gain(self, prior_weight: float) -> Tensor:
        """log P(T|I) - prior_weight * log P(T), [B, N]."""
        return information_gain(self.caption_log_likelihood, self.prior_log_likelihood, prior_weight)

    def blind(self) -> Tensor:
        """log P(T) as a score of every image, [B, N]: how far language alone gets."""
        return self.prior_log_likelihood.expand_as(self.caption_log_likelihood)

    def select(self, images: list[int]) -> "ScoreMatrix":
        """The scores of some of the images."""
        return self._replace(caption_log_likelihood=self.caption_log_likelihood[images])


def text_scorer(
    model: Any,
    processor: Any,
    texts: Sequence[str] | CompiledLabels,
    *,
    chunk_size: int | None = None,
    **prior: Any,
) -> Callable[[list[Image.Image]], ScoreMatrix]:
    """Makes a function that scores all texts under each image of a batch; its company in the batch changes nothing.

    Args:
        model: a model with `score`, in evaluation mode, on any device and of any dtype; or a `CaptionScorer`.
        processor: has an `image_processor` and a `tokenizer`; of no use to a scorer.
        texts: may repeat; compiled once, unless they are.
        chunk_size: see `model.score`.
        prior: `prior_source`, `reference_images` and `reference_mean`, see `CaptionScorer.score`.

    Raises:
        ValueError: for a model in training mode, or no texts.
    """
    if isinstance(model, CaptionScorer):
        return _scorer_of_captioner(model, texts, **prior)
    if (references := prior.pop("reference_images", None)) is not None:
        prior["reference_pixel_values"] = to_pixels(model, processor, list(as_images(references)))
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    if not len(texts):
        raise ValueError(f"there must be at least one text, got {len(texts)} texts")
    given: Any = texts
    if is_compiled(given):
        refuse_prior(**prior)
        given.check_tokenizer(model, processor.tokenizer)
        compiled = given.texts.verified_for(model).to(model.device)
    else:
        encoded = encode_for(model, processor.tokenizer, list(given))
        compiled = model.compile_texts(**encoded, chunk_size=chunk_size, with_fingerprint=False, **prior)

    lengths = compiled.trie.lengths.float().cpu()

    def score(images: list[Image.Image]) -> ScoreMatrix:
        with torch.no_grad():
            scores = model.score(to_pixels(model, processor, images), compiled, chunk_size=chunk_size)
        return ScoreMatrix(scores.caption_log_likelihood.cpu(), scores.prior_log_likelihood.cpu(), lengths)

    return score


def _scorer_of_captioner(
    scorer: CaptionScorer, texts: Sequence[str] | CompiledLabels, **prior: Any
) -> Callable[[list[Image.Image]], ScoreMatrix]:
    given = as_compiled(texts)
    if given is None:
        labels = scorer.compile_labels(list(texts), "{}", **prior)  # type: ignore[arg-type]
    else:  # every text for itself: a scorer gives means over templates
        each = tuple(format_labels(given.labels, given.templates))
        labels = CompiledLabels(each, ("{}",), given.texts, given.tokens_sha256)
    lengths = labels.texts.trie.lengths.float().cpu()

    def score(images: list[Image.Image]) -> ScoreMatrix:
        scores = scorer.score(images, labels)
        return ScoreMatrix(scores.caption_log_likelihood, scores.prior_log_likelihood, lengths)

    return score


def to_pixels(model: Any, processor: Any, images: list[Image.Image]) -> Tensor:
    """`pixel_values` [B, channels, height, width] on the model's device, of its dtype."""
    pixel_values = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    return pixel_values.to(model.device, model.dtype)


def score_pairs(
    model: Any,
    processor: Any,
    images: Iterable[Image.Image],
    texts: Sequence[str] | CompiledLabels,
    *,
    batch_size: int = 16,
    **options: Any,
) -> ScoreMatrix:
    """Scores every pair of B images and N texts.

    Args:
        images: read once, `batch_size` at a time, which changes nothing beyond float error.
        options: see [`text_scorer`].

    Raises:
        ValueError: for no images, a batch size below 1, and as `text_scorer`.
    """
    return concatenate(map_batches(text_scorer(model, processor, texts, **options), images, batch_size))


def concatenate(parts: Sequence[ScoreMatrix]) -> ScoreMatrix:
    """The scores of several batches of images with the same texts."""
    if not parts:
        raise ValueError("no images to score")
    return parts[0]._replace(caption_log_likelihood=torch.cat([part.caption_log_likelihood for part in parts]))


def classify_images(
    model: Any,
    processor: Any,
    samples: Iterable[tuple[Image.Image, int]],
    class_names: Sequence[str] | CompiledLabels,
    templates: str | Sequence[str] | None = None,
    *,
    batch_size: int = 16,
    **options: Any,
) -> tuple[ScoreMatrix, Tensor]:
    """Scores C classes under B labelled images.

    Args:
        samples: (image, class index) pairs, read once.
        class_names: compiled ones bring their templates.
        templates: one or more, with `{}` in each; the checkpoint's own if not given.
        batch_size: images per pass; it changes nothing beyond float error.
        options: see [`text_scorer`].

    Returns:
        The scores [B, C], means over templates, and the labels int [B].

    Raises:
        ValueError: for no images, a label that is no class index, and wrong class names or templates.
    """
    texts: Any = class_names
    if is_compiled(texts):
        if templates is not None:
            raise ValueError(f"compiled class names have their templates already, got {templates!r} with them")
        class_names = texts.labels
    else:
        texts = format_labels(texts, templates or default_templates(model.config))
    num_templates = len(texts) // len(class_names)
    score = text_scorer(model, processor, texts, **options)

    def score_classes(images: list[Image.Image]) -> ScoreMatrix:
        return ScoreMatrix(*(mean_over_templates(values, num_templates) for values in score(images)))

    images, labels = separate(_with_valid_labels(samples, len(class_names)))
    parts = map_batches(score_classes, images, batch_size)
    return concatenate(parts), torch.tensor(labels)


def _with_valid_labels(
    samples: Iterable[tuple[Image.Image, int]], num_classes: int
) -> Iterator[tuple[Image.Image, int]]:
    for number, (image, label) in enumerate(samples):
        if not 0 <= label < num_classes:
            raise ValueError(f"label {label} of image {number} is no index of {num_classes} classes")
        yield image, label
