"""Computations of the web demo: scores of labels and their tokens, captions, and code that gives the same. No Gradio.

The model runs once per photo and set of labels. `Scores` then holds log P(T|I) and log P(T), from which every prior
weight follows.

Legend: C labels, L tokens of a text. Log-likelihoods are in nats.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from PIL import Image

from ..captioners.own import OwnCaptionScorer
from ..captioners.scorer import CaptionScorer
from ..checkpoint import choose_device, dtype_on
from ..compiled_labels import CompiledLabels
from ..data.prompts import load_prompts
from ..information_gain import information_gain
from ..input_rules import format_labels
from ..installed import DEFAULT_CHECKPOINT
from ..release import read_in_short


LARGE_SET = "everyday"  # what the shipped checkpoint knows
MAX_KEPT_TEMPLATES = 4
UNFINISHED = "\ufffd"  # what tokenizers decode the bytes of half a character to
MAX_TOKENS_PER_CHARACTER = 5  # four bytes, and a space before them


class RankedLabel(NamedTuple):
    """A label at some prior weight; `score` is the softmax of information gain / temperature over all labels."""

    label: str
    caption_log_likelihood: float
    prior_log_likelihood: float
    information_gain: float
    score: float


@dataclass(frozen=True)
class TextTokens:
    """The tokens of a text, end-of-sequence included: ids, log P(token | image, before), log P(token | before); [L]."""

    ids: list[int]
    conditional: list[float]
    unconditional: list[float]

    @property
    def confidence(self) -> float:
        """Geometric mean of the tokens' probabilities under the image."""
        return math.exp(sum(self.conditional) / len(self.conditional))

    @property
    def information_gain(self) -> float:
        """At prior weight 1."""
        return sum(self.conditional) - sum(self.unconditional)


class Piece(NamedTuple):
    """Characters of a text, and what their token or tokens contribute; an empty text is the end of the sequence."""

    text: str
    conditional: float
    unconditional: float


@dataclass(frozen=True)
class Scores:
    """Scores of a photo for C labels in one template or more.

    Args:
        caption_log_likelihood, prior_log_likelihood: means over templates, [C].
        tokens: of each label in the first template, [C], or none.
        num_cut: how many of the texts were longer than the model reads.
        temperature, abstain_threshold: the checkpoint's. Of "none of these" there is no row.
    """

    labels: tuple[str, ...]
    templates: tuple[str, ...]
    caption_log_likelihood: list[float]
    prior_log_likelihood: list[float]
    tokens: tuple[TextTokens, ...] = ()
    num_cut: int = 0
    temperature: float = 1.0
    abstain_threshold: float | None = None

    def ranked(self, prior_weight: float, top_k: int | None = None) -> list[RankedLabel]:
        """Labels by information gain, best first; equals stay in their order."""
        both = list(zip(self.caption_log_likelihood, self.prior_log_likelihood, strict=True))
        gains = [information_gain(*pair, prior_weight) for pair in both]
        relative = [math.exp((gain - max(gains)) / self.temperature) for gain in gains]
        order = sorted(range(len(gains)), key=lambda i: -gains[i])[:top_k]
        return [RankedLabel(self.labels[i], *both[i], gains[i], relative[i] / sum(relative)) for i in order]


@dataclass(frozen=True)
class Caption:
    text: str
    tokens: TextTokens


