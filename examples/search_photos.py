"""Finds the photos of a folder for a text, and the texts for each photo, by log P(T|I) and information gain.

python examples/search_photos.py photos/ "a dog in the snow" "a girl in a red dress"
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForZeroShotImageClassification, AutoProcessor

from ig_captioner import DEFAULT_CHECKPOINT
from ig_captioner.data.folders import list_images
from ig_captioner.processing_ig_captioner import load_rgb_image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--model", default=DEFAULT_CHECKPOINT)
    parser.add_argument("--batch_size", type=int, default=16)
    options = parser.parse_args()
    model = AutoModelForZeroShotImageClassification.from_pretrained(options.model, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(options.model)
    paths = [Path(path) for path in list_images(str(options.folder))]
    if not paths:
        raise SystemExit(f"no photos in {options.folder}")

    texts = processor(text=options.texts, return_tensors="pt")
    rows = []
    for start in range(0, len(paths), options.batch_size):
        photos = [load_rgb_image(path) for path in paths[start : start + options.batch_size]]
        with torch.no_grad():  # log P(T) is computed in the first pass and kept
            rows.append(model.score(**processor(images=photos, return_tensors="pt"), **texts))
    likelihood = torch.cat([scores.caption_log_likelihood for scores in rows])  # [photos, texts]
    gain = torch.cat([scores.information_gain for scores in rows])

    for index, text in enumerate(options.texts):  # log P(T) is the same for all photos, so the likelihood decides
        best = int(likelihood[:, index].argmax())
        print(f"{text!r}: {paths[best]}, log P(T|I) {likelihood[best, index]:.2f}")
    for path, gains in zip(paths, gain, strict=True):
        best = int(gains.argmax())
        print(f"{path}: {options.texts[best]!r}, information gain {gains[best]:.2f}")


if __name__ == "__main__":
    main()
