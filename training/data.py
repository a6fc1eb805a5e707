"""From shards to batches: loading, collation, and which part of a batch each process reads (see `mixtures`).

Shapes: B images, H x W pixels, L text tokens.
"""

import atexit
import multiprocessing
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

from ig_captioner.data.fingerprints import Fingerprint, list_fingerprints, mark_shards
from ig_captioner.data.shards import (
    SHARD_REASONS,
    EmptySourceError,
    Encode,
    Sample,
    Skipped,
    describe_empty,
    find_shards,
    hash_of,
    is_held_out,
    make_encoder,
    read_samples,
)
from ig_captioner.information_gain import IGNORE_INDEX

from .augmentation import ImageSettings, normalise, resize
from .captions import CaptionReader
from .config import DataConfig, SourceConfig, UsageError
from .feature_cache import FeatureStore
from .mixtures import (
    CachedMixture,
    CachedSource,
    FeatureSample,
    FeatureSource,
    StreamedMixture,
    StreamedSource,
    StreamState,
    refuse_if_strict,
)


IMAGE_INPUTS = ("pixel_values", "image_features")  # of which a batch has one, under the model's argument names
SILENT_SECONDS = 2.0  # what takes longer shows that it goes on


# Batches


def collate(items: list[dict[str, Any]], settings: ImageSettings, pad_to_multiple_of: int = 1) -> dict[str, Any]:
    """Items to a batch: pixel_values float32 [B, 3, H, W], labels int64 [B, L], source int64 [B].

    Of items with features in place of images: image_features [B, P, D], in the number format they have. Beside the
    tensors: the `keys` of the samples and the `epochs` of their sources, what was `skipped` before them, and the
    `states` of the streams that gave them (empty for cached sources).
    """
    if "features" in items[0]:
        images = {"image_features": torch.from_numpy(np.stack([item["features"] for item in items]))}
    else:
        images = {"pixel_values": normalise(np.stack([item["image"] for item in items]), settings)}
    return {
        **images,
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
        self.first_draw = first_draw
        self.batch_size = batch_size
        self.process = process
        self.processes = processes

    def __iter__(self) -> Iterator[list[int]]:
        start = self.first_draw + self.process * self.batch_size
        while True:
            yield list(range(start, start + self.batch_size))
            start += self.batch_size * self.processes


def image_inputs(samples: Sequence[Sample], settings: ImageSettings) -> dict[str, torch.Tensor]:
    """The argument of the model for whole images, or for features, of samples: `pixel_values` or `image_features`."""
    if isinstance(samples[0].image, np.ndarray) and samples[0].image.ndim == 2:
        return {"image_features": torch.from_numpy(np.stack([sample.image for sample in samples])).float()}
    images = [np.asarray(resize(sample.image, settings)) for sample in samples]
    return {"pixel_values": normalise(np.stack(images), settings)}


def split_by_length(batch: dict[str, Any], parts: int, pad_to_multiple_of: int = 1) -> list[dict[str, torch.Tensor]]:
    """Parts of a batch with captions of similar length, each cut to its longest."""
    lengths = (batch["labels"] != IGNORE_INDEX).sum(dim=1)
    names = [name for name in (*IMAGE_INPUTS, "labels", "source") if name in batch]
    result = []
    for rows in lengths.sort(stable=True).indices.chunk(parts):
        longest = -(-int(lengths[rows].max()) // pad_to_multiple_of) * pad_to_multiple_of
        part = {name: batch[name][rows] if parts > 1 else batch[name] for name in names}
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
    """Number of streams over all processes; 0 for cached sources."""
    states: dict[int, StreamState] = field(default_factory=dict)
    """Positions of this process's streams; the training loop updates it with each batch's."""
    shards: dict[str, list[Fingerprint]] = field(default_factory=dict)
    """Fingerprints of each source's shards: with their content where they were read, else names and sizes; of streams
    see `mark_sources`."""


@dataclass(frozen=True)
class Share:
    """The part of each batch that a process loads."""

    batch_size: int
    """Samples of this process."""
    process: int = 0
    processes: int = 1


@dataclass(frozen=True)
class DataPosition:
    """Position in the data of a run that is resumed, over all processes."""

    draws: int = 0
    """Samples drawn so far."""
    streams: int = 0
    states: dict[int, StreamState] = field(default_factory=dict)


@dataclass
class DecodedSources:
    """Samples in memory, by source, and what could not be used."""

    training: dict[str, list[Any]] = field(default_factory=dict)
    """`Sample`s, or `FeatureSample`s."""
    held_out: dict[str, list[Sample]] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    shards: dict[str, list[Fingerprint]] = field(default_factory=dict)


def load_training_data(
    config: DataConfig,
    tokenizer: Any,
    settings: ImageSettings,
    share: Share,
    *,
    data_root: str,
    seed: int,
    position: DataPosition | None = None,
    max_held_out: int = 200,
    features: dict[str, FeatureStore] | None = None,
) -> TrainingData:
    """Opens the shards and builds the loader of one process.

    Args:
        position: where a resumed run goes on; None: at the start.
        max_held_out: images per source that are kept for evaluation; 0: none.
        features: of the sources' images, which are then not read.
    """
    position = position or DataPosition()
    encode = make_encoder(tokenizer, config.max_length)
    paths = {name: find_shards(source.shards, data_root) for name, source in config.sources.items()}
    if features:
        decoded = read_features(config, features, encode, max_held_out)
    else:
        decoded = decode_sources(config, paths, encode, settings, max_held_out, shows_progress=share.process == 0)
    shards = {name: list_fingerprints(paths[name]) for name in paths} | decoded.shards
    mixture: CachedMixture | StreamedMixture
    if features or config.cache_in_memory:
        mixture = cached_mixture(config, decoded.training, settings, seed, features)
        loader = make_loader(
            mixture,
            config,
            settings,
            batch_sampler=DrawSampler(position.draws, share.batch_size, share.process, share.processes),
        )
        sizes = {name: len(samples) for name, samples in decoded.training.items()}
        return TrainingData(loader, decoded.held_out, decoded.skipped, sizes, shards=shards)
    mixture = streamed_mixture(config, paths, encode, settings, seed, share, position)
    loader = make_loader(mixture, config, settings, batch_size=share.batch_size)
    states = dict(position.states) if share.process == 0 else {}
    return TrainingData(loader, decoded.held_out, decoded.skipped, {}, mixture.streams, states, shards)


def mark_sources(config: DataConfig, data_root: str) -> dict[str, list[Fingerprint]]:
    """Fingerprints of the shards of streamed sources, which are not read as a whole."""
    marked = {}
    for name, source in config.sources.items():
        paths = find_shards(source.shards, data_root)
        shown = {"total": len(paths), "unit": " shards", "delay": SILENT_SECONDS, "mininterval": 1.0}
        marked[name] = list(tqdm(mark_shards(paths), desc=f"looking at the shards of {name}", **shown))
    return marked


def cached_mixture(
    config: DataConfig,
    training: dict[str, list[Any]],
    settings: ImageSettings,
    seed: int,
    features: dict[str, FeatureStore] | None = None,
) -> CachedMixture:
    weights = [source.weight for source in config.sources.values()]
    cached: list[CachedSource | FeatureSource] = [
        FeatureSource(name, training[name], features[name])
        if features
        else CachedSource(name, training[name], source.augmentation)
        for name, source in config.sources.items()
    ]
    return CachedMixture(cached, weights, settings, seed)


def streamed_mixture(
    config: DataConfig,
    paths: dict[str, list[str]],
    encode: Encode,
    settings: ImageSettings,
    seed: int,
    share: Share,
    position: DataPosition,
) -> StreamedMixture:
    """Deals the shards out to streams. Raises UsageError where there are more readers than streams."""
    readers = share.processes * max(1, config.num_workers)
    streams = position.streams or config.streams or readers
    if streams < readers:
        raise UsageError(
            f"{readers} readers (processes x data.num_workers) for {streams} streams (data.streams; a resumed run "
            "keeps the number it started with): lower data.num_workers"
        )
    sources = [
        StreamedSource(name, paths[name], source, config, encode, seed + index)
        for index, (name, source) in enumerate(config.sources.items())
    ]
    return StreamedMixture(
        sources,
        [source.weight for source in config.sources.values()],
        settings,
        seed,
        streams=streams,
        states=position.states,
        first_batch=position.draws // (share.batch_size * share.processes),
        process=share.process,
        processes=share.processes,
    )


def make_loader(mixture: Dataset, config: DataConfig, settings: ImageSettings, **batches: Any) -> DataLoader:
    """A loader of endless batches; `batches` are DataLoader's arguments that say how they are put together."""
    if config.num_workers:
        atexit.unregister(kill_workers)
        atexit.register(kill_workers)
    return DataLoader(
        mixture,
        num_workers=config.num_workers,
        collate_fn=partial(collate, settings=settings, pad_to_multiple_of=config.pad_to_multiple_of),
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if config.num_workers else None,
        worker_init_fn=ignore_sigterm,
        **batches,
    )


def ignore_sigterm(worker_id: int) -> None:
    """A cluster sends SIGTERM to every process; loader workers go on until their training process has saved."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def kill_workers() -> None:
    """Called at exit, where Python would ask the workers to end by SIGTERM, which they ignore, and wait for ever."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def decode_sources(
    config: DataConfig,
    paths: dict[str, list[str]],
    encode: Encode,
    settings: ImageSettings,
    max_held_out: int,
    shows_progress: bool,
) -> DecodedSources:
    """Decodes what is kept in memory: every sample, or when streaming only what is held out."""
    decoded = DecodedSources()
    for name, source in config.sources.items():
        if config.cache_in_memory or (source.holdout_fraction and max_held_out):
            fingerprints: list[Fingerprint] | None = [] if config.cache_in_memory else None
            training, held_out, skipped = read_cache(
                name, paths[name], source, config, encode, settings, shows_progress, fingerprints
            )
            if fingerprints is not None:
                decoded.shards[name] = fingerprints
            decoded.training[name] = training
            decoded.held_out[name] = choose_held_out(held_out, max_held_out)
            decoded.skipped += skipped
    return decoded


def read_cache(
    name: str,
    paths: list[str],
    source: SourceConfig,
    config: DataConfig,
    encode: Encode,
    settings: ImageSettings,
    shows_progress: bool = False,
    fingerprints: list[Fingerprint] | None = None,
) -> tuple[list[Sample], list[Sample], list[Skipped]]:
    """Decodes a source: (training samples, held-out samples, skipped).

    When streaming, only what is held out; a broken shard is then counted by the stream that reads it.
    """

    def keep(key: str) -> bool:
        return config.cache_in_memory or is_held_out(key, source.holdout_fraction)

    training: list[Sample] = []
    held_out: list[Sample] = []
    skipped: list[Skipped] = []
    items = read_samples(
        paths,
        encode,
        max_pixels=config.max_image_pixels,
        size=config.cache_size,
        keep_proportions=settings.crop_pct is not None,
        keep=keep,
        fingerprints=fingerprints,
    )
    shown = {"unit": " samples", "delay": SILENT_SECONDS, "mininterval": 1.0, "disable": not shows_progress}
    for item in tqdm(items, desc=f"decoding {name} ({len(paths)} shards)", **shown):
        if isinstance(item, Skipped):
            refuse_if_strict(item, config)
            if config.cache_in_memory or item.reason not in SHARD_REASONS:
                skipped.append(item)
        else:
            (held_out if is_held_out(item.key, source.holdout_fraction) else training).append(item)
    if config.cache_in_memory and not training:
        raise EmptySourceError(describe_empty(name, paths, Counter(item.reason for item in skipped)))
    return training, held_out, skipped


def read_features(
    config: DataConfig, stores: dict[str, FeatureStore], encode: Encode, max_held_out: int
) -> DecodedSources:
    """The samples whose features are cached. The `image` of held-out ones is the features of their first view [P, D].

    Raises:
        EmptySourceError: all samples of a source are held out.
    """
    decoded = DecodedSources()
    for name, source in config.sources.items():
        store = stores[name]
        read_captions = CaptionReader(source, encode)
        training = list[FeatureSample]()
        held_out = list[Sample]()
        for row, record in enumerate(store.records):
            captions = read_captions(record.captions, record.metadata)
            if is_held_out(record.key, source.holdout_fraction) or is_left_out(record.metadata, source):
                held_out.append(Sample(record.key, store.features[row, 0], captions))
            else:
                training.append(FeatureSample(record.key, row, captions))
        if not training:
            raise EmptySourceError(f"source {name!r}: all of its {len(held_out)} usable samples are held out")
        decoded.training[name] = training
        decoded.held_out[name] = choose_held_out(held_out, max_held_out)
        decoded.skipped += store.skipped
    return decoded


def is_left_out(metadata: dict[str, Any], source: SourceConfig) -> bool:
    """Tells whether a sample's class name is one of those that are never trained on."""
    return "class_name" in metadata and is_held_out(str(metadata["class_name"]), source.holdout_names_fraction)


def choose_held_out(samples: list[Sample], count: int) -> list[Sample]:
    """Up to `count` samples in the order of their keys' hashes: shards may be sorted by class."""
    return sorted(samples, key=lambda sample: hash_of(sample.key))[:count]
