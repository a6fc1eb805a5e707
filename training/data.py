"""Decoded samples to batches: mixing of sources, shuffling, collation.

Shapes: B images, H x W pixels, L text tokens.

Two ways lead from shards to batches:
- `CachedMixture` (small sets): every image decoded once to uint8. Which sample, caption and augmentation the n-th draw
  gives is a pure function of (seed, n), so the position in the data is one integer, whatever the number of workers.
- `StreamedMixture` (large sets): shards shuffled per epoch, split over the readers, with a shuffle buffer.

What was skipped travels with the next good item to the training loop, which counts it.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from ig_captioner.information_gain import IGNORE_INDEX
from ig_captioner.shards import (
    EmptySourceError,
    Encode,
    Sample,
    Skipped,
    describe_empty,
    find_shards,
    is_held_out,
    make_encoder,
    read_samples,
)

from .augmentation import ImageSettings, augment, normalise
from .config import AugmentationConfig, DataConfig, SourceConfig


MIXTURE_PERIOD = 1000  # draws after which the order of the sources repeats; weights are rounded to 1/1000


# Mixtures


def mixture_order(weights: list[float], period: int = MIXTURE_PERIOD) -> np.ndarray:
    """The source of each of `period` consecutive draws, int [period], spread as evenly as the weights allow."""
    shares = np.asarray(weights, dtype=np.float64) / sum(weights)
    counts = np.maximum(1, np.floor(shares * period)).astype(int)
    while counts.sum() != period:
        error = shares * period - counts
        counts[error.argmax() if counts.sum() < period else error.argmin()] += 1 if counts.sum() < period else -1
    due = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    return np.repeat(np.arange(len(counts)), counts)[np.argsort(due, kind="stable")]


class CachedSource:
    """Decoded samples of one shard set."""

    def __init__(self, name: str, samples: list[Sample], augmentation: AugmentationConfig) -> None:
        self.name, self.samples, self.augmentation = name, samples, augmentation


class CachedMixture(Dataset):
    """Endless mixture of cached sources: item n is the n-th draw of the run, a pure function of (seed, n)."""

    def __init__(self, sources: list[CachedSource], weights: list[float], settings: ImageSettings, seed: int) -> None:
        self.sources, self.settings, self.seed = sources, settings, seed
        self.order = mixture_order(weights)
        self.counts = np.bincount(self.order, minlength=len(sources))
        self.ranks = np.zeros_like(self.order)  # how often the draw's source came before within the period
        for source in range(len(sources)):
            self.ranks[self.order == source] = np.arange(self.counts[source])
        self.permutations: dict[int, tuple[int, np.ndarray]] = {}

    def locate(self, draw: int) -> tuple[int, int]:
        """(source, sample) of a draw; a source's samples all come once before any comes again."""
        periods, position = divmod(draw, len(self.order))
        source = int(self.order[position])
        epoch, index = divmod(
            periods * int(self.counts[source]) + int(self.ranks[position]), len(self.sources[source].samples)
        )
        if self.permutations.get(source, (-1,))[0] != epoch:
            rng = np.random.default_rng((self.seed, 0, source, epoch))
            self.permutations[source] = (epoch, rng.permutation(len(self.sources[source].samples)))
        return source, int(self.permutations[source][1][index])

    def __getitem__(self, draw: int) -> dict[str, Any]:
        source, index = self.locate(draw)
        sample = self.sources[source].samples[index]
        rng = np.random.default_rng((self.seed, 1, draw))
        return make_item(sample, source, self.sources[source].augmentation, self.settings, rng)


