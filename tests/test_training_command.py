"""`python -m training.train` as its users meet it: help, usage errors, what it says; number formats."""

import dataclasses
import logging

import pytest
import torch
import yaml
from training_runs import run_config

from ig_captioner import precision
from training.config import (
    DataConfig,
    FeatureCacheConfig,
    TrainConfig,
    UsageError,
    flatten,
    load_config,
    parse_overrides,
    to_dict,
)
from training.metrics import read_rows
from training.run import start_run
from training.state import SavedRun
from training.train import main, train


RECIPE = "training/configs/tiny.yaml"


def fails(capsys, *arguments):
    """The line on stderr of a command that ends with status 2."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


# Help


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_setting_with_its_meaning_and_default(capsys, flag):
    main([flag])
    text = capsys.readouterr().out
    config = TrainConfig(data=DataConfig(feature_cache=FeatureCacheConfig("features")))
    for key in flatten(to_dict(config)):
        assert f"  --{key} " in text, key
    assert "  --data.feature_cache.folder STRING  (required)" in text
    assert "  --data.sources.NAME.weight NUMBER > 0  (default: 1.0)" in text
    assert "  --data.sources.NAME.augmentation.shift NUMBER >= 0 and < 0.5" in text
    assert '--optimizer.name {adamw,adafactor,muon}  (default: "adamw")' in text
    assert "Wall-clock budget in minutes" in text and "longer side than this (pixels)" in text


def test_every_setting_has_a_docstring():
    sections = [TrainConfig]
    while sections:
        cls = sections.pop()
        for name, info in cls.__pydantic_fields__.items():
            if dataclasses.is_dataclass(info.annotation):
                sections.append(info.annotation)
            else:
                assert info.description, f"{cls.__name__}.{name}"


# Usage errors: one line that names the key


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: python -m training.train --config FILE.yaml"),
        (["oops"], "usage: python -m training.train --config FILE.yaml"),
        (["--config"], "--config needs a file"),
        (["--config", "none.yaml"], "cannot read the configuration none.yaml"),
        (["--config", RECIPE, "oops"], "expected --key value, got 'oops'"),
        (
            ["--config", RECIPE, "--optimizer.learning_rate", "1"],
            "unknown key optimizer.learning_rate; known here: ",
        ),
        (
            ["--config", RECIPE, "--data.sources.emoji.weigth=1"],
            "unknown key data.sources.emoji.weigth; known ",
        ),
        (["--config", RECIPE, "--data.sources.emoji.weight", ".inf"], "data.sources.emoji.weight: must be a finite"),
        (["--config", RECIPE, "--max_steps", ".inf"], "max_steps: must be a finite number, got inf"),
        (["--config", RECIPE, "--max_minutes", ".nan"], "max_minutes: must be a finite number, got nan"),
        (["--config", RECIPE, "--optimizer.lr=-.inf"], "optimizer.lr: must be a finite number, got -inf"),
        (
            ["--config", RECIPE, "--model.conditional_weight", ".inf"],
            "model.conditional_weight must be a finite",
        ),
        (["--config", RECIPE, "--batch_size", "--resume"], "batch_size: must be a number, got True"),
        (["--config", RECIPE, "--trackers", "[a"], "--trackers is not YAML"),
        (["--config", RECIPE, "--tokenizer", "none"], "tokenizer 'none' cannot be loaded"),
        (["--config", RECIPE, "--tokenizer", "''"], "tokenizer is not set"),
    ],
)
def test_a_usage_error_is_one_line(capsys, tmp_path, monkeypatch, arguments, message):
    if "--tokenizer" in arguments:
        arguments = [*arguments, "--output_dir", str(tmp_path)]
    assert message in fails(capsys, *arguments)


def test_missing_shards_a_used_folder_and_an_unknown_model_key_are_one_line(workspace, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    values = to_dict(run_config(workspace, tmp_path / "run", max_steps=1))
    config.write_text(yaml.safe_dump(values))
    assert "no shard at" in fails(capsys, "--config", str(config), "--data_root", "/none")
    assert "unknown key model.vision_config.depth" in fails(
        capsys, "--config", str(config), "--model.vision_config.depth", "2"
    )
    assert "freeze: no parameter matches" in fails(capsys, "--config", str(config), "--freeze", "encoder.*")
    train(run_config(workspace, tmp_path / "run", max_steps=1))
    capsys.readouterr()
    assert "is of an earlier run: pass --resume" in fails(capsys, "--config", str(config))
    assert "optimizer.lr: 0.01 -> 0.5" in fails(capsys, "--config", str(config), "--resume", "--optimizer.lr", "0.5")


def test_dashes_of_options_are_underscores_but_names_of_sources_stay():
    pairs = parse_overrides(["--resume-with-changes", "--data.sources.my-set.weight=2e-1"])
    assert pairs == [("resume_with_changes", True), ("data.sources.my-set.weight", 0.2)]


def test_numbers_may_be_written_with_an_exponent():
    config = load_config(RECIPE, ["--max_steps", "1e3", "--model.text_config.initializer_range", "2e-2"])
    assert config.max_steps == 1000 and config.model["text_config"]["initializer_range"] == 0.02


# What a run says


def test_a_short_run_by_the_clock_logs_rows_and_says_where_its_files_are(workspace, tmp_path, capsys):
    config = run_config(
        workspace, tmp_path, max_steps=None, max_minutes=0.02, log_every_steps=10**6, trackers=["tensorboard"]
    )
    pytest.importorskip("tensorboard")
    train(config)
    assert len(read_rows(tmp_path / "log.jsonl")) >= 2
    said = capsys.readouterr().out
    assert f"log: {tmp_path / 'log.jsonl'}; curves: " in said
    assert f"tensorboard --logdir {tmp_path / 'tracked'}" in said


def test_decoding_that_takes_longer_shows_a_progress_line(workspace, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("training.data.SILENT_SECONDS", 0)
    start_run(run_config(workspace, tmp_path))
    assert "decoding colors (1 shards): 24 samples" in capsys.readouterr().err


def test_the_last_steps_of_a_run_are_logged(workspace, tmp_path):
    train(run_config(workspace, tmp_path, max_steps=5, log_every_steps=3))
    assert [row["step"] for row in read_rows(tmp_path / "log.jsonl")] == [3, 5]


# Number formats


@pytest.mark.parametrize(("ratio", "expected"), [(0.25, "bf16"), (0.95, "no"), (11.0, "no")])
def test_auto_takes_bfloat16_where_it_is_faster_and_says_why(workspace, tmp_path, monkeypatch, capsys, ratio, expected):
    monkeypatch.setattr(precision, "bfloat16_time_ratio", lambda: ratio)
    run = start_run(run_config(workspace, tmp_path, mixed_precision="auto", **{"optimizer.name": "muon"}))
    assert run.config.mixed_precision == run.accelerator.mixed_precision == expected
    said = capsys.readouterr().out
    assert (
        f"mixed_precision: {expected}, chosen by auto: a product of matrices in bfloat16 takes {ratio:.2g} times"
        in said
    )
    muon = run.optimizers[0].optimizer
    assert muon.dtype == (torch.bfloat16 if expected == "bf16" else torch.float32)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["mixed_precision"] == expected


def test_a_resumed_run_keeps_what_auto_has_chosen(workspace, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "bfloat16_time_ratio", lambda: 11.0)
    config = run_config(workspace, tmp_path, mixed_precision="auto", max_steps=1)
    train(config)
    monkeypatch.setattr(precision, "bfloat16_time_ratio", lambda: 0.1)
    run = start_run(dataclasses.replace(config, resume=True))
    assert run.config.mixed_precision == "no"
    with pytest.raises(UsageError, match="mixed_precision: 'no' -> 'bf16'"):
        start_run(dataclasses.replace(config, resume=True, mixed_precision="bf16"))


def test_an_explicit_bf16_that_is_slow_here_warns_with_the_measured_ratio(monkeypatch, caplog):
    from accelerate import PartialState

    from training.run import choose_precision

    monkeypatch.setattr("training.run.bfloat16_time_ratio", lambda: 9.7)
    config = TrainConfig(max_steps=1, mixed_precision="bf16")
    with caplog.at_level(logging.WARNING):
        assert choose_precision(config, SavedRun(None), PartialState(cpu=True)) == "bf16"
    assert "takes 9.7 times as long as in float32; --mixed_precision no is faster" in caplog.text


def test_the_ratio_is_measured_without_touching_random_numbers():
    before = torch.get_rng_state()
    assert precision.bfloat16_time_ratio() > 0
    assert torch.equal(before, torch.get_rng_state())
    choice = precision.fastest_dtype(torch.device("cpu"))
    assert choice.dtype in (torch.float32, torch.bfloat16) and "bfloat16" in choice.reason
