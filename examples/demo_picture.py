"""The picture of `demo.py`: for each photo, bars of likelihood, prior and information gain over the labels."""

from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image


COLUMNS = {
    "caption_log_likelihood": "log P(T|I)\nlikelihood",
    "prior_log_likelihood": "log P(T)\nprior",
    "information_gain": "log P(T|I) - log P(T)\ninformation gain",
}


def draw(results: dict[str, list[dict]], images: dict[str, Image.Image], labels: list[str], path: Path) -> None:
    """One row per photo: the photo, then bars with the winner of each column in colour.

    Args:
        results: by photo, what the pipeline returns with `return_log_likelihoods=True`.
        labels: from top to bottom.
    """
    height = 2.0 * len(results) + 0.9
    figure, axes = plt.subplots(
        len(results), 4, figsize=(11.5, height), layout="constrained", width_ratios=[1.0, 1.3, 1.3, 1.3]
    )
    limits = {column: [row[column] for rows in results.values() for row in rows] for column in COLUMNS}
    for (name, predictions), (photo, *bars) in zip(results.items(), axes, strict=True):
        rows = sorted(predictions, key=lambda row: -labels.index(row["label"]))
        photo.imshow(images[name])
        photo.set_axis_off()
        for axis, (column, title) in zip(bars, COLUMNS.items(), strict=True):
            values = [row[column] for row in rows]
            colours = ["#d1495b" if value == max(values) else "#9fb3c8" for value in values]
            axis.barh([row["label"] for row in rows], values, color=colours)
            low, high = min(0.0, *limits[column]), max(0.0, *limits[column])
            axis.set_xlim(low * 1.05, high * 1.15 + 0.01)
            axis.axvline(0, color="black", linewidth=0.8)
            axis.spines[["top", "right", "left"]].set_visible(False)
            axis.tick_params(left=False, labelleft=axis is bars[0], labelbottom=name == list(results)[-1])
            if name == next(iter(results)):
                axis.set_title(title, fontsize=10)
    figure.supxlabel("nats; red: the text that this column would choose", fontsize=9)
    figure.savefig(path, dpi=90)
