"""What is measured of a finished run: CIFAR-10 test and Flickr8k-val, weights tuned on training keys held out.

Tables are rows as in `ig_captioner.evaluation.rows`. Those of a captioner come under four names: P(T) without an image
(`unconditional`) or as the mean of P(T|I) over training images (`reference images`), and either with log-likelihoods
per text, or `per token`, divided by their number of tokens.

Shapes: B images, N texts.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ig_captioner.compiled_labels import encode_for
from ig_captioner.data.prompts import load_prompts
from ig_captioner.data.samples import label_from_field, labelled_decoder
from ig_captioner.data.shards import (
    Skipped,
    find_shards,
    first_by_hash,
    image_of,
    is_held_out,
    read_captions,
    read_decoded,
    read_shard,
)
from ig_captioner.evaluation.contrastive import ContrastiveModel
from ig_captioner.evaluation.ranking import true_pairs
from ig_captioner.evaluation.retrieval import (
    image_to_text_row,
    image_to_text_rows,
    text_to_image_row,
    text_to_image_rows,
)
from ig_captioner.evaluation.rows import Contender, Row, contenders
from ig_captioner.evaluation.scores import ScoreMatrix, score_pairs
from ig_captioner.evaluation.zero_shot import class_row, confusion, tune_on


CLASS_NAMES = load_prompts("cifar10").class_names
TEMPLATE = "a photo of a {}."
CLASS_TEXTS = [TEMPLATE.format(name) for name in CLASS_NAMES]
TEST_SHARDS = {"cifar10": "cifar10-test-0000.tar.gz", "flickr8k": "flickr8k-val-0000.tar"}
TRAIN_SHARDS = {"cifar10": "cifar10-train-{0000..0004}.tar.gz", "flickr8k": "flickr8k-train-{0000..0003}.tar"}
BATCH_SIZE = 32


class TestSet(NamedTuple):
    """Photos with what is true of them: class indices, or a caption each."""

    images: list[Image.Image]
    labels: list[Any]


class TestData(NamedTuple):
    cifar10: tuple[TestSet, TestSet]
    """Held out of the training shards, and the test shard."""
    flickr8k: tuple[TestSet, TestSet]
    references: list[Image.Image]
    """Training images, half of each set."""


def load_test_data(data_root: str, holdout: float, test_captions: int, reference_images: int) -> TestData:
    """Raises FileNotFoundError naming a shard that is not there."""
    decode_class = labelled_decoder(label_from_field(CLASS_NAMES))

    def decode_caption(key: str, files: dict[str, bytes]) -> tuple[Image.Image, str]:
        return image_of(files), read_captions(files)[0]

    def read(shards: str, decode: Any, keep: Callable[[str], bool]) -> TestSet:
        items = read_decoded(find_shards([shards], data_root), decode, keep=keep)
        images, labels = zip(*(item for item in items if not isinstance(item, Skipped)), strict=True)
        return TestSet(list(images), list(labels))

    def keys(shards: str) -> Iterable[str]:
        for path in find_shards([shards], data_root):
            yield from (item[0] for item in read_shard(path) if not isinstance(item, Skipped))

    sets = {}
    references = []
    for name, decode in (("cifar10", decode_class), ("flickr8k", decode_caption)):
        trained = (key for key in keys(TRAIN_SHARDS[name]) if not is_held_out(key, holdout))
        chosen = first_by_hash(trained, reference_images // 2)
        references += read(TRAIN_SHARDS[name], decode, chosen.__contains__).images
        tested = first_by_hash(keys(TEST_SHARDS[name]), test_captions if name == "flickr8k" else None)
        sets[name] = (
            read(TRAIN_SHARDS[name], decode, lambda key: is_held_out(key, holdout)),
            read(TEST_SHARDS[name], decode, tested.__contains__),
        )
    return TestData(**sets, references=references)


# Captioners


def evaluate_captioner(model: Any, processor: Any, data: TestData) -> dict[str, Any]:
    """Tables by name, see the module's docstring."""
    model.eval()
    pixels = processor.image_processor(images=data.references, return_tensors="pt")["pixel_values"]
    references = pixels.to(model.device, model.dtype)

    def scores(images: list[Image.Image], texts: list[str]) -> dict[str, ScoreMatrix]:
        matrix = score_pairs(model, processor, images, texts, batch_size=BATCH_SIZE)
        encoded = encode_for(model, processor.tokenizer, texts)
        mean_over_images = model.compile_texts(**encoded, reference_pixel_values=references).prior_log_likelihood.cpu()
        both = {"unconditional": matrix, "reference images": matrix._replace(prior_log_likelihood=mean_over_images)}
        return both | {f"{name}, per token": per_token(each) for name, each in both.items()}

    held_out, test = data.cifar10
    images = held_out.images + test.images
    labels = torch.tensor(held_out.labels + test.labels)
    split = [*range(len(held_out.images))], [*range(len(held_out.images), len(images))]
    classified = scores(images, CLASS_TEXTS)
    tables: dict[str, list[Row]] = {
        f"CIFAR-10, {name}": class_rows(matrix, labels, split) for name, matrix in classified.items()
    }
    tables |= {
        f"CIFAR-10 held out, {name}": class_rows(matrix, labels, (split[0], split[0]))
        for name, matrix in classified.items()
    }
    pairs = {}
    for part, (photos, captions) in zip(("held out", "test"), data.flickr8k, strict=True):
        pairs[part] = scores(photos, captions), true_pairs([[caption] for caption in captions], captions)
    for name in classified:
        held_out_pair, test_pair = ((matrices[name], is_true) for matrices, is_true in pairs.values())
        tables[f"Flickr8k image to text, {name}"] = image_to_text_rows(held_out_pair, test_pair)
        tables[f"Flickr8k held out, {name}"] = image_to_text_rows(held_out_pair, held_out_pair)
    matrices, is_true = pairs["test"]
    owners = torch.arange(len(is_true))
    tables["Flickr8k text to image"] = text_to_image_rows(matrices["unconditional"], is_true, owners)
    return as_dicts(tables)


