"""Image-text retrieval: captioned images to recall and median rank, both ways.

An image may have several captions, the best of them counts.

Legend: B images, N texts. Log-likelihoods are in nats.
"""

import argparse
from collections.abc import Iterator

from PIL import Image
from torch import Tensor, tensor

from ..captioners.arguments import read_prior
from ..data.samples import Samples, captioned, split_by_hash
from .ranking import ranks, recall_metrics, true_pairs, tune_prior_weight
from .rows import Contender, Row, contenders, gain_row, make_row
from .scores import ScoreMatrix, score_pairs
from .task import describe_samples, finish, load_models


NOTES = [
    "Every image ranks the captions of all test images, and every caption all test images; of several right "
    "answers the best counts, and ties count against. Blind: the likeliest text, log P(T), whatever the image.",
]


def run(arguments: argparse.Namespace) -> int:
    """Recall and median rank, image to text and text to image."""
    model, processor, clip = load_models(arguments)
    # Read three times: the texts have to be known before the first image is scored, and images may not fit in memory.
    samples = Samples(arguments.data, captioned, arguments.limit)
    captions = [own[: arguments.captions] for _, own in samples]
    split = split_by_hash(samples.keys, arguments.held_out_fraction)
    options = {"batch_size": arguments.batch_size, **read_prior(arguments)}

    def images_of(indices: list[int]) -> Iterator[Image.Image]:
        chosen = set(indices)
        return (image for index, (image, _) in enumerate(samples) if index in chosen)

    def texts_of(indices: list[int]) -> list[str]:
        return [caption for index in indices for caption in captions[index]]

    def score(indices: list[int]) -> tuple[ScoreMatrix, Tensor]:
        texts = texts_of(indices)
        matrix = score_pairs(model, processor, images_of(indices), texts, **options)
        return matrix, true_pairs([captions[index] for index in indices], texts)

    held_out, test = map(score, split)
    others = {}
    if clip is not None:
        images = clip.embed_images(images_of(split[1]), batch_size=arguments.batch_size)
        others[arguments.clip] = images @ clip.embed_texts(texts_of(split[1])).T
    owners = tensor([image for image, index in enumerate(split[1]) for _ in captions[index]])
    tables = {
        "Image to text": image_to_text_rows(held_out, test, others),
        "Text to image": text_to_image_rows(test[0], test[1], owners, others),
        "True pairs": [gain_row(*test)],
    }
    data = {**describe_samples(arguments, samples, split), "texts": len(owners)}
    finish(arguments, model, "Image-text retrieval", tables, NOTES, data)
    return 0


# Rows


def image_to_text_rows(
    held_out: tuple[ScoreMatrix, Tensor], test: tuple[ScoreMatrix, Tensor], others: dict[str, Tensor] | None = None
) -> list[Row]:
    """Rows of recall, median rank, and how many different texts come first.

    Args:
        held_out, test: scores of B images and N texts, and which of them belong together, bool [B, N].
        others: scores [B, N] of other models on the test images, by name.
    """
    matrix, is_true = held_out
    tuned = tune_prior_weight(lambda weight: ranks(matrix.information_gain(weight), is_true))
    return [image_to_text_row(each, test[1]) for each in contenders(test[0], tuned, others)]


def image_to_text_row(contender: Contender, is_true: Tensor) -> Row:
    """The row of scores [B, N]; intervals are over images, and there is none of the number of texts."""
    found = ranks(contender.scores, is_true)
    row = make_row(contender, lambda drawn: recall_metrics(found[drawn]), len(found))
    row.metrics["distinct_top1"] = {"value": contender.scores.argmax(dim=1).unique().numel()}
    return row


def text_to_image_rows(
    matrix: ScoreMatrix, is_true: Tensor, owners: Tensor, others: dict[str, Tensor] | None = None
) -> list[Row]:
    """Rows of recall and median rank: one for all prior weights, as the prior of a text is the same for all images."""
    ours = Contender("any prior weight", matrix.caption_log_likelihood, baseline=False)
    all_of_them = [ours, *(Contender(*other) for other in (others or {}).items())]
    return [text_to_image_row(each, is_true, owners) for each in all_of_them]


def text_to_image_row(contender: Contender, is_true: Tensor, owners: Tensor) -> Row:
    """The row of scores [B, N].

    Args:
        owners: the image of each text, int [N]; intervals are over images, each with all of its texts.
    """
    found = ranks(contender.scores.T, is_true.T)

    def metrics(drawn: Tensor) -> dict[str, float]:
        times = drawn.bincount(minlength=len(is_true))[owners]
        return recall_metrics(found.repeat_interleave(times))

    return make_row(contender, metrics, len(is_true))
