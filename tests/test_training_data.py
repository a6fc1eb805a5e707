"""Reading, mixing and batching of training data, on shards made here."""

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import CAPTIONS, SETTINGS, good_members, image_bytes, load, take, write_shard

from ig_captioner import IGCaptionerImageProcessor
from ig_captioner.data.shards import (
    EmptySourceError,
    Sample,
    Skipped,
    expand_braces,
    find_shards,
    is_held_out,
    make_encoder,
    read_samples,
    read_shard,
    shrink,
)
from training.augmentation import ImageSettings, augment, normalise, random_box, reflect_border
from training.build import image_settings
from training.config import AugmentationConfig, DataConfig, SourceConfig
from training.data import DrawSampler, pad_labels, split_by_length
from training.mixtures import CachedMixture, CachedSource, mixture_order
from training.train_tokenizer import train_tokenizer


# Shards


def test_expand_braces():
    assert expand_braces("a{08..10}b") == ["a08b", "a09b", "a10b"]
    assert expand_braces("{x,y}{1..2}.tar") == ["x1.tar", "x2.tar", "y1.tar", "y2.tar"]
    assert expand_braces("plain") == ["plain"]


def test_find_shards_expands_braces_and_globs_and_names_what_is_missing(tmp_path):
    for name in ("s-0000.tar", "s-0001.tar", "t.tar.gz"):
        write_shard(tmp_path / name, good_members(0, 1))
    names = [path.rpartition("/")[2] for path in find_shards(["s-{0000..0001}.tar", "t*.gz"], str(tmp_path))]
    assert names == ["s-0000.tar", "s-0001.tar", "t.tar.gz"]
    with pytest.raises(FileNotFoundError, match="s-0002"):
        find_shards(["s-{0001..0002}.tar"], str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"none-\*"):
        find_shards(["none-*.tar"], str(tmp_path))


@pytest.mark.parametrize("name", ["s.tar", "s.tar.gz"])
def test_reads_plain_and_gzipped_shards(tmp_path, tokenizer, name):
    path = write_shard(tmp_path / name, good_members(0, 3))
    samples = list(read_samples([str(path)], make_encoder(tokenizer, 32), max_pixels=1000, size=96))
    assert [sample.key for sample in samples] == ["0000", "0001", "0002"]
    assert samples[1].image.shape == (10, 12, 3) and samples[1].image[0, 0].tolist() == [1, 0, 0]
    assert samples[0].captions == [tokenizer(CAPTIONS[0])["input_ids"]]


def test_json_captions_win_over_the_text_file(tmp_path, tokenizer):
    metadata = json.dumps({"captions": ["one", " ", "two"]}).encode()
    members = [("k.png", image_bytes()), ("k.txt", b"text"), ("k.json", metadata)]
    path = write_shard(tmp_path / "s.tar", members)
    (sample,) = read_samples([str(path)], make_encoder(tokenizer, 32), max_pixels=1000)
    assert list(sample.captions) == [tokenizer(text)["input_ids"] for text in ("one", "two")]


def test_transparency_becomes_white(tmp_path, tokenizer):
    members = [("k.png", image_bytes((255, 0, 0, 0), mode="RGBA")), ("k.txt", b"text")]
    path = write_shard(tmp_path / "s.tar", members)
    (sample,) = read_samples([str(path)], make_encoder(tokenizer, 32), max_pixels=1000, size=96)
    assert sample.image.min() == 255


