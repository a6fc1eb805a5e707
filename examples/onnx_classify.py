"""Classifies photos with onnxruntime, tokenizers, Pillow and numpy; neither torch nor ig_captioner is imported.

python -m ig_captioner.export MODEL FOLDER
python examples/onnx_classify.py FOLDER photo.jpg --labels cat dog horse
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer


def to_pixel_values(photo: Image.Image, settings: dict) -> np.ndarray:
    """`pixel_values` [channels, height, width] of an RGB image."""
    from input_rules import centre_box  # how the model's images and texts were read in training

    height, width = settings["size"]["height"], settings["size"]["width"]
    box = centre_box(photo.height, photo.width, (height, width), settings["crop_pct"])
    pixels = np.asarray(photo.resize((width, height), settings["resample"], box=box), dtype=np.float32)
    pixels = pixels * np.float32(settings["rescale_factor"])
    mean, std = (np.array(settings[name], dtype=np.float32) for name in ("image_mean", "image_std"))
    return ((pixels - mean) / std).transpose(2, 0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what ig_captioner.export wrote")
    parser.add_argument("photos", nargs="+", metavar="PHOTO")
    parser.add_argument("--labels", nargs="+", required=True)
    parser.add_argument("--template", default="a photo of a {}.")
    options = parser.parse_args()
    sys.path.insert(0, str(options.folder))
    from input_rules import clean_text, read_image_file

    settings = json.loads((options.folder / "settings.json").read_text(encoding="utf-8"))
    graphs = "image_encoder", "text_scorer", "text_prior"
    encoder, scorer, prior = (onnxruntime.InferenceSession(options.folder / f"{name}.onnx") for name in graphs)

    tokenizer = Tokenizer.from_file(str(options.folder / "tokenizer.json"))
    labels = [clean_text(label) for label in options.labels]
    encoded = tokenizer.encode_batch([options.template.replace("{}", label) for label in labels])
    texts = {
        "input_ids": np.array([text.ids for text in encoded]),
        "attention_mask": np.array([text.attention_mask for text in encoded]),
    }
    (prior_log_likelihood,) = prior.run(None, texts)  # [C], the same for every photo

    names = [*labels, "none of these"]  # the last one is a candidate where there is a threshold
    for path in options.photos:
        pixel_values = to_pixel_values(read_image_file(path), settings["image_processor"])[None]
        (image_key_values,) = encoder.run(None, {"pixel_values": pixel_values})
        (caption_log_likelihood,) = scorer.run(None, {"image_key_values": image_key_values, **texts})
        gains = caption_log_likelihood[0] - settings["prior_weight"] * prior_log_likelihood
        if settings["abstain_threshold"] is not None:
            gains = np.append(gains, settings["abstain_threshold"])
        scores = np.exp((gains - gains.max()) / settings["score_temperature"])
        for i in np.argsort(-gains):
            print(f"{path}  {names[i]}: {scores[i] / scores.sum():.3f}, information gain {gains[i]:.2f} nats")


if __name__ == "__main__":
    main()
