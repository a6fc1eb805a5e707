"""The choice of templates and prior weight on samples that were held out."""

import json

import numpy as np
import pytest
import torch
from training_runs import image_bytes, write_shard

from ig_captioner import IGCaptionerConfig
from tests.test_feature_cache import cached_config
from training.data import Share, load_training_data
from training.feature_cache import open_features
from training.train import train
from training.tune import PRIOR_WEIGHTS, choose, class_figures, main, mixed_top1, read_held_out, save_choice


NAMES = [f"thing {number}" for number in range(12)]


@pytest.fixture
def config(workspace, tmp_path):
    """A run on photos of named things, a third of the names left out, and on captioned photos."""
    members = []
    for index, name in enumerate(NAMES * 4):
        metadata = {"captions": [f"a photo of a {name}."], "class_name": name}
        color = (20 * (index % 12), 255 - 20 * (index % 12), 7 * index % 256)
        members += [(f"{index:03d}.png", image_bytes(color)), (f"{index:03d}.json", json.dumps(metadata).encode())]
    write_shard(tmp_path / "named.tar", members)
    members = [(f"{i:03d}.{suffix}", content) for i in range(12) for suffix, content in captioned(i)]
    write_shard(tmp_path / "captioned.tar", members)
    named = {"shards": "named.tar", "holdout_names_fraction": 0.4, "holdout_fraction": 0.3}
    sources = {"named": named, "captioned": {"shards": "captioned.tar", "holdout_fraction": 0.5}}
    changes = {"data_root": str(tmp_path), "data.sources": sources, "data.max_length": 32, "max_steps": 2}
    small = cached_config(workspace, tmp_path).model["text_config"] | {"max_position_embeddings": 32}
    return cached_config(workspace, tmp_path, **changes, **{"model.text_config": small})


def captioned(index):
    return [("png", image_bytes((index, 0, 255))), ("txt", f"caption {index}".encode())]


def test_held_out_samples_are_those_that_training_leaves_out(config):
    from ig_captioner.data.shards import is_held_out

    held_out = read_held_out(config, open_features(config).stores)
    named = held_out["named"]
    assert named.all_names == sorted(NAMES) and not held_out["captioned"].names
    left_out = {name for name in NAMES if is_held_out(name, 0.4)}
    assert left_out and {n for n, known in zip(named.names, named.known.tolist(), strict=True) if not known} == left_out
    assert int((~named.known).sum()) == 4 * len(left_out)
    keys = [f"{index:03d}" for index, name in enumerate(NAMES * 4) if name not in left_out]
    assert int(named.known.sum()) == sum(is_held_out(key, 0.3) for key in keys)


def test_mixed_names_are_told_apart_among_themselves_only():
    known = torch.tensor([True, True, False, False])
    labels = torch.tensor([0, 1, 2, 3])
    names = torch.tensor([[9.0, 0, 0, 0], [0, 9, 0, 0], [0, 0, 9, 0], [0, 0, 0, 9]])
    assert mixed_top1(names, labels, known) == 1.0
    assert mixed_top1(-names, labels, known) == 0.0
    overshooting = names + torch.tensor([0.0, 0, 20, 20])  # what was never trained on always wins
    assert mixed_top1(overshooting, labels, known) == pytest.approx(0.5)


def test_class_figures_at_each_weight(config):
    held_out = read_held_out(config, open_features(config).stores)["named"]
    labels = torch.tensor([sorted(NAMES).index(name) for name in held_out.names])

    def score(features, texts):
        """The prior decides between the right name and the next one: weight 1 is right, weight 0 is wrong."""
        caption = torch.zeros(len(features), 2 * len(NAMES))
        for row, label in enumerate(labels):
            caption[row, [label, label + len(NAMES)]] = 10.0
        prior = torch.arange(2 * len(NAMES)).float() % len(NAMES)
        return caption + 20 * prior, 20 * prior

    figures = class_figures(held_out, score, (0.0, 1.0), ["{}", "a {}"])
    last = (labels[held_out.known] == len(NAMES) - 1).float().mean().item()
    assert figures["known"] == [pytest.approx(last, abs=1e-4), 1.0] and figures["mixed"][1] == 1.0


