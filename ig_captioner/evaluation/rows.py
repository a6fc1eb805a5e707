"""What every evaluation shares: rows at prior weight 0, 1 and a tuned one, and bootstrap intervals.

A row is `{"name", "prior_weight", "metrics": {name: {"value", "low", "high"}}}`, without the last two where they would
mean nothing; a table is a list of rows. The rows:

- likelihood: log P(T|I) alone, prior weight 0
- information gain: log P(T|I) - log P(T), prior weight 1
- tuned: the weight that was best on samples which are in no row
- blind: log P(T) alone, the likelier text wins; no image is seen, so it shows how far language alone gets. (Its
  negative, which information gain adds, prefers unlikely texts whatever they say: no guess that anybody would make.)
- another model, such as CLIP, on the same samples
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import zero_shot
from .scores import ScoreMatrix, ranks, recall_metrics, true_pairs, tune_prior_weight


RESAMPLES = 1000
Row = dict[str, Any]
Metrics = Callable[[Tensor], dict[str, float]]
"""Figures from indices of samples, int [B], which may repeat."""


def bootstrap(
    metrics: Metrics, count: int, resamples: int = RESAMPLES, seed: int = 0, centred: Sequence[str] = ()
) -> dict[str, dict[str, float]]:
    """Each metric over all samples, with its 95 % interval over samples drawn with replacement (percentiles).

    The same seed draws the same samples, so that rows of a table can be compared. A distance, which noise can only
    raise, is higher in resamples than in the samples: the interval of those that are `centred` is moved down by that
    difference, as far as 0.
    """
    generator = torch.Generator().manual_seed(seed)
    values = metrics(torch.arange(count))
    draws = [metrics(torch.randint(count, (count,), generator=generator)) for _ in range(resamples)]
    intervals = {}
    for name, value in values.items():
        drawn = torch.tensor([draw[name] for draw in draws], dtype=torch.float64)
        low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        if name in centred:
            low, high = (max(0.0, end + value - drawn.mean().item()) for end in (low, high))
        intervals[name] = {"value": value, "low": low, "high": high}
    return intervals


def make_row(name: str, metrics: Metrics, count: int, prior_weight: float | None = None, baseline: bool = False) -> Row:
    """`baseline`: whether the row is there to compare with, and no result of the model."""
    row = {"name": name, "prior_weight": prior_weight, "baseline": baseline}
    return {**row, "metrics": bootstrap(metrics, count)}


def weights_of_rows(tuned: float) -> dict[str, float]:
    """Names and prior weights of the rows that every evaluation has."""
    return {"likelihood": 0.0, "information gain": 1.0, "tuned": tuned}


def select_images(matrix: ScoreMatrix, images: list[int]) -> ScoreMatrix:
    return matrix._replace(caption_log_likelihood=matrix.caption_log_likelihood[images])


# Classification


def zero_shot_rows(
    matrix: ScoreMatrix,
    labels: Tensor,
    class_names: list[str],
    split: tuple[list[int], list[int]],
    others: dict[str, Tensor] | None = None,
) -> list[Row]:
    """Rows of top-1, top-5 and mean per class. Also `predicted`, how often each class is, [C], and `confusion`, [C, C].

    Args:
        matrix: scores of C classes under B images.
        labels: int [B].
        split: indices of the images to tune on, and of those to test on.
        others: scores [B, C] of other models, by name.
    """
    held_out, test = split
    tuned = zero_shot.tune_prior_weight(select_images(matrix, held_out), labels[held_out], class_names)
    tested, labels = select_images(matrix, test), labels[test]
    blind = tested.prior_log_likelihood.expand_as(tested.caption_log_likelihood)
    named: dict[str, tuple[Tensor, float | None]] = {
        name: (tested.information_gain(weight), weight) for name, weight in weights_of_rows(tuned).items()
    }
    named["blind"] = blind, None
    named |= {name: (scores[test], None) for name, scores in (others or {}).items()}
    return [class_row(name, scores, labels, class_names, weight) for name, (scores, weight) in named.items()]


def class_row(
    name: str,
    scores: Tensor,
    labels: Tensor,
    class_names: list[str],
    prior_weight: float | None = None,
    baseline: bool | None = None,
) -> Row:
    """The row of scores [B, C] of labelled images; a baseline, if not said otherwise, where there is no weight."""
    is_true = true_pairs([[name] for name in class_names], class_names)[labels]
    wrong_before, counts = ranks(scores, is_true), confusion(scores, labels)

    def metrics(drawn: Tensor) -> dict[str, float]:
        return zero_shot.accuracies(wrong_before[drawn], labels[drawn])

    row = make_row(name, metrics, len(labels), prior_weight, prior_weight is None if baseline is None else baseline)
    return {**row, "predicted": counts.sum(dim=0).tolist(), "confusion": counts.tolist()}


def confusion(scores: Tensor, labels: Tensor) -> Tensor:
    """How many images of each class (rows) are taken for each class (columns): counts int [C, C]."""
    classes = scores.shape[1]
    pairs = labels * classes + scores.argmax(dim=1)
    return pairs.bincount(minlength=classes**2).unflatten(0, (classes, classes))


# Retrieval


def image_to_text_rows(
    held_out: tuple[ScoreMatrix, Tensor], test: tuple[ScoreMatrix, Tensor], others: dict[str, Tensor] | None = None
) -> list[Row]:
    """Rows of recall, median rank, and how many different texts come first (no interval); intervals are over images.

    Args:
        held_out, test: scores of B images and N texts, and which of them belong together, bool [B, N].
        others: scores [B, N] of other models on the test images, by name.
    """
    matrix, is_true = test
    tuned = tune_prior_weight(*held_out)
    scores: dict[str, tuple[Tensor, float | None]] = {
        name: (matrix.information_gain(weight), weight) for name, weight in weights_of_rows(tuned).items()
    }
    scores["blind"] = matrix.prior_log_likelihood.expand_as(matrix.caption_log_likelihood), None
    scores |= {name: (values, None) for name, values in (others or {}).items()}
    return [image_to_text_row(name, values, is_true, weight) for name, (values, weight) in scores.items()]


def image_to_text_row(
    name: str, scores: Tensor, is_true: Tensor, prior_weight: float | None = None, baseline: bool | None = None
) -> Row:
    """The row of scores [B, N]; a baseline, if not said otherwise, where there is no weight."""
    ranks_of_images = ranks(scores, is_true)

    def metrics(drawn: Tensor) -> dict[str, float]:
        return recall_metrics(ranks_of_images[drawn])

    row = make_row(name, metrics, len(scores), prior_weight, prior_weight is None if baseline is None else baseline)
    row["metrics"]["distinct_top1"] = {"value": scores.argmax(dim=1).unique().numel()}
    return row


def text_to_image_rows(
    matrix: ScoreMatrix, is_true: Tensor, owners: Tensor, others: dict[str, Tensor] | None = None
) -> list[Row]:
    """Rows of recall and median rank: one for all prior weights, as the prior of a text is the same for all images."""
    first = text_to_image_row("any prior weight", matrix.caption_log_likelihood, is_true, owners)
    named = (others or {}).items()
    return [first, *(text_to_image_row(name, scores, is_true, owners, baseline=True) for name, scores in named)]


def text_to_image_row(name: str, scores: Tensor, is_true: Tensor, owners: Tensor, baseline: bool = False) -> Row:
    """The row of scores [B, N].

    Args:
        owners: the image of each text, int [N]; intervals are over images, each with all of its texts.
    """
    ranks_of_texts = ranks(scores.T, is_true.T)

    def metrics(drawn: Tensor) -> dict[str, float]:
        times = drawn.bincount(minlength=len(is_true))[owners]
        return recall_metrics(ranks_of_texts.repeat_interleave(times))

    return make_row(name, metrics, len(is_true), baseline=baseline)


def gain_row(matrix: ScoreMatrix, is_true: Tensor) -> Row:
    """Information gain of the true pairs per token, in nats; rounded to what float error leaves."""
    gain = matrix.information_gain(1.0).masked_fill(~is_true, 0.0).double().sum(dim=1)
    tokens = (matrix.text_lengths * is_true).double().sum(dim=1)

    def metrics(drawn: Tensor) -> dict[str, float]:
        return {"nats_per_token": round((gain[drawn].sum() / tokens[drawn].sum()).item(), 4)}

    return make_row("information gain", metrics, len(is_true), 1.0)
