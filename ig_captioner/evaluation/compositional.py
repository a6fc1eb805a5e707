"""Compositional sets: whether the right caption of an image scores above one that differs in a word or in order.

Their public files:

- SugarCrepe: a JSON file per category (or one of them), `{"0": {"filename", "caption", "negative_caption"}, ...}`
- ARO, Visual Genome Relation and Attribution: JSON files, `[{"image_path", "true_caption", "false_caption", "bbox_x",
  "bbox_y", "bbox_w", "bbox_h"}, ...]`; the image is cut to the box, where there is one. (ARO makes its order sets from
  captions at run time; there are no files of them.) Figures are over items; ARO's paper averages over relations.
- Winoground: `examples.jsonl` with `image_0`, `image_1`, `caption_0`, `caption_1`; caption i belongs to image i.

An item's images are found by file name without extension; a key may also end in it after an underscore:
`coco_000000000285` is `000000000285.jpg`.

Legend: M items, I images and K texts of an item. Log-likelihoods are in nats.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..captioners.scorer import CaptionScorer
from ..compiled_labels import encode_for
from ..data.samples import Samples, describe_skipped, split_by_hash
from ..data.shards import first_by_hash, image_of
from ..information_gain import IGNORE_INDEX, information_gain, linear_loss, shift_right
from .processes import map_batches
from .ranking import share_found_first, tune_prior_weight
from .rows import Contender, Row, bootstrap, contenders
from .scores import to_pixels
from .task import finish, load_models


NOTES = [
    "Shares of items whose right caption scores higher than the wrong ones; ties count against. Blind: the "
    "likelier text, log P(T), whatever the image; with two images per item it cannot be right.",
]
Question = tuple[Image.Image, list[str]]
"""An image and the texts that are asked about it."""


class Item(NamedTuple):
    """One question: text i belongs to image i, and texts beyond the number of images to none."""

    category: str
    images: tuple[str, ...]
    """File names without extension."""
    texts: tuple[str, ...]
    box: tuple[int, int, int, int] | None = None
    """Part to cut out of the image: left, top, right, bottom in pixels."""


class ItemScores(NamedTuple):
    """Scores of M items of the same number of images; where an item has fewer texts than others, -inf and 0."""

    caption_log_likelihood: Tensor
    """log P(T|I), or any other score, [M, I, K]."""
    prior_log_likelihood: Tensor
    """log P(T), [M, K]."""

    def information_gain(self, prior_weight: float) -> Tensor:
        """log P(T|I) - prior_weight * log P(T), [M, I, K]."""
        return information_gain(self.caption_log_likelihood, self.prior_log_likelihood[:, None], prior_weight)

    def blind(self) -> Tensor:
        """log P(T) as a score of every image, [M, I, K]."""
        return self.prior_log_likelihood[:, None].expand_as(self.caption_log_likelihood)

    def select(self, items: Sequence[int]) -> "ItemScores":
        return ItemScores(*(values[list(items)] for values in self))


# From arguments to results


def run(arguments: argparse.Namespace) -> int:
    """Shares of items whose right caption wins: by category, and from text only on all of them."""
    items = read_items(arguments.format, arguments.pairs)
    if arguments.limit is not None:
        chosen = first_by_hash(map(str, range(len(items))), arguments.limit)
        items = [item for index, item in enumerate(items) if str(index) in chosen]
    model, processor, clip = load_models(arguments)
    priors = prior_of_texts(model, processor.tokenizer, items)
    tables: dict[str, list[Row]] = {}
    data: dict[str, Any] = {"data": str(arguments.pairs), "items": len(items)}
    if arguments.data is not None:
        tables, data = score_items(arguments, items, priors, model, processor, clip)
    if len(items[0].images) == 1:
        tables["All items, text alone"] = [blind_row(priors, [item.category for item in items])]
    elif arguments.data is None:
        raise ValueError(f"text alone answers nothing of --format {arguments.format}: --data is missing")
    finish(arguments, model, f"Compositional understanding: {arguments.format}", tables, NOTES, data)
    return 0


def score_items(
    arguments: argparse.Namespace, items: Sequence[Item], priors: Sequence[Tensor], model, processor, clip
) -> tuple[dict[str, list[Row]], dict[str, Any]]:
    """The table of the items whose images are there, and what is in it."""
    names = {name for item in items for name in item.images}

    def decode(key: str, files: dict[str, bytes]):
        name = find_name(key, names)
        return name, None if name is None else image_of(files)

    samples = Samples(arguments.data, decode)
    size = arguments.batch_size
    all_scores = score_images(items, samples, lambda asked: score_own_texts(model, processor, asked, size))
    there = [index for index, scores in enumerate(all_scores) if scores is not None]
    if not there:
        raise ValueError(f"none of {len(items)} items has its images in {arguments.data!r}")
    priors_there = [priors[index] for index in there]
    matrix = stack_scores([all_scores[index] for index in there], priors_there)
    held_out, test = split_by_hash([items[index].images[0] for index in there], arguments.held_out_fraction)
    others = {}
    if clip is not None:
        scores_of_clip = score_images(items, samples, lambda asked: clip.score_own_texts(asked, size))
        stacked = stack_scores([scores_of_clip[index] for index in there], priors_there)
        others[arguments.clip] = stacked.caption_log_likelihood[test]
    categories = [items[there[index]].category for index in test]
    tested = contenders(matrix.select(test), tune_on(matrix.select(held_out)), others)
    data = {
        "data": str(arguments.pairs),
        "images": arguments.data,
        "items": len(items),
        "items skipped for a missing image": len(items) - len(there),
        "images skipped": describe_skipped(samples.skipped) or "none",
        "test samples": len(test),
        "held-out samples": len(held_out),
        "held-out samples are": "chosen by a hash of the first image's name, and tune the prior weight",
    }
    return {"Items with their images": [share_row(each, categories) for each in tested]}, data


# Files


def read_items(format: str, path: str | Path) -> list[Item]:
    """Items of the file, or of all such files in the folder, at `path`.

    Raises:
        ValueError: for an unknown format, a file of another form, or a folder without files.
    """
    if format not in READERS:
        raise ValueError(f"format must be one of {', '.join(READERS)}, got {format!r}")
    extension, read = READERS[format]
    path = Path(path)
    files = sorted(path.glob(f"*{extension}")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"there is no {extension} file in {path}")
    items: list[Item] = []
    for file in files:
        try:
            items += read(file.stem, file.read_text(encoding="utf-8"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is no file of {format}: {type(error).__name__}: {error}") from error
    if not items:
        raise ValueError(f"there are no items in {path}")
    return items


def _read_sugarcrepe(category: str, text: str) -> Iterable[Item]:
    for entry in json.loads(text).values():
        yield Item(category, (Path(entry["filename"]).stem,), (entry["caption"], entry["negative_caption"]))


def _read_aro(category: str, text: str) -> Iterable[Item]:
    for entry in json.loads(text):
        box = None
        if "bbox_x" in entry:
            left, top, width, height = (int(entry[f"bbox_{side}"]) for side in "xywh")
            box = (left, top, left + width, top + height)
        yield Item(category, (Path(entry["image_path"]).stem,), (entry["true_caption"], entry["false_caption"]), box)


def _read_winoground(category: str, text: str) -> Iterable[Item]:
    for entry in map(json.loads, filter(str.strip, text.splitlines())):
        images = tuple(Path(entry[name]).stem for name in ("image_0", "image_1"))
        yield Item("winoground", images, (entry["caption_0"], entry["caption_1"]))


READERS: dict[str, tuple[str, Callable[[str, str], Iterable[Item]]]] = {
    "sugarcrepe": (".json", _read_sugarcrepe),
    "aro": (".json", _read_aro),
    "winoground": (".jsonl", _read_winoground),
}


# Scores


def find_name(key: str, names: set[str]) -> str | None:
    """Finds the image name that a sample's key stands for."""
    base = key.rpartition("/")[2]
    return next((name for name in (base, base.rpartition("_")[2]) if name in names), None)


