"""Results of an evaluation as `results.json`, `results.md` and `model-index.yml`, with all that led to them.

Results are `{"task", "title", "notes", "data", "tables": {title: rows}, "run"}`; the rows are dicts, see `rows.Row`.
`details`, `{title: lines}` with a dict per line, are shown as they are.
"""

import hashlib
import json
import platform
import re
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import EvalResult, ModelCardData

from ..installed import __version__
from .processes import place


class Metric(NamedTuple):
    """The form in which a metric is shown."""

    heading: str
    type: str
    """The metric's name on the Hub."""
    scale: float = 100.0
    digits: int = 1


METRICS = {
    "top1": Metric("top-1 %", "accuracy"),
    "top5": Metric("top-5 %", "accuracy"),
    "mean_per_class": Metric("mean per class %", "accuracy"),
    "ece": Metric("ECE %", "expected_calibration_error"),
    "nll": Metric("NLL in nats", "negative_log_likelihood", scale=1, digits=3),
    "temperature": Metric("temperature", "temperature", scale=1, digits=3),
    "top1_of_95": Metric("top-1 % of surest 95 %", "accuracy"),
    "top1_of_90": Metric("top-1 % of surest 90 %", "accuracy"),
    "top1_of_80": Metric("top-1 % of surest 80 %", "accuracy"),
    "top1_of_50": Metric("top-1 % of surest 50 %", "accuracy"),
    "none_auroc": Metric("right class there: AUROC %", "roc_auc"),
    "recall_at_1": Metric("R@1 %", "recall"),
    "recall_at_5": Metric("R@5 %", "recall"),
    "recall_at_10": Metric("R@10 %", "recall"),
    "median_rank": Metric("median rank", "median_rank", scale=1),
    "distinct_top1": Metric("different texts first", "distinct_top1", scale=1, digits=0),
    "cider_d": Metric("CIDEr-D %", "cider"),
    "bleu4": Metric("BLEU-4 %", "bleu"),
    "meteor": Metric("METEOR %", "meteor"),
    "nats_per_token": Metric("nats per token", "information_gain", scale=1, digits=3),
}
HUB_TASKS = {
    "zero-shot": ("zero-shot-image-classification", "Zero-shot image classification"),
    "retrieval": ("image-text-retrieval", "Image-text retrieval"),
    "compositional": ("image-text-matching", "Compositional image-text matching"),
    "captioning": ("image-to-text", "Image captioning"),
    "linear-probe": ("image-classification", "Linear probe"),
    "lit": ("zero-shot-image-classification", "LiT tuning"),
}


def metric_of(name: str) -> Metric:
    """The form of a metric; an unknown one is a share of right answers, under its own name."""
    return METRICS.get(name, Metric(f"{name} %", "accuracy"))


# Circumstances


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or not x86
        return platform.processor() or platform.machine()


