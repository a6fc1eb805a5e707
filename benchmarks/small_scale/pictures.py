"""Pictures of the experiments."""

from pathlib import Path

from matplotlib.figure import Figure

from .evaluate import CLASS_NAMES
from .long_tail import class_counts
from .plan import ARMS, Recipe
from .report import CLASSES, OWN, REFERENCES, TO_TEXT, Line, Result, find_row, values_of


COLOURS = {"likelihood": "#b0b0b0", "information gain": "#1f77b4", "tuned": "#2ca02c", "CLIP": "#d95f02"}


def draw_long_tail(path: Path, results: list[Result], recipe: Recipe) -> None:
    """How often each class is predicted at weight 0 and 1, beside how often it was trained on. Means over seeds."""
    counts = class_counts(len(CLASS_NAMES), 1000, recipe.long_tail_ratio)
    bars = {"training data": [100 * count / sum(counts) for count in counts]}
    for row, title in (("likelihood", "predicted at weight 0"), ("information gain", "predicted at weight 1")):
        line = Line("IG captioner", OWN, row)
        runs = [each for each in results if each["run"]["arm"] == line.arm]
        shares = [
            [100 * n / sum(predicted) for n in predicted]
            for predicted in (find_row(each, line, "CIFAR-10")["predicted"] for each in runs)
        ]
        bars[title] = [sum(column) / len(column) for column in zip(*shares, strict=True)]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    for number, (title, values) in enumerate(bars.items()):
        places = [index + 0.27 * (number - 1) for index in range(len(CLASS_NAMES))]
        axes.bar(places, values, 0.27, label=title, color=("#333333", "#b0b0b0", "#1f77b4")[number])
    axes.axhline(100 / len(CLASS_NAMES), color="black", linewidth=0.8, linestyle=":", label="test data")
    axes.set_xticks(range(len(CLASS_NAMES)), CLASS_NAMES)
    axes.set_ylabel("% of photos")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def draw_comparison(path: Path, results: list[Result]) -> None:
    """A dot per seed: top-1 on CIFAR-10 and R@10 on Flickr8k, image to text."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, column, title in zip(
        figure.subplots(1, 2), (CLASSES, TO_TEXT[1]), ("CIFAR-10 top-1 %", "Flickr8k image to text R@10 %"), strict=True
    ):
        for height, arm in enumerate(reversed(ARMS)):
            for row in ("CLIP",) if arm == "CLIP" else ("likelihood", "information gain", "tuned"):
                values = values_of(results, Line(arm, REFERENCES if arm == "captioner" else OWN, row), column)
                offset = {"likelihood": 0.2, "tuned": -0.2}.get(row, 0.0)
                axes.scatter(
                    [100 * value for value in values],
                    [height + offset] * len(values),
                    color=COLOURS[row],
                    s=22,
                    label=row if arm in ("IG captioner", "CLIP") else None,
                )
        axes.set_yticks(range(len(ARMS)), list(reversed(ARMS)))
        axes.set_title(title, fontsize=10)
        axes.grid(axis="x", linewidth=0.4)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)