BROKEN = {
    "truncated": (
        [("b.jpg", image_bytes(size=(64, 64), image_format="JPEG")[:300]), ("b.txt", b"t")],
        "undecodable image",
    ),
    "empty": ([("b.png", b""), ("b.txt", b"t")], "empty image file"),
    "html": ([("b.jpg", b"<html>404</html>"), ("b.txt", b"t")], "not an image"),
    "bomb": ([("b.png", image_bytes(size=(400, 400))), ("b.txt", b"t")], "too many pixels"),
    "no image": ([("b.txt", b"t")], "missing image"),
    "no caption": ([("b.png", image_bytes())], "missing caption"),
    "blank caption": ([("b.png", image_bytes()), ("b.txt", b" \n")], "missing caption"),
    "not utf-8": ([("b.png", image_bytes()), ("b.txt", b"\xff\xfe\x00")], "caption is not UTF-8"),
    "bad json": ([("b.png", image_bytes()), ("b.txt", b"t"), ("b.json", b"{")], "bad JSON"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_sample_is_skipped_counted_and_logged(tmp_path, tokenizer, caplog, kind):
    members, reason = BROKEN[kind]
    write_shard(tmp_path / "s.tar", [*good_members(0, 2), *members, *good_members(2, 2)])
    config = DataConfig(sources={"x": SourceConfig(["s.tar"])}, max_image_pixels=10_000)
    with caplog.at_level(logging.WARNING):
        data = load(config, tokenizer, tmp_path)
    assert data.skipped == [Skipped("b", reason)] and data.sizes == {"x": 4}
    assert f"skipped b: {reason}" in caplog.text
    config.cache_in_memory = False
    skipped = [item for batch in take(load(config, tokenizer, tmp_path).loader, 2) for item in batch["skipped"]]
    assert Skipped("b", reason) in skipped


def test_truncated_shard_gives_what_was_whole(tmp_path):
    path = write_shard(tmp_path / "s.tar", good_members(0, 4))
    path.write_bytes(path.read_bytes()[: 512 * 9 + 100])  # 4 blocks of 512 bytes per sample: breaks inside the third
    *whole, last = read_shard(str(path))
    assert [key for key, _ in whole] == ["0000", "0001"]
    assert isinstance(last, Skipped) and "broken shard" in last.reason


@pytest.mark.parametrize("cached", [True, False])
def test_source_without_usable_samples_fails_with_counts(tmp_path, tokenizer, cached):
    write_shard(tmp_path / "good.tar", good_members(0, 2))
    write_shard(tmp_path / "bad.tar", [("a.png", b""), ("a.txt", b"t"), ("b.png", b""), ("b.txt", b"t")])
    sources = {"good": SourceConfig(["good.tar"]), "bad": SourceConfig(["bad.tar"])}
    config = DataConfig(sources=sources, cache_in_memory=cached)
    with pytest.raises(EmptySourceError, match=r"'bad'.*2 x empty image file"):
        take(load(config, tokenizer, tmp_path).loader, 1)


def test_held_out_keys_are_never_drawn(tmp_path, tokenizer):
    write_shard(tmp_path / "s.tar", good_members(0, 40))
    held_out = {f"{index:04d}" for index in range(40) if is_held_out(f"{index:04d}", 0.3)}
    assert 4 <= len(held_out) <= 20
    config = DataConfig(sources={"x": SourceConfig(["s.tar"], holdout_fraction=0.3)})
    for config.cache_in_memory in (True, False):
        data = load(config, tokenizer, tmp_path)
        assert {sample.key for sample in data.held_out["x"]} == held_out
        reds = {
            round((batch["pixel_values"][row, 0, 0, 0].item() + 1) * 127.5)
            for batch in take(data.loader, 30)
            for row in range(4)
        }
        assert reds == {index for index in range(40) if f"{index:04d}" not in held_out}


# Captions and batches


def test_encoder_cuts_long_captions_but_keeps_eos(tokenizer):
    encode = make_encoder(tokenizer, 4)
    (tokens,) = encode([CAPTIONS[3]])
    assert len(tokens) == 4 and tokens[-1] == tokenizer.eos_token_id
    assert tokens[:3] == tokenizer(CAPTIONS[3])["input_ids"][:3]


def test_encoder_refuses_a_tokenizer_without_eos(tokenizer):
    import copy

    from tokenizers.processors import TemplateProcessing

    plain = copy.deepcopy(tokenizer)
    plain.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(ValueError, match="EOS"):
        make_encoder(plain, 8)


def test_labels_are_padded_with_minus_100():
    labels = pad_labels([[5, 2], [6, 7, 8, 9, 2]], pad_to_multiple_of=4)
    assert labels.tolist() == [[5, 2] + [-100] * 6, [6, 7, 8, 9, 2, -100, -100, -100]]
    assert pad_labels([[5, 2], [2]]).shape == (2, 2)


def test_normalise_is_what_the_image_processor_does():
    images = np.array([0, 127, 255], dtype=np.uint8).reshape(1, 1, 1, 3)
    expected = (torch.tensor([0, 127, 255]) / 255 - 0.5) / 0.5
    assert torch.allclose(normalise(images, SETTINGS).flatten(), expected, atol=1e-6)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    statistics = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    processor = IGCaptionerImageProcessor(size={"height": 16, "width": 16}, **statistics)
    settings = ImageSettings((16, 16), mean=tuple(statistics["image_mean"]), std=tuple(statistics["image_std"]))
    expected = processor(list(pixels), return_tensors="pt")["pixel_values"]
    assert torch.allclose(normalise(pixels, settings), expected, atol=1e-5)


def test_batches(tmp_path, tokenizer):
    write_shard(tmp_path / "s.tar", good_members(0, 6))
    data = load(DataConfig(sources={"x": SourceConfig(["s.tar"])}), tokenizer, tmp_path)
    batch = next(iter(data.loader))
    assert batch["pixel_values"].shape == (4, 3, 16, 16) and batch["pixel_values"].dtype == torch.float32
    assert batch["labels"].dtype == torch.int64 and batch["labels"].shape[0] == 4
    last = (batch["labels"] != -100).sum(dim=1) - 1
    assert (batch["labels"].gather(1, last[:, None]) == tokenizer.eos_token_id).all()
    assert batch["source"].tolist() == [0, 0, 0, 0]


def test_split_by_length_keeps_every_row_once():
    labels = pad_labels([[1] * length for length in (3, 9, 2, 8, 4)])
    batch = {"labels": labels, "pixel_values": torch.arange(5.0)[:, None], "source": torch.arange(5), "skipped": []}
    parts = split_by_length(batch, 2)
    assert [part["labels"].shape for part in parts] == [(3, 4), (2, 9)]
    assert sorted(torch.cat([part["source"] for part in parts]).tolist()) == [0, 1, 2, 3, 4]
    for part in parts:
        assert torch.equal(part["source"].float(), part["pixel_values"][:, 0])


# Mixtures


def cached_mixture(sizes, weights, seed=0):
    sources = [
        CachedSource(
            str(index),
            [Sample(str(i), np.full((8, 8, 3), i, np.uint8), [[4, 2], [5, 2]]) for i in range(size)],
            AugmentationConfig(),
        )
        for index, size in enumerate(sizes)
    ]
    return CachedMixture(sources, weights, SETTINGS, seed)


def test_mixture_order_has_the_weights():
    order = mixture_order([6, 3.5, 0.5])
    assert np.bincount(order).tolist() == [600, 350, 50]
    assert np.bincount(mixture_order([1, 1e-9])).tolist() == [999, 1]
    counts = np.array([np.bincount(part, minlength=3) for part in order.reshape(-1, 100)])
    assert (np.abs(counts - [60, 35, 5]) <= 1).all(), "spread evenly"


def test_every_sample_once_per_epoch_and_a_new_order_in_the_next():
    mixture = cached_mixture([50, 20], [0.5, 0.5])
    drawn = [mixture.locate(draw) for draw in range(200)]
    first = [index for source, epoch, index in drawn if source == 0]
    assert [epoch for source, epoch, index in drawn if source == 0] == [0] * 50 + [1] * 50
    assert sorted(first[:50]) == sorted(first[50:100]) == list(range(50))
    assert first[:50] != first[50:100]


def test_a_draw_depends_on_seed_and_number_only():
    forwards, backwards = cached_mixture([9, 5], [1, 2]), cached_mixture([9, 5], [1, 2])
    numbers = [0, 1, 17, 1000, 2345]
    expected = [forwards[number] for number in numbers]
    for number, item in reversed(list(zip(numbers, expected, strict=True))):
        again = backwards[number]
        assert (again["image"] == item["image"]).all() and again["labels"] == item["labels"]
    other = cached_mixture([9, 5], [1, 2], seed=1)
    assert any(other[number]["image"].mean() != forwards[number]["image"].mean() for number in range(30))
    assert {tuple(forwards[number]["labels"]) for number in range(30)} == {(4, 2), (5, 2)}, "captions vary"


def test_sampler_shares_out_global_batches_and_starts_anywhere():
    batches = [take(DrawSampler(8, 2, process, 2), 2) for process in range(2)]
    assert batches == [[[8, 9], [12, 13]], [[10, 11], [14, 15]]]


def test_loader_workers_change_nothing(tmp_path, tokenizer):
    write_shard(tmp_path / "s.tar", good_members(0, 10))
    augmentation = AugmentationConfig(flip_probability=0.5, scale=(0.5, 1.0), shift=0.1, color_jitter=0.1)
    config = DataConfig(sources={"x": SourceConfig(["s.tar"], augmentation=augmentation)})
    alone = take(load(config, tokenizer, tmp_path).loader, 3)
    config.num_workers = 2
    for batch, other in zip(alone, take(load(config, tokenizer, tmp_path).loader, 3), strict=True):
        assert torch.equal(batch["pixel_values"], other["pixel_values"]) and torch.equal(
            batch["labels"], other["labels"]
        )


def test_streaming_with_more_workers_than_shards_covers_everything(tmp_path, tokenizer):
    for shard, name in enumerate(("a.tar", "b.tar.gz")):
        write_shard(tmp_path / name, good_members(10 * shard, 10))
    config = DataConfig(sources={"x": SourceConfig(["*.tar*"])}, cache_in_memory=False, shuffle_buffer=5, num_workers=3)
    batches = take(load(config, tokenizer, tmp_path).loader, 40)
    reds = {round((value.item() + 1) * 127.5) for batch in batches for value in batch["pixel_values"][:, 0, 0, 0]}
    assert reds == set(range(20))


def test_streams_of_two_processes_share_out_the_shards(tmp_path, tokenizer):
    for shard in range(2):
        write_shard(tmp_path / f"{shard}.tar", good_members(10 * shard, 10))
    config = DataConfig(sources={"x": SourceConfig(["*.tar"])}, cache_in_memory=False)
    seen = []
    for process in range(2):
        batches = take(load(config, tokenizer, tmp_path, process=process, processes=2, batch_size=10).loader, 1)
        seen.append({round((value.item() + 1) * 127.5) for value in batches[0]["pixel_values"][:, 0, 0, 0]})
    assert seen[0] | seen[1] == set(range(20)) and not seen[0] & seen[1]


def test_shrunk_images_may_keep_their_proportions():
    image = Image.new("RGB", (300, 100))
    assert shrink(image, 50).size == (50, 50)
    assert shrink(image, 50, keep_proportions=True).size == (150, 50)
    assert shrink(image, 100, keep_proportions=True) is image


# Augmentation


def test_no_augmentation_is_the_plain_resize():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    result = augment(image, AugmentationConfig(), SETTINGS, np.random.default_rng(0))
    assert (result == np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BICUBIC))).all()


