"""Calibration of scores: a temperature that makes them agree with how often they are right, and abstaining.

Scores are the softmax of s / temperature over classes, where s is the information gain at some prior weight. The
temperature is fitted by the negative log-likelihood of the right classes on samples that are in no figure, and moves no
ranking (Guo et al. 2017, arXiv 1706.04599). Abstaining means to answer "none of these" where the best class has less
information gain than a threshold.

Classes of one name are one answer, `merge_equal_names`; ties count against, as everywhere (see `ranking`).

Legend: B images, C classes. Scores s and thresholds are in nats.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..configuration_ig_captioner import IGCaptionerConfig
from .ranking import ranks
from .rows import Metrics, Row, bootstrap, weights_of_rows
from .scores import ScoreMatrix


TEMPERATURES = (0.01, 100.0)
"""Range of temperatures that are tried."""
BINS = 15
FEWEST_HELD_OUT = 100
"""Minimum held-out images for saving a fit."""
SHARES = (0.95, 0.9, 0.8, 0.5)
"""Of images that are kept while the least certain are given up."""
Split = tuple[list[int], list[int]]
"""Indices of the images to tune on, and of those to test on."""


def merge_equal_names(matrix: ScoreMatrix, labels: Tensor, class_names: Sequence[str]) -> tuple[ScoreMatrix, Tensor]:
    """Scores and labels [B] of the distinct classes: the first of each name."""
    distinct = list(dict.fromkeys(class_names))
    columns = [class_names.index(name) for name in distinct]
    merged = matrix._replace(
        caption_log_likelihood=matrix.caption_log_likelihood[:, columns],
        prior_log_likelihood=matrix.prior_log_likelihood[columns],
        text_lengths=matrix.text_lengths[columns],
    )
    return merged, torch.tensor([distinct.index(name) for name in class_names])[labels]


# Temperature


def fit_temperature(scores: Tensor, labels: Tensor) -> float:
    """The temperature with the lowest mean negative log-likelihood of `labels` int [B] under `scores` [B, C].

    That is convex in 1 / temperature, so that bisection of its slope finds the only minimum. A minimum outside of
    TEMPERATURES gives the nearer end: the lower one where every answer is right, the upper one where scores are worth
    nothing.

    Raises:
        ValueError: for scores that are not finite.
    """
    if not scores.isfinite().all():
        raise ValueError(f"{int((~scores.isfinite()).sum())} of {scores.numel()} scores are not finite")
    low, high = map(math.log, TEMPERATURES)
    for _ in range(50):  # halves 9 nats of log temperature to the precision of float64
        middle = (low + high) / 2
        slope = _slopes(scores, labels, math.exp(middle))[0].mean().item()
        if slope == 0:
            return math.exp(middle)
        low, high = (middle, high) if slope > 0 else (low, middle)
    return math.exp((low + high) / 2)


def _slopes(scores: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """First and second derivative, [B] each, of the negative log-likelihood by 1 / temperature."""
    scores = scores.double()
    probabilities = (scores / temperature).softmax(dim=1)
    mean = (probabilities * scores).sum(dim=1)
    variance = (probabilities * (scores - mean[:, None]).square()).sum(dim=1)
    return mean - scores.gather(1, labels[:, None])[:, 0], variance


def resampled_temperature(scores: Tensor, labels: Tensor, temperature: float) -> Metrics:
    """The temperature of any sample of the images, one Newton step away from the one fitted to all of them."""
    slopes, curvatures = _slopes(scores, labels, temperature)
    tiny = torch.finfo(torch.float64).tiny

    def metrics(drawn: Tensor) -> dict[str, float]:
        # of log temperature, which cannot leave the positive numbers
        step = slopes[drawn].mean() / curvatures[drawn].mean().clamp(min=tiny) * temperature
        return {"temperature": (temperature * step.exp()).clamp(*TEMPERATURES).item()}

    return metrics


# From scores to metrics


class Answers(NamedTuple):
    """The best class of each image: how certain, and whether it is right."""

    certainty: Tensor
    """Its score or its information gain, [B]."""
    is_right: Tensor
    """Bool [B]."""

    def of(self, drawn: Tensor) -> "Answers":
        """Those of some images, by their indices."""
        return Answers(self.certainty[drawn], self.is_right[drawn])


def confidence(scores: Tensor, temperature: float) -> Tensor:
    """The highest softmax, [B], of scores [B, C]; 0 where every class is ruled out by -inf."""
    return (scores.double() / temperature).softmax(dim=1).amax(dim=1).nan_to_num()


def is_right(scores: Tensor, labels: Tensor) -> Tensor:
    """Bool [B]."""
    return ranks(scores, F.one_hot(labels, scores.shape[1]).bool()) < 1


class Bins(NamedTuple):
    """Answers by their score: (0, 1/15], (1/15, 2/15], ... (14/15, 1]. [BINS] each."""

    images: Tensor
    score: Tensor
    """Mean; nan where there are no images."""
    right: Tensor
    """Share; nan where there are no images."""


def bin_by_score(answers: Answers) -> Bins:
    index = _bins_of(answers.certainty)
    images = index.bincount(minlength=BINS)
    score, right = (index.bincount(values.double(), minlength=BINS) / images for values in answers)
    return Bins(images, score, right)


def _bins_of(scores: Tensor) -> Tensor:
    return ((scores * BINS).ceil().long() - 1).clamp(0, BINS - 1)


def expected_calibration_error(answers: Answers) -> float:
    """Mean over images of the distance between mean score and share of right answers in their bin."""
    score, right = answers
    distances = _bins_of(score).bincount(score - right.double())
    return distances.abs().sum().item() / len(score)


def negative_log_likelihoods(scores: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """-log of the score of the right class, in nats, [B]."""
    return F.cross_entropy(scores.double() / temperature, labels, reduction="none")


# Abstaining


def abstain_threshold(certainty: Tensor, share: float) -> float:
    """The highest threshold that at least this share of `certainty` [B] reaches."""
    kept = max(1, math.ceil(share * len(certainty) - 1e-9))  # 0.95 * 20 is not quite 19
    return certainty.kthvalue(len(certainty) - kept + 1).values.item()


def coverage_curve(answers: Answers) -> tuple[Tensor, Tensor]:
    """Share of images that reach a threshold, and share of right answers among them, at every threshold there is."""
    certainty, order = answers.certainty.sort(descending=True)
    kept = torch.arange(1, len(order) + 1)
    right = answers.is_right[order].cumsum(dim=0).double() / kept
    ends = torch.cat([certainty[1:] < certainty[:-1], torch.tensor([True])])  # a threshold keeps equals together
    return kept[ends].double() / len(order), right[ends]


def accuracy_of_kept(answers: Answers, share: float) -> float:
    return answers.is_right[answers.certainty >= abstain_threshold(answers.certainty, share)].double().mean().item()


def auroc(higher: Tensor, lower: Tensor) -> float:
    """Share of pairs of which the one of `higher` [B] is greater than that of `lower` [B']; ties are half a pair."""
    lower = lower.sort().values
    below = torch.searchsorted(lower, higher, right=False) + torch.searchsorted(lower, higher, right=True)
    return below.double().mean().item() / (2 * len(lower))


# Results of the zero-shot evaluation; `matrix` and `labels` are those of distinct classes


def calibration_rows(matrix: ScoreMatrix, labels: Tensor, split: Split, tuned: float, given: float) -> list[Row]:
    """Two rows per prior weight: at the `given` temperature, and at the one fitted to the held-out images."""
    held_out, test = split
    rows = []
    for name, weight in weights_of_rows(tuned).items():
        scores = matrix.information_gain(weight)
        fitted = fit_temperature(scores[held_out], labels[held_out])
        resampled = resampled_temperature(scores[held_out], labels[held_out], fitted)
        for row, temperature, estimate in (
            (name, given, {"temperature": dict.fromkeys(("value", "low", "high"), given)}),
            (f"{name}, fitted temperature", fitted, bootstrap(resampled, len(held_out))),
        ):
            metrics = _calibration_metrics(scores[test], labels[test], temperature)
            estimate |= bootstrap(metrics, len(test), centred=("ece",))
            rows.append(Row(row, estimate, weight))
    return rows


def _calibration_metrics(scores: Tensor, labels: Tensor, temperature: float) -> Metrics:
    answers = Answers(confidence(scores, temperature), is_right(scores, labels))
    nll = negative_log_likelihoods(scores, labels, temperature)

    def metrics(drawn: Tensor) -> dict[str, float]:
        return {"ece": expected_calibration_error(answers.of(drawn)), "nll": nll[drawn].mean().item()}

    return metrics


def ways_to_abstain(scores: Tensor, labels: Tensor, temperature: float) -> dict[str, tuple[Answers, Tensor]]:
    """Answers, certain by information gain and by score, and how certain they would be without the right class, [B].

    Args:
        scores: information gain of test images, [B, C].
    """
    others = scores.masked_fill(F.one_hot(labels, scores.shape[1]).bool(), -math.inf)
    right = is_right(scores, labels)
    return {
        "by information gain": (Answers(scores.amax(dim=1), right), others.amax(dim=1)),
        "by score": (Answers(confidence(scores, temperature), right), confidence(others, temperature)),
    }


def abstaining_rows(ways: dict[str, tuple[Answers, Tensor]], prior_weight: float) -> list[Row]:
    """Accuracy of the most certain images, and how well certainty tells whether the right class is there at all.

    For the latter every image comes twice: with all classes, and without its own.
    """
    rows = []
    for name, (answers, nothing) in ways.items():

        def metrics(drawn: Tensor, answers: Answers = answers, nothing: Tensor = nothing) -> dict[str, float]:
            sample = answers.of(drawn)
            accuracy = {f"top1_of_{100 * share:.0f}": accuracy_of_kept(sample, share) for share in SHARES}
            return {**accuracy, "none_auroc": auroc(sample.certainty, nothing[drawn])}

        estimates = bootstrap(metrics, len(nothing))
        rows.append(Row(name, estimates, prior_weight))
    return rows


def reliability_table(pictures: dict[str, Bins]) -> list[dict[str, Any]]:
    """A line per bin that has images; the columns of all `pictures`, such as before and after."""
    lines = []
    for index in range(BINS):
        line: dict[str, Any] = {"score": f"{index / BINS:.2f} - {(index + 1) / BINS:.2f}"}
        for name, bins in pictures.items():
            line[f"{name}: images"] = int(bins.images[index])
            for column, values in (("mean score %", bins.score), ("right %", bins.right)):
                line[f"{name}: {column}"] = round(100 * values[index].item(), 1) if bins.images[index] else None
        if any(bins.images[index] for bins in pictures.values()):
            lines.append(line)
    return lines


def threshold_table(held_out: Answers, test: Answers) -> list[dict[str, Any]]:
    """Applies thresholds that keep a share of the held-out images to the test images."""
    lines = []
    for share in SHARES:
        threshold = abstain_threshold(held_out.certainty, share)
        kept = test.certainty >= threshold
        lines.append(
            {
                "kept of held-out %": round(100 * share, 1),
                "threshold in nats": round(threshold, 3),
                "kept of test %": round(100 * kept.double().mean().item(), 1),
                "top-1 % of kept": round(100 * test.is_right[kept].double().mean().item(), 1) if kept.any() else None,
            }
        )
    return lines


class Calibration(NamedTuple):
    """All of it, at the prior weight that the checkpoint is used with."""

    temperature: float
    """Fitted to the held-out images."""
    held_out: Answers
    """Certain by information gain."""
    tables: dict[str, list[Row]]
    details: dict[str, list[dict[str, Any]]]
    reliability: dict[str, Bins]
    coverage: dict[str, Answers]

    @property
    def doubts(self) -> list[str]:
        """Why what was fitted should not be used, if there is a reason."""
        doubts = []
        number = len(self.held_out.is_right)
        if number < FEWEST_HELD_OUT:
            doubts.append(f"Only {number} images are held out: a calibration is fitted to at least {FEWEST_HELD_OUT}.")
        if any(math.isclose(self.temperature, end, rel_tol=1e-6) for end in TEMPERATURES):
            low, high = TEMPERATURES
            doubts.append(f"No temperature from {low:g} to {high:g} is best: the fit ended at {self.temperature:g}.")
        return doubts


def calibrate(
    matrix: ScoreMatrix,
    labels: Tensor,
    class_names: Sequence[str],
    split: Split,
    tuned: float,
    config: IGCaptionerConfig,
) -> Calibration:
    """Fits to the held-out images and measures on the others.

    Args:
        matrix, labels: scores of C classes under B images, and the class of each, int [B].
        tuned: the tuned prior weight.
        config: of the model.
    """
    matrix, labels = merge_equal_names(matrix, labels, class_names)
    prior_weight = getattr(config, "prior_weight", 1.0)  # a captioner of the Hub has none of these settings
    scores = matrix.information_gain(prior_weight)
    held_out, test = ((scores[part], labels[part]) for part in split)
    fitted = fit_temperature(*held_out)
    given = getattr(config, "score_temperature", 1.0)
    temperatures = {f"temperature {given:.3g}": given, f"fitted, {fitted:.3g}": fitted}
    reliability = {
        name: bin_by_score(Answers(confidence(test[0], temperature), is_right(*test)))
        for name, temperature in temperatures.items()
    }
    ways = ways_to_abstain(*test, fitted)
    by_gain = Answers(held_out[0].amax(dim=1), is_right(*held_out))
    coverage = {name: answers for name, (answers, _) in ways.items()}
    tables = {
        "Calibration": calibration_rows(matrix, labels, split, tuned, given),
        "Abstaining": abstaining_rows(ways, prior_weight),
    }
    details = {
        f"Reliability at prior weight {prior_weight:g}": reliability_table(reliability),
        "Thresholds of information gain": threshold_table(by_gain, coverage["by information gain"]),
    }
    return Calibration(fitted, by_gain, tables, details, reliability, coverage)
