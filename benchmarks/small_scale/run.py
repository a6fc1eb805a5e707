"""One run: trains, evaluates, writes `metrics.json`; `__main__` starts it in a process of its own.

    python -m benchmarks.small_scale.run FOLDER

FOLDER holds `run.json`: the fields of `plan.Run` and the paths that it needs.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor

from ig_captioner import IGCaptionerForZeroShotImageClassification
from training.config import from_dict
from training.train import train

from .contrastive import train_contrastive
from .evaluate import evaluate_captioner, evaluate_contrastive, load_test_data, quality
from .plan import Recipe, Run, training_config


def execute(folder: Path) -> dict[str, Any]:
    """Returns what it writes to `metrics.json`."""
    order = json.loads((folder / "run.json").read_text())
    run = Run(**order["run"])
    recipe = from_dict(Recipe, order["recipe"])
    tokenizer = Path(order["tokenizer"])
    long_tail = Path(order["long_tail"])
    config = training_config(run, recipe, folder, tokenizer, long_tail, order["data_root"])
    holdout = recipe.train["data"]["sources"]["cifar10"]["holdout_fraction"]
    data = load_test_data(order["data_root"], holdout, recipe.test_captions, recipe.reference_images)
    start = time.perf_counter()
    if run.kind == "contrastive":
        model, losses = train_contrastive(config)
        (folder / "losses.json").write_text(json.dumps(losses))
        parameters = model.model.num_parameters()
        tables = evaluate_contrastive(model, data)
    else:
        final = train(config)
        captioner = IGCaptionerForZeroShotImageClassification.from_pretrained(final)
        parameters = captioner.num_parameters()
        tables = evaluate_captioner(captioner, AutoProcessor.from_pretrained(final), data)
    metrics = {
        "run": order["run"],
        "parameters": parameters,
        "samples": config.max_samples,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "minutes": round((time.perf_counter() - start) / 60, 2),
        "quality": quality(tables),
        "tables": tables,
    }
    partial = folder / "metrics.partial"
    partial.write_text(json.dumps(metrics))
    partial.rename(folder / "metrics.json")
    return metrics


if __name__ == "__main__":
    execute(Path(sys.argv[1]))