def test_the_first_templates_within_half_a_point_of_the_best_are_chosen():
    def figures(known, mixed, weight):
        curve = np.zeros(len(PRIOR_WEIGHTS))
        curve[PRIOR_WEIGHTS.index(weight)] = 1.0
        return {"x": {"known": (known * curve).tolist(), "mixed": (mixed * curve).tolist()}, "y": {"photos": 3}}

    runs = [figures(0.5, 0.5, 0.2), figures(0.8, 0.596, 0.4), figures(0.6, 0.8, 0.7)]
    assert choose(runs, runs) == (1, 0.4)
    assert choose(runs[:1], runs[:1]) == (0, 0.2)
    without = [{"x": {"known": run["x"]["known"], "mixed": []}} for run in runs]
    assert choose(without, without) == (1, 0.4)
    with pytest.raises(ValueError, match="no held-out photos with class names"):
        choose([{"y": {"photos": 3}}], [{"y": {"photos": 3}}])


def test_the_choice_is_saved_with_the_model(config, tmp_path):
    final = train(config)
    main(["--run", str(final.parent), "--output", str(tmp_path / "tuned.json"), "--candidates", "2", "--save"])
    tuned = json.loads((tmp_path / "tuned.json").read_text())
    saved = IGCaptionerConfig.from_pretrained(final)
    assert (saved.prompt_templates, saved.prior_weight) == (tuned["prompt_templates"], tuned["prior_weight"])
    assert [set(candidate["run"]) for candidate in tuned["candidates"]] == [{"named", "captioned"}] * 2
    assert len(tuned["candidates"][0]["run"]["captioned"]["image to text R@10"]) == len(PRIOR_WEIGHTS)
    save_choice(final, ["{}!"], 0.3)
    assert IGCaptionerConfig.from_pretrained(final).prompt_templates == ["{}!"]


def test_a_dual_encoder_sees_the_draws_of_the_run(config, tmp_path, monkeypatch):
    """The same samples, views and texts in the same order, however they are dealt out to batches."""
    from benchmarks.everyday import dual_encoder

    drawn: dict[str, list] = {"captioner": [], "tower": []}
    final = train(config)
    features = open_features(config)
    read = {"data_root": config.data_root, "seed": 0, "features": features.stores}
    loader = load_training_data(config.data, features.tokenizer, features.settings, Share(8), **read).loader
    for batch, _ in zip(loader, range(2), strict=False):
        drawn["captioner"] += [*zip(batch["image_features"], batch["labels"], strict=True)]
    fit = dual_encoder.fit

    def recorded(tower, batches):
        batches = [next(batches) for _ in range(4)]
        drawn["tower"] = [row for features, tokens, _ in batches for row in zip(features, tokens, strict=True)]
        return fit(tower, iter(batches))

    monkeypatch.setattr(dual_encoder, "fit", recorded)
    arguments = ["--run", str(final.parent), "--output", str(tmp_path / "tower"), "--batch_size", "4"]
    dual_encoder.main([*arguments, "--width", "16", "--layers", "1"])
    assert len(drawn["captioner"]) == len(drawn["tower"]) == 16  # the run's two batches of eight
    for (tokens, labels), (flat, text) in zip(drawn["captioner"], drawn["tower"], strict=True):
        assert torch.equal(tokens.flatten(), flat)
        assert [token for token in labels.tolist() if token >= 0] == [token for token in text.tolist() if token > 0]
    figures = json.loads((tmp_path / "tower" / "held_out.json").read_text())
    assert figures["steps"] == 4 and len(figures["named"]["known"]) == 1
