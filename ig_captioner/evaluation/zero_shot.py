"""Zero-shot classification of labelled images: scores of all classes, and accuracy at any prior weight.

`classify_images` runs the model once; `accuracy` and `tune_prior_weight` are arithmetic on what it returns. Several
templates are ensembled as in the pipeline: the mean over templates of log P(T|I) and of log P(T).

Classes of the same name share one score and are the same answer. Other ties count against (see `scores`).

Legend: B images, C classes, T templates. Log-likelihoods are in nats.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..compiled_labels import CompiledLabels, is_compiled
from ..processing_ig_captioner import default_templates, format_labels
from .processes import map_batches
from .scores import PRIOR_WEIGHTS, ScoreMatrix, best_of_grid, concatenate, ranks, text_scorer, true_pairs


# From images to scores


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
    """Scores of C classes under B labelled images.

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
    labels: list[int] = []

    def images() -> Iterator[Image.Image]:
        for image, label in samples:
            if not 0 <= label < len(class_names):
                raise ValueError(f"label {label} of image {len(labels)} is no index of {len(class_names)} classes")
            labels.append(label)
            yield image

    score = text_scorer(model, processor, texts, **options)
    num_classes = len(class_names)
    batches = map_batches(lambda batch: mean_over_templates(score(batch), num_classes), images(), batch_size)
    return concatenate(batches), torch.tensor(labels)


def mean_over_templates(matrix: ScoreMatrix, num_classes: int) -> ScoreMatrix:
    """Scores of T x C texts, template by template, to scores of C classes."""
    return ScoreMatrix(*(values.unflatten(-1, (-1, num_classes)).mean(dim=-2) for values in matrix))


# From scores to metrics


def class_ranks(matrix: ScoreMatrix, labels: Tensor, class_names: Sequence[str], prior_weight: float) -> Tensor:
    """How many wrong classes are ranked before the right one, int [B]."""
    is_true = true_pairs([[name] for name in class_names], class_names)  # [C, C]
    return ranks(matrix.information_gain(prior_weight), is_true[labels])


def accuracy(
    matrix: ScoreMatrix, labels: Tensor, class_names: Sequence[str], prior_weight: float = 1.0
) -> dict[str, float]:
    """`accuracies` at a prior weight."""
    return accuracies(class_ranks(matrix, labels, class_names, prior_weight), labels)


def accuracies(wrong_before: Tensor, labels: Tensor) -> dict[str, float]:
    """Shares `top1` and `top5`, and `mean_per_class`: the top-1 share of each class that occurs, averaged.

    Args:
        wrong_before: how many wrong classes are ranked before the right one, int [B].
    """
    correct = (wrong_before < 1).double()
    images_of_class = labels.bincount()
    per_class = labels.bincount(correct) / images_of_class
    return {
        "top1": correct.mean().item(),
        "top5": (wrong_before < 5).double().mean().item(),
        "mean_per_class": per_class[images_of_class > 0].mean().item(),
    }


def tune_prior_weight(
    matrix: ScoreMatrix, labels: Tensor, class_names: Sequence[str], grid: Sequence[float] = PRIOR_WEIGHTS
) -> float:
    """The weight with the highest top-1 share; of equals that with the lowest geometric mean rank, then the first."""

    def quality(prior_weight: float) -> tuple[float, float]:
        wrong_before = class_ranks(matrix, labels, class_names, prior_weight)
        return (wrong_before < 1).double().mean().item(), -(wrong_before + 1).double().log().mean().item()

    return best_of_grid(grid, quality)