def score_images(
    items: Sequence[Item],
    images: Iterable[tuple[str, Image.Image]],
    score: Callable[[Iterable[Question]], list[Tensor]],
) -> list[Tensor | None]:
    """Scores [I, K] of each item, None where an image is missing.

    Args:
        images: name and image, read once.
        score: scores [K] of each image's own texts; it gets each image and box once, with the texts of all its items.
    """
    wanted: dict[str, list[tuple[int, int]]] = {}
    for index, item in enumerate(items):
        for place, name in enumerate(item.images):
            wanted.setdefault(name, []).append((index, place))
    asked: list[list[tuple[int, int]]] = []  # item and image in it, of each question

    def questions() -> Iterator[Question]:
        for name, image in images:
            boxes: dict[Any, list[tuple[int, int]]] = {}
            for index, place in wanted.get(name, []):
                boxes.setdefault(items[index].box, []).append((index, place))
            for box, places in boxes.items():
                asked.append(places)
                texts = [text for index, _ in places for text in items[index].texts]
                yield image if box is None else image.crop(box), texts

    found: dict[tuple[int, int], Tensor] = {}
    for scores, places in zip(score(questions()), asked, strict=True):
        found |= zip(places, scores.split([len(items[index].texts) for index, _ in places]), strict=True)
    complete = [all((index, place) in found for place in range(len(item.images))) for index, item in enumerate(items)]
    return [
        torch.stack([found[index, place] for place in range(len(item.images))]) if complete[index] else None
        for index, item in enumerate(items)
    ]


