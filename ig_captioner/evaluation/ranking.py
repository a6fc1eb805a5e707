"""Ranks of right answers, what is measured by them, and the prior weight that ranks best.

Ties count against the model, here and wherever something is ranked: a wrong answer that scores as high as the right one
is ranked before it, and so is anything beside a score that is not a number.

Legend: Q queries (images, texts or items), N answers. Scores are in nats, higher is better.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


PRIOR_WEIGHTS = tuple(round(0.05 * step, 2) for step in range(31))  # w = 0 ... 1.5


def true_pairs(captions: Sequence[Sequence[str]], texts: Sequence[str]) -> Tensor:
    """Tells which of N texts are captions of which of Q images, bool [Q, N]; equal texts are the same answer."""
    columns: dict[str, list[int]] = {}
    for column, text in enumerate(texts):
        columns.setdefault(text, []).append(column)
    is_true = torch.zeros(len(captions), len(texts), dtype=torch.bool)
    for row, own in enumerate(captions):
        is_true[row, [column for caption in own for column in columns.get(caption, [])]] = True
    return is_true


def true_classes(labels: Tensor, class_names: Sequence[str]) -> Tensor:
    """Tells which of N classes are right, bool [Q, N], for images of class `labels` [Q]; equal names are one answer."""
    return true_pairs([[name] for name in class_names], class_names)[labels]


def ranks(scores: Tensor, is_true: Tensor) -> Tensor:
    """Counts the wrong answers ranked before the best true one, int [Q] (0: found first).

    Args:
        scores: [Q, N].
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


# From ranks, int [Q], to metrics


def share_found_first(ranks: Tensor) -> float:
    return (ranks < 1).double().mean().item()


def mean_log_rank(ranks: Tensor) -> float:
    """Logarithm of the geometric mean rank.

    It uses every query, where recall at a fixed k only sees those that cross k: less noise on small sets.
    """
    return (ranks + 1).double().log().mean().item()


def recall_metrics(ranks: Tensor) -> dict[str, float]:
    """`recall_at_1`, `_5`, `_10` (shares of the queries) and `median_rank` (1 is best)."""
    recalls = {f"recall_at_{k}": (ranks < k).double().mean().item() for k in (1, 5, 10)}
    return {**recalls, "median_rank": ranks.double().quantile(0.5).item() + 1}


def accuracies(ranks: Tensor, labels: Tensor) -> dict[str, float]:
    """Shares `top1` and `top5`, and `mean_per_class`: the top-1 share of each class that occurs, averaged.

    Args:
        labels: the class of each query, int [Q].
    """
    images_of_class = labels.bincount()
    per_class = labels.bincount((ranks < 1).double()) / images_of_class
    return {
        "top1": share_found_first(ranks),
        "top5": (ranks < 5).double().mean().item(),
        "mean_per_class": per_class[images_of_class > 0].mean().item(),
    }


# The prior weight


def tune_prior_weight(
    ranks_at: Callable[[float], Tensor],
    quality: Callable[[Tensor], Any] = lambda ranks: -mean_log_rank(ranks),
    grid: Sequence[float] = PRIOR_WEIGHTS,
) -> float:
    """The prior weight whose ranks are best; the first of equals.

    Args:
        ranks_at: ranks, int [Q], at a prior weight.
        quality: of ranks, the higher the better; by default the lowest geometric mean rank is best.
    """
    return best_of_grid(grid, lambda prior_weight: quality(ranks_at(prior_weight)))


def top1_then_mean_rank(ranks: Tensor) -> tuple[float, float]:
    """A quality of ranks: the share found first, and of equals the geometric mean rank."""
    return share_found_first(ranks), -mean_log_rank(ranks)


def best_of_grid(grid: Sequence[float], quality: Callable[[float], Any]) -> float:
    """The entry of `grid` with the highest `quality`; the first of equals."""
    if not len(grid):
        raise ValueError("the grid to choose from is empty")
    return max(grid, key=quality)
