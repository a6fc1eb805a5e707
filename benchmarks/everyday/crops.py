"""The centred square or the whole frame squashed to a square: top-1 on held-out training photos of named things.

    python -m benchmarks.everyday.crops --data 'caltech101-train-*.tar.gz' --class_names FILE --output FILE.json

Of the training's sources only Caltech-101 has photos that are not squares.
"""

import argparse
import json
from pathlib import Path

import torch

from ig_captioner import DEFAULT_CHECKPOINT, IGCaptionerForZeroShotImageClassification
from ig_captioner.checkpoint import load_processor
from ig_captioner.data.prompts import read_class_names
from ig_captioner.data.samples import Samples, label_from_field, labelled_decoder
from ig_captioner.data.shards import is_held_out
from ig_captioner.evaluation.report import cpu_model, git_commit, weights_digest
from ig_captioner.evaluation.rows import bootstrap
from ig_captioner.evaluation.scores import classify_images


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_CHECKPOINT)
    parser.add_argument("--data", required=True, help="labelled photos: shards, a folder or a data set")
    parser.add_argument("--class_names", required=True)
    parser.add_argument("--held_out", type=float, default=0.02, help="the training's holdout_fraction")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    names = read_class_names(options.class_names)
    samples = Samples(options.data, labelled_decoder(label_from_field(names)))
    every = list(samples)
    chosen = [sample for key, sample in zip(samples.keys, every, strict=True) if is_held_out(key, options.held_out)]
    model = IGCaptionerForZeroShotImageClassification.from_pretrained(options.model, dtype=torch.float32).eval()
    processor = load_processor(options.model)
    correct = {}
    for name, crop_pct in (("square", 1.0), ("squashed", None)):
        processor.image_processor.crop_pct = crop_pct
        matrix, labels = classify_images(model, processor, chosen, names, batch_size=8)
        correct[name] = (matrix.information_gain(1.0).argmax(dim=1) == labels).float()
    correct["difference"] = correct["square"] - correct["squashed"]
    rows = {}
    for name, values in correct.items():
        estimate = bootstrap(lambda drawn, values=values: {"top1": values[drawn].mean().item()}, len(values))
        rows[name] = {key: round(100 * number, 1) for key, number in estimate["top1"].items()}
        print(name, rows[name])
    about = {"photos": len(chosen), "commit": git_commit(), "cpu": cpu_model()}
    about["weights_sha256"] = weights_digest(str(options.model))
    options.output.write_text(json.dumps({**about, "top-1 % at weight 1": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