def score_own_texts(model: Any, processor: Any, questions: Iterable[Question], batch_size: int = 16) -> list[Tensor]:
    """log P(T|I) [K] of the texts of each image, which no other image sees; the batch size changes nothing."""
    if isinstance(model, CaptionScorer):
        return [model.log_likelihoods(image, texts)[0] for image, texts in questions]

    def score(batch: list[Question]) -> list[Tensor]:
        images, texts = zip(*batch, strict=True)
        counts = [len(own) for own in texts]
        encoded = encode_for(model, processor.tokenizer, [text for own in texts for text in own])
        ids = encoded["input_ids"]
        mask = encoded["attention_mask"]
        image_of_text = torch.arange(len(images)).repeat_interleave(torch.tensor(counts)).to(ids.device)
        with torch.no_grad():
            key_values, _ = model.model.encode_image(to_pixels(model, processor, list(images)))
            states = model.model.decoder(
                shift_right(ids, model.config.decoder_start_token_id, mask),
                attention_mask=mask,
                image_key_values=[(key[image_of_text], value[image_of_text]) for key, value in key_values],
                use_cache=False,
            ).last_hidden_state
            labels = ids.masked_fill(mask == 0, IGNORE_INDEX)
            head = model.lm_head
            weights = torch.ones(labels.shape, device=ids.device)  # float32, whatever the model is in
            _, token_scores = linear_loss(states, head.weight, head.bias, labels, weights)
        return list(token_scores.float().sum(dim=-1).cpu().split(counts))

    return [scores for batch in map_batches(score, questions, batch_size) for scores in batch]


def prior_of_texts(model: Any, tokenizer: Any, items: Sequence[Item]) -> list[Tensor]:
    """log P(T) [K] of each item."""
    texts = [text for item in items for text in item.texts]
    with torch.no_grad():
        if isinstance(model, CaptionScorer):
            priors = model.compile_labels(texts, "{}").texts.prior_log_likelihood.cpu()
            return list(priors.split([len(item.texts) for item in items]))
        encoded = encode_for(model, tokenizer, texts)
        priors = model.compile_texts(**encoded, with_fingerprint=False).prior_log_likelihood.cpu()
    return list(priors.split([len(item.texts) for item in items]))


def stack_scores(scores: Sequence[Tensor], priors: Sequence[Tensor]) -> ItemScores:
    """`scores`: [I, K] of each of M items, `priors`: [K]."""
    by_text = [values.T for values in scores]  # [K, I]
    stacked = pad_sequence(by_text, batch_first=True, padding_value=float("-inf")).transpose(1, 2)
    return ItemScores(stacked, pad_sequence(list(priors), batch_first=True))


# Metrics


def item_ranks(scores: Tensor) -> Tensor:
    """Counts the wrong texts that the images of an item do not rank below their own, int [M], from [M, I, K].

    Ties count against, as in `ranking.ranks`.
    """
    own = scores.diagonal(dim1=1, dim2=2)  # [M, I]
    is_own = torch.eye(*scores.shape[1:], dtype=torch.bool)
    return (~(own[:, :, None] > scores) & ~is_own).flatten(1).sum(dim=1)


def text_is_right(scores: Tensor) -> Tensor:
    """Tells whether all images of an item prefer their own text, bool [M], from [M, I, K]."""
    return item_ranks(scores) < 1


def image_is_right(scores: Tensor) -> Tensor:
    """Tells whether each text that has an image prefers it, bool [M], from [M, I, K]; the prior cancels out."""
    return text_is_right(scores[:, :, : scores.shape[1]].transpose(1, 2))


def tune_on(scores: ItemScores) -> float:
    """The prior weight with the most items whose texts are right; the first of equals."""
    return tune_prior_weight(lambda weight: item_ranks(scores.information_gain(weight)), share_found_first)


def share_row(contender: Contender, categories: Sequence[str]) -> Row:
    """Shares of right items, from scores [M, I, K]; intervals are over the items of each column."""

    def interval(values: Tensor) -> dict[str, float]:
        def share(drawn: Tensor) -> dict[str, float]:
            return {"share": values[drawn].double().mean().item()}

        return bootstrap(share, len(values))["share"]

    right = right_by_column(contender.scores, categories)
    metrics = {column: interval(values) for column, values in right.items()}
    return Row(contender.name, metrics, contender.prior_weight, contender.baseline)


def right_by_column(scores: Tensor, categories: Sequence[str]) -> dict[str, Tensor]:
    """Right items by category and over all, from [M, 1, K]; with several images, by text, image and group score."""
    by_text = text_is_right(scores)
    if scores.shape[1] > 1:
        by_image = image_is_right(scores)
        return {"text": by_text, "image": by_image, "group": by_text & by_image}
    columns = {
        category: by_text[[index for index, other in enumerate(categories) if other == category]]
        for category in sorted(set(categories))
    }
    return {**columns, "all": by_text} if len(columns) > 1 else columns


def blind_row(priors: Sequence[Tensor], categories: Sequence[str]) -> Row:
    """The one row that needs no images, over all items. `priors`: log P(T) [K] of each."""
    scores = pad_sequence(list(priors), batch_first=True, padding_value=float("-inf"))[:, None]
    return share_row(Contender("blind", scores), categories)