class StreamedSource:
    """An endless, shuffled stream of one shard set."""

    def __init__(self, name: str, paths: list[str], config: SourceConfig, data: DataConfig, encode: Encode) -> None:
        self.name, self.paths, self.config, self.data, self.encode = name, paths, config, data, encode

    def samples(self, reader: int, readers: int, seed: int) -> Iterator[Sample | Skipped]:
        """With fewer shards than readers each reader reads every shard, in an order of its own."""
        shared = len(self.paths) < readers
        rng = np.random.default_rng((seed, reader))
        for epoch in range(2**31):
            # All readers must draw the same permutation to share out the shards without loss.
            order = (rng if shared else np.random.default_rng((seed, epoch))).permutation(len(self.paths))
            paths = [self.paths[index] for index in (order if shared else order[reader::readers])]
            reasons: Counter[str] = Counter()
            buffer: list[Sample] = []
            usable = 0
            for item in read_samples(paths, self.encode, max_pixels=self.data.max_image_pixels, keep=self.keep):
                if isinstance(item, Skipped):
                    reasons[item.reason] += 1
                    yield item
                    continue
                usable += 1
                buffer.append(item)
                if len(buffer) > self.data.shuffle_buffer:
                    yield buffer.pop(self.swap_last(buffer, int(rng.integers(len(buffer)))))
            if not usable:
                raise EmptySourceError(describe_empty(self.name, paths, reasons))
            for index in rng.permutation(len(buffer)):
                yield buffer[index]

    def keep(self, key: str) -> bool:
        return not is_held_out(key, self.config.holdout_fraction)

    @staticmethod
    def swap_last(buffer: list[Sample], index: int) -> int:
        """Moves the item at `index` to the end, so that pop() there is cheap; returns the end's index."""
        buffer[index], buffer[-1] = buffer[-1], buffer[index]
        return len(buffer) - 1


class StreamedMixture(IterableDataset):
    """Endless mixture of streams, split over `processes` training processes and their loader workers."""

    def __init__(
        self,
        sources: list[StreamedSource],
        weights: list[float],
        settings: ImageSettings,
        seed: int,
        process: int,
        processes: int,
    ) -> None:
        self.sources, self.settings, self.seed = sources, settings, seed
        self.order = mixture_order(weights)
        self.process, self.processes = process, processes

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        workers, worker_id = (worker.num_workers, worker.id) if worker else (1, 0)
        reader, readers = self.process * workers + worker_id, self.processes * workers
        streams = [source.samples(reader, readers, self.seed + index) for index, source in enumerate(self.sources)]
        rng = np.random.default_rng((self.seed, 2, reader))
        while True:
            for source in self.order:
                skipped: list[Skipped] = []
                for sample in streams[source]:
                    if not isinstance(sample, Skipped):
                        break
                    skipped.append(sample)
                augmentation = self.sources[source].config.augmentation
                yield make_item(sample, int(source), augmentation, self.settings, rng, skipped)


def make_item(
    sample: Sample,
    source: int,
    augmentation: AugmentationConfig,
    settings: ImageSettings,
    rng: np.random.Generator,
    skipped: list[Skipped] | None = None,
) -> dict[str, Any]:
    """One augmented image uint8 [H, W, 3] with one of its captions."""
    labels = sample.captions[int(rng.integers(len(sample.captions)))]
    image = augment(sample.image, augmentation, settings, rng)
    return {"image": image, "labels": labels, "source": source, "skipped": skipped or []}


# Batches


def collate(items: list[dict[str, Any]], pad_to_multiple_of: int = 1) -> dict[str, Any]:
    """Items to a batch: pixel_values float32 [B, 3, H, W], labels int64 [B, L], source int64 [B], skipped."""
    return {
        "pixel_values": normalise(np.stack([item["image"] for item in items])),
        "labels": pad_labels([item["labels"] for item in items], pad_to_multiple_of),
        "source": torch.tensor([item["source"] for item in items]),
        "skipped": [skipped for item in items for skipped in item["skipped"]],
    }


