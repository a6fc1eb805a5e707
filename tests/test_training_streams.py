"""Streams: every sample once per epoch whatever the numbers, exact positions, and what is broken counted by kind."""

import itertools
import json
import logging
from collections import Counter

import pytest
import torch
from broken_samples import EXPECTED, GOOD, write_dirty_shards
from training_runs import good_members, image_bytes, load, run_config, write_shard

from ig_captioner.data.shards import EmptySourceError
from training.config import AugmentationConfig, DataConfig, SourceConfig
from training.data import DataPosition
from training.metrics import read_rows
from training.train import train


pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def streamed(**fields):
    fields = {"sources": {"x": SourceConfig(["*.tar*"])}, "shuffle_buffer": 5, **fields}
    return DataConfig(cache_in_memory=False, **fields)


def epochs_of(batches):
    """{epoch: keys} of batches."""
    keys = {}
    for batch in batches:
        for key, epoch in zip(batch["keys"], batch["epochs"], strict=True):
            keys.setdefault(epoch, []).append(key)
    return keys


# Numbers that do not fit


@pytest.mark.parametrize("workers", [0, 1, 3, 4])
@pytest.mark.parametrize("sizes", [(20,), (1, 12), (2, 0, 9, 5)])
def test_every_sample_once_per_epoch(tmp_path, tokenizer, workers, sizes):
    """One shard and many workers, shards of uneven size, an empty one, batches that do not divide the epoch."""
    for shard, size in enumerate(sizes):
        write_shard(tmp_path / f"{shard}.tar", good_members(100 * shard, size))
    loader = load(streamed(num_workers=workers), tokenizer, tmp_path, batch_size=3).loader
    epochs = epochs_of(itertools.islice(loader, 40))
    own = {key for keys in list(epochs.values())[:2] for key in keys}
    assert len(own) == sum(sizes)
    streams_pass_alone = workers in (0, 1)
    if streams_pass_alone or len(sizes) == 1:
        for epoch in range(3):
            assert sorted(epochs[epoch]) == sorted(own)
    for keys in epochs.values():  # a stream that has nothing of its own repeats what others have
        assert len(keys) - len(set(keys)) == 0 or sizes == (2, 0, 9, 5)


def test_fewer_samples_than_a_batch_and_than_workers(tmp_path, tokenizer):
    write_shard(tmp_path / "s.tar", good_members(0, 2))
    for config in (streamed(num_workers=3), DataConfig(sources={"x": SourceConfig(["s.tar"])}, num_workers=3)):
        for process in range(2):
            data = load(config, tokenizer, tmp_path, batch_size=8, process=process, processes=2)
            for batch in itertools.islice(data.loader, 5):
                assert set(batch["keys"]) <= {"0000", "0001"} and len(batch["keys"]) == 8


def test_processes_and_workers_share_out_every_sample(tmp_path, tokenizer):
    for shard, size in enumerate((11, 3, 6, 4)):
        write_shard(tmp_path / f"{shard}.tar", good_members(100 * shard, size))
    first = []
    for process in range(2):
        data = load(streamed(num_workers=2), tokenizer, tmp_path, batch_size=1, process=process, processes=2)
        first += epochs_of(itertools.islice(data.loader, 30))[0]
    assert len(first) == len(set(first)) == 24


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cached", [True, False])
def test_set_that_yields_nothing_fails_fast_with_counts(tmp_path, tokenizer, cached, workers):
    members = [("a.png", b""), ("a.txt", b"t"), ("b.jpg", b"<html>"), ("b.txt", b"t"), ("c.png", image_bytes())]
    write_shard(tmp_path / "0.tar", members)
    write_shard(tmp_path / "1.tar", [])
    config = streamed(num_workers=workers)
    config.cache_in_memory = cached
    with pytest.raises(EmptySourceError, match="'x' has no usable sample in 2 shard") as caught:
        next(iter(load(config, tokenizer, tmp_path).loader))
    for count in ("1 x empty image file", "1 x not an image", "1 x missing caption"):
        assert count in str(caught.value)


