"""The modules of `metrics/`, loaded from their folders without a network, against the package's own functions."""

from pathlib import Path

import pytest
import torch
from test_evaluation import random_matrix

from ig_captioner.evaluation.ranking import ranks, recall_metrics
from ig_captioner.evaluation.rows import gain_row


evaluate = pytest.importorskip("evaluate")
METRICS = Path(__file__).parents[1] / "metrics"


@pytest.fixture
def load(tmp_path, monkeypatch):
    """`evaluate.load` of a folder, with nothing left in the user's cache."""
    monkeypatch.setattr("evaluate.config.HF_EVALUATE_OFFLINE", True)

    def from_folder(name):
        return evaluate.load(str(METRICS / name), cache_dir=str(tmp_path), experiment_id=tmp_path.name)

    return from_folder


def test_information_gain_is_that_of_the_package(load):
    matrix, is_true = random_matrix(6, 6), torch.eye(6, dtype=torch.bool)
    matrix = matrix._replace(text_lengths=torch.tensor([3.0, 1, 7, 2, 2, 5]))
    metric = load("information_gain")
    caption = matrix.caption_log_likelihood.diag().tolist()
    for part in (slice(0, 4), slice(4, 6)):  # as in a loop over batches
        tokens = matrix.text_lengths.long().tolist()[part]
        metric.add_batch(
            predictions=caption[part], references=matrix.prior_log_likelihood.tolist()[part], num_tokens=tokens
        )
    result = metric.compute()
    expected = gain_row(matrix, is_true).metrics["nats_per_token"]["value"]
    assert result["information_gain_per_token"] == pytest.approx(expected, abs=1e-4)
    assert result["information_gain"] == pytest.approx(matrix.information_gain(1.0).diag().mean().item(), rel=1e-5)
    assert metric.compute(predictions=[-3.0], references=[-4.0], num_tokens=[2], prior_weight=0.5) == {
        "information_gain": -1.0,
        "information_gain_per_token": -0.5,
    }
    assert metric.compute(predictions=[-3.0, -2.0], references=[-4.0, -4.0]) == {"information_gain": 1.5}
    metric.add(prediction=-3.0, reference=-4.0)
    metric.add_batch(predictions=[-2.0], references=[-4.0])
    assert metric.compute() == {"information_gain": 1.5}
    with pytest.raises(ValueError, match="got num_tokens 0"):
        metric.compute(predictions=[-3.0], references=[-4.0], num_tokens=[0])


def test_recall_is_that_of_the_package(load):
    scores = random_matrix(30, 40).caption_log_likelihood.round(decimals=1)  # with ties
    scores[0, :5] = float("nan")
    is_true = torch.rand(30, 40, generator=torch.Generator().manual_seed(3)) < 0.05
    is_true[:, 9] |= ~is_true.any(dim=1)
    expected = recall_metrics(ranks(scores.masked_fill(is_true & scores.isnan(), -99), is_true))
    metric = load("retrieval_recall")
    arguments = {"predictions": scores.masked_fill(is_true & scores.isnan(), -99).tolist()}
    assert metric.compute(**arguments, references=is_true.tolist()) == pytest.approx(expected)
    assert set(metric.compute(**arguments, references=is_true.tolist(), at=[3])) == {"recall_at_3", "median_rank"}
    with pytest.raises(ValueError, match="2 scores, 2 references, 0 of them right"):
        metric.compute(predictions=[[1.0, 2.0]], references=[[False, False]])
