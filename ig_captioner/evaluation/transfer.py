"""Tasks of `ig-captioner evaluate` that fit something to the frozen image encoder first: linear-probe and lit.

They go from arguments to results as those in `tasks.py` do.
"""

import argparse
from typing import Any

from torch import tensor

from ..data.prompts import read_class_names
from ..data.samples import Samples, captioned, describe_skipped, label_from_field, labelled_decoder, split_by_hash
from .linear_probe import choose_shots, count_shots, mean_pooled_features, probe_row
from .lit import IMAGES_PER_PASS, DualEncoder, Recipe, choose_tower, read_pairs
from .rows import class_row, image_to_text_row, text_to_image_row
from .scores import true_pairs
from .task import choose_templates, describe_samples, finish, load_models


LINEAR_PROBE_NOTES = [
    "Ridge regression onto one-hot labels. The shots are one fixed choice by hash of the key; the intervals do not "
    "say how much another choice would change.",
]
LIT_NOTES = [
    "The image encoder is frozen; the text tower and a linear projection on each side are trained from scratch, "
    "with the learning rate that has the lowest geometric mean rank on the held-out training pairs. Tested on the "
    "samples that the tasks zero-shot and retrieval test on.",
]


def linear_probe(arguments: argparse.Namespace) -> int:
    """Top-1, top-5 and mean per class of a linear map, fitted to a few images per class."""
    class_names = read_class_names(arguments.class_names)
    if len(set(class_names)) < len(class_names):
        raise ValueError(f"{arguments.class_names} has several classes of one name: a probe cannot tell them apart")
    model, processor, clip = load_models(arguments)
    decode = labelled_decoder(label_from_field(class_names, arguments.label_field))
    train, test = Samples(arguments.train, decode), Samples(arguments.data, decode, arguments.limit)
    all_labels = [label for _, label in train]
    shots = choose_shots(train.keys, all_labels, arguments.shots)
    labels = tensor([all_labels[index] for index in shots]), tensor([label for _, label in test])
    split = split_by_hash(test.keys, arguments.held_out_fraction)

    def row(name: str, embed, baseline: bool = False):
        chosen = set(shots)
        of_shots = embed((image for index, (image, _) in enumerate(train) if index in chosen))
        of_test = embed((image for image, _ in test))
        return probe_row(name, (of_shots, labels[0]), (of_test, labels[1]), split, len(class_names), baseline)

    size = arguments.batch_size
    rows = [row("mean of the patches", lambda images: mean_pooled_features(model, processor, images, size))]
    if clip is not None:
        rows.append(row(arguments.clip, lambda images: clip.embed_images(images, size), baseline=True))
    data = {
        **describe_samples(arguments, test, split, tuned="penalty"),
        "train": arguments.train,
        "shots": count_shots(labels[0].tolist()),
    }
    finish(arguments, model, "Linear probe", {f"{len(class_names)} classes": rows}, LINEAR_PROBE_NOTES, data)
    return 0


def lit(arguments: argparse.Namespace) -> int:
    """Recall and accuracy of a text tower that is trained for the frozen image encoder."""
    if arguments.data is None and arguments.labelled is None:
        raise ValueError("nothing to test on: give --data for retrieval, --labelled for classification, or both")
    if arguments.labelled is not None and arguments.class_names is None:
        raise ValueError("--labelled needs --class-names")
    model, processor, _ = load_models(arguments)
    train = Samples(arguments.train, captioned)
    pairs = read_pairs(model, processor, train)
    held_out, fit = split_by_hash(train.keys, arguments.held_out_fraction)
    recipe = Recipe(**{name: getattr(arguments, name) for name in ("steps", "batch_size", "width", "layers", "seed")})
    recipes = [recipe._replace(learning_rate=rate) for rate in arguments.learning_rates]
    parts = pairs.select(fit), pairs.select(held_out)
    tower, selection = choose_tower(*parts, processor.tokenizer, recipes, model.device)
    tables: dict[str, list] = {}
    data: dict[str, Any] = {
        "train": arguments.train,
        "skipped in training": describe_skipped(train.skipped) or "none",
        "training samples": len(fit),
        "held-out training samples": len(held_out),
    }
    if arguments.data is not None:
        tables |= _lit_retrieval(arguments, model, processor, tower, data)
    if arguments.labelled is not None:
        tables |= _lit_classification(arguments, model, processor, tower, data)
    tables["Learning rates on held-out training pairs, image to text"] = selection
    finish(arguments, model, "LiT tuning", tables, LIT_NOTES, data)
    return 0


def _lit_retrieval(arguments: argparse.Namespace, model, processor, tower: DualEncoder, data: dict) -> dict[str, list]:
    samples = Samples(arguments.data, captioned, arguments.limit)
    pairs = read_pairs(model, processor, samples)
    test = split_by_hash(samples.keys, arguments.held_out_fraction)[1]
    features, captions = pairs.select(test)
    texts = [caption for own in captions for caption in own]
    owners = tensor([image for image, own in enumerate(captions) for _ in own])
    scores, is_true = tower.score(features, texts), true_pairs(captions, texts)
    data |= {"data": arguments.data, "skipped": describe_skipped(samples.skipped) or "none"}
    data |= {"test samples": len(test), "texts": len(texts)}
    return {
        "Image to text": [image_to_text_row("LiT", scores, is_true, baseline=False)],
        "Text to image": [text_to_image_row("LiT", scores, is_true, owners)],
    }


def _lit_classification(
    arguments: argparse.Namespace, model, processor, tower: DualEncoder, data: dict
) -> dict[str, list]:
    class_names, templates = read_class_names(arguments.class_names), choose_templates(arguments, model.config)
    decode = labelled_decoder(label_from_field(class_names, arguments.label_field))
    samples, labels = Samples(arguments.labelled, decode, arguments.limit), list[int]()

    def images():
        for image, label in samples:
            labels.append(label)
            yield image

    features = mean_pooled_features(model, processor, images(), IMAGES_PER_PASS)
    test = split_by_hash(samples.keys, arguments.held_out_fraction)[1]
    scores = tower.score_classes(features[test], class_names, templates)
    row = class_row("LiT", scores, tensor(labels)[test], class_names, baseline=False)
    del row["confusion"]
    data |= {"labelled": arguments.labelled, "skipped of labelled": describe_skipped(samples.skipped) or "none"}
    data |= {"labelled test samples": len(test), "classes": len(class_names), "templates": len(templates)}
    return {f"{len(class_names)} classes": [row]}
