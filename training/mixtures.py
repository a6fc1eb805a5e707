"""Sources of samples mixed by weight: what the n-th item of a run is.

Shapes: H x W pixels.

- `CachedMixture` (small sets): every image decoded once to uint8, or its features computed once. Which sample, caption
  and augmentation (or view) the n-th draw gives is a pure function of (seed, n), so the position in the data is one
  integer, whatever the number of workers.
- `StreamedMixture` (large sets): the shards are dealt out to a fixed number of streams, each shuffled by blocks. What a
  stream gives is a pure function of its `Position`, which travels with each item to the training loop and from there
  into the checkpoint. A sample comes once per epoch of its stream.

What was skipped travels with the next good item to the training loop, which counts it.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ig_captioner.data.shards import (
    EmptySourceError,
    Encode,
    RawSample,
    Sample,
    Skipped,
    decode_item,
    describe_empty,
    is_held_out,
    read_shard,
    sample_decoder,
)

from .augmentation import ImageSettings, augment
from .captions import draw_caption
from .config import AugmentationConfig, DataConfig, SourceConfig, UsageError
from .feature_cache import FeatureStore


MIXTURE_PERIOD = 1000  # draws after which the order of the sources repeats; weights are rounded to 1/1000


def mixture_order(weights: list[float], period: int = MIXTURE_PERIOD) -> np.ndarray:
    """The source of each of `period` consecutive draws, int [period], spread as evenly as the weights allow."""
    counts = draws_per_source(weights, period)
    due = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    return np.repeat(np.arange(len(counts)), counts)[np.argsort(due, kind="stable")]


def draws_per_source(weights: list[float], period: int) -> np.ndarray:
    """Number of draws of each source among `period`: at least one, others by the largest remainder, int [sources]."""
    if len(weights) > period:
        raise ValueError(f"at most {period} sources can be mixed, got {len(weights)}")
    wanted = np.asarray(weights, dtype=np.float64) / sum(weights) * period
    counts = np.maximum(1, np.floor(wanted)).astype(int)
    while counts.sum() < period:
        counts[(wanted - counts).argmax()] += 1
    while counts.sum() > period:
        counts[(wanted - counts).argmin()] -= 1
    return counts


class FeatureSample(NamedTuple):
    """A sample whose features are in row `row` of its source's store."""

    key: str
    row: int
    captions: Sequence[list[int]]


class CachedSource:
    """Decoded samples of one shard set."""

    def __init__(self, name: str, samples: list[Sample], augmentation: AugmentationConfig) -> None:
        self.name = name
        self.samples = samples
        self.augmentation = augmentation

    def item(self, index: int, settings: ImageSettings, rng: np.random.Generator) -> dict[str, Any]:
        return make_item(self.samples[index], self.augmentation, settings, rng)


class FeatureSource:
    """Samples of one shard set with the features of several views of each, [N, V, P, D]."""

    def __init__(self, name: str, samples: list[FeatureSample], store: FeatureStore) -> None:
        self.name = name
        self.samples = samples
        self.store = store

    def item(self, index: int, settings: ImageSettings, rng: np.random.Generator) -> dict[str, Any]:
        """A drawn view of a sample, [P, D], with one of its texts."""
        sample = self.samples[index]
        labels = draw_caption(sample.captions, rng)
        view = int(rng.integers(self.store.views))
        return {"key": sample.key, "features": self.store.features[sample.row, view], "labels": labels}


