"""The small-scale experiments: what runs share and change, their data, the CLIP baseline, what the tables say."""

import argparse
import dataclasses
import io
import json
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from benchmarks.small_scale import __main__ as command
from benchmarks.small_scale.contrastive import clip_config
from benchmarks.small_scale.evaluate import CLASS_NAMES, per_token
from benchmarks.small_scale.long_tail import class_counts, write_long_tail
from benchmarks.small_scale.plan import (
    DESIGNS,
    PRESENT_DESIGN,
    ablation_runs,
    comparison_runs,
    design_runs,
    load_recipe,
    long_tail_runs,
    search_runs,
    training_config,
)
from benchmarks.small_scale.report import CLASSES, Line, difference, interval, weighted_accuracy
from ig_captioner.data.shards import is_held_out, read_metadata, read_shard
from ig_captioner.evaluation.lit import contrastive_loss
from ig_captioner.evaluation.scores import ScoreMatrix
from tiny import tiny_config


RECIPES = Path(command.__file__).parent
RATES = {"IG captioner": 2.0, "CLIP": 0.5}


def all_runs(recipe):
    ablated = ablation_runs(recipe, RATES, recipe.seeds)
    return [*search_runs(recipe), *comparison_runs(recipe, RATES), *long_tail_runs(recipe), *ablated]


# Plan


@pytest.mark.parametrize("name", ["cpu.yaml", "gpu.yaml"])
def test_runs_of_a_recipe_share_all_but_what_they_change(name, tmp_path):
    recipe = load_recipe(RECIPES / name)
    runs = all_runs(recipe)
    assert len({run.name for run in runs}) == len(set(map(repr, runs)))  # a name means one run
    base = None
    for run in runs:
        config = training_config(run, recipe, tmp_path / run.name, tmp_path / "tok", tmp_path / "tail.tar", "data")
        assert config.seed == run.seed
        assert config.optimizer.lr == pytest.approx(recipe.train["optimizer"]["lr"] * run.rate_factor)
        if run.data == "mixture":
            config.seed, config.output_dir, config.model = 0, "", {}
            config.optimizer.lr = config.optimizer.adamw_lr = 0.0
            base = base or dataclasses.asdict(config)
            assert dataclasses.asdict(config) == base
        else:
            assert [source.shards for source in config.data.sources.values()] == [[str(tmp_path / "tail.tar")]]


def test_every_arm_of_the_comparison_has_every_seed_and_the_rate_that_was_found():
    recipe = load_recipe(RECIPES / "cpu.yaml")
    runs = comparison_runs(recipe, RATES)
    assert {(run.arm, run.seed) for run in runs} == {
        (arm, seed) for arm in ("captioner", "IG captioner", "IG + parallel", "CLIP") for seed in recipe.seeds
    }
    assert {run.rate_factor for run in runs if run.arm == "CLIP"} == {0.5}
    assert {run.rate_factor for run in runs if run.arm != "CLIP"} == {2.0}


def test_the_best_held_out_rate_is_chosen():
    searched = [
        {"run": {"arm": arm, "rate_factor": factor}, "quality": quality}
        for arm, factor, quality in (
            ("a", 0.5, 0.1),
            ("b", 0.5, 0.9),
            ("a", 1.0, 0.3),
            ("b", 1.0, 0.2),
            ("a", 2.0, 0.2),
        )
    ]
    assert command.choose_rates(searched) == {"a": 1.0, "b": 0.5}


def test_designs_run_with_equal_samples_and_with_equal_cpu_time(tmp_path):
    recipe = load_recipe(RECIPES / "cpu.yaml")
    costs = {name: 1.0 if name == PRESENT_DESIGN else 0.5 for name in DESIGNS}
    runs = design_runs(recipe, costs, recipe.seeds)
    assert len({run.name for run in runs}) == len(runs) == len(recipe.seeds) * (len(DESIGNS) + 1)
    samples = recipe.design_samples
    for run in runs:
        config = training_config(run, recipe, tmp_path / run.name, tmp_path / "tok", tmp_path / "tail.tar", "data")
        assert config.max_samples == (2 * samples if "equal CPU time" in run.arm else samples)
        assert config.model["text_config"]["num_hidden_layers"] == 6


