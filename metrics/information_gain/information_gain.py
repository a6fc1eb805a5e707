"""How much of a caption the image explains: log P(T|I) - log P(T), in nats per text and per token.

metric = evaluate.load("metrics/information_gain")
metric.compute(predictions=caption_log_likelihoods, references=prior_log_likelihoods, num_tokens=num_tokens)
"""

import datasets
import evaluate
import numpy as np


DESCRIPTION = """\
Information gain of texts from their images, log P(T|I) - prior_weight * log P(T), in nats: the mean over texts, and the
sum over texts divided by the number of their tokens. At weight 1 it is the pointwise mutual information of both.
"""
INPUTS = """
Args:
    predictions: log P(T|I) in nats of each text under its own image, a sum over tokens.
    references: log P(T) in nats of each text.
    num_tokens: scored tokens of each text, end-of-sequence included; without them there is no gain per token.
    prior_weight: of log P(T) (default: 1).

Returns:
    information_gain: mean over texts, in nats.
    information_gain_per_token: in nats per token, if num_tokens was given.
"""
CITATION = """\
@inproceedings{ig_captioner,
    title={IG Captioner: Information Gain Captioners are Strong Zero-shot Classifiers},
    booktitle={ECCV},
    year={2024},
    note={arXiv 2311.17072},
}
"""


UNKNOWN = -1  # in place of a number of tokens: all modules of evaluate need all their columns


class InformationGain(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = {name: datasets.Value("float64") for name in ("predictions", "references")}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({**features, "num_tokens": datasets.Value("int64")}),
        )

    def compute(self, *, predictions=None, references=None, num_tokens=None, **kwargs):
        """As in evaluate; `num_tokens` may be left out."""
        if predictions is not None:
            kwargs["num_tokens"] = [UNKNOWN] * len(predictions) if num_tokens is None else num_tokens
        return super().compute(predictions=predictions, references=references, **kwargs)

    def add_batch(self, *, predictions=None, references=None, num_tokens=None, **kwargs):
        """As in evaluate; `num_tokens` may be left out."""
        num_tokens = [UNKNOWN] * len(predictions) if num_tokens is None else num_tokens
        return super().add_batch(predictions=predictions, references=references, num_tokens=num_tokens, **kwargs)

    def add(self, *, prediction=None, reference=None, num_tokens=UNKNOWN, **kwargs):
        """As in evaluate; `num_tokens` may be left out."""
        return super().add(prediction=prediction, reference=reference, num_tokens=num_tokens, **kwargs)

    def _compute(self, predictions, references, num_tokens, prior_weight: float = 1.0) -> dict[str, float]:
        gain = np.asarray(predictions) - prior_weight * np.asarray(references)
        tokens = np.asarray(num_tokens)
        if (tokens == UNKNOWN).all():
            return {"information_gain": float(gain.mean())}
        if not (tokens > 0).all():
            raise ValueError(f"every text has at least one token, got num_tokens {tokens.min()}")
        return {
            "information_gain": float(gain.mean()),
            "information_gain_per_token": float(gain.sum() / tokens.sum()),
        }
