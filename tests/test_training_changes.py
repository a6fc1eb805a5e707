"""Runs that are resumed with other settings: refused, or used from there on and recorded."""

import dataclasses
import re
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from training_runs import run_config

from training.checkpoint import list_checkpoints
from training.config import DataConfig, FeatureCacheConfig, TrainConfig, UsageError, flatten, load_config, to_dict
from training.metrics import read_rows
from training.resume import HARMLESS, IMPOSSIBLE, find_changes
from training.train import train
from training.train_tokenizer import train_tokenizer


STOPPED_AT, STEPS = 2, 4


@pytest.fixture(scope="module")
def stopped(workspace, tmp_path_factory):
    """The folder of a run that was killed after its second step, and the weights that it would have ended with."""
    folder = tmp_path_factory.mktemp("stopped")
    config = run_config(workspace, folder / "run", max_steps=STEPS, checkpoint_steps=STOPPED_AT)
    weights = load_file(train(config) / "model.safetensors")
    shutil.rmtree(folder / "run" / "final")
    shutil.rmtree(list_checkpoints(folder / "run")[-1])
    return folder / "run", weights


@pytest.fixture
def resume(workspace, stopped, tmp_path):
    """Resumes a copy of the stopped run with other settings; returns the final weights."""
    shutil.copytree(stopped[0], tmp_path / "run")

    def run(**overrides):
        values = {"resume": True, "max_steps": STEPS, "checkpoint_steps": STOPPED_AT, **overrides}
        return load_file(train(run_config(workspace, tmp_path / "run", **values)) / "model.safetensors")

    return run


def same(first, second, tolerance=0.0):
    return all(torch.allclose(first[name], second[name], rtol=0, atol=tolerance) for name in first)


CHANGES = [
    ("optimizer.lr", 1e-9),
    ("optimizer.weight_decay", 0.9),
    ("optimizer.betas", [0.5, 0.5]),
    ("optimizer.eps", 0.1),
    ("optimizer.max_grad_norm", 0.01),
    ("optimizer.schedule", "constant"),
    ("optimizer.ema_decay", 0.0),
    ("model.conditional_weight", 9.0),
    ("model.unconditional_weight", 0.0),
    ("model.parallel_prediction_prob", 1.0),
    ("model.text_config.dropout", 0.5),
    ("data.sources.colors.augmentation.color_jitter", 0.4),
    ("seed", 7),
    ("batch_size", 4),
    ("max_steps", 8),
    ("mixed_precision", "bf16"),
]


@pytest.mark.parametrize(("key", "value"), CHANGES, ids=[key for key, _ in CHANGES])
def test_a_changed_setting_is_refused_and_with_resume_with_changes_acts(resume, stopped, tmp_path, key, value):
    log = (tmp_path / "run" / "log.jsonl").read_text()
    with pytest.raises(UsageError, match=rf"{key}: .* -> {re.escape(repr(value))}.*resume_with_changes"):
        resume(**{key: value})
    assert (tmp_path / "run" / "log.jsonl").read_text() == log, "a refused run leaves all as it was"
    assert not same(resume(**{key: value, "resume_with_changes": True}), stopped[1])
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert flatten(recorded)[key] == value
    assert [(change["from_step"], change["key"], change["now"]) for change in recorded["changes"]] == [
        (STOPPED_AT, key, value)
    ]


def test_a_lower_learning_rate_holds_from_the_step_of_the_checkpoint_on(resume, stopped):
    """E17 of a review: the checkpoint's own rate was restored, and the new one recorded as used."""
    start = load_file(stopped[0] / "checkpoint-00000002" / "model" / "model.safetensors")
    end = resume(resume_with_changes=True, **{"optimizer.lr": 1e-9, "optimizer.ema_decay": 0.0})
    assert same(start, end, tolerance=1e-6)


def test_the_objective_of_a_checkpoint_changes_with_the_settings(resume, tmp_path):
    resume(resume_with_changes=True, **{"model.conditional_weight": 9.0, "model.prior_weight": 0.25})
    saved = yaml.safe_load((tmp_path / "run" / "final" / "config.json").read_text())
    assert (saved["conditional_weight"], saved["prior_weight"]) == (9.0, 0.25)


def test_a_moving_average_may_begin_and_end_with_a_resumed_run(workspace, resume, tmp_path):
    without = resume(resume_with_changes=True, **{"optimizer.ema_decay": 0.0})
    config = run_config(workspace, tmp_path / "other", **{"optimizer.ema_decay": 0.0})
    train(config)
    config.optimizer.ema_decay, config.resume_with_changes, config.max_steps = 0.9, True, 8
    assert not same(load_file(train(config) / "model.safetensors"), without)


