"""Rows of the tables of results, and the bootstrap intervals of their figures.

Every evaluation has these rows:

- likelihood: log P(T|I) only, prior weight 0
- information gain: log P(T|I) - log P(T), prior weight 1
- tuned: the prior weight that was best on held-out samples, which are in no row
- blind: log P(T) only, the likelier text wins; no image is seen, so it shows how far language alone gets. (Ranking by
  -log P(T) would just pick the rarest text.)
- another model, such as CLIP, on the same samples
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .scores import ScoreMatrix


RESAMPLES = 1000
Metrics = Callable[[Tensor], dict[str, float]]
"""Figures from indices of samples, int [B], which may repeat."""
Estimate = dict[str, float]
"""`value` of a figure, and where they mean something the ends of its interval, `low` and `high`."""


@dataclass
class Row:
    """A line of a table.

    Args:
        prior_weight: None where the scores depend on none.
        baseline: whether the row is there to compare with, and no result of the model.
        details: what the results file says beyond the table.
    """

    name: str
    metrics: dict[str, Estimate]
    prior_weight: float | None = None
    baseline: bool = False
    details: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The row as results files hold it."""
        shown = {"name": self.name, "prior_weight": self.prior_weight, "baseline": self.baseline}
        return {**shown, "metrics": self.metrics, **self.details}


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


def make_row(contender: "Contender", metrics: Metrics, count: int, **details: Any) -> Row:
    """The row of scores, with intervals over `count` samples."""
    estimates = bootstrap(metrics, count)
    return Row(contender.name, estimates, contender.prior_weight, contender.baseline, details)


def gain_row(matrix: ScoreMatrix, is_true: Tensor) -> Row:
    """Information gain of the true pairs, bool [B, N], per token, in nats; rounded to what float error leaves."""
    gain = matrix.information_gain(1.0).masked_fill(~is_true, 0.0).double().sum(dim=1)
    tokens = (matrix.text_lengths * is_true).double().sum(dim=1)

    def metrics(drawn: Tensor) -> dict[str, float]:
        return {"nats_per_token": round((gain[drawn].sum() / tokens[drawn].sum()).item(), 4)}

    return Row("information gain", bootstrap(metrics, len(is_true)), prior_weight=1.0)


# What every evaluation compares


class Contender(NamedTuple):
    """Scores that get a row."""

    name: str
    scores: Tensor
    """[B, N], higher is better."""
    prior_weight: float | None = None
    baseline: bool = True


class Scores(Protocol):
    """The methods that `ScoreMatrix` and `ItemScores` have in common."""

    def information_gain(self, prior_weight: float) -> Tensor: ...

    def blind(self) -> Tensor: ...


def contenders(matrix: Scores, tuned: float, others: dict[str, Tensor] | None = None) -> list[Contender]:
    """The scores of all rows of an evaluation.

    Args:
        tuned: the prior weight of the row "tuned".
        others: scores of other models, by name.
    """
    ours = [
        Contender(name, matrix.information_gain(weight), weight, baseline=False)
        for name, weight in weights_of_rows(tuned).items()
    ]
    return [*ours, Contender("blind", matrix.blind()), *(Contender(*other) for other in (others or {}).items())]


def weights_of_rows(tuned: float) -> dict[str, float]:
    """Names and prior weights of the rows that every evaluation has."""
    return {"likelihood": 0.0, "information gain": 1.0, "tuned": tuned}
