"""Tables and pictures of the experiments, from the `metrics.json` of their runs.

A figure is the mean over seeds, with a 95 % interval of Student's t over them: what another training would give. The
intervals of one run in the table of the long tail are bootstrap intervals over test images.
"""

import json
import math
import statistics
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from ig_captioner.evaluation.report import cpu_model, git_commit, table_row

from .evaluate import CLASS_NAMES
from .long_tail import class_counts
from .plan import CHEAPEST_DESIGN, DESIGNS, PRESENT_DESIGN, SAME_TIME, Recipe


Result = dict[str, Any]
# 97.5 % quantiles of Student's t with n - 1 degrees of freedom, for n values
T_QUANTILES = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
OWN, REFERENCES = "unconditional", "reference images"


class Line(NamedTuple):
    """A line of a table: one row of the tables of an arm's runs."""

    arm: str
    prior: str
    row: str
    title: str = ""


class Column(NamedTuple):
    heading: str
    table: str
    metric: str
    scale: float = 100
    digits: int = 1


CLASSES = Column("CIFAR-10 top-1 %", "CIFAR-10", "top1")
TO_TEXT = (
    Column("image to text R@1 %", "Flickr8k image to text", "recall_at_1"),
    Column("R@10 %", "Flickr8k image to text", "recall_at_10"),
    Column("median rank", "Flickr8k image to text", "median_rank", 1),
    Column("texts that come first", "Flickr8k image to text", "distinct_top1", 1, 0),
)
TO_IMAGE = Column("text to image R@10 %", "Flickr8k text to image", "recall_at_10")


# Figures


def find_row(result: Result, line: Line, table: str) -> dict[str, Any] | None:
    """The row of one run; None where its model has no such row."""
    tables = result["tables"]
    rows = tables.get(f"{table}, {line.prior}") or tables.get(table) or []
    if len(rows) == 1:
        return rows[0]
    return next((row for row in rows if row["name"] == line.row), None)


def values_of(results: list[Result], line: Line, column: Column) -> list[float]:
    """One value per seed."""
    rows = [find_row(each, line, column.table) for each in results if each["run"]["arm"] == line.arm]
    return [row["metrics"][column.metric]["value"] for row in rows if row is not None]


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean and ends of its 95 % interval; nan ends for a single value."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = T_QUANTILES[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def show(values: list[float], column: Column) -> str:
    """As in "12.3 (11.0 - 13.9)"; "" without values, no interval for one value."""
    if not values:
        return ""
    mean, low, high = (f"{column.scale * value:.{column.digits}f}" for value in interval(values))
    return mean if len(values) == 1 else f"{mean} ({low} - {high})"


def weights_of(results: list[Result], line: Line, table: str) -> str:
    """The prior weights of a line over seeds, as in "0.8, 0.85"; "" where there are none."""
    rows = [find_row(each, line, table) for each in results if each["run"]["arm"] == line.arm]
    weights = sorted({row["prior_weight"] for row in rows if row and row["prior_weight"] is not None})
    return ", ".join(f"{weight:g}" for weight in weights)


def table(results: list[Result], lines: list[Line], columns: list[Column], first: str = "model") -> list[str]:
    headings = [first, "log P(T) from", "prior weight", *(column.heading for column in columns)]
    text = [table_row(headings), table_row(["---"] * len(headings))]
    for line in lines:
        weight = "" if line.row == "CLIP" else line.row
        if line.row not in ("CLIP", "blind"):
            weights = [weights_of(results, line, name) for name in dict.fromkeys(column.table for column in columns)]
            weight = "; ".join(dict.fromkeys(filter(None, weights)))
            weight = f"tuned: {weight}" if line.row == "tuned" else weight
        prior = "" if line.row == "likelihood" else line.prior.removesuffix(", per token")
        # an image's rank under a text does not depend on the prior
        shown = [column for column in columns if column is not TO_IMAGE or line.row in ("likelihood", "CLIP")]
        cells = [show(values_of(results, line, column), column) if column in shown else "" for column in columns]
        text.append(table_row([line.title or line.arm, prior, weight, *cells]))
    return text


def difference(results: list[Result], one: Line, other: Line, column: Column) -> str:
    """Mean difference of two lines over the seeds that both have, with its interval."""
    pairs = zip(values_of(results, one, column), values_of(results, other, column), strict=True)
    return show([a - b for a, b in pairs], column)


# The experiments