def git_commit() -> str:
    """Commit of the code, "-dirty" if a tracked file was changed; "unknown" where it is in no repository."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        folder = Path(__file__).parent
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # not in a checkout of something else around it
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def portable_name(model: str) -> str:
    """`model`; the folder of a checkpoint in the package without what is above the package."""
    root = Path(__file__).parents[2]
    return Path(model).relative_to(root).as_posix() if Path(model).is_relative_to(root / "ig_captioner") else model


def weights_digest(model: str) -> str | None:
    """SHA-256 of the weights, if `model` is a folder."""
    path = Path(model) / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def describe_run(model: Any, name: str, command: str) -> dict[str, Any]:
    """Command, weights, date, commit, hardware and versions."""
    device = model.device
    return {
        "command": command,
        "model": portable_name(name),
        "weights_sha256": weights_digest(name),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "hardware": {
            "cpu": cpu_model(),
            "processes": place()[1],
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        },
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": {"python": platform.python_version(), "ig_captioner": __version__}
        | {name: version(name) for name in ("torch", "transformers")},
    }


# Markdown


def table_row(cells: Iterable[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def to_markdown(results: dict[str, Any]) -> str:
    run = results["run"]
    hardware, versions = (
        ", ".join(f"{name} {value}" for name, value in run[field].items()) for field in ("hardware", "versions")
    )
    lines = [f"# {results['title']}", ""]
    for title, rows in results["tables"].items():
        lines += [f"## {title}", "", *table_lines(rows), ""]
    for title, entries in results.get("details", {}).items():
        lines += [f"## {title}", "", *detail_lines(entries), ""]
    lines += [f"{note}\n" for note in results["notes"]]
    lines += [
        "## Run",
        "",
        *(f"- {name}: {value}" for name, value in results["data"].items()),
        f"- `{run['command']}`",
        f"- {run['date']}, commit {run['git_commit']}",
        f"- model {run['model']}, SHA-256 of its weights: {run['weights_sha256'] or 'unknown'}",
        f"- hardware: {hardware}; {run['dtype']}",
        f"- versions: {versions}",
    ]
    return "\n".join(lines) + "\n"


def table_lines(rows: list[dict[str, Any]]) -> list[str]:
    """One line per row; each figure with its interval in brackets."""
    columns = list(rows[0]["metrics"])
    headings = ["", "prior weight", *(metric_of(name).heading for name in columns)]
    lines = [table_row(headings), table_row(["---"] * len(headings))]
    for row in rows:
        weight = "" if row["prior_weight"] is None else f"{row['prior_weight']:g}"
        lines.append(table_row([row["name"], weight, *(format_metric(name, row["metrics"][name]) for name in columns)]))
    return lines


def detail_lines(entries: list[dict[str, Any]]) -> list[str]:
    """One line per entry, with the columns of the first."""
    headings = list(entries[0])
    cells = (["" if entry[name] is None else entry[name] for name in headings] for entry in entries)
    return [table_row(headings), table_row(["---"] * len(headings)), *map(table_row, cells)]


def format_metric(name: str, estimate: dict[str, float]) -> str:
    """As in "12.3 (11.0 - 13.9)", or "12.3" without an interval."""
    metric = metric_of(name)
    value, *ends = (f"{metric.scale * figure:.{metric.digits}f}" for figure in estimate.values())
    return f"{value} ({' - '.join(ends)})" if ends else value


# Metadata


def dataset_name(data: str) -> str:
    """The name of a data set by that of its files: "cifar10-test" of "data/cifar10-test-*.tar.gz"."""
    name = Path(data).name
    stem = re.sub(r"(\.tar)?(\.(gz|zst|xz|bz2))?$", "", name)
    return re.sub(r"[-_.][*?\d{}\[\].,]+$", "", stem) or name


def evaluations(results: dict[str, Any], headlines: bool = False) -> list[EvalResult]:
    """The results of the model, not of those it is compared with, as entries of a card's metadata.

    Args:
        headlines: of the first table only, over all its items if there is such a metric, else its first metric; the
            others are in the card's text.
    """
    task, task_name = HUB_TASKS[results["task"]]
    data = dataset_name(results["data"].get("data") or results["data"]["labelled"])
    shown = 1 if headlines else None
    return [
        EvalResult(
            task_type=task,
            task_name=task_name,
            dataset_type=data,
            dataset_name=f"{data}: {title}",
            dataset_config=title,  # entries of one type, configuration and split share a name
            dataset_args={"command": results["run"]["command"]},
            metric_type=metric_of(name).type,
            metric_name=f"{metric_of(name).heading}, {row['name']}",
            metric_value=round(metric_of(name).scale * estimate["value"], 3),
            metric_args={"prior_weight": row["prior_weight"]} if row["prior_weight"] is not None else None,
        )
        for title, rows in list(results["tables"].items())[:shown]
        for row in rows
        if not row["baseline"]
        for name, estimate in row["metrics"].items()
        if not headlines or name == ("all" if "all" in row["metrics"] else next(iter(row["metrics"])))
    ]


def model_index(results: dict[str, Any]) -> str:
    """The `model-index` of a model card, as YAML, to be merged into its metadata."""
    name = Path(results["run"]["model"]).name
    return ModelCardData(model_name=name, eval_results=evaluations(results)).to_yaml() + "\n"


# Files


def write_results(directory: Path, results: dict[str, Any]) -> None:
    """`results.json`, `results.md` and `model-index.yml`, in a folder that is made if it is missing."""
    directory.mkdir(parents=True, exist_ok=True)
    contents = {
        "results.json": json.dumps(results, indent=2, allow_nan=False) + "\n",
        "results.md": to_markdown(results),
        "model-index.yml": model_index(results),
    }
    for name, content in contents.items():
        (directory / name).write_text(content, encoding="utf-8")