def test_no_augmentation_is_the_image_processor():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    processor = IGCaptionerImageProcessor(size={"height": 16, "width": 12}, crop_pct=0.8, image_mean=[0.4, 0.5, 0.6])
    settings = image_settings(processor)
    view = augment(image, AugmentationConfig(), settings, np.random.default_rng(0))
    expected = processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(normalise(np.stack([view]), settings), expected, atol=2 / 255 / 0.5, rtol=0)


def test_a_crop_of_the_centre_is_what_is_augmented():
    settings = ImageSettings((16, 16), crop_pct=1.0)
    assert settings.box(40, 20) == (10, 0, 30, 20)
    left, _, right, _ = random_box(settings.box(40, 20), AugmentationConfig(), np.random.default_rng(0))
    assert (left, right) == (10, 30)


def test_crops_stay_inside_and_have_the_size_asked_for():
    rng, config = np.random.default_rng(0), AugmentationConfig(scale=(0.3, 0.6), ratio=(0.8, 1.25))
    for _ in range(200):
        left, top, right, bottom = random_box((0, 0, 40, 20), config, rng)
        assert left >= 0 and top >= 0 and right <= 40 + 1e-9 and bottom <= 20 + 1e-9
        assert 0.29 <= (right - left) * (bottom - top) / 800 <= 0.61


