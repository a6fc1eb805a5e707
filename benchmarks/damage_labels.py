"""Damages compiled labels in many random ways and loads them: is every damage reported by the name of the folder?

    OMP_NUM_THREADS=1 python -m benchmarks.damage_labels [--flips 200] [--truncations 50] [--seed 0]

Labels are compiled for the checkpoint in the package. Then, on a fresh copy each time, one bit of one of the two files
is flipped, or one file is cut short. `CompiledLabels.load` must refuse with the folder's name; what it accepts must
give the very scores of the intact labels (as after a flip in the white space of the JSON).
"""

import argparse
import json
import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import torch

from benchmarks.damage_checkpoint import flip_bit, truncate
from ig_captioner import DEFAULT_CHECKPOINT, CompiledLabels, IGCaptionerForZeroShotImageClassification, compile_labels
from ig_captioner.checkpoint import load_model, load_processor


LABELS = ["cat", "dog", "horse", "a woman on skis", "cup of coffee", "motorcycle"]
TEMPLATES = ["a photo of a {}.", "a {}"]


def outcome_of(folder: Path, model, pixel_values: torch.Tensor, intact: CompiledLabels) -> str:
    """Loads a damaged folder; returns "reported", "without effect", or what went unnoticed."""
    try:
        loaded = CompiledLabels.load(folder)
    except ValueError as error:
        return "reported" if str(folder) in str(error) else f"UNNAMED: {error}"
    except Exception as error:
        return f"UNNAMED: {type(error).__name__}: {error}"
    same = (loaded.labels, loaded.templates) == (intact.labels, intact.templates)
    with torch.no_grad():
        pairs = zip(model.score(pixel_values, loaded).values(), model.score(pixel_values, intact).values(), strict=True)
    return "without effect" if same and all(torch.equal(*pair) for pair in pairs) else "UNNOTICED"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=200, help="single bits flipped, one at a time")
    parser.add_argument("--truncations", type=int, default=50, help="files cut short, one at a time")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    rng = random.Random(options.seed)
    model = load_model(IGCaptionerForZeroShotImageClassification, DEFAULT_CHECKPOINT, dtype="float32")
    intact = compile_labels(model, load_processor(DEFAULT_CHECKPOINT).tokenizer, LABELS, TEMPLATES)
    size = model.config.vision_config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    pixel_values = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    outcomes: Counter[tuple[str, str, str]] = Counter()
    with tempfile.TemporaryDirectory() as name:
        source = Path(name, "intact")
        damaged = Path(name, "damaged")
        intact.save(source)
        files = sorted(path.name for path in source.iterdir())
        for number in range(options.flips + options.truncations):
            damage = flip_bit if number < options.flips else truncate
            file = files[number % len(files)]
            shutil.rmtree(damaged, ignore_errors=True)
            shutil.copytree(source, damaged)
            damage(damaged / file, rng)
            outcomes[damage.__name__, file, outcome_of(damaged, model, pixel_values, intact)] += 1
    for (damage_name, file, outcome), times in sorted(outcomes.items()):
        print(json.dumps({"damage": damage_name, "file": file, "outcome": outcome, "times": times}))
    if any(outcome.startswith("UN") for _, _, outcome in outcomes):
        raise SystemExit("FAILED: damage went unnoticed, or was not named")


if __name__ == "__main__":
    main()
