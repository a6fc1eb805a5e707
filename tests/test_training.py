"""Configuration, optimisers, schedule, checkpoints, and whole runs of a few steps."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from training_runs import options, run_config

from ig_captioner import IGCaptionerConfig, IGCaptionerForConditionalGeneration, IGCaptionerProcessor
from tests.tiny import padded, random_images, random_texts, tiny_model
from training.augmentation import ImageSettings
from training.build import build_model_config, image_settings
from training.checkpoint import list_checkpoints, load_state, save_checkpoint
from training.config import OptimizerConfig, TrainConfig, load_config, parse_overrides
from training.curves import draw_curves
from training.evaluation import evaluate_held_out
from training.metrics import read_rows, sums_by_source, weight_in_mean
from training.muon import Muon
from training.optim import (
    MovingAverage,
    group_parameters,
    learning_rate_factor,
    make_optimizers,
    set_learning_rate,
)
from training.state import RunProgress
from training.train import NonFiniteError, run_fraction, train
from training.train_tokenizer import train_tokenizer


MINIMAL = {"max_steps": 3, "data.sources.x.shards": "x.tar"}


# Configuration


def test_yaml_and_overrides(tmp_path, monkeypatch):
    path = tmp_path / "run.yaml"
    path.write_text(
        "max_steps: 10\nmixed_precision: no\ndata: {sources: {x: {shards: [a.tar]}}}\noptimizer: {lr: 2e-3}\n"
    )
    monkeypatch.setenv("IG_CAPTIONER_DATA", "/somewhere")
    config = load_config(
        path, ["--optimizer.name", "muon", "--data.sources.x.weight=0.5", "--resume", "--max_steps", "20"]
    )
    assert (config.max_steps, config.resume, config.mixed_precision, config.data_root) == (
        20,
        True,
        "no",
        "/somewhere",
    )
    assert (config.optimizer.name, config.optimizer.lr, config.data.sources["x"].weight) == ("muon", 0.002, 0.5)
    assert load_config(path, ["--data_root", "/elsewhere"]).data_root == "/elsewhere"


def test_shipped_recipes_are_valid():
    from pathlib import Path

    import training

    recipes = sorted((Path(training.__file__).parent / "configs").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        load_config(recipe)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"optimizer.learning_rate": 1}, "unknown key optimizer.learning_rate"),
        ({"max_step": 1}, "unknown key max_step"),
        ({"data.sources.x.weigth": 1}, "unknown key data.sources.x.weigth"),
        ({"optimizer.lr": "fast"}, "optimizer.lr: must be a valid number.*got 'fast'"),
        ({"max_steps": 1.5}, "max_steps: must be a valid integer.*got 1.5"),
        ({"max_steps": 0}, "max_steps: must be greater than 0, got 0"),
        ({"resume": "maybe"}, "resume: must be a valid boolean.*got 'maybe'"),
        ({"optimizer.name": "sgd"}, "optimizer.name: must be 'adamw', 'adafactor' or 'muon', got 'sgd'"),
        ({"optimizer.betas": [0.9]}, r"optimizer.betas.1: .*required, got \[0.9\]"),
        ({"optimizer.betas": [0.9, 1]}, "optimizer.betas.1: must be less than 1, got 1"),
        ({"data.sources.x.weight": 0}, "data.sources.x.weight: must be greater than 0, got 0"),
        ({"data.sources.x.augmentation.scale": [0.9, 0.5]}, "augmentation.scale must be"),
        ({"data.sources": 3}, "data.sources: must be a valid dictionary, got 3"),
        ({"batch_size": True}, "batch_size: must be a number, got True"),
        ({"optimizer": 3}, "optimizer: must be .*got 3"),
        ({"max_steps": None}, "at least one of max_steps"),
        ({"batch_size": 4, "micro_batches": 8}, "micro_batches must be at most batch_size"),
    ],
)
def test_configuration_errors_name_the_key(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, options({**MINIMAL, **overrides}))


def test_override_errors():
    with pytest.raises(ValueError, match="'oops'"):
        parse_overrides(["oops"])
    with pytest.raises(ValueError, match="'max_steps' is a value"):
        load_config(None, [*options(MINIMAL), "--max_steps.x", "1"])


def test_unknown_model_keys_are_errors(workspace, tmp_path):
    for key in ("model.vision_config.depth", "model.text_config.dept", "model.loss_weight"):
        with pytest.raises(ValueError, match=f"unknown key {key}"):
            train(run_config(workspace, tmp_path, **{key: 3}))


def test_model_config_takes_special_tokens_from_the_tokenizer():
    tokenizer = train_tokenizer(["a b"], 300)
    config = build_model_config({"text_config": {"hidden_size": 16, "num_attention_heads": 2}}, tokenizer)
    text = config.text_config
    assert (text.vocab_size, text.pad_token_id, text.decoder_start_token_id, text.eos_token_id) == (
        len(tokenizer),
        0,
        1,
        2,
    )
    assert text.mask_token_id == 3 and text.hidden_size == 16


# Optimisation


def test_every_parameter_is_in_one_group_and_tables_have_no_decay():
    for vision in ({}, {"patch_embedding": "convolutional", "num_register_tokens": 2}):
        model = tiny_model(vision=vision)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = {group: {names[id(p)] for p in members} for group, members in group_parameters(model).items()}
        assert sorted(name for group in groups.values() for name in group) == sorted(names.values())
        assert all(dict(model.named_parameters())[name].ndim == 2 for name in groups["hidden"])
        for name in groups["hidden"]:
            assert name.endswith("weight") and "embed" not in name and "norm" not in name and "lm_head" not in name
        assert "model.decoder.embed_tokens.weight" in groups["plain"]
        assert "model.decoder.embed_positions.weight" in groups["plain"]
        assert "model.vision_model.embeddings.position_embedding" in groups["plain"]
        assert all("projection" in name for name in groups["decayed"])


def test_untied_head_is_decayed_but_not_given_to_muon():
    model = tiny_model("cross")
    assert [p.shape for p in group_parameters(model)["decayed"]][-1] == model.lm_head.weight.shape
    assert all(p is not model.lm_head.weight for p in group_parameters(model)["hidden"])


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest():
    model = tiny_model()
    muon, adamw = make_optimizers(model, OptimizerConfig(name="muon", lr=0.02, adamw_lr=0.003, weight_decay=0.1))
    assert isinstance(muon, Muon) and isinstance(adamw, torch.optim.AdamW)
    total = sum(len(group["params"]) for optimizer in (muon, adamw) for group in optimizer.param_groups)
    assert total == len(list(model.parameters()))
    assert sorted(group["weight_decay"] for group in adamw.param_groups) == [0.0, 0.1]
    set_learning_rate([muon, adamw], 0.5)
    assert {group["lr"] for group in muon.param_groups} == {0.01}
    assert {group["lr"] for group in adamw.param_groups} == {0.0015}


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_optimizers_lower_the_loss(name):
    model = tiny_model().train()
    optimizers = make_optimizers(model, OptimizerConfig(name=name, lr=0.01))
    ids, mask = padded(random_texts())
    labels = ids.masked_fill(mask == 0, -100)
    losses = []
    for _ in range(8):
        loss = model(pixel_values=random_images(len(labels)), labels=labels).loss
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"schedule": "linear"}, {0: 0, 0.05: 0.5, 0.1: 1, 0.55: 0.5, 1: 0, 2: 0}),
        ({"schedule": "cosine"}, {0.05: 0.5, 0.1: 1, 0.55: 0.5, 1: 0}),
        ({"schedule": "cosine", "min_lr_ratio": 0.2}, {0.1: 1, 0.55: 0.6, 1: 0.2}),
        ({"schedule": "constant", "cooldown_fraction": 0.2}, {0.1: 1, 0.8: 1, 0.9: 0.5, 1: 0}),
        ({"schedule": "rsqrt", "cooldown_fraction": 0.2}, {0.1: 1, 0.4: 0.5, 0.9: 0.5 / 3, 1: 0}),
    ],
)
def test_schedule_values(fields, expected):
    config = OptimizerConfig(warmup_fraction=0.1, **fields)
    for progress, factor in expected.items():
        assert learning_rate_factor(progress, config) == pytest.approx(factor, abs=1e-9)


def test_run_fraction_follows_the_nearer_limit():
    assert run_fraction(TrainConfig(max_steps=10), RunProgress(step=5, seconds=1e9)) == 0.5
    assert run_fraction(TrainConfig(max_minutes=2), RunProgress(step=10**9, seconds=30)) == 0.25
    both = TrainConfig(max_samples=1000, batch_size=100, max_minutes=2)
    assert run_fraction(both, RunProgress(step=9, samples=900, seconds=30)) == 0.9
    assert run_fraction(both, RunProgress(step=1, samples=100, seconds=60)) == 0.5


def test_moving_average():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    average = MovingAverage(model, decay=0.5)
    torch.nn.init.ones_(model.weight)
    average.update(model)  # decay min(0.5, 1 / 10)
    assert average.average["weight"].item() == pytest.approx(0.9)
    with average.applied(model):
        assert model.weight.item() == pytest.approx(0.9)
    assert model.weight.item() == 1.0


# Metrics and evaluation


def test_losses_per_source_add_up_to_the_batch():
    model = tiny_model()
    ids, mask = padded(random_texts())
    labels, source = ids.masked_fill(mask == 0, -100), torch.tensor([0, 1, 1, 0, 2])
    outputs = model(pixel_values=random_images(5), labels=labels)
    sums = sums_by_source(outputs.caption_log_likelihood, outputs.prior_log_likelihood, labels, source, 4)
    captioning, unconditional, tokens = sums.sum(dim=0).tolist()
    assert captioning / tokens == pytest.approx(outputs.captioning_loss.item(), rel=1e-4)
    assert unconditional / tokens == pytest.approx(outputs.unconditional_loss.item(), rel=1e-4)
    assert sums[:, 2].tolist() == [6, 9, 5, 0]


def test_weight_in_mean():
    labels = torch.tensor([[1, 2, 2], [2, -100, -100], [-100, -100, -100]])
    assert weight_in_mean(labels, "token") == 4
    assert weight_in_mean(labels, "sequence") == 2


# Checkpoints


def test_checkpoints_are_pruned_and_half_written_ones_ignored(tmp_path):
    def save_model(folder):
        folder.mkdir()

    for step in (5, 10, 15):
        save_checkpoint(tmp_path, step, {"value": torch.tensor(step)}, save_model, keep=2)
    (tmp_path / "checkpoint-00000020").mkdir()  # without state.pt
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-00000010", "checkpoint-00000015"]
    assert load_state(list_checkpoints(tmp_path)[-1])["value"] == 15


def test_failed_checkpoint_leaves_the_last_one(tmp_path):
    def disk_full(folder):
        raise OSError("No space left on device")

    save_checkpoint(tmp_path, 1, {}, lambda folder: folder.mkdir(), keep=1)
    with pytest.raises(OSError, match=r"checkpoint-00000002.*No space left"):
        save_checkpoint(tmp_path, 2, {}, disk_full, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000001"]


# Runs


def test_run_writes_a_loadable_folder_and_a_log(workspace, tmp_path, monkeypatch):
    from transformers import AutoProcessor

    monkeypatch.setattr("training.train.draw_curves", draw_curves)
    config = run_config(
        workspace,
        tmp_path,
        **{"save_dtype": "float16", "data.sources.colors.holdout_fraction": 0.3, "evaluation.every_steps": 4},
        **{"optimizer.name": "muon", "micro_batches": 2},
    )
    final = train(config)
    assert Image.open(tmp_path / "curves.png").format == "PNG"
    model = IGCaptionerForConditionalGeneration.from_pretrained(final, dtype="auto")
    assert model.dtype == torch.float16
    processor = AutoProcessor.from_pretrained(final)
    inputs = processor(images=Image.new("RGB", (9, 9)), text=["a red square."], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 16, 16)
    scores = model.float().score(inputs["pixel_values"], inputs["input_ids"])
    assert scores.information_gain.shape == (1, 1) and torch.isfinite(scores.information_gain).all()

    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    metrics = [row for row in rows if "loss" in row]
    assert [row["step"] for row in metrics] == [2, 4]
    assert metrics[-1]["samples"] == 32 and metrics[-1]["skipped_samples"] == 0
    gain = metrics[-1]["unconditional_loss"] - metrics[-1]["captioning_loss"]
    assert metrics[-1]["information_gain"] == pytest.approx(gain, abs=1e-4)
    assert set(metrics[-1]["sources"]) == {"colors"}
    evaluations = [row["evaluation"]["colors"] for row in rows if "evaluation" in row]
    assert evaluations and 0 <= evaluations[-1]["top1_prior_weight_1"] <= 1


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
def test_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(workspace, tmp_path, optimizer):
    extra = {"optimizer.name": optimizer, "model.text_config.dropout": 0.1, "model.parallel_prediction_prob": 0.5}
    whole = train(run_config(workspace, tmp_path / "whole", **extra))
    with_stop = run_config(workspace, tmp_path / "parts", **extra, checkpoint_steps=2)
    train(with_stop)
    # What a kill after step 3 leaves: the checkpoint of step 2, and a longer log.
    (tmp_path / "parts" / "checkpoint-00000004" / "state.pt").unlink()
    with_stop.resume = True
    final = train(with_stop)
    expected, resumed = (load_file(folder / "model.safetensors") for folder in (whole, final))
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    rows = [json.loads(line)["step"] for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert rows == [2, 4]


def test_micro_batches_change_nothing_but_rounding(workspace, tmp_path):
    finals = []
    for parts in (1, 3):
        config = run_config(workspace, tmp_path / str(parts), micro_batches=parts, max_steps=2)
        finals.append(load_file(train(config) / "model.safetensors"))
    for name, tensor in finals[0].items():
        assert torch.allclose(tensor, finals[1][name], atol=1e-3), name


def test_run_starts_from_a_given_checkpoint(workspace, tmp_path):
    first = train(run_config(workspace, tmp_path / "first", max_steps=1))
    second = train(
        run_config(workspace, tmp_path / "second", max_steps=1, init_from=str(first), **{"optimizer.lr": 1e-9})
    )
    before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


def test_time_budget_ends_the_run(workspace, tmp_path):
    config = run_config(workspace, tmp_path, max_steps=None, max_minutes=0.01, log_every_steps=1)
    train(config)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows and rows[-1]["progress"] <= 1 and rows[-1]["learning_rate_factor"] < 0.6


def test_non_finite_steps_are_skipped_and_end_the_run(workspace, tmp_path, monkeypatch):
    monkeypatch.setattr("training.train.all_finite", lambda *arguments: False)
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        train(run_config(workspace, tmp_path, max_nonfinite_steps=2))


def test_bad_sizes_fail_before_training(workspace, tmp_path):
    with pytest.raises(ValueError, match=r"data.max_length 32"):
        train(run_config(workspace, tmp_path, **{"data.max_length": 32}))
    with pytest.raises(ValueError, match="the tokenizer has"):
        train(run_config(workspace, tmp_path, **{"model.text_config.vocab_size": 100}))


@pytest.mark.parametrize(("knows", "top1"), [(True, 1.0), (False, 0.0)], ids=["perfect", "ties count against"])
def test_held_out_ranking(knows, top1):
    """Scores of a stub: red images say caption 0, others caption 1, or all captions are equal."""
    import numpy as np

    from ig_captioner.data.shards import Sample
    from training.augmentation import ImageSettings

    class Stub:
        def compile_texts(self, input_ids, attention_mask, **options):
            return input_ids

        def score(self, pixel_values, texts):
            from types import SimpleNamespace

            red = (pixel_values[:, 0].mean(dim=(1, 2)) > 0).float() * knows
            scores = torch.stack([red - 2, -red - 1 - int(not knows)], dim=1)
            return SimpleNamespace(caption_log_likelihood=scores, prior_log_likelihood=torch.zeros(2))

    samples = [
        Sample(str(i), np.full((4, 4, 3), 255 * (i % 2), np.uint8), [[4, 2] if i % 2 else [5, 2]]) for i in range(20)
    ]
    metrics = evaluate_held_out(Stub(), samples, ImageSettings((4, 4)), 0, torch.device("cpu"))
    assert metrics["captions"] == 2 and metrics["top1_prior_weight_1"] == top1


def test_frozen_parameters_keep_their_values_and_the_rest_is_trained(workspace, tmp_path):
    start = train(run_config(workspace, tmp_path / "start", max_steps=1, **{"optimizer.lr": 1e-12}))
    frozen = {"freeze": ["model.vision_model.*", "*.embed_tokens.weight"], "init_from": str(start)}
    final = train(run_config(workspace, tmp_path / "run", **frozen))
    before, after = (load_file(folder / "model.safetensors") for folder in (start, final))
    for name, tensor in before.items():
        is_frozen = name.startswith("model.vision_model.") or "embed_tokens" in name
        # a bias of keys has no gradient: softmax does not see what all keys share
        assert torch.equal(tensor, after[name]) == is_frozen or "k_proj.bias" in name, name
    for patterns, message in ((["encoder.*"], "no parameter matches 'encoder"), (["*"], "nothing to train")):
        with pytest.raises(ValueError, match=message):
            train(run_config(workspace, tmp_path / "error", freeze=patterns))


def test_trackers_get_the_rows_of_the_log(workspace, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(run_config(workspace, tmp_path, trackers=["tensorboard"]))
    (events,) = (tmp_path / "tracked").glob("events*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for name, values in (
        ("information_gain", [row["information_gain"] for row in rows]),
        ("sources/colors/captioning_loss", [row["sources"]["colors"]["captioning_loss"] for row in rows]),
    ):
        assert [event.value for event in accumulator.Scalars(name)] == pytest.approx(values, rel=1e-5)


def test_picture_of_the_curves(tmp_path):
    pytest.importorskip("matplotlib")
    assert not draw_curves(tmp_path / "none.jsonl", tmp_path / "none.png")
    rows = []
    for step in range(1, 9):
        losses = {"loss": 2 / step, "captioning_loss": 1 / step, "unconditional_loss": 1.5 / step}
        sources = {name: {"information_gain": 0.4 / step} for name in ("a", "b")[: 1 + step % 2]}
        rows.append({"step": step, **losses, "information_gain": 0.5 / step, "sources": sources})
    rows.append({"step": 8, "evaluation": {"a": {"top1_prior_weight_1": 0.5}}})
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert draw_curves(tmp_path / "log.jsonl", tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").width == 1440


# Starting from a model


def test_a_run_from_a_model_keeps_its_pixels_and_may_change_its_objective(workspace, tmp_path):
    start = Path(train(run_config(workspace, tmp_path / "first", max_steps=1)))
    processor_file = start / "processor_config.json"
    described = json.loads(processor_file.read_text())
    described["image_processor"] |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2}
    processor_file.write_text(json.dumps(described))
    objective = {"parallel_prediction_prob": 0.25, "prior_weight": 0.5}
    config = run_config(workspace, tmp_path / "second", init_from=str(start), max_steps=1)
    config.model = objective
    final = train(config)
    for key, value in objective.items():
        assert getattr(IGCaptionerConfig.from_pretrained(final), key) == value
    image_processor = IGCaptionerProcessor.from_pretrained(final).image_processor
    expected = ImageSettings((16, 16), 2, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert image_settings(image_processor) == expected
    config.model, config.output_dir = {"vision_config": {"num_hidden_layers": 2}}, str(tmp_path / "third")
    with pytest.raises(ValueError, match=r"num_hidden_layers is 2, but the model of init_from has 1"):
        train(config)


def test_losses_that_a_part_of_a_batch_does_not_have_are_left_out(workspace, tmp_path):
    """With one text per part, each part has either a captioning or a parallel loss."""
    overrides = {"model.parallel_prediction_prob": 0.5, "micro_batches": 8, "log_every_steps": 1}
    train(run_config(workspace, tmp_path, **overrides))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    for row in rows:
        assert math.isfinite(row["captioning_loss"]) and math.isfinite(row["parallel_loss"])
        conditional = (row["loss"] - 0.5 * row["unconditional_loss"]) / 1.5
        low, high = sorted([row["captioning_loss"], row["parallel_loss"]])
        assert low < conditional < high


def test_a_captioner_without_the_unconditional_loss_trains_and_logs(workspace, tmp_path):
    train(run_config(workspace, tmp_path / "run", **{"model.unconditional_weight": 0.0}))
    rows = read_rows(tmp_path / "run" / "log.jsonl")
    assert rows and all("captioning_loss" in row for row in rows)
    assert not any("unconditional_loss" in row or "information_gain" in row for row in rows)
