"""Captions against reference captions: CIDEr-D, BLEU and METEOR, without Java.

CIDEr-D is here, as no maintained package has it without heavy requirements; BLEU is that of sacrebleu and METEOR that
of nltk (the extra `evaluate`), with synonyms from WordNet, which `python -m nltk.downloader wordnet` fetches once.
Texts are lower-cased words without punctuation, where published figures come from the PTB tokenizer of Stanford and
from Meteor 1.5, in Java: they are close, not equal.

Legend: B images; n-grams are tuples of words.
"""

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..captioners.arguments import load_scorer
from ..captioners.scorer import CaptionScorer
from ..data.samples import Samples, captioned, separate
from .processes import is_first, map_batches
from .rows import Row, bootstrap
from .task import describe_samples, finish


LONGEST = 4  # words of an n-gram
SIGMA = 6.0  # words by which lengths may differ

Ngrams = Counter[tuple[str, ...]]


# From arguments to results


def run(arguments: argparse.Namespace) -> int:
    """CIDEr-D, BLEU-4 and METEOR of generated captions; the captions go to `captions.jsonl`."""
    search, name = search_options(arguments)
    scorer = load_scorer(arguments)
    samples = Samples(arguments.data, captioned, arguments.limit)
    images, references = separate(samples)
    captions = generate_captions(scorer, images, arguments.batch_size, **search)
    row = captioning_row(name, captions, references)
    if is_first():
        write_captions(arguments.output, samples.keys, captions, references)
    data = {**describe_samples(arguments, samples), "different captions": len(set(captions))}
    finish(arguments, scorer, "Captioning", {"Captions": [row]}, notes_on(row.metrics), data)
    return 0


