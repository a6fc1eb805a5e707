"""The picture of `demo.py`: photos by labels, once by likelihood and once by information gain."""

from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize, TwoSlopeNorm
from matplotlib.patches import Rectangle

from ig_captioner.demo.examples import LABEL_OF, NO_CLASS, load_photo
from ig_captioner.demo.page import LESS_LIKELY, LIKELIER


RIGHT, WRONG = "#2f855a", "#c53030"
GREYS = {"cmap": "Greys", "norm": Normalize(-22.0, 4.0)}  # nats
GAINS = {"cmap": LinearSegmentedColormap.from_list("gain", [LESS_LIKELY, "#ffffff", LIKELIER])}
GAINS["norm"] = TwoSlopeNorm(0.0, -15.0, 8.0)


def draw(results: dict[str, list[dict]], path: Path) -> None:
    """A row per photo. `results` are, by name, what the pipeline returns with `return_log_likelihoods=True`."""
    by_label = [{row["label"]: row for row in rows} for rows in results.values()]
    places = [["photos", "caption", "gain"], [".", "prior", "."]]
    sizes = {"figsize": (12.5, 8.6), "width_ratios": [0.22, 1, 1], "height_ratios": [len(results), 1]}
    figure, axes = plt.subplot_mosaic(places, layout="constrained", **sizes)
    for name, column, title, colours in (
        ("caption", "caption_log_likelihood", "log P(T|I)", GREYS),
        ("prior", "prior_log_likelihood", "log P(T), the same for every photo", GREYS),
        ("gain", "information_gain", "information gain, log P(T|I) - log P(T)", GAINS),
    ):
        values = np.array([[rows[label][column] for label in LABEL_OF.values()] for rows in by_label])
        _draw_cells(axes[name], values[:1] if name == "prior" else values, title, colours)
    axes["prior"].set_xticks([])
    axes["photos"].set_axis_off()
    for row, name in enumerate(results):
        place = axes["photos"].inset_axes((0, 1 - (row + 0.96) / len(results), 1, 0.92 / len(results)))
        place.imshow(load_photo(name))
        place.set(xticks=[], yticks=[])
        place.set_xlabel("no class of the training" if name in NO_CLASS else "", fontsize=7)
    figure.supxlabel("nats; framed: the text that each photo gets, green where it is right", fontsize=10)
    figure.savefig(path, dpi=90)


def _draw_cells(axes: Axes, values: np.ndarray, title: str, colours: dict) -> None:
    axes.imshow(values, aspect="auto", **colours)
    axes.set(title=title, yticks=[])
    axes.set_xticks(range(values.shape[1]), LABEL_OF.values(), rotation=35, ha="right", rotation_mode="anchor")
    axes.tick_params(length=0)
    for (row, column), value in np.ndenumerate(values):
        axes.text(column, row, f"{value:.0f}".replace("-0", "0"), ha="center", va="center", fontsize=9)
    for row, column in enumerate(values.argmax(axis=1) if len(values) > 1 else ()):
        frame = {"fill": False, "linewidth": 3, "edgecolor": RIGHT if row == column else WRONG}
        axes.add_patch(Rectangle((column - 0.47, row - 0.46), 0.94, 0.92, **frame))
