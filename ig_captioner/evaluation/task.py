"""Parts that all tasks of `ig-captioner evaluate` share: reading what arguments name, and reporting results.

A task is a file with a function `run`, from the command's arguments to tables on disk and on the screen.
"""

import argparse
import shlex
from typing import Any

from ..captioners.arguments import load_scorer
from ..checkpoint import folder_or_repository, is_own, load_on_device, load_processor
from ..configuration_ig_captioner import IGCaptionerConfig
from ..data.prompts import is_text_file, read_templates
from ..data.samples import Samples, describe_skipped, label_from_field, labelled_decoder
from ..input_rules import default_templates
from ..installed import DEFAULT_CHECKPOINT
from ..modeling_ig_captioner import IGCaptionerForZeroShotImageClassification
from .contrastive import ContrastiveModel
from .processes import is_first, place
from .report import describe_run, to_markdown, write_results
from .rows import RESAMPLES, Row


# What the arguments name


def load_models(arguments: argparse.Namespace):
    """Loads model and processor, and the contrastive model if one is asked for.

    The model is a `CaptionScorer` for a captioner that is none of this package's, where the task takes them.
    """
    if "prompt" in arguments and not is_own(folder_or_repository(arguments.model)):
        scorer = load_scorer(arguments)
        clip = None if arguments.clip is None else ContrastiveModel.load(arguments.clip, scorer.device)
        return scorer, scorer.processors, clip
    model = load_on_device(
        IGCaptionerForZeroShotImageClassification, arguments.model, arguments.device, arguments.dtype
    )
    clip = None if arguments.clip is None else ContrastiveModel.load(arguments.clip, model.device)
    return model, load_processor(arguments.model), clip


def choose_templates(arguments: argparse.Namespace, config: IGCaptionerConfig) -> list[str]:
    """Returns the templates asked for, or those that come with the class names, or the checkpoint's own."""
    if arguments.templates is not None:
        return read_templates(arguments.templates)
    return default_templates(config) if is_text_file(arguments.class_names) else read_templates(arguments.class_names)


def labelled_samples(arguments: argparse.Namespace, data: str, class_names: list[str], limit: int | None) -> Samples:
    """Images with their class index."""
    return Samples(data, labelled_decoder(label_from_field(class_names, arguments.label_field)), limit)


# Results


def describe_samples(arguments: argparse.Namespace, samples, split=None, tuned: str = "prior weight") -> dict[str, Any]:
    """Counts the samples by kind."""
    described = {"data": arguments.data, "skipped": describe_skipped(samples.skipped) or "none"}
    if arguments.limit is not None:
        described["limit"] = arguments.limit
    if split is None:
        return {**described, "test samples": len(samples.keys)}
    return {
        **described,
        "test samples": len(split[1]),
        "held-out samples": len(split[0]),
        "held-out samples are": f"chosen by a hash of the key, and tune the {tuned}",
    }


def finish(
    arguments: argparse.Namespace,
    model,
    title: str,
    tables: dict[str, list[Row]],
    notes: list[str],
    data: dict,
    **more: Any,
) -> None:
    """Writes and prints the results; of several processes only the first does."""
    if not is_first():
        return
    task = arguments.run.__name__.replace("_", "-")
    if hasattr(model, "describe"):  # a captioner of the Hub
        data = {**data, **model.describe()}
    intervals = (
        f"In brackets: 95 % bootstrap intervals over test samples ({RESAMPLES} resamples, percentiles, a fixed seed). "
        "They say nothing about other training runs."
    )
    results = {
        "task": task,
        "title": title,
        "tables": {name: [row.as_dict() for row in rows] for name, rows in tables.items()},
        **more,
        "notes": [*notes, intervals],
        "data": data,
        "run": describe_run(model, arguments.model, _command_line(task, arguments)),
    }
    write_results(arguments.output, results)
    print(to_markdown(results), end="")


def _command_line(task: str, arguments: argparse.Namespace) -> str:
    """The command with the value of every option."""
    hidden = {"run", "traceback"} | ({"model"} if arguments.model == DEFAULT_CHECKPOINT else set())
    given: dict[str, Any] = {name: value for name, value in vars(arguments).items() if name not in hidden}
    options: list[str] = []
    for name, value in given.items():
        if value is not None and value is not False:
            values = [] if value is True else value if isinstance(value, list) else [value]
            options += [f"--{name.replace('_', '-')}", *map(str, values)]
    processes = place()[1]
    many = ["torchrun", "--nproc_per_node", str(processes), "-m", "ig_captioner.cli"]
    program = ["ig-captioner"] if processes == 1 else many
    return shlex.join([*program, "evaluate", task, *options])
