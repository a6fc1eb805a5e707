"""Image-text retrieval: scores of all pairs of images and texts, ranks, recall.

One pass of the model gives log P(T|I) of every pair and log P(T) of every text (`score_pairs`); everything after it is
arithmetic on that `ScoreMatrix`, at any prior weight.

Image to text ranks texts by log P(T|I) - w * log P(T). Text to image ranks images by log P(T|I): for a fixed text the
prior is a constant. An image may have several true texts, the best of them counts. Ties count against: a wrong answer
that scores as high as the right one is ranked before it, and so is anything beside a score that is not a number.

Legend: B images, N texts, L text tokens. Log-likelihoods are in nats.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..compiled_labels import CompiledLabels, encode_for, is_compiled
from ..information_gain import information_gain
from .processes import map_batches


PRIOR_WEIGHTS = tuple(round(0.05 * step, 2) for step in range(31))  # w = 0 ... 1.5


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


# From images and texts to scores


def text_scorer(
    model: Any,
    processor: Any,
    texts: Sequence[str] | CompiledLabels,
    *,
    chunk_size: int | None = None,
    **prior: Any,
) -> Callable[[list[Image.Image]], ScoreMatrix]:
    """A function that scores all texts under each image of a batch; what is in the batch beside it changes nothing.

    Args:
        model: a model with `score`, in evaluation mode, on any device and of any dtype.
        processor: has an `image_processor` and a `tokenizer`.
        texts: may repeat; compiled once, unless they are.
        chunk_size: see `model.score`.
        prior: `prior_source` and `reference_pixel_values`, see `model.score`.

    Raises:
        ValueError: for a model in training mode, or no texts.
    """
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    if not len(texts):
        raise ValueError(f"there must be at least one text, got {len(texts)} texts")
    given: Any = texts
    if is_compiled(given):
        if prior:
            raise ValueError(f"compiled labels have their prior already, got {prior!r} with them")
        given.check_tokenizer(model, processor.tokenizer)
        compiled = given.texts.verified_for(model).to(model.device)
    else:
        encoded = encode_for(model, processor.tokenizer, list(given))
        compiled = model.compile_texts(**encoded, chunk_size=chunk_size, with_fingerprint=False, **prior)

    def score(images: list[Image.Image]) -> ScoreMatrix:
        with torch.no_grad():
            scores = model.score(to_pixels(model, processor, images), compiled, chunk_size=chunk_size)
        likelihoods = scores.caption_log_likelihood.cpu(), scores.prior_log_likelihood.cpu()
        return ScoreMatrix(*likelihoods, compiled.trie.lengths.float().cpu())

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
    """Scores of every pair of B images and N texts.

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


# From scores to metrics


def true_pairs(captions: Sequence[Sequence[str]], texts: Sequence[str]) -> Tensor:
    """Which of N texts are captions of which of B images, bool [B, N]; equal texts are the same answer."""
    columns: dict[str, list[int]] = {}
    for column, text in enumerate(texts):
        columns.setdefault(text, []).append(column)
    is_true = torch.zeros(len(captions), len(texts), dtype=torch.bool)
    for row, own in enumerate(captions):
        is_true[row, [column for caption in own for column in columns.get(caption, [])]] = True
    return is_true


def ranks(scores: Tensor, is_true: Tensor) -> Tensor:
    """How many wrong answers are ranked before the best true one, int [Q] (0: found first), of Q queries.

    Args:
        scores: [Q, N], higher is better.
        is_true: bool [Q, N]; other true answers do not count. Ties and NaN count as ranked before.

    Raises:
        ValueError: if a query has no true answer, or shapes differ.
    """
    if scores.shape != is_true.shape or not is_true.any(dim=1).all():
        raise ValueError(
            f"every query needs a true answer: scores {tuple(scores.shape)}, is_true {tuple(is_true.shape)}, "
            f"{int((~is_true.any(dim=-1)).sum())} queries without one"
        )
    best = scores.masked_fill(~is_true, float("-inf")).amax(dim=1, keepdim=True)
    return (~(scores < best) & ~is_true).sum(dim=1)


def recall_metrics(ranks: Tensor) -> dict[str, float]:
    """`recall_at_1`, `_5`, `_10` (shares of the queries) and `median_rank` (1 is best), from [`ranks`]."""
    recalls = {f"recall_at_{k}": (ranks < k).double().mean().item() for k in (1, 5, 10)}
    return {**recalls, "median_rank": ranks.double().quantile(0.5).item() + 1}


def image_to_text_metrics(matrix: ScoreMatrix, is_true: Tensor, prior_weight: float) -> dict[str, float]:
    """Each image ranks all texts by information gain at `prior_weight`. `is_true`: bool [B, N]."""
    return recall_metrics(ranks(matrix.information_gain(prior_weight), is_true))


def text_to_image_metrics(matrix: ScoreMatrix, is_true: Tensor) -> dict[str, float]:
    """Each text ranks all images by log P(T|I). `is_true`: bool [B, N]."""
    return recall_metrics(ranks(matrix.caption_log_likelihood.T, is_true.T))


def tune_prior_weight(matrix: ScoreMatrix, is_true: Tensor, grid: Sequence[float] = PRIOR_WEIGHTS) -> float:
    """The weight with the lowest geometric mean rank, image to text; the first of equals.

    That mean uses every query, where recall at a fixed k only sees those that cross it: less noise on small sets.
    """

    def mean_log_rank(prior_weight: float) -> float:
        return (ranks(matrix.information_gain(prior_weight), is_true) + 1).double().log().mean().item()

    return best_of_grid(grid, lambda prior_weight: -mean_log_rank(prior_weight))


def best_of_grid(grid: Sequence[float], quality: Callable[[float], Any]) -> float:
    """The entry of `grid` with the highest `quality`; the first of equals."""
    if not len(grid):
        raise ValueError("the grid of prior weights is empty")
    return max(grid, key=quality)


def information_gain_per_token(matrix: ScoreMatrix, is_true: Tensor) -> float:
    """(log P(T|I) - log P(T)) over all true pairs, divided by their number of tokens: nats per token."""
    gain = matrix.information_gain(1.0)[is_true].double().sum()
    return (gain / matrix.text_lengths.expand_as(is_true)[is_true].double().sum()).item()
