"""How much faster training is with cached features of the frozen encoder, and what computing them costs.

    python -m benchmarks.feature_cache --config training/configs/everyday.yaml [--steps 20] [--key value ...]

Trains the same few steps twice, on cached features and on images, in a folder of its own, and prints images per second
of each, and how many views a second the cache is filled with.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path

from training.config import TrainConfig, load_config
from training.feature_cache import open_features
from training.train import train


def images_per_second(config: TrainConfig, steps: int, folder: Path) -> float:
    """Of the second half of a run, which leaves out what is done once."""
    changes = {"max_steps": steps, "max_samples": None, "max_minutes": None, "checkpoint_minutes": 0.0}
    changes |= {"log_every_steps": max(1, steps // 2), "output_dir": str(folder)}
    train(dataclasses.replace(config, **changes))
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return rows[-1]["images_per_second"]


def on_images(config: TrainConfig) -> TrainConfig:
    """The configuration without its feature cache, and without what needs one."""
    sources = {
        name: dataclasses.replace(source, templates=[], holdout_names_fraction=0.0)
        for name, source in config.data.sources.items()
    }
    data = dataclasses.replace(config.data, sources=sources, feature_cache=None, cache_size=288)
    return dataclasses.replace(config, data=data)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--steps", type=int, default=20)
    options, overrides = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(options.config, [*overrides, "--data.feature_cache.folder", str(Path(folder, "features"))])
        started = time.perf_counter()
        stores = open_features(config).stores
        views = sum(store.shape[0] * store.shape[1] for store in stores.values())
        print(f"computing features: {views / (time.perf_counter() - started):.1f} views/s ({views} views)")
        cached = images_per_second(config, options.steps, Path(folder, "cached"))
        images = images_per_second(on_images(config), options.steps, Path(folder, "images"))
    print(f"training on cached features: {cached:.1f} images/s; on images: {images:.1f}; {cached / images:.1f} times")


if __name__ == "__main__":
    main()
