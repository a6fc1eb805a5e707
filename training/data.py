"""From shards to batches: loading, collation, and which part of a batch each process reads (see `mixtures`).

Shapes: B images, H x W pixels, L text tokens.
"""

import atexit
import hashlib
import multiprocessing
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ig_captioner.data.shards import (
    SHARD_REASONS,
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
from ig_captioner.information_gain import IGNORE_INDEX

from .augmentation import ImageSettings, normalise
from .config import DataConfig, SourceConfig
from .mixtures import CachedMixture, CachedSource, StreamedMixture, StreamedSource, StreamState


# Batches


def collate(items: list[dict[str, Any]], settings: ImageSettings, pad_to_multiple_of: int = 1) -> dict[str, Any]:
    """Items to a batch: pixel_values float32 [B, 3, H, W], labels int64 [B, L], source int64 [B].

    Beside the tensors: the `keys` of the samples and the `epochs` of their sources, what was `skipped` before them, and
    the `states` of the streams that gave them (empty for cached sources).
    """
    return {
        "pixel_values": normalise(np.stack([item["image"] for item in items]), settings),
        "labels": pad_labels([item["labels"] for item in items], pad_to_multiple_of),
        "source": torch.tensor([item["source"] for item in items]),
        "keys": [item["key"] for item in items],
        "epochs": [item["epoch"] for item in items],
        "skipped": [skipped for item in items for skipped in item.get("skipped", [])],
        "states": dict(item["state"] for item in items if "state" in item),
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
    held_out: dict[str, list[Sample]]
    skipped: list[Skipped]
    sizes: dict[str, int]
    """Training samples per source; empty when streaming."""
    streams: int = 0
    """How many streams there are over all processes; 0 for cached sources."""
    states: dict[int, StreamState] = field(default_factory=dict)
    """Where this process's streams stand; the training loop updates it with each batch's."""


def load_training_data(
    config: DataConfig,
    tokenizer: Any,
    settings: ImageSettings,
    *,
    data_root: str,
    batch_size: int,
    seed: int,
    first_draw: int = 0,
    streams: int = 0,
    states: dict[int, StreamState] | None = None,
    process: int = 0,
    processes: int = 1,
    max_held_out: int = 200,
) -> TrainingData:
    """Builds the loader of one process.

    Args:
        batch_size: per process.
        first_draw: number of samples drawn before, over all processes, in a run that is resumed.
        streams, states: of the run that is resumed, over all processes.
    """
    encode = make_encoder(tokenizer, config.max_length)
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
        streams, states = 0, {}
        cached = [CachedSource(name, training[name], source.augmentation) for name, source in config.sources.items()]
        mixture = CachedMixture(cached, weights, settings, seed)
        options = {"batch_sampler": DrawSampler(first_draw, batch_size, process, processes)}
    else:
        readers = processes * max(1, config.num_workers)
        streams, states = streams or config.streams or readers, states or {}
        if streams < readers:
            raise ValueError(
                f"{readers} readers (processes x data.num_workers) for {streams} streams (data.streams; a resumed run "
                "keeps the number it started with): lower data.num_workers"
            )
        streamed = [
            StreamedSource(name, paths[name], source, config, encode, seed + index)
            for index, (name, source) in enumerate(config.sources.items())
        ]
        mixture = StreamedMixture(
            streamed,
            weights,
            settings,
            seed,
            streams=streams,
            states=states,
            first_batch=first_draw // (batch_size * processes),
            process=process,
            processes=processes,
        )
        options = {"batch_size": batch_size}
    if config.num_workers:
        atexit.unregister(kill_workers)
        atexit.register(kill_workers)
    loader: DataLoader = DataLoader(
        mixture,
        num_workers=config.num_workers,
        collate_fn=partial(collate, settings=settings, pad_to_multiple_of=config.pad_to_multiple_of),
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if config.num_workers else None,
        worker_init_fn=ignore_sigterm,
        **options,
    )
    sizes = {name: len(samples) for name, samples in training.items()} if config.cache_in_memory else {}
    return TrainingData(loader, held_out, skipped, sizes, streams, dict(states) if process == 0 else {})


def ignore_sigterm(worker_id: int) -> None:
    """A cluster sends SIGTERM to every process; loader workers go on until their training process has saved."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def kill_workers() -> None:
    """Called at exit, where Python would ask the workers to end by SIGTERM, which they ignore, and wait for ever."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def read_cache(
    name: str, paths: list[str], source: SourceConfig, config: DataConfig, encode: Encode
) -> tuple[list[Sample], list[Sample], list[Skipped]]:
    """Decodes a source: (training samples, held-out samples, skipped).

    When streaming, only what is held out; a broken shard is then counted by the stream that reads it.
    """

    def keep(key: str) -> bool:
        return config.cache_in_memory or is_held_out(key, source.holdout_fraction)

    training: list[Sample] = []
    held_out: list[Sample] = []
    skipped: list[Skipped] = []
    for item in read_samples(paths, encode, max_pixels=config.max_image_pixels, size=config.cache_size, keep=keep):
        if isinstance(item, Skipped):
            if config.cache_in_memory or item.reason not in SHARD_REASONS:
                skipped.append(item)
        else:
            (held_out if is_held_out(item.key, source.holdout_fraction) else training).append(item)
    if config.cache_in_memory and not training:
        raise EmptySourceError(describe_empty(name, paths, Counter(item.reason for item in skipped)))
    return training, held_out, skipped


def choose_held_out(samples: list[Sample], count: int) -> list[Sample]:
    """Up to `count` samples in the order of their keys' hashes: shards may be sorted by class."""
    return sorted(samples, key=lambda sample: hashlib.sha1(sample.key.encode()).digest())[:count]
