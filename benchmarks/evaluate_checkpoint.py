"""Measures a checkpoint on CIFAR-10 test and Flickr8k-val, at prior weights 0, 1 and one tuned on held-out data.

    python -m benchmarks.evaluate_checkpoint --model DIR --data_root DATA --output_dir DIR

Held-out data are the training shards' keys that the recipe of the tiny checkpoint never trains on (`holdout_fraction`
of training/configs/tiny.yaml). Flickr8k: each image has its first caption, both on the test and on the held-out side.
Writes `evaluation.json` and `evaluation.md`, and prints the latter.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from transformers import AutoModelForZeroShotImageClassification, AutoProcessor

from ig_captioner import TINY_CHECKPOINT, retrieval, zero_shot
from ig_captioner.report import describe_run, table_row
from ig_captioner.shards import (
    EmptySourceError,
    Skipped,
    find_shards,
    first_by_hash,
    is_held_out,
    read_captions,
    read_decoded,
    read_image,
    read_shard,
)


CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR10_TEMPLATE = "a photo of a {}."
HOLDOUT_FRACTION = 0.02  # as in training/configs/tiny.yaml
SHARDS = {
    "cifar10_test": "cifar10-test-*.tar.gz",
    "cifar10_train": "cifar10-train-*.tar.gz",
    "flickr8k_val": "flickr8k-val-*.tar",
    "flickr8k_train": "flickr8k-train-*.tar",
}

T = TypeVar("T")
Keep = Callable[[str], bool]


# Data


def choose_keys(paths: list[str], limit: int | None, held_out: bool) -> Keep:
    """Which keys are evaluated: all or the held-out ones, and of these `limit` by hash (shards may be sorted)."""

    def eligible(key: str) -> bool:
        return not held_out or is_held_out(key, HOLDOUT_FRACTION)

    if limit is None:
        return eligible
    keys = (item[0] for path in paths for item in read_shard(path) if not isinstance(item, Skipped))
    return first_by_hash(filter(eligible, keys), limit).__contains__


def load(source: str, options: argparse.Namespace, read: Callable[[list[str], Keep], Iterable[T | Skipped]]) -> list[T]:
    """The usable samples of a source. Of training shards only what is held out."""
    paths = find_shards([SHARDS[source]], options.data_root)
    items = list(read(paths, choose_keys(paths, options.limit, held_out=source.endswith("_train"))))
    samples = [item for item in items if not isinstance(item, Skipped)]
    if not samples:
        raise EmptySourceError(f"no usable sample in {paths} ({len(items)} skipped)")
    return samples


def read_labelled(paths: list[str], keep: Keep) -> Iterable[tuple[Image.Image, int] | Skipped]:
    return zero_shot.read_labelled_images(paths, zero_shot.label_from_field(CIFAR10_CLASSES, "class_name"), keep)


def read_captioned(paths: list[str], keep: Keep) -> Iterable[tuple[Image.Image, str] | Skipped]:
    return read_decoded(paths, lambda key, files: (read_image(files), read_captions(files)[0]), keep=keep)


# Evaluations


def at_weights(tuned: float, metrics: Callable[[float], dict[str, float]]) -> dict[str, dict[str, float]]:
    """`metrics` at prior weight 0, 1 and the tuned one, each with its weight."""
    weights = {"0": 0.0, "1": 1.0, "tuned": tuned}
    return {name: {"prior_weight": weight, **metrics(weight)} for name, weight in weights.items()}


def evaluate_cifar10(model: Any, processor: Any, options: argparse.Namespace) -> dict[str, Any]:
    def scores(source: str) -> tuple[retrieval.ScoreMatrix, torch.Tensor, list[str]]:
        samples = load(source, options, read_labelled)
        arguments = (model, processor, samples, CIFAR10_CLASSES, CIFAR10_TEMPLATE)
        return *zero_shot.classify_images(*arguments, batch_size=options.batch_size, progress=source), CIFAR10_CLASSES

    held_out, test = scores("cifar10_train"), scores("cifar10_test")
    return {
        "images": len(test[1]),
        "held_out_images": len(held_out[1]),
        "classes": len(CIFAR10_CLASSES),
        "template": CIFAR10_TEMPLATE,
        "zero_shot": at_weights(
            zero_shot.tune_prior_weight(*held_out), lambda weight: zero_shot.accuracy(*test, weight)
        ),
    }


def evaluate_flickr8k(model: Any, processor: Any, options: argparse.Namespace) -> dict[str, Any]:
    def scores(source: str) -> tuple[retrieval.ScoreMatrix, torch.Tensor]:
        images, captions = zip(*load(source, options, read_captioned), strict=True)
        arguments = {"batch_size": options.batch_size, "progress": source}
        matrix = retrieval.score_pairs(model, processor, images, captions, **arguments)
        return matrix, retrieval.true_pairs([[caption] for caption in captions], captions)

    held_out, test = scores("flickr8k_train"), scores("flickr8k_val")
    image_to_text = at_weights(
        retrieval.tune_prior_weight(*held_out), lambda weight: retrieval.image_to_text_metrics(*test, weight)
    )
    likelihood, tuned = (image_to_text[name]["recall_at_10"] for name in ("0", "tuned"))
    return {
        "images": len(test[1]),
        "texts": len(test[1][0]),
        "held_out_images": len(held_out[1]),
        "image_to_text": image_to_text,
        "recall_at_10_tuned_over_0": tuned / likelihood if likelihood else None,
        "text_to_image": retrieval.text_to_image_metrics(*test),
        "information_gain_per_token": retrieval.information_gain_per_token(*test),
    }


# Report


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def weight_table(columns: dict[str, str], results: dict[str, dict[str, float]]) -> list[str]:
    """One line per prior weight. `columns`: heading of each metric, shares in percent."""
    lines = [table_row(["prior weight", *columns.values()]), table_row(["---"] * (len(columns) + 1))]
    for name, metrics in results.items():
        weight = f"{metrics['prior_weight']:g}" + (" (tuned)" if name == "tuned" else "")
        lines.append(table_row([weight, *retrieval_cells(metrics, columns)]))
    return lines


def retrieval_cells(metrics: dict[str, float], columns: Iterable[str]) -> list[str]:
    return [f"{metrics[name]:g}" if name == "median_rank" else percent(metrics[name]) for name in columns]


def to_markdown(report: dict[str, Any]) -> str:
    run, cifar, flickr = report["run"], report["cifar10"], report["flickr8k"]
    accuracies = {"top1": "top-1 %", "top5": "top-5 %", "mean_per_class": "mean per class %"}
    recalls = {f"recall_at_{k}": f"R@{k} %" for k in (1, 5, 10)} | {"median_rank": "median rank"}
    ratio = flickr["recall_at_10_tuned_over_0"]
    hardware, versions, seconds = (
        ", ".join(f"{name} {value}" for name, value in values.items())
        for values in (run["hardware"], run["versions"], report["seconds"])
    )
    lines = [
        f"# Evaluation of {run['model']}",
        "",
        *([f"**Limited to {run['limit']} samples per set.**", ""] if run["limit"] else []),
        f"## CIFAR-10 test: {cifar['images']} images, {cifar['classes']} classes in `{cifar['template']}`",
        "",
        *weight_table(accuracies, cifar["zero_shot"]),
        "",
        f"Tuned on {cifar['held_out_images']} held-out training images.",
        "",
        f"## Flickr8k-val: {flickr['images']} images x {flickr['texts']} first captions",
        "",
        "Image to text:",
        "",
        *weight_table(recalls, flickr["image_to_text"]),
        "",
        f"Tuned on {flickr['held_out_images']} held-out training images. R@10 tuned / R@10 at 0: "
        f"{'undefined' if ratio is None else f'{ratio:.2f}'}.",
        "",
        "Text to image (the prior is a constant):",
        "",
        table_row(recalls.values()),
        table_row(["---"] * len(recalls)),
        table_row(retrieval_cells(flickr["text_to_image"], recalls)),
        "",
        f"Information gain: {flickr['information_gain_per_token']:.3f} nats per token.",
        "",
        "## Run",
        "",
        f"- `{run['command']}`",
        f"- {run['date']}, commit {run['git_commit']}",
        f"- hardware: {hardware}; {run['dtype']}",
        f"- versions: {versions}",
        f"- seconds: {seconds}",
        f"- SHA-256 of the weights: {run['weights_sha256'] or 'unknown'}",
    ]
    return "\n".join(lines) + "\n"


# Command


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=TINY_CHECKPOINT, help="folder or Hub name; default: the shipped checkpoint")
    parser.add_argument(
        "--data_root", default=os.environ.get("IG_CAPTIONER_DATA", "data"), help="default: $IG_CAPTIONER_DATA, or data"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("evaluation"))
    parser.add_argument("--limit", type=positive, help="samples per set, a fixed random choice; default: all")
    parser.add_argument("--batch_size", type=positive, default=16, help="images per pass; changes no result")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    options = parser.parse_args(arguments)
    try:
        find_shards(SHARDS.values(), options.data_root)
    except FileNotFoundError as error:
        parser.error(f"{error}; say where the shards are with --data_root or the variable IG_CAPTIONER_DATA")
    return options


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the evaluation and returns what it writes to `evaluation.json`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(arguments)
    model = AutoModelForZeroShotImageClassification.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    model = model.to(options.device).eval()
    processor = AutoProcessor.from_pretrained(options.model)
    command = " ".join(["python -m benchmarks.evaluate_checkpoint", *arguments])
    run = {**describe_run(model, options.model, command), "limit": options.limit}
    report: dict[str, Any] = {"run": run, "seconds": {}}
    for name, evaluate in (("cifar10", evaluate_cifar10), ("flickr8k", evaluate_flickr8k)):
        start = time.perf_counter()
        report[name] = evaluate(model, processor, options)
        report["seconds"][name] = round(time.perf_counter() - start, 1)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    (options.output_dir / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    (options.output_dir / "evaluation.md").write_text(to_markdown(report))
    print(to_markdown(report))
    return report


if __name__ == "__main__":
    main()
