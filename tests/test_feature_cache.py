"""Cached features: equal to the encoder's, found again or made anew, and trained on as images are."""

import json
import tarfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_runs import image_bytes, run_config, write_shard

import training.feature_cache
from ig_captioner.data.shards import EmptySourceError, image_of, read_shard
from training.augmentation import augment, normalise, resize
from training.build import build_processor
from training.config import AugmentationConfig
from training.feature_cache import FEATURES, SAMPLES, SETTINGS, open_features
from training.metrics import read_rows
from training.train import train


FROZEN = {"freeze": ["model.vision_model.*"], "model.image_token_grids": [2, 1]}
VARIED = {"shift": 0.2, "flip_probability": 0.5, "color_jitter": 0.1, "detail": [0.5, 1.0], "sharpness": [0.5, 2.0]}


def cached_config(workspace, folder, **overrides):
    cache = {"folder": str(folder / "features"), "views": 3, "dtype": "float32", "batch_size": 8}
    values = {**FROZEN, "data.feature_cache": cache, "data.sources.colors.augmentation": VARIED, **overrides}
    return run_config(workspace, folder / "run", **values)


@pytest.fixture
def computed(monkeypatch):
    """Names of the sources whose features are computed."""
    names, compute = [], training.feature_cache.compute

    def counted(name, *arguments):
        names.append(name)
        compute(name, *arguments)

    monkeypatch.setattr(training.feature_cache, "compute", counted)
    return names


def files_of(store):
    return {name: (store.folder / name).read_bytes() for name in (FEATURES, SAMPLES, SETTINGS)}


