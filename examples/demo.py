"""Classifies real photos with the shipped checkpoint: a table per photo, and a picture of the same numbers.

    python examples/demo.py --output_dir demo_output

The photos are in `ig_captioner/demo/photos`, the labels what they show, the sentence is the checkpoint's own, and the
prior weight is 1, the plain difference.
"""

import argparse
from pathlib import Path

from demo_picture import draw
from transformers import pipeline

from ig_captioner import DEFAULT_CHECKPOINT, IGZeroShotImageClassificationPipeline
from ig_captioner.demo.examples import LABEL_OF, NO_CLASS, load_photo


COLUMNS = ("caption_log_likelihood", "prior_log_likelihood", "information_gain", "score")


def print_table(name: str, predictions: list[dict]) -> None:
    known = ", of which no class was trained" if name in NO_CLASS else ""
    print(f"\n{name}: {LABEL_OF[name]}{known}   (nats; * highest of its column)")
    print(f"{'label':>17} {'log P(T|I)':>11} {'log P(T)':>9} {'IG':>7} {'score':>7}")
    best = {column: max(row[column] for row in predictions) for column in COLUMNS}
    for row in predictions:
        cells = [f"{row[column]:.2f}" + ("*" if row[column] == best[column] else " ") for column in COLUMNS]
        print(f"{row['label']:>17} {cells[0]:>11} {cells[1]:>9} {cells[2]:>7} {cells[3]:>7}")


def count_right(results: dict[str, list[dict]], column: str) -> int:
    """How many photos have the highest value of a column at their own label."""
    best = {name: max(rows, key=lambda row: row[column])["label"] for name, rows in results.items()}
    return sum(best[name] == LABEL_OF[name] for name in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_CHECKPOINT)
    parser.add_argument("--output_dir", type=Path, default=Path("demo_output"))
    options = parser.parse_args()
    classify = pipeline(
        "zero-shot-image-classification", model=options.model, pipeline_class=IGZeroShotImageClassificationPipeline
    )
    settings = {"candidate_labels": list(LABEL_OF.values()), "prior_weight": 1.0, "return_log_likelihoods": True}
    results = {name: classify(load_photo(name), **settings) for name in LABEL_OF}
    for name, predictions in results.items():
        print_table(name, predictions)
    by_likelihood, by_gain = (count_right(results, column) for column in (COLUMNS[0], COLUMNS[2]))
    print(f"\nright of {len(results)} photos: {by_gain} by information gain, {by_likelihood} by log P(T|I) alone")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    draw(results, options.output_dir / "demo.png")
    print(f"wrote {options.output_dir / 'demo.png'}")


if __name__ == "__main__":
    main()
