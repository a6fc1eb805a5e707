"""Draws docs/images/prior_weight.png: the scores of labels as lines over the prior weight, for two photos.

    python docs/draw_prior_weight.py

Photos and labels are those of `examples/demo.py`, the model is the shipped checkpoint.
"""

import argparse
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from transformers import pipeline

from ig_captioner import DEFAULT_CHECKPOINT, IGZeroShotImageClassificationPipeline
from ig_captioner.demo.examples import LABEL_OF, load_photo


PHOTOS, LABELS = ("cat", "bee"), list(LABEL_OF.values())
WEIGHTS = np.linspace(0.0, 1.5, 301)


def draw(axes: Axes, name: str, predictions: list[dict]) -> None:
    """A line per label, and the winner at each weight along the top.

    Args:
        predictions: what the pipeline returns with `return_log_likelihoods=True`.
    """
    rows = {row["label"]: row for row in predictions}
    scores = np.array(
        [rows[label]["caption_log_likelihood"] - WEIGHTS * rows[label]["prior_log_likelihood"] for label in LABELS]
    )
    best = scores.argmax(axis=0)
    top = scores.max() + 2.0
    for index, label in enumerate(LABELS):
        (line,) = axes.plot(WEIGHTS, scores[index], linewidth=2, label=label)
        wins = np.where(best == index, top, np.nan)
        axes.plot(WEIGHTS, wins, color=line.get_color(), linewidth=7, solid_capstyle="butt")
        if index in best:
            won = WEIGHTS[best == index]
            axes.annotate(label, (won.mean(), top + 0.9), ha="center", fontsize=9, color=line.get_color())
            print(f"{name}: {label} from {won[0]:.2f} to {won[-1]:.2f}")
    axes.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
    axes.set_ylim(scores.min() - 1.0, top + 3.0)
    axes.set(title=f"a photo of a {name}", xlabel="prior weight")
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "images" / "prior_weight.png")
    options = parser.parse_args()
    classify = pipeline(
        "zero-shot-image-classification", model=DEFAULT_CHECKPOINT, pipeline_class=IGZeroShotImageClassificationPipeline
    )
    settings = {"candidate_labels": LABELS, "return_log_likelihoods": True}
    figure, panels = plt.subplots(1, 2, figsize=(11.5, 4.2), sharey=True, layout="constrained")
    for axes, name in zip(panels, PHOTOS, strict=True):
        draw(axes, name, classify(load_photo(name), **settings))
    panels[0].set_ylabel("log P(T|I) - weight * log P(T), nats")
    panels[1].legend(loc="lower right", fontsize=9, frameon=False)
    figure.savefig(options.output, dpi=90)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
