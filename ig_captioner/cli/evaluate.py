"""The parser of `ig-captioner evaluate`: zero-shot, retrieval, compositional, captioning, linear-probe and lit.

Each task is a file of that name in `evaluation/`, imported when the task runs. Its `run` goes from the arguments to
`results.json`, `results.md` and `model-index.yml` in a folder, and to the printed tables.
"""

import argparse
import math
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from .arguments import (
    MODEL_HELP,
    Parser,
    add_captioner,
    add_command,
    add_device,
    add_prior,
    add_strict,
    number,
    positive_integer,
)


ZERO_SHOT_EXAMPLES = """\
examples:
  ig-captioner evaluate zero-shot --data "cifar10-test-*.tar.gz" --class-names cifar10 --output out
  ig-captioner evaluate zero-shot --data photos/ --class-names names.txt --templates imagenet --output out
  ig-captioner evaluate zero-shot --data imagenet/val --class-names imagenet --label-field class_id --output out
  ig-captioner evaluate zero-shot --data photos/ --class-names cifar10 --clip openai/clip-vit-base-patch32 --output out
  ig-captioner evaluate zero-shot --model mine/ --data photos/ --class-names names.txt --save-temperature --output out
"""
RETRIEVAL_EXAMPLES = """\
examples:
  ig-captioner evaluate retrieval --data "flickr8k-val-*.tar" --output out
  torchrun --nproc_per_node 2 -m ig_captioner.cli evaluate retrieval --data "flickr8k-val-*.tar" --output out
  ig-captioner evaluate retrieval --data "flickr8k-val-*.tar" --clip openai/clip-vit-base-patch32 --output out
"""
COMPOSITIONAL_EXAMPLES = """\
examples:
  ig-captioner evaluate compositional --format sugarcrepe --pairs sugarcrepe/ --output out       # text only
  ig-captioner evaluate compositional --format sugarcrepe --pairs sugarcrepe/ --data coco/val2017 --output out
  ig-captioner evaluate compositional --format winoground --pairs examples.jsonl --data images/ --output out
"""
CAPTIONING_EXAMPLES = """\
examples:
  ig-captioner evaluate captioning --data "flickr8k-val-*.tar" --num-beams 4 --output out
"""
LINEAR_PROBE_EXAMPLES = """\
examples:
  ig-captioner evaluate linear-probe --train train/ --data test/ --class-names names.txt --output out
"""
LIT_EXAMPLES = """\
examples:
  ig-captioner evaluate lit --train "flickr8k-train-*.tar" --data "flickr8k-val-*.tar" --output out
  ig-captioner evaluate lit --train captioned/ --labelled photos/ --class-names imagenet --output out
"""
DATA_HELP = "shards (pattern or folder), a folder of images, or a folder saved by the datasets library"

finite = number("a finite number", math.isfinite)
rate = number("a positive number", lambda value: 0 < value < float("inf"))
fraction = number("between 0 and 1", lambda value: 0 < value < 1)


def add_evaluate(commands) -> None:
    """Registers the tasks with the parser of `ig-captioner`."""
    summary = "Measure a checkpoint on labelled or captioned images, at prior weight 0, 1 and a tuned one."
    parser = commands.add_parser("evaluate", help=summary, description=summary)
    tasks = parser.add_subparsers(metavar="TASK", required=True)
    for add in (_add_zero_shot, _add_retrieval, _add_compositional, _add_captioning, _add_linear_probe, _add_lit):
        add(tasks)


def _add_task(tasks, name: str, usage: str, summary: str, examples: str, needs_data: bool = True) -> Parser:
    """The parser of a task, with the arguments of all tasks. `name` is that of its file in `evaluation/`."""
    task = add_command(tasks, _run_later(name), f"{usage} --output DIR", summary, examples, MODEL_HELP)
    task.add_argument("--data", required=needs_data, metavar="DATA", help=DATA_HELP)
    task.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the results")
    limit = "measure a fixed choice of N samples, by their keys (default: all)"
    task.add_argument("--limit", type=positive_integer, metavar="N", help=limit)
    add_strict(task)
    add_device(task)
    help = "number format of the model; auto: float32 on a CPU, on a GPU as stored (default: %(default)s)"
    task.add_argument("--dtype", choices=("auto", "float32", "float16", "bfloat16"), default="auto", help=help)
    return task


# Tasks


def _add_zero_shot(tasks) -> None:
    usage = "--data DATA --class-names FILE_OR_NAME"
    summary = "Classify labelled images by their class names."
    task = _add_task(tasks, "zero_shot", usage, summary, ZERO_SHOT_EXAMPLES)
    _add_labels(task)
    _add_templates(task)
    _add_tuning(task)
    _add_batch_size(task)
    _add_saving(task)
    add_prior(task)
    add_captioner(task)


def _add_retrieval(tasks) -> None:
    summary = "Find captions for images, and images for captions."
    task = _add_task(tasks, "retrieval", "--data DATA", summary, RETRIEVAL_EXAMPLES)
    captions = "the first N captions of each image (default: all)"
    task.add_argument("--captions", type=positive_integer, metavar="N", help=captions)
    _add_tuning(task)
    _add_batch_size(task)
    add_prior(task)
    add_captioner(task)


def _add_compositional(tasks) -> None:
    usage = "--format FORMAT --pairs FILE_OR_FOLDER [--data DATA]"
    summary = "Tell the right caption of an image from one that differs in a word or in order."
    task = _add_task(tasks, "compositional", usage, summary, COMPOSITIONAL_EXAMPLES, needs_data=False)
    task.add_argument(
        "--format", required=True, choices=("sugarcrepe", "aro", "winoground"), help="benchmark that --pairs comes from"
    )
    task.add_argument(
        "--pairs", type=Path, required=True, metavar="FILE_OR_FOLDER", help="file or folder with its captions"
    )
    _add_tuning(task)
    _add_batch_size(task)
    add_captioner(task)


