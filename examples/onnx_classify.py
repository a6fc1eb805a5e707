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
from tokenizers import Tokenizer


def read_photo(path: str, settings: dict) -> np.ndarray:
    """`pixel_values` [channels, height, width], by the rules that the export wrote beside the graphs."""
    from input_rules import centre_box, read_image_file

    photo, height, width = read_image_file(path), settings["size"]["height"], settings["size"]["width"]
    box = centre_box(photo.height, photo.width, (height, width), settings.get("crop_pct"))
    pixels = np.float32(photo.crop(box).resize((width, height), settings["resample"]))
    mean, std = np.float32(settings["image_mean"]), np.float32(settings["image_std"])
    return ((pixels * np.float32(settings["rescale_factor"]) - mean) / std).transpose(2, 0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what ig_captioner.export wrote")
    parser.add_argument("photos", nargs="+", metavar="PHOTO")
    parser.add_argument("--labels", nargs="+", required=True)
    options = parser.parse_args()
    sys.path.insert(0, str(options.folder))
    from input_rules import clean_text

    settings = json.loads((options.folder / "settings.json").read_text(encoding="utf-8"))
    graphs = "image_encoder", "text_scorer", "text_prior"
    encoder, scorer, prior = (onnxruntime.InferenceSession(options.folder / f"{name}.onnx") for name in graphs)
    tokenizer = Tokenizer.from_file(str(options.folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True  # words like "[PAD]" in a label are words
    names = [*map(clean_text, options.labels), "none of these"]  # the last is a candidate where there is a threshold
    template = settings["prompt_templates"][0]
    encoded = tokenizer.encode_batch([template.replace("{}", name) for name in names[:-1]])
    columns = {"input_ids": "ids", "attention_mask": "attention_mask"}
    texts = {name: np.array([getattr(text, column) for text in encoded]) for name, column in columns.items()}
    (prior_log_likelihood,) = prior.run(None, texts)  # [C], the same for every photo
    for path in options.photos:
        (image_key_values,) = encoder.run(None, {"pixel_values": read_photo(path, settings["image_processor"])[None]})
        (caption_log_likelihood,) = scorer.run(None, {"image_key_values": image_key_values, **texts})
        gains = caption_log_likelihood[0] - settings["prior_weight"] * prior_log_likelihood
        if settings["abstain_threshold"] is not None:
            gains = np.append(gains, settings["abstain_threshold"])
        scores = np.exp((gains - gains.max()) / settings["score_temperature"])
        for i in np.argsort(-gains):
            print(f"{path}  {names[i]}: {scores[i] / scores.sum():.3f}, information gain {gains[i]:.2f} nats")


if __name__ == "__main__":
    main()