def test_shift_reflects_at_the_border():
    image = np.arange(8, dtype=np.uint8)[None, :, None].repeat(4, axis=0).repeat(3, axis=2)
    padded, box = reflect_border(image, (-2.0, 0.0, 6.0, 4.0))
    assert padded[0, :, 0].tolist() == [2, 1, 0, 1, 2, 3, 4, 5, 6, 7]
    assert box == (0.0, 0.0, 8.0, 4.0)


def test_flip_probability():
    image = np.zeros((16, 16, 3), np.uint8)
    image[:, 8:] = 255
    config, rng = AugmentationConfig(flip_probability=0.5), np.random.default_rng(0)
    flipped = sum(augment(image, config, SETTINGS, rng)[0, 0, 0] == 255 for _ in range(400))
    assert 150 < flipped < 250


# Tokenizer


def test_tokenizer_gives_the_scored_form(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.convert_tokens_to_ids(["[PAD]", "[BOS]", "[EOS]", "[MASK]"]) == [0, 1, 2, 3]
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id, loaded.mask_token_id) == (0, 1, 2, 3)
    ids = loaded("Red, a RED")["input_ids"]
    assert ids == tokenizer("  red, a red ")["input_ids"] and ids[-1] == 2 and 1 not in ids
    assert ids[0] == ids[-2], "a word has the same token at the start and in the middle"
    assert loaded.decode(ids, skip_special_tokens=True) == "red, a red"
    assert loaded.decode(loaded("Straße 🎆")["input_ids"], skip_special_tokens=True) == "straße 🎆", (
        "every byte is known"
    )
    assert loaded.model_max_length == 64


def test_tokenizer_training_is_deterministic():
    first, second = (train_tokenizer(CAPTIONS, 290).backend_tokenizer.to_str() for _ in range(2))
    assert first == second
    with pytest.raises(ValueError, match="100"):
        train_tokenizer(CAPTIONS, 100)
