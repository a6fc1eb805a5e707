"""Zero-shot classification: labelled images to accuracy, calibration, tables and pictures.

Classes of the same name share one score and are the same answer. Other ties count against (see `ranking`).

Legend: B images, C classes. Log-likelihoods are in nats.
"""

import argparse
import json
import os
from pathlib import Path

from torch import Tensor
from torch.nn.functional import one_hot

from ..captioners.arguments import read_prior
from ..checkpoint import is_own
from ..configuration_ig_captioner import IGCaptionerConfig
from ..data.prompts import read_class_names
from ..data.samples import split_by_hash
from ..installed import DEFAULT_CHECKPOINT
from .calibration import BINS, Calibration, abstain_threshold, calibrate, coverage_curve
from .plots import draw_confusion, draw_coverage, draw_reliability
from .processes import is_first
from .ranking import accuracies, ranks, top1_then_mean_rank, true_classes, tune_prior_weight
from .rows import Contender, Row, contenders, gain_row, make_row
from .scores import ScoreMatrix, classify_images
from .task import choose_templates, describe_samples, finish, labelled_samples, load_models


NOTES = [
    "Ties count against; classes of one name are one class. Blind: the class with the likeliest text, log P(T), "
    "whatever the image.",
    "Calibration is about the score of the best class, the softmax of information gain / temperature. ECE: expected "
    f"calibration error, {BINS} bins of equal width; its intervals are moved by what resampling itself adds to it. "
    "Intervals of fitted temperatures are over held-out samples, by one Newton step per resample.",
    "Abstaining: answers of the surest images only. Right class there: how often an image is surer with all "
    "classes than one without its own class.",
]


def run(arguments: argparse.Namespace) -> int:
    """Top-1, top-5 and mean per class, calibration, and pictures of both. May save what was fitted."""
    saves = arguments.save_temperature or arguments.save_threshold is not None
    if saves:
        check_checkpoint_folder(arguments.model)
    class_names = read_class_names(arguments.class_names)
    model, processor, clip = load_models(arguments)
    templates = choose_templates(arguments, model.config)
    samples = labelled_samples(arguments, arguments.data, class_names, arguments.limit)
    size = {"batch_size": arguments.batch_size}
    options = {**size, **read_prior(arguments)}
    matrix, labels = classify_images(model, processor, samples, class_names, templates, **options)
    others = {}
    if clip is not None:
        images = clip.embed_images((image for image, _ in samples), **size)
        others[arguments.clip] = images @ clip.embed_classes(class_names, templates).T

    split = held_out, test = split_by_hash(samples.keys, arguments.held_out_fraction)
    tuned = tune_on(matrix.select(held_out), labels[held_out], class_names)
    tested = contenders(matrix.select(test), tuned, {name: scores[test] for name, scores in others.items()})
    calibration = calibrate(matrix, labels, class_names, split, tuned, model.config)
    tables = {
        f"{len(class_names)} classes": [class_row(each, labels[test], class_names) for each in tested],
        "True classes": [gain_row(matrix.select(test), one_hot(labels[test], len(class_names)).bool())],
        **calibration.tables,
    }
    data = {
        **describe_samples(arguments, samples, split, tuned="prior weight and the temperatures"),
        "classes": len(class_names),
        "templates": len(templates),
    }
    notes = [*NOTES, *calibration.doubts]
    finish(arguments, model, "Zero-shot classification", tables, notes, data, details=calibration.details)
    if is_first():
        confusions = {each.name: confusion(each.scores, labels[test]).tolist() for each in tested}
        draw(arguments.output, confusions, class_names, calibration)
        if saves:
            save_fitted(arguments, calibration)
    return 0


# Rows


def tune_on(matrix: ScoreMatrix, labels: Tensor, class_names: list[str]) -> float:
    """The prior weight with the highest top-1 share; of equals that with the lowest geometric mean rank."""
    is_true = true_classes(labels, class_names)
    return tune_prior_weight(lambda weight: ranks(matrix.information_gain(weight), is_true), top1_then_mean_rank)


def class_row(contender: Contender, labels: Tensor, class_names: list[str]) -> Row:
    """Top-1, top-5 and mean per class of scores [B, C]; and `predicted`, how often each class is, [C]."""
    found = ranks(contender.scores, true_classes(labels, class_names))

    def metrics(drawn: Tensor) -> dict[str, float]:
        return accuracies(found[drawn], labels[drawn])

    predicted = confusion(contender.scores, labels).sum(dim=0).tolist()
    return make_row(contender, metrics, len(labels), predicted=predicted)


def confusion(scores: Tensor, labels: Tensor) -> Tensor:
    """Counts how many images of each class (rows) are taken for each class (columns), int [C, C]."""
    classes = scores.shape[1]
    pairs = labels * classes + scores.argmax(dim=1)
    return pairs.bincount(minlength=classes**2).unflatten(0, (classes, classes))


# Pictures, and what may be saved


def draw(folder: Path, confusions: dict, class_names: list[str], calibration: Calibration) -> None:
    """Writes the pictures, or prints that matplotlib is missing."""
    curves = {name: coverage_curve(answers) for name, answers in calibration.coverage.items()}
    is_drawn = (
        draw_confusion(folder / "confusion.png", confusions, class_names)
        and draw_reliability(folder / "reliability.png", calibration.reliability)
        and draw_coverage(folder / "coverage.png", curves)
    )
    if not is_drawn:
        print("no pictures: matplotlib is not installed")


def save_fitted(arguments: argparse.Namespace, calibration: Calibration) -> None:
    """Saves the temperature or the threshold. Raises ValueError where there are doubts about what was fitted."""
    if calibration.doubts:
        raise ValueError(f"nothing is saved in {arguments.model}. {' '.join(calibration.doubts)}")
    fields = {"score_temperature": calibration.temperature} if arguments.save_temperature else {}
    if arguments.save_threshold is not None:
        fields["abstain_threshold"] = abstain_threshold(calibration.held_out.certainty, arguments.save_threshold)
    save_calibration(arguments.model, **fields)
    print(f"saved in {arguments.model}: " + ", ".join(f"{name} {value:.3f}" for name, value in fields.items()))


def check_checkpoint_folder(model: str) -> None:
    """Raises ValueError if `model` is no folder whose configuration may be changed."""
    path = Path(model)
    if not (path / "config.json").is_file():
        raise ValueError(f"a calibration can be saved only into the folder of a checkpoint, got {model!r}")
    if not is_own(model):
        raise ValueError(f"a calibration can be saved only into a checkpoint of this package, got {model!r}")
    if path.resolve() == Path(DEFAULT_CHECKPOINT).resolve():
        raise ValueError("the checkpoint in the package is not changed: `ig-captioner release DIR` makes a copy of it")


def save_calibration(folder: str | Path, **fields: float) -> None:
    """Writes `score_temperature` and `abstain_threshold` into a checkpoint's `config.json`; all else stays as it is.

    Raises:
        StrictDataclassError: for values that the configuration refuses.
    """
    path = Path(folder) / "config.json"
    content = {**json.loads(path.read_text(encoding="utf-8")), **fields}
    IGCaptionerConfig.from_dict(content)
    partial = path.with_name("config.json.partial")
    partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial, path)