def test_features_are_those_of_the_encoder(workspace, tmp_path):
    config = cached_config(workspace, tmp_path)
    model, _, settings, stores, _ = open_features(config)
    store, augmentation = stores["colors"], config.data.sources["colors"].augmentation
    assert store.shape == (24, 3, 5, 16) and [record.key for record in store.records[:2]] == ["0000", "0001"]
    for row, (key, files) in enumerate(read_shard(str(workspace / "colors.tar"))):
        image = image_of(files)
        seeds = [(0, training.feature_cache.number_of(key), view) for view in (1, 2)]
        views = [np.asarray(resize(image, settings))]
        views += [augment(image, augmentation, settings, np.random.default_rng(seed)) for seed in seeds]
        with torch.no_grad():
            expected = model.eval().model.encode_features(normalise(np.stack(views), settings))
        torch.testing.assert_close(torch.from_numpy(store.features[row].copy()), expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(store.features[0, 0], store.features[0, 1], atol=1e-3)


def test_features_are_found_again_until_something_changes(workspace, tmp_path, computed):
    first = open_features(cached_config(workspace, tmp_path))
    again = open_features(cached_config(workspace, tmp_path))
    assert computed == ["colors"] and again.stores["colors"].folder == first.stores["colors"].folder
    open_features(cached_config(workspace, tmp_path, seed=1))
    assert computed == ["colors"] * 2  # other weights
    first.model.save_pretrained(tmp_path / "model")
    build_processor(cached_config(workspace, tmp_path), first.model.config, first.tokenizer).save_pretrained(
        tmp_path / "model"
    )
    weights = {"init_from": str(tmp_path / "model"), "model": {}}
    fixed = open_features(cached_config(workspace, tmp_path, **weights)).stores["colors"]
    assert len(computed) == 2 and fixed.folder == first.stores["colors"].folder
    same = {"seed": 5, "batch_size": 4, "data.sources.colors.holdout_fraction": 0.5, "optimizer.lr": 1e-4}
    for changes, is_new in [
        (same, False),
        ({"data.sources.colors.augmentation.flip_probability": 0.4}, True),
        ({"data.feature_cache.views": 2}, True),
        ({"data.sources.colors.views": 1}, True),
        ({"data.feature_cache.seed": 1}, True),
        ({"mixed_precision": "bf16"}, True),
    ]:
        before = len(computed)
        store = open_features(cached_config(workspace, tmp_path, **weights, **changes)).stores["colors"]
        assert (len(computed) > before) == is_new == (store.folder != fixed.folder), changes


def test_a_cuda_build_without_a_gpu_computes_on_the_cpu(workspace, tmp_path, monkeypatch):
    def of_a_cuda_build(check_available=False):
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", of_a_cuda_build)
    assert open_features(cached_config(workspace, tmp_path)).device == torch.device("cpu")


def test_other_shards_make_other_features(tmp_path, workspace, computed):
    for color in ((255, 0, 0), (0, 255, 0)):
        write_shard(tmp_path / "s.tar", [("a.png", image_bytes(color)), ("a.txt", b"a square.")])
        config = cached_config(
            workspace, tmp_path, **{"data_root": str(tmp_path), "data.sources.colors.shards": "*.tar"}
        )
        open_features(config)
    assert len(computed) == 2


@pytest.mark.parametrize("torn", [False, True])
def test_interrupted_computation_goes_on(workspace, tmp_path, monkeypatch, torn):
    def build(folder):
        return open_features(cached_config(workspace, folder)).stores["colors"]

    whole = build(tmp_path / "whole")
    make_encode, calls = training.feature_cache.make_encode, []

    def failing(*arguments):
        encode = make_encode(*arguments)

        def count(views):
            calls.append(len(views))
            if len(calls) == 6:
                raise KeyboardInterrupt
            return encode(views)

        return count

    monkeypatch.setattr(training.feature_cache, "make_encode", failing)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cut")
    (folder,) = (tmp_path / "cut" / "features").iterdir()
    assert 0 < len((folder / SAMPLES).read_text().splitlines()) < 24 and not (folder / SETTINGS).exists()
    if torn:
        with open(folder / SAMPLES, "ab") as file:
            file.write(b'{"key": "00')
        with open(folder / FEATURES, "ab") as file:
            file.write(b"\1" * 10)
    monkeypatch.setattr(training.feature_cache, "make_encode", make_encode)
    assert files_of(build(tmp_path / "cut")) == files_of(whole)


def test_unusable_samples_are_told_and_left_out(workspace, tmp_path):
    members = [("a.png", b""), ("a.txt", b"x"), ("b.png", image_bytes()), ("c.png", image_bytes()), ("c.txt", b"c")]
    write_shard(tmp_path / "s.tar", members)
    shards = {"data_root": str(tmp_path), "data.sources.colors.shards": "s.tar"}
    store = open_features(cached_config(workspace, tmp_path, **shards)).stores["colors"]
    assert [tuple(item) for item in store.skipped] == [("a", "empty image file"), ("b", "missing caption")]
    assert [record.key for record in store.records] == ["c"] and len(store.features) == 1
    write_shard(tmp_path / "s.tar", members[:2])
    with pytest.raises(EmptySourceError, match="1 x empty image file"):
        open_features(cached_config(workspace, tmp_path, **shards))


def test_a_trained_encoder_is_refused(workspace, tmp_path):
    with pytest.raises(ValueError, match="needs a frozen encoder: add 'model.vision_model"):
        train(cached_config(workspace, tmp_path, freeze=[]))


def test_training_on_features_equals_training_on_images(workspace, tmp_path):
    plain = {"data.sources.colors.augmentation": {}, "evaluation.every_steps": 2}
    plain |= {"data.sources.colors.holdout_fraction": 0.2}
    one_view = {"folder": str(tmp_path / "features"), "dtype": "float32"}
    on_features = train(cached_config(workspace, tmp_path / "1", **plain, **{"data.feature_cache": one_view}))
    on_images = train(run_config(workspace, tmp_path / "2", **FROZEN, **plain))
    first, second = (load_file(folder / "model.safetensors") for folder in (on_features, on_images))
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-4)
    rows = [read_rows(folder.parent / "log.jsonl") for folder in (on_features, on_images)]
    assert len(rows[0]) == len(rows[1])
    for one, two in zip(*rows, strict=True):
        assert one.get("evaluation") == two.get("evaluation")
        assert one.get("loss", 0) == pytest.approx(two.get("loss", 0), rel=1e-3)