# Data


def photo(index: int, size: int = 32) -> bytes:
    """Noise in a colour that follows the class."""
    pixels = np.random.default_rng(index).integers(0, 60, (size, size, 3)) + 19 * (index % 10)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_photos(path: Path, prefix: str, count: int, captions) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for index in range(count):
            name, caption = CLASS_NAMES[index % 10], captions(index)
            metadata = json.dumps({"class_name": name, "captions": [caption]}).encode()
            for extension, content in (("png", photo(index)), ("txt", caption.encode()), ("json", metadata)):
                member = tarfile.TarInfo(f"{prefix}_{index}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def write_data(folder: Path) -> Path:
    """Shards with the names of the real ones."""
    for shard in range(5):
        write_photos(
            folder / f"cifar10-train-{shard:04d}.tar.gz",
            f"c{shard}",
            60,
            lambda i: f"a photo of a {CLASS_NAMES[i % 10]}.",
        )
    for shard in range(4):
        write_photos(
            folder / f"flickr8k-train-{shard:04d}.tar", f"f{shard}", 40, lambda i: f"{CLASS_NAMES[i % 10]} no {i}"
        )
    write_photos(folder / "cifar10-test-0000.tar.gz", "ct", 30, lambda i: f"a photo of a {CLASS_NAMES[i % 10]}.")
    write_photos(folder / "flickr8k-val-0000.tar", "fv", 12, lambda i: f"{CLASS_NAMES[i % 10]} number {i}")
    return folder


def test_the_long_tail_has_the_counts_that_it_should_and_nothing_held_out(tmp_path):
    data = write_data(tmp_path)
    paths = [str(path) for path in sorted(data.glob("cifar10-train-*"))]
    counts = write_long_tail(paths, tmp_path / "tail.tar", CLASS_NAMES, ratio=10, holdout=0.1)
    kept = [item for path in paths for item in read_shard(path) if not is_held_out(item[0], 0.1)]
    smallest = min(sum(read_metadata(files)["class_name"] == name for _, files in kept) for name in CLASS_NAMES)
    assert counts[0] == smallest and counts[-1] == round(smallest / 10) and counts == sorted(counts, reverse=True)
    written = [*read_shard(str(tmp_path / "tail.tar"))]
    found = [read_metadata(files)["class_name"] for _, files in written]
    assert [found.count(name) for name in CLASS_NAMES] == counts
    originals = dict(kept)
    assert all(files == originals[key] for key, files in written)


def test_class_counts_fall_geometrically():
    counts = class_counts(10, 5000, 100)
    assert counts[0] == 5000 and counts[-1] == 50
    assert np.allclose(np.diff(np.log(counts)), -math.log(100) / 9, atol=0.01)


# CLIP


def test_equal_texts_are_no_negatives():
    generator = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(4, 4, generator=generator), torch.tensor([[1, 2], [3, 4], [1, 2], [5, 6]])

    def one_way(rows):
        total = 0.0
        for i, row in enumerate(rows.tolist()):
            norm = math.log(sum(map(math.exp, row)))
            right = [j for j in range(4) if ids[j].tolist() == ids[i].tolist()]
            total += sum(norm - row[j] for j in right) / len(right)
        return total / 4

    expected = (one_way(logits) + one_way(logits.T)) / 2
    assert contrastive_loss(logits, ids).item() == pytest.approx(expected, abs=1e-6)


def test_the_towers_have_the_captioners_sizes_and_pool_at_the_end_of_the_text():
    from transformers import CLIPModel

    config = tiny_config({"hidden_size": 16})
    clip = clip_config(config)
    assert clip.vision_config.num_hidden_layers == config.vision_config.num_hidden_layers
    assert clip.text_config.hidden_size == config.text_config.hidden_size
    torch.manual_seed(0)
    model, end = CLIPModel(clip).eval(), clip.text_config.eos_token_id
    with torch.no_grad():
        short = model.get_text_features(torch.tensor([[7, 8, end]])).pooler_output
        padded = model.get_text_features(torch.tensor([[7, 8, end, 0, 0]])).pooler_output
        other = model.get_text_features(torch.tensor([[7, 9, end, 0, 0]])).pooler_output
    assert torch.allclose(short, padded, atol=1e-6) and not torch.allclose(short, other, atol=1e-3)


# Tables


def test_scores_per_token():
    matrix = ScoreMatrix(torch.tensor([[-4.0, -9.0]]), torch.tensor([-6.0, -3.0]), torch.tensor([2.0, 3.0]))
    assert per_token(matrix).information_gain(1.0).tolist() == [[1.0, -2.0]]


def test_intervals_over_seeds():
    # scipy.stats.t.interval(0.95, 2, loc=2, scale=1 / 3**0.5)
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, -0.4841377, 4.4841377), abs=1e-3)
    assert interval([5.0])[0] == 5.0 and math.isnan(interval([5.0])[1])