def test_more_readers_than_streams_is_an_error(tmp_path, tokenizer):
    write_shard(tmp_path / "s.tar", good_members(0, 2))
    with pytest.raises(ValueError, match="4 readers .* for 3 streams"):
        load(streamed(num_workers=2, streams=3), tokenizer, tmp_path, process=1, processes=2)


# Positions


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_goes_on_exactly_where_it_stopped(tmp_path, tokenizer, workers):
    for shard, size in enumerate((11, 3, 6, 4)):
        members = [*good_members(100 * shard, size), (f"bad{shard}.png", b""), (f"bad{shard}.txt", b"t")]
        write_shard(tmp_path / f"{shard}.tar.gz", members)
    write_shard(tmp_path / "other.tar", good_members(900, 5))
    augmentation = AugmentationConfig(flip_probability=0.5, shift=0.2, color_jitter=0.2)
    sources = {
        "x": SourceConfig(["?.tar.gz"], weight=2, augmentation=augmentation, holdout_fraction=0.1),
        "y": SourceConfig(["other.tar"]),
    }
    config = streamed(sources=sources, num_workers=workers, streams=4)
    whole = list(itertools.islice(load(config, tokenizer, tmp_path).loader, 16))
    states = {}
    for taken, batch in enumerate(whole[:12], start=1):
        states = json.loads(json.dumps(states | batch["states"]))
        states = {int(number): state for number, state in states.items()}
        if taken % 3:
            continue
        from training.mixtures import StreamState

        restored = {number: StreamState(*state) for number, state in states.items()}
        data = load(config, tokenizer, tmp_path, position=DataPosition(taken * 4, 4, restored))
        for expected, batch_again in zip(whole[taken:], data.loader, strict=False):
            assert expected["keys"] == batch_again["keys"] and expected["skipped"] == batch_again["skipped"]
            assert torch.equal(expected["pixel_values"], batch_again["pixel_values"])
            assert torch.equal(expected["labels"], batch_again["labels"])


# Broken samples


@pytest.fixture(scope="module")
def dirty_shards(tmp_path_factory):
    return write_dirty_shards(tmp_path_factory.mktemp("dirty"))


@pytest.mark.parametrize("cached", [True, False])
def test_stream_with_broken_samples_trains_through_with_counts_by_kind(
    workspace,
    dirty_shards,
    tmp_path,
    caplog,
    cached,
):
    data = {"data.cache_in_memory": cached, "data.sources.colors.shards": "*.tar", "data.shuffle_buffer": 50}
    config = run_config(
        workspace, tmp_path, data_root=str(dirty_shards), max_steps=GOOD // 10, batch_size=10, **data, seed=1
    )
    with caplog.at_level(logging.WARNING):
        train(config)
    row = read_rows(tmp_path / "log.jsonl")[-1]
    assert row["samples"] == GOOD and row["skipped_samples"] == 20
    assert row["skipped"] == EXPECTED
    messages = [record.getMessage() for record in caplog.records if record.getMessage().startswith("skipped ")]
    assert Counter(message.rpartition(": ")[2] for message in messages) == EXPECTED
    assert sum("3.tar:" in message for message in messages) == 1 and sum("bad" in message for message in messages) == 19


def test_endless_brackets_and_half_characters_in_json_are_no_error(tmp_path, tokenizer):
    nested, surrogate = b"[" * 100_000, b'{"captions": ["\\ud800"]}'
    members = [*good_members(0, 2), ("a.png", image_bytes()), ("a.json", nested)]
    write_shard(tmp_path / "s.tar", [*members, ("b.png", image_bytes()), ("b.json", surrogate)])
    data = load(DataConfig(sources={"x": SourceConfig(["s.tar"])}), tokenizer, tmp_path)
    assert [tuple(skipped) for skipped in data.skipped] == [("a", "bad JSON"), ("b", "caption is not UTF-8")]
