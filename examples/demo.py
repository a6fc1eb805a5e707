"""Classifies real photos with the shipped checkpoint: a table per photo, and a picture of the same numbers.

    python examples/demo.py --output_dir demo_output

The photos are the public-domain and CC0 ones inside scikit-image's wheel, so nothing is downloaded.
"""

import argparse
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image
from skimage import data
from transformers import pipeline

from ig_captioner import TINY_CHECKPOINT, IGZeroShotImageClassificationPipeline


PHOTOS = {
    "chelsea": data.chelsea,
    "astronaut": data.astronaut,
    "coffee": data.coffee,
    "rocket": data.rocket,
    "motorcycle": lambda: data.stereo_motorcycle()[0],
}
LABELS = ["cat", "dog", "woman", "cup of coffee", "rocket", "motorcycle"]
TEMPLATE = "a {}"
COLUMNS = {
    "caption_log_likelihood": "log P(T|I)\nlikelihood",
    "prior_log_likelihood": "log P(T)\nprior",
    "information_gain": "log P(T|I) - log P(T)\ninformation gain",
}


def print_table(name: str, predictions: list[dict]) -> None:
    print(f"\n{name}   (nats; * highest of its column)")
    print(f"{'label':>16} {'log P(T|I)':>11} {'log P(T)':>9} {'IG':>7} {'score':>7}")
    best = {column: max(row[column] for row in predictions) for column in (*COLUMNS, "score")}
    for row in predictions:
        cells = [f"{row[column]:.2f}" + ("*" if row[column] == best[column] else " ") for column in best]
        print(f"{row['label']:>16} {cells[0]:>11} {cells[1]:>9} {cells[2]:>7} {cells[3]:>7}")


def draw(results: dict[str, list[dict]], images: dict[str, Image.Image], path: Path) -> None:
    """One row per photo: the photo, then bars of likelihood, prior and information gain with the winner in colour."""
    figure, axes = plt.subplots(
        len(results),
        4,
        figsize=(11.5, 2.0 * len(results) + 0.9),
        layout="constrained",
        width_ratios=[1.0, 1.3, 1.3, 1.3],
    )
    limits = {c: [row[c] for rows in results.values() for row in rows] for c in COLUMNS}
    for (name, predictions), (photo, *bars) in zip(results.items(), axes, strict=True):
        rows = sorted(predictions, key=lambda row: -LABELS.index(row["label"]))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=TINY_CHECKPOINT)
    parser.add_argument("--output_dir", type=Path, default=Path("demo_output"))
    options = parser.parse_args()
    classify = pipeline(
        "zero-shot-image-classification",
        model=options.model,
        pipeline_class=IGZeroShotImageClassificationPipeline,
    )
    images = {name: Image.fromarray(load()) for name, load in PHOTOS.items()}
    results = {
        name: classify(image, candidate_labels=LABELS, hypothesis_template=TEMPLATE, return_log_likelihoods=True)
        for name, image in images.items()
    }
    for name, predictions in results.items():
        print_table(name, predictions)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    draw(results, images, options.output_dir / "demo.png")
    print(f"\nwrote {options.output_dir / 'demo.png'}")


if __name__ == "__main__":
    main()