def search_options(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """What `generate()` takes, and the name of the row. Raises ValueError for a length penalty without beams."""
    options = {"num_beams": arguments.num_beams, "max_new_tokens": arguments.max_new_tokens}
    name = f"{arguments.num_beams} beams" if arguments.num_beams > 1 else "greedy"
    if (penalty := arguments.length_penalty) is not None:
        if arguments.num_beams == 1:
            raise ValueError(f"--length-penalty {penalty:g} chooses among beams, but there is one: see --num-beams")
        options["length_penalty"] = penalty
        name += f", length penalty {penalty:g}"
    return options, name


def write_captions(folder: Path, keys: list[str], captions: list[str], references: list[list[str]]) -> None:
    """Writes `captions.jsonl`: key, caption and references of each image."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "captions.jsonl", "w", encoding="utf-8") as file:
        for key, caption, own in zip(keys, captions, references, strict=True):
            file.write(json.dumps({"key": key, "caption": caption, "references": own}, ensure_ascii=False) + "\n")


def notes_on(metrics: Collection[str]) -> list[str]:
    """Notes on the metrics that are there, and why others are not."""
    notes = [
        "CIDEr-D at most 1000 %. Words are split without Stanford's PTB tokenizer, so that published figures are not "
        "strictly comparable; the weights of words come from these images' references."
    ]
    if "bleu4" not in metrics:
        notes.append("No BLEU: sacrebleu is not installed.")
    if "meteor" in metrics:
        notes.append("METEOR is that of nltk (2007: exact words, stems, WordNet's synonyms), not Meteor 1.5 in Java.")
    else:
        notes.append("No METEOR: nltk or its WordNet is not installed (python -m nltk.downloader wordnet).")
    return notes


# Captions


def words(text: str) -> list[str]:
    """Lower-cased words; "don't" is one."""
    return re.findall(r"\w+(?:'\w+)*", text.lower())


def generate_captions(
    scorer: CaptionScorer, images: Iterable[Image.Image], batch_size: int = 16, **options: Any
) -> list[str]:
    """A caption for each image. `options` go to `CaptionScorer.caption`."""
    written = map_batches(lambda batch: scorer.caption(batch, **options), images, batch_size)
    return [caption for captions in written for caption in captions]


# CIDEr-D


def count_ngrams(text: str) -> Ngrams:
    """Counts the n-grams of 1 to 4 words."""
    listed = words(text)
    spans = ((start, start + n) for n in range(1, LONGEST + 1) for start in range(len(listed) - n + 1))
    return Counter(tuple(listed[start:end]) for start, end in spans)


def cider_d(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Tensor:
    """CIDEr-D of each image, float64 [B], 10 at most (Vedantam et al., arXiv 1411.5726, section 4 and appendix).

    N-grams weigh the less, the more images have them among their references. The corpus figure is the mean.

    Args:
        captions: one for each of B images.
        references: one or more for each.

    Raises:
        ValueError: for an image without references, or other numbers of captions than of images.
    """
    if len(captions) != len(references) or not all(references):
        without = sum(not own for own in references)
        raise ValueError(f"{len(captions)} captions, {len(references)} images, {without} of them without references")
    counted = [[count_ngrams(text) for text in own] for own in references]
    images_with = Counter(ngram for own in counted for ngram in set().union(*own))
    weight_of = {ngram: math.log(len(captions) / count) for ngram, count in images_with.items()}
    unseen = math.log(len(captions))
    scores = []
    for caption, own in zip(captions, counted, strict=True):
        ngrams = count_ngrams(caption)
        similar = [_similarity(ngrams, reference, weight_of, unseen) for reference in own]
        scores.append(10 * sum(similar) / len(similar))
    return torch.tensor(scores, dtype=torch.float64)


def _similarity(caption: Ngrams, reference: Ngrams, weight_of: dict, unseen: float) -> float:
    """Mean over n of the clipped cosine, less for different lengths."""
    ours, theirs = (
        {ngram: count * weight_of.get(ngram, unseen) for ngram, count in ngrams.items()}
        for ngrams in (caption, reference)
    )
    cosines = []
    for n in range(1, LONGEST + 1):
        norms = [math.sqrt(sum(v**2 for ngram, v in vector.items() if len(ngram) == n)) for vector in (ours, theirs)]
        shared = (ngram for ngram in ours if ngram in theirs and len(ngram) == n)
        dot = sum(min(ours[ngram], theirs[ngram]) * theirs[ngram] for ngram in shared)
        cosines.append(dot / math.prod(norms) if all(norms) else 0.0)
    lengths = [sum(count for ngram, count in ngrams.items() if len(ngram) == 1) for ngrams in (caption, reference)]
    return sum(cosines) / LONGEST * math.exp(-((lengths[0] - lengths[1]) ** 2) / (2 * SIGMA**2))


# METEOR


def load_wordnet() -> Any:
    """nltk's WordNet; None where nltk or WordNet's files are missing."""
    try:
        from nltk.corpus import wordnet

        wordnet.ensure_loaded()
    except (ImportError, LookupError):
        return None
    return wordnet


def meteor(captions: Sequence[str], references: Sequence[Sequence[str]], wordnet: Any) -> Tensor:
    """METEOR of each image with its best reference, float64 [B], 1 at most (Lavie and Agarwal, 2007).

    Words match if they are equal, of one stem, or synonyms; the fewer runs of words they make, the better.

    Args:
        wordnet: has `synsets(word)`, as that of nltk.
    """
    from nltk.translate.meteor_score import meteor_score

    scores = [
        meteor_score([words(text) for text in own], words(caption), wordnet=wordnet)
        for caption, own in zip(captions, references, strict=True)
    ]
    return torch.tensor(scores, dtype=torch.float64)


# Rows


def captioning_row(name: str, captions: Sequence[str], references: Sequence[Sequence[str]]) -> Row:
    """CIDEr-D and, where what they need is installed, BLEU-4 and METEOR.

    Intervals are over images, with the weights of all of them.
    """
    means = {"cider_d": cider_d(captions, references)}
    if (wordnet := load_wordnet()) is not None:
        means["meteor"] = meteor(captions, references, wordnet)
    statistics = _bleu_statistics(captions, references)

    def metrics(drawn: Tensor) -> dict[str, float]:
        bleu = {} if statistics is None else {"bleu4": _bleu(statistics[drawn].sum(dim=0))}
        return {**{metric: scores[drawn].mean().item() for metric, scores in means.items()}, **bleu}

    return Row(name, bootstrap(metrics, len(captions)))


def _bleu_statistics(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Tensor | None:
    """Lengths of caption and closest reference, matching and all n-grams, int [B, 10]; None without sacrebleu."""
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        return None
    bleu = BLEU(tokenize="none", effective_order=True)
    rows = []
    for caption, own in zip(captions, references, strict=True):
        score = bleu.sentence_score(" ".join(words(caption)), [" ".join(words(text)) for text in own])
        rows.append([score.sys_len, score.ref_len, *score.counts, *score.totals])
    return torch.tensor(rows)


def _bleu(statistics: Tensor) -> float:
    """BLEU-4 of a corpus, 0 to 1, from the sums of `_bleu_statistics` over its images."""
    from sacrebleu.metrics import BLEU

    length, reference_length, *counts = statistics.tolist()
    correct = counts[:LONGEST]
    total = counts[LONGEST:]
    return BLEU.compute_bleu(correct, total, length, reference_length, smooth_method="none").score / 100