def comparison(results: list[Result], searched: list[Result], recipe: Recipe) -> list[str]:
    lines = [Line("CLIP", "", "CLIP")]
    for arm in ("captioner", "IG captioner", "IG + parallel"):
        lines.append(Line(arm, OWN, "likelihood"))
        for prior in (OWN, REFERENCES) if arm != "captioner" else (REFERENCES,):
            lines += [Line(arm, prior, row) for row in ("information gain", "tuned", "blind")]
    tuned = Line("IG captioner", OWN, "tuned")
    plain = Line("captioner", REFERENCES, "tuned")
    pairs = [("IG captioner tuned - CLIP", tuned, lines[0]), ("IG captioner tuned - captioner tuned", tuned, plain)]
    columns = [CLASSES, *TO_TEXT, TO_IMAGE]
    differences = [CLASSES, TO_TEXT[1], TO_IMAGE]
    return [
        "Ten classes, balanced in training and test; Flickr8k-val: "
        f"{recipe.test_captions} photos, with one caption each. Weights are tuned on held-out training keys.",
        "",
        *table(results, lines, columns),
        "",
        "Differences between runs of the same seed:",
        "",
        table_row(["", *(column.heading for column in differences)]),
        table_row(["---"] * 4),
        *(
            table_row([title, *(difference(results, one, other, column) for column in differences)])
            for title, one, other in pairs
        ),
        "",
        "Learning rates, as multiples of the recipe's, by mean held-out top-1 and R@10; the best is used:",
        "",
        *search_table(searched, recipe),
    ]


def search_table(searched: list[Result], recipe: Recipe) -> list[str]:
    qualities = {(each["run"]["arm"], each["run"]["rate_factor"]): each["quality"] for each in searched}
    lines = [table_row(["", *(f"{factor:g} x" for factor in recipe.rate_factors)])]
    lines.append(table_row(["---"] * (len(recipe.rate_factors) + 1)))
    for arm in ("IG captioner", "CLIP"):
        lines.append(table_row([arm, *(f"{100 * qualities[arm, factor]:.1f}" for factor in recipe.rate_factors)]))
    return lines


def long_tail(results: list[Result], recipe: Recipe) -> list[str]:
    counts = class_counts(len(CLASS_NAMES), 1000, recipe.long_tail_ratio)
    lines = [Line("IG captioner", OWN, row) for row in ("likelihood", "information gain", "tuned")]
    lines.append(Line("captioner", OWN, "likelihood"))
    lines += [Line("captioner", REFERENCES, row) for row in ("information gain", "tuned")]
    head = [
        "model",
        "log P(T) from",
        "weight",
        "balanced top-1 %",
        "one run, seed by seed",
        "top-1 % as in training",
        "classes predicted for over 1 % of the photos",
    ]
    text = [
        f"Training images per class fall from {recipe.long_tail_ratio:g} to 1; the test set is balanced. In the column "
        "of single runs, intervals are over test images; `as in training` weighs the classes as the training data do.",
        "",
        table_row(head),
        table_row(["---"] * len(head)),
    ]
    for line in lines:
        rows = [find_row(each, line, "CIFAR-10") for each in results if each["run"]["arm"] == line.arm]
        top1 = [row["metrics"]["top1"] for row in rows]
        single = "; ".join(f"{100 * t['value']:.1f} ({100 * t['low']:.1f} - {100 * t['high']:.1f})" for t in top1)
        uneven = [weighted_accuracy(row["confusion"], counts) for row in rows]
        used = ", ".join(str(sum(count > 0.01 * sum(row["predicted"]) for count in row["predicted"])) for row in rows)
        weights = ", ".join(f"{weight:g}" for weight in sorted({row["prior_weight"] for row in rows}))
        prior = "" if line.row == "likelihood" else line.prior
        cells = [show([t["value"] for t in top1], CLASSES), single, show(uneven, CLASSES), used]
        text.append(table_row([line.arm, prior, f"tuned: {weights}" if line.row == "tuned" else weights, *cells]))
    gain = difference(results, lines[1], lines[0], CLASSES)
    return [*text, "", f"IG captioner, weight 1 - weight 0, runs of the same seed: {gain} points."]


def weighted_accuracy(confusion: list[list[int]], counts: list[int]) -> float:
    """Accuracy where classes are as frequent as `counts` say, from counts [true, predicted]."""
    per_class = [row[index] / sum(row) for index, row in enumerate(confusion)]
    return sum(count * accuracy for count, accuracy in zip(counts, per_class, strict=True)) / sum(counts)


