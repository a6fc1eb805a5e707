"""Few-shot linear probe: ridge regression from frozen features to one-hot labels, in closed form.

CapPa is evaluated by such a probe with 10 shots. What this one does in detail: features are the mean over the encoder's
patches, scaled to mean 0 and variance 1 over the shots; the bias is not penalised; the penalty is the best of a grid on
held-out images of the test data.

Legend: B images, S shots in all, C classes, E width of the features.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..data.prompts import read_class_names
from ..data.samples import split_by_hash
from ..data.shards import first_by_hash
from .processes import map_batches
from .ranking import accuracies, best_of_grid, ranks, share_found_first
from .rows import Contender, Row, make_row
from .scores import to_pixels
from .task import describe_samples, finish, labelled_samples, load_models


PENALTIES = tuple(4.0**power for power in range(-6, 7))
NOTES = [
    "Ridge regression onto one-hot labels. The shots are one fixed choice by hash of the key; the intervals do not "
    "say how much another choice would change.",
]


def run(arguments: argparse.Namespace) -> int:
    """Top-1, top-5 and mean per class of a linear map, fitted to a few images per class."""
    class_names = read_class_names(arguments.class_names)
    if len(set(class_names)) < len(class_names):
        raise ValueError(f"{arguments.class_names} has several classes of one name: a probe cannot tell them apart")
    model, processor, clip = load_models(arguments)
    train = labelled_samples(arguments, arguments.train, class_names, None)
    test = labelled_samples(arguments, arguments.data, class_names, arguments.limit)
    all_labels = [label for _, label in train]
    shots = choose_shots(train.keys, all_labels, arguments.shots)
    shot_labels = torch.tensor([all_labels[index] for index in shots])
    labels = torch.tensor([label for _, label in test])
    split = split_by_hash(test.keys, arguments.held_out_fraction)

    def row(name: str, embed: Callable[[Iterator[Image.Image]], Tensor], baseline: bool) -> Row:
        chosen = set(shots)
        of_shots = embed(image for index, (image, _) in enumerate(train) if index in chosen)
        of_test = embed(image for image, _ in test)
        return probe_row(name, (of_shots, shot_labels), (of_test, labels), split, len(class_names), baseline)

    size = arguments.batch_size
    rows = [row("mean of the patches", lambda images: mean_pooled_features(model, processor, images, size), False)]
    if clip is not None:
        rows.append(row(arguments.clip, lambda images: clip.embed_images(images, size), True))
    data = {
        **describe_samples(arguments, test, split, tuned="penalty"),
        "train": arguments.train,
        "shots": count_shots(shot_labels.tolist()),
    }
    finish(arguments, model, "Linear probe", {f"{len(class_names)} classes": rows}, NOTES, data)
    return 0


class LinearProbe(NamedTuple):
    """Scores of features [B, E] are `features @ weight + bias`, [B, C]."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        return features.double() @ self.weight + self.bias


def mean_pooled_features(model: Any, processor: Any, images: Iterable[Image.Image], batch_size: int = 16) -> Tensor:
    """The encoder's patches, averaged: [B, E], float32 on the CPU.

    Raises:
        ValueError: for no images.
    """

    def features(batch: list[Image.Image]) -> Tensor:
        with torch.no_grad():
            return model.model.pooled_features(to_pixels(model, processor, batch)).float().cpu()

    parts = map_batches(features, images, batch_size)
    if not parts:
        raise ValueError("no images to make features of")
    return torch.cat(parts)


def choose_shots(keys: Sequence[str], labels: Sequence[int], shots: int) -> list[int]:
    """Indices of the first `shots` samples of each class by hash of the key, ascending; fewer where there are fewer."""
    of_class: dict[int, list[str]] = {}
    for key, label in zip(keys, labels, strict=True):
        of_class.setdefault(label, []).append(key)
    chosen = {label: first_by_hash(own, shots) for label, own in of_class.items()}
    return [index for index, (key, label) in enumerate(zip(keys, labels, strict=True)) if key in chosen[label]]


def fit(features: Tensor, labels: Tensor, num_classes: int, penalty: float) -> LinearProbe:
    """Minimises the mean over S shots of |scores - one-hot|^2, plus `penalty` * |weights of scaled features|^2.

    Args:
        features: [S, E].
        labels: int [S].
    """
    mean = features.double().mean(dim=0)
    scale = features.double().std(dim=0, correction=0).clamp(min=1e-6)
    scaled = (features.double() - mean) / scale
    targets = F.one_hot(labels, num_classes).double()
    average = targets.mean(dim=0)
    gram = scaled.T @ scaled / len(features) + penalty * torch.eye(features.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, scaled.T @ (targets - average) / len(features)) / scale[:, None]
    return LinearProbe(weight, average - mean @ weight)


def probe_row(
    name: str,
    shots: tuple[Tensor, Tensor],
    images: tuple[Tensor, Tensor],
    split: tuple[list[int], list[int]],
    num_classes: int,
    baseline: bool = False,
) -> Row:
    """Top-1, top-5 and mean per class of the probe with the penalty that is best on the held-out images; with it.

    Args:
        shots, images: features [S, E] and labels int [S] to fit, and [B, E] and [B] to tune and test on.
        split: indices of the images to tune on, and of those to test on.
    """
    features, labels = images

    def wrong_before(penalty: float, indices: list[int]) -> Tensor:
        scores = fit(*shots, num_classes, penalty)(features[indices])
        return ranks(scores, F.one_hot(labels[indices], num_classes).bool())

    held_out, test = split
    penalty = best_of_grid(PENALTIES, lambda value: share_found_first(wrong_before(value, held_out)))
    found = wrong_before(penalty, test)
    true = labels[test]
    probe = Contender(name, found, baseline=baseline)
    return make_row(probe, lambda drawn: accuracies(found[drawn], true[drawn]), len(true), penalty=penalty)


def count_shots(labels: Sequence[int]) -> str:
    """As in "10 per class", or "2 to 10 per class"."""
    counts = sorted(Counter(labels).values())
    return f"{counts[0]} per class" if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]} per class"