def class_rows(matrix: ScoreMatrix, labels: Tensor, split: tuple[list[int], list[int]]) -> list[Row]:
    """Rows of CIFAR-10, tuned on the first part of the split and measured on the second."""
    held_out, test = split
    tuned = tune_on(matrix.select(held_out), labels[held_out], CLASS_NAMES)
    return [class_row_with_confusion(each, labels[test]) for each in contenders(matrix.select(test), tuned)]


def class_row_with_confusion(contender: Contender, labels: Tensor) -> Row:
    row = class_row(contender, labels, CLASS_NAMES)
    row.details["confusion"] = confusion(contender.scores, labels).tolist()
    return row


def as_dicts(tables: dict[str, list[Row]]) -> dict[str, Any]:
    """The tables as results files hold them."""
    return {name: [row.as_dict() for row in rows] for name, rows in tables.items()}


def per_token(matrix: ScoreMatrix) -> ScoreMatrix:
    lengths = matrix.text_lengths
    return ScoreMatrix(matrix.caption_log_likelihood / lengths, matrix.prior_log_likelihood / lengths, lengths)


# CLIP


def evaluate_contrastive(model: ContrastiveModel, data: TestData) -> dict[str, Any]:
    """The same tables, with one row each."""
    classes = model.embed_texts(CLASS_TEXTS)
    tables: dict[str, list[Row]] = {}
    for name, part in zip(("CIFAR-10 held out", "CIFAR-10"), data.cifar10, strict=True):
        scores = model.embed_images(part.images, BATCH_SIZE) @ classes.T
        tables[name] = [class_row_with_confusion(Contender("CLIP", scores), torch.tensor(part.labels))]
    for name, part in zip(("held out", "image to text"), data.flickr8k, strict=True):
        scores = model.embed_images(part.images, BATCH_SIZE) @ model.embed_texts(part.labels).T
        is_true = true_pairs([[caption] for caption in part.labels], part.labels)
        tables[f"Flickr8k {name}"] = [image_to_text_row(Contender("CLIP", scores), is_true)]
    tables["Flickr8k text to image"] = [
        text_to_image_row(Contender("CLIP", scores), is_true, torch.arange(len(is_true)))
    ]
    return as_dicts(tables)


# What learning rates are chosen by


def quality(tables: dict[str, Any]) -> float:
    """Mean of top-1 on CIFAR-10 and R@10 on Flickr8k, image to text, on held-out samples; at the tuned weight."""

    def best(prefix: str, metric: str) -> float:
        rows = tables.get(f"{prefix}, unconditional") or tables[prefix]
        row = next((row for row in rows if row["name"] == "tuned"), rows[0])
        return row["metrics"][metric]["value"]

    return (best("CIFAR-10 held out", "top1") + best("Flickr8k held out", "recall_at_10")) / 2