class CachedMixture(Dataset):
    """Endless mixture of cached sources: item n is the n-th draw of the run, a pure function of (seed, n)."""

    def __init__(
        self, sources: Sequence[CachedSource | FeatureSource], weights: list[float], settings: ImageSettings, seed: int
    ) -> None:
        self.sources = sources
        self.settings = settings
        self.seed = seed
        self.order = mixture_order(weights)
        self.counts = np.bincount(self.order, minlength=len(sources))
        self.ranks = np.zeros_like(self.order)  # how often the draw's source came before within the period
        for source in range(len(sources)):
            self.ranks[self.order == source] = np.arange(self.counts[source])
        self.permutations: dict[int, tuple[int, np.ndarray]] = {}

    def locate(self, draw: int) -> tuple[int, int, int]:
        """(source, epoch, sample) of a draw; a source's samples all come once before any comes again."""
        periods, position = divmod(draw, len(self.order))
        source = int(self.order[position])
        epoch, index = divmod(
            periods * int(self.counts[source]) + int(self.ranks[position]), len(self.sources[source].samples)
        )
        if self.permutations.get(source, (-1,))[0] != epoch:
            rng = np.random.default_rng((self.seed, 0, source, epoch))
            self.permutations[source] = (epoch, rng.permutation(len(self.sources[source].samples)))
        return source, epoch, int(self.permutations[source][1][index])

    def __getitem__(self, draw: int) -> dict[str, Any]:
        source, epoch, index = self.locate(draw)
        rng = np.random.default_rng((self.seed, 1, draw))
        return self.sources[source].item(index, self.settings, rng) | {"source": source, "epoch": epoch}


class Position(NamedTuple):
    """Place of a stream in one source: the block that begins at `sample` of `shard` has given `drawn` items."""

    turn: int = 0
    """2 * epoch; the number after that (odd) if the stream's own part of the epoch had nothing usable."""
    shard: int = 0
    """Number in the order of this turn."""
    sample: int = 0
    drawn: int = 0


def refuse_if_strict(item: Skipped, data: DataConfig) -> None:
    """Raises UsageError for a sample or shard that cannot be used, where the configuration wants all of them."""
    if data.strict:
        raise UsageError(f"{item.key} cannot be used: {item.reason} (data.strict is set)")


class StreamedSource:
    """One shard set as endless, shuffled streams that share out its samples."""

    def __init__(
        self, name: str, paths: list[str], config: SourceConfig, data: DataConfig, encode: Encode, seed: int
    ) -> None:
        self.name = name
        self.paths = paths
        self.config = config
        self.data = data
        self.seed = seed
        self.decode = sample_decoder(encode, data.max_image_pixels)

    def items(self, stream: int, streams: int, start: Position) -> Iterator[tuple[Sample | Skipped, Position]]:
        """Decoded items from `start` on, each with the position after it.

        A stream whose own part of an epoch has nothing usable (fewer samples than streams, or a broken shard) takes one
        turn through all shards instead.

        Raises:
            EmptySourceError: nothing in any shard is usable.
        """
        turn = start.turn
        while True:
            usable = start.drawn > 0
            reasons = Counter[str]()
            for shard, sample, block in self.blocks(turn, stream, streams, start):
                rng = np.random.default_rng((self.seed, 0, stream, turn, shard, sample))
                order = rng.permutation(len(block))
                for drawn in range(start.drawn, len(block)):
                    item = decode_item(block[order[drawn]], self.decode)
                    if isinstance(item, Skipped):
                        refuse_if_strict(item, self.data)
                        reasons[item.reason] += 1
                    usable = usable or not isinstance(item, Skipped)
                    yield item, Position(turn, shard, sample, drawn + 1)
                start = start._replace(drawn=0)
            if not usable and turn % 2:
                raise EmptySourceError(describe_empty(self.name, self.paths, reasons))
            turn += 1 if turn % 2 or not usable else 2
            start = Position(turn)

    def blocks(
        self, turn: int, stream: int, streams: int, start: Position
    ) -> Iterator[tuple[int, int, list[RawSample | Skipped]]]:
        """(shard, sample, items) of one turn: `shuffle_buffer` items, still encoded, from that place on."""
        paths, parts = self.part(turn, stream, streams)
        place = (start.shard, start.sample)
        block = list[RawSample | Skipped]()
        for shard in range(start.shard, len(paths)):
            first = start.sample if shard == start.shard else 0
            for sample, item in enumerate(islice(read_shard(paths[shard]), first, None), start=first):
                if parts > 1 and sample % parts != stream:
                    continue
                if not isinstance(item, Skipped) and is_held_out(item[0], self.config.holdout_fraction):
                    continue
                if len(block) == self.data.shuffle_buffer:
                    yield *place, block
                    place = (shard, sample)
                    block = []
                block.append(item)
        if block:
            yield *place, block

    def part(self, turn: int, stream: int, streams: int) -> tuple[list[str], int]:
        """The shards of a stream in order, and into how many parts their samples are split.

        With fewer shards than streams, each stream reads every shard and keeps every `streams`-th sample.
        """
        whole = turn % 2 or len(self.paths) < streams
        # All streams must draw the same permutation to share out the shards without loss.
        seeds = (self.seed, 1, turn, stream) if whole else (self.seed, 1, turn)
        order = np.random.default_rng(seeds).permutation(len(self.paths))
        shards = [self.paths[index] for index in (order if whole else order[stream::streams])]
        return shards, 1 if turn % 2 or not whole else streams


