"""Whatever a captioner is used for works with encoders of transformers as it does with our own."""

import json
import subprocess
import sys

import PIL.Image
import pytest
import torch
from tiny_encoders import ENCODERS, FIVE_TOKENS, encoder_model, images_for
from torch.distributed.fsdp import fully_shard

from ig_captioner import (
    CompiledLabels,
    IGCaptionerForConditionalGeneration,
    IGCaptionerForZeroShotImageClassification,
    IGCaptionerImageProcessor,
    IGCaptionerProcessor,
    IGZeroShotImageClassificationPipeline,
    cli,
    compile_labels,
)
from ig_captioner.checkpoint import load_model, load_processor
from ig_captioner.export import SPELLED_OUT, export_programs
from tiny import padded, random_texts
from training.sharding import precision_of, units
from training.train_tokenizer import train_tokenizer


def texts():
    return padded(random_texts((5, 2, 7)))


def labels() -> torch.Tensor:
    ids, mask = texts()
    return ids.masked_fill(mask == 0, -100)


def gradients(model, **inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


# Saving


@pytest.mark.parametrize("name", ENCODERS)
def test_saved_and_loaded_under_either_head(name, tmp_path):
    model = encoder_model(name, **FIVE_TOKENS)
    names = model.model.vision_model.state_dict().keys()
    model.save_pretrained(tmp_path)
    pixels, (ids, mask) = images_for(model), texts()
    with torch.no_grad():
        expected = model.score(pixels, ids, mask).information_gain
    for head in (IGCaptionerForConditionalGeneration, IGCaptionerForZeroShotImageClassification):
        loaded, report = head.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values()), report
        assert loaded.model.vision_model.state_dict().keys() == names
        with torch.no_grad():
            torch.testing.assert_close(loaded.eval().score(pixels, ids, mask).information_gain, expected)
        assert loaded.fingerprint() == model.fingerprint()
    half = IGCaptionerForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        assert half.score(pixels, ids, mask).information_gain.isfinite().all()


def test_fingerprints_tell_encoders_and_their_tokens_apart():
    seen = {encoder_model("siglip2", **fields).fingerprint() for fields in ({}, {"image_token_grids": [1]})}
    model = encoder_model("siglip2")
    model.config.vision_config.layer_norm_eps = 0.1
    assert len(seen | {model.fingerprint()}) == 3


REMOTE = """
import sys
import torch
from transformers import AutoModelForZeroShotImageClassification
folder = sys.argv[1]
model = AutoModelForZeroShotImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
inputs = torch.load(f"{folder}/inputs.pt")
with torch.no_grad():
    logits = model(**inputs).logits_per_image
model.save_pretrained(f"{folder}/again")
torch.save(logits, f"{folder}/logits.pt")
assert "ig_captioner" not in sys.modules
"""


def test_remote_code_needs_no_package(tmp_path):
    model = encoder_model("efficientnet", IGCaptionerForZeroShotImageClassification, **FIVE_TOKENS)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    ids, mask = texts()
    inputs = {"pixel_values": images_for(model), "input_ids": ids, "attention_mask": mask}
    torch.save(inputs, folder / "inputs.pt")
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin"}
    subprocess.run([sys.executable, "-c", REMOTE, str(folder)], check=True, cwd=tmp_path, env=environment)
    with torch.no_grad():
        expected = model(**inputs).logits_per_image
    torch.testing.assert_close(torch.load(folder / "logits.pt"), expected)
    assert json.loads((folder / "again" / "config.json").read_text())["vision_config"]["model_type"] == "efficientnet"


# Scores


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with model, tokenizer and image processor."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = train_tokenizer(["a photo of a cat.", "a photo of a dog."], 270)
    model = encoder_model("efficientnet", text={"vocab_size": len(tokenizer)}, **FIVE_TOKENS)
    model.save_pretrained(folder)
    image_processor = IGCaptionerImageProcessor(size={"height": 32, "width": 32}, crop_pct=1.0)
    IGCaptionerProcessor(image_processor, tokenizer).save_pretrained(folder)
    return folder


def test_pipeline_and_compiled_labels(checkpoint, tmp_path):
    model = load_model(IGCaptionerForZeroShotImageClassification, checkpoint)
    processor = load_processor(checkpoint)
    photo, names = PIL.Image.linear_gradient("L"), ["cat", "dog", "photo"]
    classify = IGZeroShotImageClassificationPipeline(
        model=model, tokenizer=processor.tokenizer, image_processor=processor.image_processor
    )
    expected = classify(photo, candidate_labels=names)
    compile_labels(model, processor.tokenizer, names).save(tmp_path / "labels")
    compiled = CompiledLabels.load(tmp_path / "labels")
    again = load_model(IGCaptionerForZeroShotImageClassification, checkpoint)
    classify = IGZeroShotImageClassificationPipeline(
        model=again, tokenizer=processor.tokenizer, image_processor=processor.image_processor
    )
    found = classify(photo, candidate_labels=compiled)
    assert [row["label"] for row in found] == [row["label"] for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert row["score"] == pytest.approx(other["score"], abs=1e-5)


def test_info(checkpoint, capsys):
    assert cli.main(["info", str(checkpoint), "--format", "jsonl"]) in (0, None)
    described = json.loads(capsys.readouterr().out)
    assert described["image_encoder"] == "efficientnet of transformers"
    assert (described["image_width"], described["image_tokens"], described["image_size"]) == (320, 5, [32, 32])


# efficientnet stands for all by default; exporting takes seconds
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ENCODERS if name != "efficientnet"]