def ablations(results: list[Result]) -> list[str]:
    arms = list(dict.fromkeys(each["run"]["arm"] for each in results))
    seeds = len({each["run"]["seed"] for each in results})
    columns = [CLASSES, TO_TEXT[1], TO_IMAGE]
    text = [
        f"One change each, {seeds} seed{'s' if seeds > 1 else ''}; `IG captioner` is weights 1.5:0.5, no parallel "
        "prediction, half of the decoder's layers text-only, prefix fusion, the loss a mean over tokens. "
        "`captioner` is weights 1:0, `IG + parallel` a share of 0.75.",
        "",
    ]
    for name, row in (("likelihood", "likelihood"), ("information gain", "information gain"), ("tuned", "tuned")):
        lines = [Line(arm, REFERENCES if arm == "captioner" else OWN, row) for arm in arms]
        text += [f"At {name}:", "", *table(results, lines, columns, "change"), ""]
    base = [
        Line("IG captioner", prior + suffix, row, f"IG captioner{suffix}")
        for suffix in ("", ", per token")
        for prior in (OWN, REFERENCES)
        for row in ("likelihood", "information gain", "tuned")
        if (prior, row) != (REFERENCES, "likelihood")
    ]
    text += ["Scores of the same runs: per text or per token, and where log P(T) comes from:", ""]
    text += table(results, base, [CLASSES, TO_TEXT[1]], "score")
    return text


def designs(results: list[Result], cpu_seconds: dict[str, float]) -> list[str]:
    """Each design at two weights, and its difference from the present design with the same seeds."""
    columns = [CLASSES, TO_TEXT[1], TO_IMAGE]
    text = [
        "A decoder of 6 layers of width 192; so many of them see the image, and so wide are the token embedding and "
        f"the head. The present design is `{PRESENT_DESIGN}`. At equal CPU time, `{CHEAPEST_DESIGN}` has as many "
        "samples as take the CPU time of the present design's.",
        "",
    ]
    others = [name for name in DESIGNS if name != PRESENT_DESIGN]
    arms = [PRESENT_DESIGN, *others, CHEAPEST_DESIGN + SAME_TIME]
    for row in ("likelihood", "information gain"):
        lines = [Line(arm, OWN, row) for arm in arms]
        text += [f"At {row}:", "", *table(results, lines, columns, "design"), ""]
        text += ["Minus the present design, runs of the same seed:", ""]
        text += [table_row(["design", *(column.heading for column in columns)]), table_row(["---"] * 4)]
        for line in lines[1:]:
            cells = [difference(results, line, lines[0], column) for column in columns]
            text.append(table_row([line.arm, *cells]))
        text.append("")
    text += ["CPU seconds of a training step:", "", table_row(["design", "s", "ratio"]), table_row(["---"] * 3)]
    for name, seconds in cpu_seconds.items():
        text.append(table_row([name, f"{seconds:.3f}", f"{seconds / cpu_seconds[PRESENT_DESIGN]:.2f}"]))
    return text


TITLES = {
    "comparison": "Captioner, IG captioner, parallel prediction and CLIP at equal samples",
    "long_tail": "Long-tailed training data",
    "ablations": "Ablations",
    "designs": "Fewer fusion layers and a narrower embedding",
}


def write_report(folder: Path, experiment: str, text: list[str], results: list[Result], command: str) -> None:
    """`EXPERIMENT.md`, and `EXPERIMENT.json` with the values of every run."""
    unique = list({json.dumps(each["run"], sort_keys=True): each for each in results}.values())
    parameters = {each["run"]["arm"]: each["parameters"] for each in unique}
    run = {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "hardware": f"{cpu_model()}; trained on {', '.join(sorted({each['device'] for each in unique}))}",
        "samples per run": ", ".join(f"{count:,}" for count in sorted({each["samples"] for each in unique})),
        "minutes, all runs together": f"{sum(each['minutes'] for each in unique):.0f}",
        "parameters": ", ".join(f"{arm} {count:,}" for arm, count in parameters.items()),
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers")),
    }
    lines = [f"# {TITLES[experiment]}", "", *text, "", "In brackets: 95 % intervals over seeds (Student's t).", ""]
    lines += [f"- {key}: {value}" for key, value in run.items()]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{experiment}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    content = {"run": run, "results": [slim(each) for each in unique]}
    (folder / f"{experiment}.json").write_text(json.dumps(content) + "\n", encoding="utf-8")


def slim(result: Result) -> Result:
    """Values without intervals: those can be computed from nothing but the scores, which are not kept."""
    tables = {
        name: [
            {"name": row["name"], "prior_weight": row["prior_weight"]}
            | {metric: round(estimate["value"], 5) for metric, estimate in row["metrics"].items()}
            | {key: row[key] for key in ("predicted",) if key in row}
            for row in rows
        ]
        for name, rows in result["tables"].items()
    }
    return {**result, "tables": tables}