class Captioner:
    """A checkpoint, and what the demo asks of it.

    Args:
        model: a folder, or the name of a repository on the Hub.
        device: "auto", "cpu" or "cuda".

    Raises:
        ValueError, OSError: it is no captioner that can be scored with, or there is no such device.
    """

    def __init__(self, model: str, device: str = "auto") -> None:
        self.name = model
        chosen = choose_device(device)
        self.scorer = CaptionScorer.from_pretrained(model, device=chosen, dtype=dtype_on(chosen))
        self.is_own = isinstance(self.scorer, OwnCaptionScorer)
        config = self.scorer.config
        self.prior_weight = self.scorer.default_prior_weight
        self.templates = self.scorer.default_templates
        self.in_short = read_in_short(model) if self.is_own else None
        self.settings: dict[str, Any] = {
            "temperature": getattr(config, "score_temperature", 1.0),  # a captioner of the Hub has no such settings
            "abstain_threshold": getattr(config, "abstain_threshold", None),
        }
        positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
        self.max_tokens = min(self.scorer.tokenizer.model_max_length, positions or sys.maxsize)
        self.compile_large_set = lru_cache(MAX_KEPT_TEMPLATES)(self._compile_large_set)

    def read(self, photo: Image.Image) -> Any:
        """Turns an RGB image into what is kept of it, to be scored and captioned."""
        return self.scorer.prepare(photo)

    def classify(self, image: Any, labels: Sequence[str], templates: Sequence[str]) -> Scores:
        """Scores of labels, and of every token of each."""
        texts = format_labels(list(labels), list(templates))
        tokens = self._tokens(image, texts)
        lengths = self.scorer.tokenizer(texts, verbose=False)
        return Scores(
            tuple(labels),
            tuple(templates),
            _means_over_templates([sum(text.conditional) for text in tokens], len(labels)),
            _means_over_templates([sum(text.unconditional) for text in tokens], len(labels)),
            tuple(tokens[: len(labels)]),
            sum(len(ids) > self.max_tokens for ids in lengths["input_ids"]),
            **self.settings,
        )

    def classify_large_set(self, image: Any, templates: Sequence[str]) -> Scores:
        """Scores of the large set of names, whose texts are compiled once per set of templates."""
        compiled = self.compile_large_set(tuple(templates))
        scores = self.scorer.score(image, compiled)
        caption = scores.caption_log_likelihood[0].tolist()
        prior = scores.prior_log_likelihood.tolist()
        return Scores(compiled.labels, compiled.templates, caption, prior, **self.settings)

    def _compile_large_set(self, templates: tuple[str, ...]) -> CompiledLabels:
        return self.scorer.compile_labels(large_set(), templates)

    def caption(self, image: Any) -> Caption:
        """The caption that the model writes, scored as a text of its own."""
        text = self.scorer.caption(image)[0]
        return Caption(text, self._tokens(image, [text])[0])

    def _tokens(self, image: Any, texts: Sequence[str]) -> list[TextTokens]:
        """Both log-probabilities of every token of the texts."""
        return [TextTokens(*each) for each in self.scorer.tokens_of_texts(image, texts)]

    def pieces(self, tokens: TextTokens) -> list[Piece]:
        """Tokens as text, the end of the sequence last. Those that make no whole character are taken together."""
        pieces = []
        start = 0
        before = ""
        last = len(tokens.ids) - 1
        for end in range(1, last + 1):
            now = self.scorer.tokenizer.decode(tokens.ids[:end])
            text = now.removeprefix(before) if now.startswith(before) else now[-1:]
            is_whole = text.strip() and not text.endswith(UNFINISHED)
            if is_whole or end == last or end - start == MAX_TOKENS_PER_CHARACTER:
                group = slice(start, end)
                pieces.append(Piece(text, sum(tokens.conditional[group]), sum(tokens.unconditional[group])))
                start = end
                before = now
        return [*pieces, Piece("", tokens.conditional[last], tokens.unconditional[last])]


def _means_over_templates(values: Sequence[float], num_labels: int) -> list[float]:
    """Means [C] of the values of T x C texts, template by template."""
    of_label = (values[label::num_labels] for label in range(num_labels))
    return [sum(own) / len(own) for own in of_label]


@lru_cache
def large_set() -> tuple[str, ...]:
    """Names of everyday things, all different."""
    return tuple(load_prompts(LARGE_SET).class_names)


def as_code(model: str, scores: Scores, prior_weight: float) -> str:
    """Python that gives the same scores: a call of the pipeline on `photo.jpg`."""
    is_shipped = model == DEFAULT_CHECKPOINT
    never_abstain = "" if scores.abstain_threshold is None else '    abstain_threshold=float("-inf"),\n'
    template = scores.templates[0] if len(scores.templates) == 1 else list(scores.templates)
    names = ["IGZeroShotImageClassificationPipeline"]
    if is_shipped:
        names.insert(0, "DEFAULT_CHECKPOINT")
    return f"""\
from transformers import pipeline

from ig_captioner import {", ".join(names)}

classify = pipeline(
    "zero-shot-image-classification",
    model={"DEFAULT_CHECKPOINT" if is_shipped else repr(model)},
    pipeline_class=IGZeroShotImageClassificationPipeline,
)
predictions = classify(
    "photo.jpg",
    candidate_labels={list(scores.labels)!r},
    hypothesis_template={template!r},
    prior_weight={prior_weight!r},
{never_abstain}    return_log_likelihoods=True,
)
for row in predictions:
    print(row["label"], row["information_gain"], row["score"])
"""
