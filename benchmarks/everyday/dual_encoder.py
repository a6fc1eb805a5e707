"""A dual encoder at equal samples: LiT's text tower, trained on the draws of a captioner's run.

    python -m benchmarks.everyday.dual_encoder --run RUN --output FOLDER [--seed 0] [--learning_rate 1e-3]

RUN is the output of `training.train` with a feature cache. Encoder, cached views, samples, texts and their order are
those of a run with the same seed; the tower, its loss and its optimiser are those of `ig-captioner evaluate lit`, which
then measures it: `ig-captioner evaluate lit --tower FOLDER --model RUN/final ...`. FOLDER gets `tower.safetensors` and
`held_out.json`, the figures on the held-out samples of the training data, for the choice of a learning rate.

Legend: B pairs, P image tokens, D their width, L text tokens, F width of the tower's features.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ig_captioner.evaluation.lit import POOLINGS, DualEncoder, Recipe, fit, save_tower
from ig_captioner.information_gain import IGNORE_INDEX
from training.config import load_config
from training.data import Share, load_training_data
from training.feature_cache import FeatureStore, open_features
from training.tune import held_out_figures


EXAMPLES = 20_000  # features that their mean and scale are taken over


def as_features(image_features: Tensor, pooling: str) -> Tensor:
    """What the tower reads of image tokens [B, P, D], the last of which is the mean of all: [B, F]."""
    return image_features[:, -1] if pooling == "mean" else image_features.flatten(1)


def examples(stores: dict[str, FeatureStore], pooling: str) -> Tensor:
    """Features of unaugmented views from all sources alike, [at most EXAMPLES, F]."""
    parts = []
    for store in stores.values():
        step = max(1, len(store.records) * len(stores) // EXAMPLES)
        parts.append(as_features(torch.from_numpy(store.features[::step, 0].copy()).float(), pooling))
    return torch.cat(parts)


def batches(
    loader: Any, pad_token_id: int, pooling: str, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The run's batches as the tower takes them: features [B, F], tokens and mask [B, L]."""
    for batch in loader:
        labels = batch["labels"].to(device, non_blocking=True)
        features = as_features(batch["image_features"].to(device, non_blocking=True).float(), pooling)
        mask = (labels != IGNORE_INDEX).long()
        yield features, labels.masked_fill(labels == IGNORE_INDEX, pad_token_id), mask


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--samples", type=int, help="default: as many as the run had")
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--pooling", choices=POOLINGS, default="tokens")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    config = load_config(options.run / "config.yaml")
    samples = options.samples or samples_of(options.run)
    _, tokenizer, settings, stores, device = open_features(config)
    loader = load_training_data(
        config.data,
        tokenizer,
        settings,
        Share(options.batch_size),
        data_root=config.data_root,
        seed=options.seed,
        features=stores,
    ).loader
    fields = ("batch_size", "learning_rate", "width", "layers", "seed", "pooling")
    recipe = Recipe(steps=samples // options.batch_size, **{name: getattr(options, name) for name in fields})
    torch.manual_seed(options.seed)
    tower = DualEncoder(tokenizer, examples(stores, options.pooling), recipe).to(device).train()
    fit(tower, batches(loader, tokenizer.pad_token_id, options.pooling, device))
    save_tower(tower, options.output)

    def score(features: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
        return tower.score(as_features(features, options.pooling), texts), torch.zeros(len(texts))

    (figures,) = held_out_figures(config, stores, score, weights=(0.0,))
    (options.output / "held_out.json").write_text(json.dumps({**recipe._asdict(), **figures}, indent=1))
    print(f"{options.output}: {json.dumps(figures)}")


def samples_of(run: Path) -> int:
    """How many samples a finished run was trained with."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return max(row["samples"] for row in rows if "samples" in row)


if __name__ == "__main__":
    main()
