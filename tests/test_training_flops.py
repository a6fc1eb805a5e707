"""Counted operations against what PyTorch sees, and what a run reports of them."""

import json

import pytest
import torch
from tiny_encoders import SMALL_VIT, encoder_config, encoder_model, images_for
from torch.utils.flop_counter import FlopCounterMode
from training_runs import COLORS, run_config
from transformers import AutoTokenizer

from ig_captioner import IGCaptionerForConditionalGeneration, IGCaptionerVisionConfig
from tests.tiny import VARIANTS, padded, random_images, random_texts, tiny_config, tiny_model
from training.flops import decoder_flops, encoder_flops, head_flops, main, measure_peak_flops, training_flops
from training.train import train


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def batch():
    ids, mask = padded(random_texts())
    return {"pixel_values": random_images(len(ids)), "labels": ids.masked_fill(mask == 0, -100)}


def labelled() -> int:
    return int((batch()["labels"] != -100).sum())


@pytest.mark.parametrize("weight", [0.5, 0.0])
@pytest.mark.parametrize("parallel", [0.0, 0.5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_pass_is_counted_exactly(variant, parallel, weight):
    vision = {"num_register_tokens": 2, "gated_mlp": True}
    weights = {"parallel_prediction_prob": parallel, "unconditional_weight": weight}
    model = tiny_model(variant, attn="eager", vision=vision, **weights).train()
    images, length = batch()["labels"].shape
    with torch.no_grad():
        expected = counted(lambda: model(**batch()))
    body = images * (encoder_flops(model.config.vision_config) + decoder_flops(model.config, length))
    assert body + head_flops(model.config, labelled()) == expected


@pytest.mark.parametrize("name", ["siglip2", "efficientnet", "swin"])
def test_encoders_of_transformers_are_counted_on_the_meta_device(name):
    model = encoder_model(name, attn="eager", image_token_grids=[2, 1])
    pixels = images_for(model)
    with torch.no_grad():
        expected = counted(lambda: model.model.vision_model(pixels))
        features = model.model.encode_features(pixels)
        (ids, mask), number = padded(random_texts((5, 2, 7))), len(pixels)
        decoding = counted(lambda: model.train()(image_features=features, labels=ids.masked_fill(mask == 0, -100)))
    config, tokens = model.config, int(mask.sum())
    assert number * encoder_flops(config.vision_config) == expected > 0
    assert number * decoder_flops(config, ids.shape[1]) + head_flops(config, tokens) == decoding


def test_a_vit_of_transformers_costs_what_ours_does():
    """The blocks are the same; a ViT-MAE has one token more, that of the class."""
    ours = tiny_config(vision=SMALL_VIT).vision_config
    with_class_token = encoder_flops(IGCaptionerVisionConfig(**{**ours.to_dict(), "num_register_tokens": 1}))
    assert encoder_flops(encoder_config("vit_mae").vision_config) == with_class_token
    assert encoder_flops(encoder_config("siglip2").vision_config) == encoder_flops(ours)


def test_step_takes_three_forward_passes_but_for_the_pixels():
    """No gradient goes to the pixels; PyTorch does not see the head's products in place; nothing else is left out."""
    model = tiny_model(attn="eager").train()
    images, length = batch()["labels"].shape
    config = model.config.vision_config
    pixels = 2 * images * 4 * 3 * 8 * 8 * config.hidden_size
    expected = counted(lambda: model(**batch()).loss.backward())
    unseen = head_flops(model.config, labelled())
    assert training_flops(model.config, images, length, labelled()) - pixels - unseen == expected
    model.base_model.vision_model.requires_grad_(False)
    frozen = counted(lambda: model(**batch()).loss.backward())
    first = 2 * images * 4 * config.hidden_size * model.config.text_config.hidden_size  # its input needs no gradient
    assert training_flops(model.config, images, length, labelled(), encoder_passes=1) - first - unseen == frozen


def test_measured_peak_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    assert measure_peak_flops(torch.device("cpu"), torch.float32) > 0
    assert torch.equal(before, torch.get_rng_state())


def test_run_reports_speeds(workspace, tmp_path, monkeypatch):
    monkeypatch.setattr("training.metrics.measure_peak_flops", lambda *arguments: 1e9)
    model = IGCaptionerForConditionalGeneration.from_pretrained(train(run_config(workspace, tmp_path)))
    tokenizer = AutoTokenizer.from_pretrained(workspace / "tokenizer")
    lengths = [len(tokens) for tokens in tokenizer([f"a {color} square." for color in COLORS])["input_ids"]]
    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        row = json.loads(line)
        tokens = row["tokens_per_second"] / row["images_per_second"]  # both are rounded
        assert 0.99 * min(lengths) <= tokens <= 1.01 * max(lengths)
        at_least, at_most = (training_flops(model.config, 1, length, length) for length in (min(lengths), max(lengths)))
        assert 0.99 * at_least <= row["mfu"] * 1e9 / row["images_per_second"] <= 1.01 * at_most
        assert 0.05 < row["peak_memory_gib"] < 100 and 0 <= row["data_wait"] <= 1


def test_cost_of_a_run(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("max_samples: 1000000\nbatch_size: 100\ndata: {max_length: 64, sources: {x: {shards: [a.tar]}}}\n")
    main(["--config", str(path), "--peak_tflops", "100", "--mfu", "0.5"])
    first, _, last = capsys.readouterr().out.splitlines()
    per_sample = float(first.split()[0])
    assert float(last.split()[0]) == pytest.approx(50e12 / per_sample / 1e9, rel=0.01)