class StreamState(NamedTuple):
    """Number of items that a stream has given, and its place in each source."""

    draws: int
    positions: list[Position]


class StreamedMixture(IterableDataset):
    """Endless mixture of streams, dealt out to `processes` training processes and their loader workers.

    Args:
        streams: how many; each reader (a worker of a process) takes every `readers`-th.
        states: of the streams that do not start at the beginning.
        first_batch: number of the batch that the loader gives first; the loader asks its workers in turn.
    """

    def __init__(
        self,
        sources: list[StreamedSource],
        weights: list[float],
        settings: ImageSettings,
        seed: int,
        *,
        streams: int,
        states: dict[int, StreamState],
        first_batch: int = 0,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self.sources = sources
        self.settings = settings
        self.seed = seed
        self.order = mixture_order(weights)
        self.streams = streams
        self.states = states
        self.first_batch = first_batch
        self.process = process
        self.processes = processes

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        workers, worker_id = (worker.num_workers, worker.id) if worker else (1, 0)
        reader = self.process * workers + (worker_id + self.first_batch) % workers
        numbers = range(reader, self.streams, self.processes * workers)
        streams = {number: self.stream(number) for number in numbers}
        draws = {number: self.states[number].draws if number in self.states else 0 for number in numbers}
        while True:
            number = min(draws, key=lambda number: draws[number])
            yield next(streams[number])
            draws[number] += 1

    def stream(self, number: int) -> Iterator[dict[str, Any]]:
        """Items of one stream, each with the stream's state after it."""
        draw, positions = self.states.get(number, StreamState(0, [Position()] * len(self.sources)))
        positions = [Position(*position) for position in positions]
        sources = [source.items(number, self.streams, positions[i]) for i, source in enumerate(self.sources)]
        while True:
            source = int(self.order[draw % len(self.order)])
            skipped: list[Skipped] = []
            for sample, position in sources[source]:
                positions[source] = position
                if not isinstance(sample, Skipped):
                    break
                skipped.append(sample)
            rng = np.random.default_rng((self.seed, 2, number, draw))
            draw += 1
            item = make_item(sample, self.sources[source].config.augmentation, self.settings, rng)
            state = StreamState(draw, list(positions))
            place = {"source": source, "epoch": positions[source].turn // 2, "state": (number, state)}
            yield item | place | {"skipped": skipped}


def make_item(
    sample: Sample, augmentation: AugmentationConfig, settings: ImageSettings, rng: np.random.Generator
) -> dict[str, Any]:
    """One augmented image uint8 [H, W, 3] with one of its captions."""
    labels = draw_caption(sample.captions, rng)
    image = augment(sample.image, augmentation, settings, rng)
    return {"key": sample.key, "image": image, "labels": labels}
