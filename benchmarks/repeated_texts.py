"""The same labels for many photos: CPU time per photo of the pipeline and of calls of `score`, texts compiled or not.

    OMP_NUM_THREADS=1 python -m benchmarks.repeated_texts                    # the shipped checkpoint, 100 photos
    OMP_NUM_THREADS=1 python -m benchmarks.repeated_texts --base --photos 8  # ViT-B/16, decoder 6 x 384, random weights

All ways take turns in one run; each figure is the median over rounds of process time divided by the number of photos.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from ig_captioner import (
    DEFAULT_CHECKPOINT,
    IGCaptionerConfig,
    IGCaptionerForZeroShotImageClassification,
    IGCaptionerImageProcessor,
    IGCaptionerProcessor,
    IGZeroShotImageClassificationPipeline,
)


NUM_LABELS = 100
TEMPLATE = "a photo of a {}."
BASE = {"vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1536, "num_text_only_layers": 3}


def load(base: bool) -> tuple[Any, Any, Any]:
    """Model, tokenizer and image processor."""
    processor = IGCaptionerProcessor.from_pretrained(DEFAULT_CHECKPOINT)
    if not base:
        model = IGCaptionerForZeroShotImageClassification.from_pretrained(DEFAULT_CHECKPOINT, dtype=torch.float32)
        return model.eval(), processor.tokenizer, processor.image_processor
    torch.manual_seed(0)
    config = IGCaptionerConfig(text_config=BASE)
    size = {"height": 224, "width": 224}
    image_processor = IGCaptionerImageProcessor(size=size)
    return IGCaptionerForZeroShotImageClassification(config).eval(), processor.tokenizer, image_processor


def ways_to_score(base: bool, number: int) -> dict[str, Callable[[], Any]]:
    model, tokenizer, image_processor = load(base)
    classify = IGZeroShotImageClassificationPipeline(
        model=model, tokenizer=tokenizer, image_processor=image_processor, device="cpu"
    )
    pixels = np.random.default_rng(0).integers(0, 256, (number, 64, 64, 3), dtype=np.uint8)
    photos = [Image.fromarray(photo) for photo in pixels]
    labels = [f"thing number {index}" for index in range(NUM_LABELS)]
    settings = {"candidate_labels": labels, "hypothesis_template": TEMPLATE}
    texts = dict(tokenizer([TEMPLATE.replace("{}", label) for label in labels], padding=True, return_tensors="pt"))
    texts = {name: texts[name] for name in ("input_ids", "attention_mask")}
    compiled = model.compile_texts(**texts)
    batches = image_processor(images=photos, return_tensors="pt")["pixel_values"].split(1)

    def score_each(*arguments: Any, **options: Any) -> None:
        with torch.no_grad():
            for batch in batches:
                model.score(batch, *arguments, **options)

    return {
        "pipeline, one call, batches of 8": lambda: classify(photos, batch_size=8, **settings),
        "pipeline, one call, batches of 1": lambda: classify(photos, **settings),
        "pipeline, a call per photo": lambda: [classify(photo, **settings) for photo in photos],
        "score(ids), a call per photo": lambda: score_each(**texts),
        "score(compiled), a call per photo": lambda: score_each(compiled),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", action="store_true", help="ViT-B/16 with random weights, not the shipped checkpoint")
    parser.add_argument("--photos", type=int, default=100, help="photos of each way (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; the median counts (default: %(default)s)")
    options = parser.parse_args(arguments)
    ways = ways_to_score(options.base, options.photos)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for run in ways.values():
        run()
    for _ in range(options.rounds):
        for name, run in ways.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    for name, seconds in times.items():
        print(f"{1000 * statistics.median(seconds) / options.photos:9.2f} ms of CPU per photo: {name}")


if __name__ == "__main__":
    main()