@pytest.mark.parametrize("name", ["efficientnet", *SLOW])
@torch.no_grad()
def test_exported_programs(name, tmp_path):
    """As programs, and where onnxruntime is installed as graphs; on other numbers of images than in the example."""
    model = encoder_model(name, IGCaptionerForZeroShotImageClassification, attn=SPELLED_OUT, **FIVE_TOKENS)
    programs = export_programs(model)
    pixels, (ids, mask) = images_for(model), texts()
    expected = model.score(pixels, ids, mask).caption_log_likelihood
    read = programs["image_encoder"].module()(pixel_values=pixels)
    found = programs["text_scorer"].module()(image_key_values=read, input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.onnx.export(programs["image_encoder"], output_names=["read"], verbose=False).save(tmp_path / "encoder.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx")
    (graph,) = session.run(None, {"pixel_values": pixels.numpy()})
    torch.testing.assert_close(torch.from_numpy(graph), read, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["siglip2", "efficientnet"])
@torch.no_grad()
def test_compiled_in_one_graph(name):
    model = encoder_model(name, **FIVE_TOKENS)
    compiled = torch.compile(model.model.encode_features, fullgraph=True, backend="eager")
    pixels = images_for(model)
    torch.testing.assert_close(compiled(pixels), model.model.encode_features(pixels))


# Training


@pytest.mark.parametrize("name", ENCODERS)
def test_gradients_with_checkpointing_are_those_without(name):
    model = encoder_model(name, **FIVE_TOKENS).train()
    for module in model.modules():  # their statistics move in each pass, twice with checkpointing
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0
    inputs = {"pixel_values": images_for(model), "labels": labels()}
    torch.manual_seed(0)
    expected = gradients(model, **inputs)
    assert any(key.startswith("model.vision_model.") for key in expected)
    model.activation_checkpointing_enable()
    torch.manual_seed(0)
    for key, gradient in gradients(model, **inputs).items():
        torch.testing.assert_close(gradient, expected[key], atol=1e-5, rtol=1e-4, msg=key)


@pytest.mark.parametrize("frozen", (False, True))
def test_checkpointing_does_not_run_a_frozen_encoder_backwards(frozen):
    model = encoder_model("siglip2").train()
    model.model.vision_model.requires_grad_(not frozen)
    model.activation_checkpointing_enable({"use_reentrant": True})
    assert model.model.encode_features(images_for(model)).requires_grad is not frozen
    model.disable_input_require_grads()


@pytest.mark.parametrize("name", ("vit_mae", "siglip2", "efficientnet"))
def test_lora(name):
    peft = pytest.importorskip("peft")
    from training.finetune import LORA_TARGETS

    model = encoder_model(name, **FIVE_TOKENS)
    pixels, (ids, mask) = images_for(model), texts()
    with torch.no_grad():
        expected = model.score(pixels, ids, mask).information_gain
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=LORA_TARGETS))
    found = gradients(adapted.train(), pixel_values=pixels, labels=labels())
    assert found and all("lora_" in key for key in found)
    norms = [module for module in model.model.vision_model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert not any(norm.training for norm in norms)
    merged = adapted.eval().merge_and_unload()  # B is zero at first: nothing has changed
    with torch.no_grad():
        torch.testing.assert_close(merged.score(pixels, ids, mask).information_gain, expected)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", world_size=1, rank=0)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("frozen", (False, True))
@pytest.mark.parametrize("name", ("siglip2", "convnext", "swin", "efficientnet", "resnet"))
def test_fully_sharded(name, frozen, one_process):
    model = encoder_model(name, **FIVE_TOKENS)
    model.model.vision_model.requires_grad_(not frozen)
    inputs = {"pixel_values": images_for(model), "labels": labels()}
    expected = gradients(model, **inputs)
    assert len(list(units(model))) > len(model.model.decoder.layers) + 1
    for module in units(model):
        fully_shard(module, mp_policy=precision_of(module, "no"))
    found = gradients(model, **inputs)
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        torch.testing.assert_close(gradient.full_tensor(), expected[key], atol=1e-5, rtol=1e-4, msg=key)


@pytest.mark.parametrize("name", ("siglip2", "convnext", "efficientnet"))
def test_fully_sharded_in_bfloat16(name, one_process):
    model = encoder_model(name, **FIVE_TOKENS).train()
    inputs = {"pixel_values": images_for(model), "labels": labels()}
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**inputs).loss
    for module in units(model):
        fully_shard(module, mp_policy=precision_of(module, "bf16"))
    loss = model(**inputs).loss
    torch.testing.assert_close(loss, expected, atol=0.05, rtol=0.05)
    loss.backward()
    assert all(value.grad.dtype == torch.float32 for value in model.parameters() if value.grad is not None)