def pad_labels(captions: list[list[int]], pad_to_multiple_of: int = 1) -> torch.Tensor:
    """Token ids to int64 [B, L], padded with -100; L is the longest, rounded up."""
    length = -(-max(map(len, captions)) // pad_to_multiple_of) * pad_to_multiple_of
    labels = torch.full((len(captions), length), IGNORE_INDEX, dtype=torch.long)
    for row, caption in enumerate(captions):
        labels[row, : len(caption)] = torch.tensor(caption)
    return labels


class DrawSampler(Sampler[list[int]]):
    """Batches of draw numbers: of each global batch, every process takes its own part."""

    def __init__(self, first_draw: int, batch_size: int, process: int, processes: int) -> None:
        self.first_draw, self.batch_size, self.process, self.processes = (
            first_draw,
            batch_size,
            process,
            processes,
        )

    def __iter__(self) -> Iterator[list[int]]:
        start = self.first_draw + self.process * self.batch_size
        while True:
            yield list(range(start, start + self.batch_size))
            start += self.batch_size * self.processes


def split_by_length(batch: dict[str, Any], parts: int, pad_to_multiple_of: int = 1) -> list[dict[str, torch.Tensor]]:
    """Parts of a batch with captions of similar length, each cut to its longest."""
    lengths = (batch["labels"] != IGNORE_INDEX).sum(dim=1)
    result = []
    for rows in lengths.sort(stable=True).indices.chunk(parts):
        longest = -(-int(lengths[rows].max()) // pad_to_multiple_of) * pad_to_multiple_of
        part = {name: batch[name][rows] if parts > 1 else batch[name] for name in ("pixel_values", "labels", "source")}
        result.append({**part, "labels": part["labels"][:, :longest]})
    return result


# From a configuration to a loader


@dataclass
class TrainingData:
    """An endless loader of batches, the held-out samples, and what was skipped while the cache was filled."""

    loader: DataLoader
    names: list[str]
    held_out: dict[str, list[Sample]]
    skipped: list[Skipped]
    sizes: dict[str, int]
    """Training samples per source; empty when streaming."""


def load_training_data(
    config: DataConfig,
    tokenizer: Any,
    settings: ImageSettings,
    *,
    data_root: str,
    batch_size: int,
    seed: int,
    first_draw: int = 0,
    process: int = 0,
    processes: int = 1,
    max_held_out: int = 200,
) -> TrainingData:
    """Builds the loader of one process. `batch_size` is per process, `first_draw` counts over all processes."""
    encode = make_encoder(tokenizer, config.max_length)
    names = list(config.sources)
    weights = [source.weight for source in config.sources.values()]
    paths = {name: find_shards(source.shards, data_root) for name, source in config.sources.items()}
    training, held_out, skipped = {}, {}, []
    for name, source in config.sources.items():
        if config.cache_in_memory or (source.holdout_fraction and max_held_out):
            training[name], held_out[name], broken = read_cache(name, paths[name], source, config, encode)
            held_out[name] = choose_held_out(held_out[name], max_held_out)
            skipped += broken
    mixture: Dataset
    options: dict[str, Any]
    if config.cache_in_memory:
        cached = [CachedSource(name, training[name], config.sources[name].augmentation) for name in names]
        mixture = CachedMixture(cached, weights, settings, seed)
        options = {"batch_sampler": DrawSampler(first_draw, batch_size, process, processes)}
    else:
        streams = [StreamedSource(name, paths[name], config.sources[name], config, encode) for name in names]
        # A resumed stream starts anew; a seed of its own keeps it from repeating the samples of the first start.
        mixture = StreamedMixture(streams, weights, settings, seed + first_draw, process, processes)
        options = {"batch_size": batch_size}
    loader: DataLoader = DataLoader(
        mixture,
        num_workers=config.num_workers,
        collate_fn=partial(collate, pad_to_multiple_of=config.pad_to_multiple_of),
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if config.num_workers else None,
        **options,
    )
    sizes = {name: len(samples) for name, samples in training.items()} if config.cache_in_memory else {}
    return TrainingData(loader, names, held_out, skipped, sizes)


def read_cache(
    name: str, paths: list[str], source: SourceConfig, config: DataConfig, encode: Encode
) -> tuple[list[Sample], list[Sample], list[Skipped]]:
    """Decodes a source: (training samples, held-out samples, skipped). When streaming, only what is held out."""

    def keep(key: str) -> bool:
        return config.cache_in_memory or is_held_out(key, source.holdout_fraction)

    training: list[Sample] = []
    held_out: list[Sample] = []
    skipped: list[Skipped] = []
    for item in read_samples(paths, encode, max_pixels=config.max_image_pixels, size=config.cache_size, keep=keep):
        if isinstance(item, Skipped):
            skipped.append(item)
        else:
            (held_out if is_held_out(item.key, source.holdout_fraction) else training).append(item)
    if config.cache_in_memory and not training:
        raise EmptySourceError(describe_empty(name, paths, Counter(item.reason for item in skipped)))
    return training, held_out, skipped


def choose_held_out(samples: list[Sample], count: int) -> list[Sample]:
    """Up to `count` samples in the order of their keys' hashes: shards may be sorted by class."""
    return sorted(samples, key=lambda sample: hashlib.sha1(sample.key.encode()).digest())[:count]