def _add_captioning(tasks) -> None:
    summary = "Write captions and compare them with those of people."
    task = _add_task(tasks, "captioning", "--data DATA", summary, CAPTIONING_EXAMPLES)
    task.add_argument("--num-beams", type=positive_integer, default=1, metavar="N", help="1: greedy (default)")
    penalty = "divides a beam's log P by its length to this power: above 0 longer captions win more often (default: 1)"
    task.add_argument("--length-penalty", type=finite, metavar="P", help=penalty)
    longest = "longest caption (default: as ig-captioner caption)"
    task.add_argument("--max-new-tokens", type=positive_integer, metavar="N", help=longest)
    _add_batch_size(task)
    add_captioner(task)


def _add_linear_probe(tasks) -> None:
    usage = "--train DATA --data DATA --class-names FILE_OR_NAME"
    summary = "Classify labelled images by a linear map of frozen features, fitted to a few images per class."
    task = _add_task(tasks, "linear_probe", usage, summary, LINEAR_PROBE_EXAMPLES)
    _add_labels(task)
    task.add_argument("--train", required=True, metavar="DATA", help="where the shots are taken from; forms as --data")
    shots = "images per class (default: %(default)s)"
    task.add_argument("--shots", type=positive_integer, default=10, metavar="N", help=shots)
    _add_tuning(task)
    _add_batch_size(task)


def _add_lit(tasks) -> None:
    usage = "(--train DATA | --tower FOLDER) [--data DATA] [--labelled DATA --class-names FILE_OR_NAME]"
    summary = "Train a text tower for the frozen image encoder, and measure both as a dual encoder."
    task = _add_task(tasks, "lit", usage, summary, LIT_EXAMPLES, needs_data=False)
    _add_training_of_lit(task)
    _add_labels(task, needs_labels=False)
    _add_templates(task)
    _add_held_out(task)
    task.set_defaults(clip=None)


# Arguments


def _add_training_of_lit(task: argparse.ArgumentParser) -> None:
    task.add_argument("--train", metavar="DATA", help="captioned images to train on; forms as --data")
    task.add_argument(
        "--tower", metavar="FOLDER", help="in place of --train: a tower that benchmarks.everyday has trained"
    )
    task.add_argument("--labelled", metavar="DATA", help="labelled images to classify; forms as --data")
    sizes = {
        "steps": (2000, "optimizer steps"),
        "batch-size": (256, "pairs per step; each pair is told from the others of its step"),
        "width": (128, "of the text tower and of the embeddings"),
        "layers": (4, "of the text tower"),
    }
    for name, (default, help) in sizes.items():
        text = f"{help} (default: %(default)s)"
        task.add_argument(f"--{name}", type=positive_integer, default=default, metavar="N", help=text)
    captions = "test on the first N captions of each image (default: all)"
    task.add_argument("--captions", type=positive_integer, metavar="N", help=captions)
    rates = "tried one after another; the best on held-out training pairs is taken (default: %(default)s)"
    task.add_argument("--learning-rates", type=rate, nargs="+", default=[3e-4, 1e-3, 3e-3], metavar="LR", help=rates)
    task.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and order (default: %(default)s)")


def _run_later(name: str) -> Callable[[argparse.Namespace], int]:
    """The task of that name; what it needs is imported when it runs."""

    def run(arguments: argparse.Namespace) -> int:
        from ..evaluation.processes import sharing

        task = import_module(f"..evaluation.{name}", __package__)
        with sharing():
            return task.run(arguments)

    run.__name__ = name
    return run


def _add_templates(parser: argparse.ArgumentParser) -> None:
    templates = "as for --class-names (default: those of the same prompts; of a text file: the checkpoint's own)"
    parser.add_argument("--templates", metavar="FILE_OR_NAME", help=templates)


def _add_labels(parser: argparse.ArgumentParser, needs_labels: bool = True) -> None:
    known = "text file with a line each, JSON file of prompts, or name of a data set whose prompts are in the package"
    parser.add_argument("--class-names", required=needs_labels, metavar="FILE_OR_NAME", help=known)
    parser.add_argument(
        "--label-field",
        default="class_name",
        metavar="NAME",
        help="field of a sample's JSON, or column, that holds its class name or index; of a folder per class "
        "class_name (the folder) or class_id (its place in sorted order) (default: %(default)s)",
    )


def _add_held_out(parser: argparse.ArgumentParser) -> None:
    held_out = "share of the samples, by hash of the key, used only for tuning; excluded from all metrics"
    parser.add_argument(
        "--held-out-fraction", type=fraction, default=0.2, metavar="F", help=f"{held_out} (default: %(default)s)"
    )


def _add_tuning(parser: argparse.ArgumentParser) -> None:
    _add_held_out(parser)
    parser.add_argument("--clip", metavar="DIR_OR_REPO", help="a CLIP or SigLIP of transformers to compare with")


def _add_saving(parser: argparse.ArgumentParser) -> None:
    into = "write into the config.json of --model, a folder,"
    parser.add_argument("--save-temperature", action="store_true", help=f"{into} the fitted temperature")
    parser.add_argument(
        "--save-threshold",
        type=fraction,
        metavar="F",
        help=f"{into} the threshold of information gain that this share of the held-out samples reaches: below it, the "
        'pipeline answers "none of these"',
    )


def _add_batch_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-size",
        type=positive_integer,
        default=16,
        metavar="N",
        help="images per pass; changes speed and memory, not results (default: %(default)s)",
    )