def test_without_changes_nothing_is_recorded_and_the_run_is_the_same(resume, stopped, tmp_path):
    harmless = {"log_every_steps": 1, "checkpoint_minutes": 5, "keep_checkpoints": 7, "data.num_workers": 0}
    assert same(resume(**harmless), stopped[1])
    assert "changes" not in yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())


def test_changes_of_earlier_resumes_stay_recorded(resume, tmp_path):
    resume(resume_with_changes=True, **{"optimizer.lr": 0.002})
    changed = {"optimizer.lr": 0.002, "max_steps": STEPS + 1}
    resume(resume_with_changes=True, **changed)
    resume(**changed)
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["changes"]
    assert [(row["from_step"], row["key"]) for row in recorded] == [(2, "optimizer.lr"), (4, "max_steps")]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"optimizer.name": "adafactor"}, "optimizer.name: 'adamw' -> 'adafactor'"),
        ({"model.vision_config.hidden_size": 32}, "model.vision_config.hidden_size: 16 -> 32"),
        ({"freeze": ["model.vision_model.*"]}, "freeze: "),
        ({"init_from": "somewhere"}, "init_from: None -> 'somewhere'"),
        ({"data.streams": 2}, "data.streams: 0 -> 2"),
        ({"data.sources.other.shards": "colors.tar"}, r"data.sources: \['colors'\] -> \['colors', 'other'\]"),
    ],
)
def test_changes_that_could_not_act_are_refused_with_the_reason(resume, overrides, message):
    with pytest.raises(UsageError, match=message + ".*start a new run with --init_from"):
        resume(resume_with_changes=True, **overrides)


def test_another_tokenizer_under_the_same_path_is_refused(resume, workspace, tmp_path):
    resume()
    train_tokenizer(["completely different words"], 300).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UsageError, match="has other tokens than the one of .*checkpoint"):
        resume(tokenizer=str(tmp_path / "tokenizer"))
    shutil.copytree(workspace / "tokenizer", tmp_path / "moved")
    resume(tokenizer=str(tmp_path / "moved"))


def test_the_configuration_that_a_run_has_written_can_be_used_again(resume, stopped, tmp_path):
    resume(resume_with_changes=True, **{"optimizer.lr": 0.002})
    config = load_config(tmp_path / "run" / "config.yaml", ["--resume"])
    assert config.optimizer.lr == 0.002
    train(config)


def test_the_lists_of_settings_name_only_settings():
    config = TrainConfig(data=DataConfig(feature_cache=FeatureCacheConfig("features")))
    keys = flatten(to_dict(config))
    assert not HARMLESS.keys() - keys.keys()
    assert not {key for key in IMPOSSIBLE if "*" not in key} - keys.keys()


def test_a_setting_that_an_older_checkpoint_does_not_know_has_its_default():
    config = TrainConfig(max_steps=3)
    saved = to_dict(config)
    del saved["seed"]
    assert find_changes(saved, config) == []
    assert find_changes(saved, dataclasses.replace(config, seed=1)) == [("seed", 0, 1)]
    assert find_changes(saved, dataclasses.replace(config, mixed_precision="no")) == [("mixed_precision", "auto", "no")]


def test_more_samples_per_step_do_not_end_a_run_that_counts_samples(workspace, tmp_path):
    limit = {"max_steps": None, "max_samples": 32}
    config = run_config(workspace, tmp_path, batch_size=4, checkpoint_steps=4, log_every_steps=1, **limit)
    train(config)
    shutil.rmtree(list_checkpoints(tmp_path)[-1])  # of step 8; 16 samples have been drawn at step 4
    config.batch_size, config.resume_with_changes = 8, True
    train(config)
    assert [(row["step"], row["samples"]) for row in read_rows(tmp_path / "log.jsonl")][3:] == [
        (4, 16),
        (5, 24),
        (6, 32),
    ]


# The data (what counts as changed shards: test_training_shards.py)


def test_lost_shards_are_recorded_and_moved_ones_are_the_same(workspace, tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("a.tar", "b.tar"):
        shutil.copy(workspace / "colors.tar", tmp_path / "data" / name)
    data = {"data_root": str(tmp_path / "data"), "data.sources.colors.shards": "*.tar", "max_steps": 2}
    train(run_config(workspace, tmp_path / "run", **data))
    shutil.move(tmp_path / "data", tmp_path / "moved")
    data |= {"data_root": str(tmp_path / "moved"), "resume": True}
    train(run_config(workspace, tmp_path / "run", **data))
    (tmp_path / "moved" / "b.tar").unlink()
    with pytest.raises(UsageError, match="other shards than the checkpoint's: colors: b.tar is gone"):
        train(run_config(workspace, tmp_path / "run", **data))
    train(run_config(workspace, tmp_path / "run", **data, resume_with_changes=True))
    (recorded,) = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["changes"]
    assert (recorded["from_step"], recorded["key"], recorded["now"]) == (2, "shards", "colors: b.tar is gone")
