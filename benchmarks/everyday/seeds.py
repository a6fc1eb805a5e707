"""Three seeds of the captioner beside three of the dual encoder: means and intervals of what `gpu.py` has measured.

    python -m benchmarks.everyday.seeds WORK [--captioners batch-1024 seed-1 seed-2] --output FILE.md

WORK is that of `benchmarks.everyday.gpu`. A dual encoder has trained on the draws of the captioner with the same seed,
so that differences are taken seed by seed; intervals are over seeds (Student's t, 95 %).
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.small_scale.report import interval


CLASSES = ("tiny-imagenet", "imagenet-photos", "caltech101", "cifar10")


class Figure(NamedTuple):
    """One column of a task's results."""

    title: str
    task: str
    metric: str
    text_to_image: bool = False


FIGURES = [Figure(f"{task}, top-1 %", task, "top1") for task in CLASSES]
FIGURES += [
    Figure("flickr8k, image to text, R@10 %", "flickr8k", "recall_at_10"),
    Figure("flickr8k, text to image, R@10 %", "flickr8k", "recall_at_10", text_to_image=True),
]


def rows_of(work: Path, run: str, figure: Figure) -> list[dict[str, Any]]:
    """The rows of the table that holds a figure: the first of a task, or that from text to image."""
    path = work / "results" / run / figure.task / "results.json"
    tables = json.loads(path.read_text(encoding="utf-8"))["tables"]
    return tables["Text to image"] if figure.text_to_image else next(iter(tables.values()))


def value(rows: list[dict[str, Any]], metric: str, prior_weight: float | None) -> float:
    """A metric in percent at a prior weight; of the first row where scores have none."""
    row = next((row for row in rows if row["prior_weight"] == prior_weight), rows[0])
    return 100 * row["metrics"][metric]["value"]


def as_text(values: list[float]) -> str:
    middle, low, high = interval(values)
    return f"{middle:.1f} ({low:.1f} - {high:.1f})"


def line(work: Path, captioners: list[str], figure: Figure) -> str:
    """A line of the table."""
    captioner = [rows_of(work, run, figure) for run in captioners]
    rival = [rows_of(work, f"dual-encoder-{seed}", figure) for seed in range(len(captioners))]
    plain = [value(rows, figure.metric, 0.0) for rows in captioner]
    gain = [value(rows, figure.metric, 1.0) for rows in captioner]
    dual = [value(rows, figure.metric, None) for rows in rival]
    difference = [one - other for one, other in zip(gain, dual, strict=True)]
    return f"| {figure.title} | {as_text(plain)} | {as_text(gain)} | {as_text(dual)} | {as_text(difference)} |"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--captioners", nargs="+", default=["batch-1024", "seed-1", "seed-2"])
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.md")
    options = parser.parse_args(arguments)
    lines = ["| | captioner, weight 0 | captioner, weight 1 | dual encoder | weight 1 minus dual encoder |"]
    lines += ["|---|---|---|---|---|"]
    lines += [line(options.work, options.captioners, figure) for figure in FIGURES]
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
