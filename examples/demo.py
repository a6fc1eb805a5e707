"""Classifies real photos with the shipped checkpoint: a table per photo, and a picture of the same numbers.

    python examples/demo.py --output_dir demo_output

The photos are the public-domain and CC0 ones inside scikit-image's wheel, so nothing is downloaded.
"""

import argparse
from pathlib import Path

from demo_picture import draw
from PIL import Image
from skimage import data
from transformers import pipeline

from ig_captioner import DEFAULT_CHECKPOINT, IGZeroShotImageClassificationPipeline


PHOTOS = {
    "chelsea": data.chelsea,
    "astronaut": data.astronaut,
    "coffee": data.coffee,
    "rocket": data.rocket,
    "motorcycle": lambda: data.stereo_motorcycle()[0],
}
LABELS = ["cat", "dog", "woman", "cup of coffee", "rocket", "motorcycle"]


def print_table(name: str, predictions: list[dict]) -> None:
    print(f"\n{name}   (nats; * highest of its column)")
    print(f"{'label':>16} {'log P(T|I)':>11} {'log P(T)':>9} {'IG':>7} {'score':>7}")
    columns = ("caption_log_likelihood", "prior_log_likelihood", "information_gain", "score")
    best = {column: max(row[column] for row in predictions) for column in columns}
    for row in predictions:
        cells = [f"{row[column]:.2f}" + ("*" if row[column] == best[column] else " ") for column in best]
        print(f"{row['label']:>16} {cells[0]:>11} {cells[1]:>9} {cells[2]:>7} {cells[3]:>7}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_CHECKPOINT)
    parser.add_argument("--output_dir", type=Path, default=Path("demo_output"))
    options = parser.parse_args()
    classify = pipeline(
        "zero-shot-image-classification", model=options.model, pipeline_class=IGZeroShotImageClassificationPipeline
    )
    settings = {"candidate_labels": LABELS, "hypothesis_template": "a {}", "return_log_likelihoods": True}
    settings["prior_weight"] = 1.0  # the plain difference, which the picture's title states
    images = {name: Image.fromarray(load()) for name, load in PHOTOS.items()}
    results = {name: classify(image, **settings) for name, image in images.items()}
    for name, predictions in results.items():
        print_table(name, predictions)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    draw(results, images, LABELS, options.output_dir / "demo.png")
    print(f"\nwrote {options.output_dir / 'demo.png'}")


if __name__ == "__main__":
    main()