def test_differences_are_between_runs_of_one_seed():
    def result(arm, seed, value):
        row = {"name": "tuned", "prior_weight": 1.0, "metrics": {"top1": {"value": value}}}
        return {"run": {"arm": arm, "seed": seed}, "tables": {"CIFAR-10, unconditional": [row, {**row, "name": "x"}]}}

    results = [result("a", 0, 0.5), result("a", 1, 0.7), result("b", 0, 0.4), result("b", 1, 0.6)]
    one, other = (Line(arm, "unconditional", "tuned") for arm in "ab")
    assert difference(results, one, other, CLASSES) == "10.0 (10.0 - 10.0)"


def test_accuracy_where_classes_are_uneven():
    assert weighted_accuracy([[8, 2], [5, 5]], [3, 1]) == pytest.approx((3 * 0.8 + 0.5) / 4)


# All of it


@pytest.mark.slow
def test_all_experiments_on_generated_data(tmp_path):
    """A process per run: about two minutes."""
    recipe = yaml.safe_load((RECIPES / "cpu.yaml").read_text())
    recipe |= {"vocab_size": 300, "seeds": [0, 1], "rate_factors": [1.0], "test_captions": 12, "reference_images": 4}
    recipe |= {"long_tail_ratio": 5, "long_tail_samples": 16, "design_samples": 16}
    recipe["train"] |= {"max_samples": 16, "batch_size": 8, "log_every_steps": 1}
    for source in recipe["train"]["data"]["sources"].values():
        source["holdout_fraction"] = 0.1
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    options = [
        "--recipe",
        tmp_path / "recipe.yaml",
        "--data_root",
        write_data(tmp_path),
        "--output_dir",
        tmp_path / "runs",
    ]
    arguments = [
        str(word) for word in ["comparison", "long_tail", "ablations", *options, "--results", tmp_path / "out"]
    ]
    command.main(arguments)
    for name in ("comparison", "long_tail", "ablations"):
        assert "| IG captioner |" in (tmp_path / "out" / f"{name}.md").read_text()
        assert json.loads((tmp_path / "out" / f"{name}.json").read_text())["results"]
    assert all(Image.open(tmp_path / "out" / f"{name}.png").width > 500 for name in ("comparison", "long_tail"))
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/metrics.json")}
    command.main(arguments)  # nothing is trained again
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/metrics.json")}


def test_runs_of_another_recipe_are_not_mixed_in(tmp_path):
    options = argparse.Namespace(output_dir=tmp_path, recipe=RECIPES / "cpu.yaml")
    command.Workshop(options, load_recipe(RECIPES / "cpu.yaml"))
    command.Workshop(options, load_recipe(RECIPES / "cpu.yaml"))
    with pytest.raises(ValueError, match="another recipe"):
        command.Workshop(options, load_recipe(RECIPES / "gpu.yaml"))
