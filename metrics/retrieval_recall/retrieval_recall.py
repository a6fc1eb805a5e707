"""Recall at k and median rank of queries with one or more right answers.

metric = evaluate.load("metrics/retrieval_recall")
metric.compute(predictions=scores, references=is_true)
"""

import datasets
import evaluate
import numpy as np


DESCRIPTION = """\
Recall at k and median rank of retrieval, image to text or text to image. Of several right answers the best counts. Ties
count against: a wrong answer that scores as high as the right one is ranked before it, and so is one whose score is not
a number.
"""
INPUTS = """
Args:
    predictions: scores of all candidates for each query, higher is better.
    references: whether each candidate is right for the query; one of them at least.
    at: the k of recall (default: 1, 5, 10).

Returns:
    recall_at_<k>: share of the queries whose best right answer is among the first k.
    median_rank: of the best right answer; 1 is best.
"""


class RetrievalRecall(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            predictions=datasets.Sequence(datasets.Value("float64")),
            references=datasets.Sequence(datasets.Value("bool")),
        )
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features)

    def _compute(self, predictions, references, at: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
        pairs = zip(predictions, references, strict=True)
        ranks = np.array([wrong_before(np.asarray(scores), np.asarray(is_true)) for scores, is_true in pairs])
        recalls = {f"recall_at_{k}": float((ranks < k).mean()) for k in at}
        return {**recalls, "median_rank": float(np.median(ranks)) + 1}


def wrong_before(scores: np.ndarray, is_true: np.ndarray) -> int:
    """Counts the wrong answers of a query [N] that come before its best right one."""
    if scores.shape != is_true.shape or not is_true.any():
        raise ValueError(
            f"a query needs a right answer and as many references as predictions, got {len(scores)} scores, "
            f"{len(is_true)} references, {int(is_true.sum())} of them right"
        )
    return int((~is_true & ~(scores < scores[is_true].max())).sum())