def test_resume_is_exact(workspace, tmp_path):
    dropout = {"model.text_config.dropout": 0.1, "seed": 3, "max_steps": 7}
    dropout["model.text_config"] = {
        **json.loads(json.dumps(cached_config(workspace, tmp_path).model["text_config"])),
        "dropout": 0.1,
    }
    del dropout["model.text_config.dropout"]
    whole = train(cached_config(workspace, tmp_path, **dropout))
    shared = {"data.feature_cache.folder": str(tmp_path / "features"), "checkpoint_steps": 3, **dropout}
    parts = cached_config(workspace, tmp_path / "parts", **shared)
    original = training.train.save_checkpoint
    try:
        training.train.save_checkpoint = lambda *arguments: (original(*arguments), stop())
        with pytest.raises(KeyboardInterrupt):
            train(parts)
    finally:
        training.train.save_checkpoint = original
    parts.resume = True
    resumed = train(parts)
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def stop():
    raise KeyboardInterrupt


def test_names_left_out_are_held_out_and_templates_are_drawn(workspace, tmp_path):
    from ig_captioner.data.shards import is_held_out, make_encoder
    from training.data import read_features

    names = [f"thing {number}" for number in range(20)]
    with tarfile.open(tmp_path / "unused.tar", "w"):
        pass
    members = []
    for index, name in enumerate(names * 2):
        metadata = {"captions": [f"a photo of a {name}."], "class_name": name, "broader": ["object"]}
        members += [(f"{index:03d}.png", image_bytes()), (f"{index:03d}.json", json.dumps(metadata).encode())]
    write_shard(tmp_path / "s.tar", members)
    source = {"shards": "s.tar", "holdout_names_fraction": 0.3, "templates": ["{}", "the {}!", "cifar10"]}
    source |= {"template_fields": ["class_name", "broader"], "template_share": 0.5}
    config = cached_config(workspace, tmp_path, **{"data_root": str(tmp_path), "data.sources": {"things": source}})
    _, tokenizer, _, stores, _ = open_features(config)
    encode = make_encoder(tokenizer, 32)
    read = read_features(config.data, stores, encode, max_held_out=100)
    kept, held_out = read.training["things"], read.held_out["things"]
    left_out = {name for name in names if is_held_out(name, 0.3)}
    assert left_out and len(held_out) == 2 * len(left_out) and len(kept) == 40 - len(held_out)
    rng, own = np.random.default_rng(0), encode(["a photo of a thing 1."])[0]
    sample, *_ = [sample for sample in kept if sample.captions[0] == own]
    drawn = [tuple(sample.captions.draw(rng)) for _ in range(4000)]
    assert drawn.count(tuple(own)) / 4000 == pytest.approx(0.5 + 0.25 / 20, abs=0.04)
    for text in ("thing 1", "the thing 1!", "object", "a blurry photo of a thing 1."):
        assert drawn.count(tuple(encode([text])[0])) / 4000 == pytest.approx(0.25 / 20, abs=0.01), text


def test_detail_and_sharpness_change_what_they_say():
    from training.augmentation import ImageSettings

    settings, rng = ImageSettings((32, 32)), np.random.default_rng
    image = rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)

    def contrast(**fields):
        view = augment(image, AugmentationConfig(**fields), settings, rng(1)).astype(float)
        return np.abs(np.diff(view, axis=1)).mean()

    plain = contrast()
    assert contrast(detail=(0.3, 0.3)) < 0.5 * plain
    assert contrast(sharpness=(0.0, 0.0)) < 0.7 * plain
    assert contrast(sharpness=(1.0, 1.0), detail=(1.0, 1.0)) == plain
    smooth = np.asarray(resize(resize(image, ImageSettings((8, 8))), settings))
    view = augment(smooth, AugmentationConfig(sharpness=(2.0, 2.0)), settings, rng(1)).astype(float)
    assert np.abs(np.diff(view, axis=1)).mean() > np.abs(np.diff(smooth.astype(float), axis=1)).mean()


def test_colour_jitter_is_linear_in_each_channel():
    from training.augmentation import ImageSettings

    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    view = augment(image, AugmentationConfig(color_jitter=0.3), ImageSettings((16, 16)), np.random.default_rng(2))
    rng = np.random.default_rng(2)
    rng.uniform(size=7)  # the crop, its place and shift, the flip
    amount = rng.uniform(-0.3, 0.3, 4)
    expected = ((image - 127.5) * (1 + amount[0]) + 127.5 + 255 * amount[1:]).clip(0, 255).astype(np.uint8)
    assert np.array_equal(view, expected)
