"""Encoders from a folder: their weights, their image processor, and a training run that starts from them."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_encoders import ENCODERS, SMALL_VIT
from training_runs import run_config
from transformers import (
    AutoModel,
    BitImageProcessorPil,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    ConvNextImageProcessorPil,
    SiglipImageProcessorPil,
)

from ig_captioner import (
    IGCaptionerForConditionalGeneration,
    IGCaptionerImageProcessor,
    IGCaptionerVisionConfig,
    IGCaptionerVisionModel,
)
from ig_captioner.encoders import image_processor_for, load_encoder, size_and_crop, unused_parameters
from ig_captioner.vision_ig_captioner import run_encoder
from training.build import build_model, build_model_config, build_processor, freeze_unused
from training.config import TrainConfig
from training.metrics import read_rows
from training.train import train
from training.train_tokenizer import train_tokenizer


def saved(name: str, folder):
    """A model as `AutoModel` makes it, pooling layer and all, in evaluation mode, and saved."""
    torch.manual_seed(0)
    model = AutoModel.from_config(ENCODERS[name][0]).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", ("dinov2", "siglip2", "swin", "efficientnet", "resnet"))
def test_loaded_features_are_the_source_s(name, tmp_path):
    source, encoder = saved(name, tmp_path), load_encoder(tmp_path)
    pixels = torch.randn(2, 3, *[encoder.config.image_size] * 2)
    assert not encoder.training and not any("pooler" in key or "head." in key for key in encoder.state_dict())
    with torch.no_grad():
        expected = source(pixel_values=pixels).last_hidden_state
        torch.testing.assert_close(run_encoder(encoder, pixels), expected, atol=1e-6, rtol=1e-6)


def test_the_vision_part_of_a_whole_model_is_taken(tmp_path):
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    source = CLIPModel(CLIPConfig(vision_config=SMALL_VIT, text_config=text)).eval()
    source.save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    assert isinstance(encoder, CLIPVisionModel)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = source.vision_model(pixel_values=pixels).last_hidden_state
        torch.testing.assert_close(run_encoder(encoder, pixels), expected)


def test_our_encoder_is_one_of_them(tmp_path):
    source = IGCaptionerVisionModel(IGCaptionerVisionConfig(**SMALL_VIT)).eval()
    source.save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(run_encoder(encoder, pixels), source(pixels).last_hidden_state)


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda weight: None, "is missing"),
        (lambda weight: weight[:1].clone(), "has the wrong shape"),
        (lambda weight: weight * torch.nan, "is not finite"),
    ],
)
def test_broken_weights_are_refused(change, reason, tmp_path):
    saved("resnet", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "embedder.embedder.convolution.weight"
    weights[name] = change(weights[name])
    save_file({key: value for key, value in weights.items() if value is not None}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"do not fill ResNetModel: {name} {reason}"):
        load_encoder(tmp_path)


# Image processors


@pytest.mark.parametrize(
    "fields, size, crop_pct",
    [
        ({}, None, None),
        ({"size": {"height": 24, "width": 16}}, (24, 16), None),
        ({"size": 24, "do_center_crop": False, "crop_size": 16}, (24, 24), None),
        ({"size": {"shortest_edge": 32}, "do_center_crop": True, "crop_size": 24}, (24, 24), 0.75),
        (
            {"size": {"shortest_edge": 32}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}},
            (32, 32),
            1,
        ),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, (224, 224), 0.875),
        ({"size": {"height": 260, "width": 260}, "crop_pct": 1.0}, (260, 260), 1.0),  # ours
        ({"size": {"shortest_edge": 384}, "crop_pct": 0.875}, (384, 384), None),
    ],
)
def test_size_and_crop_of_other_processors(fields, size, crop_pct):
    assert size_and_crop(fields) == (size, crop_pct)


@pytest.mark.parametrize(
    "source",
    [
        SiglipImageProcessorPil(size={"height": 24, "width": 24}, image_mean=[0.1, 0.2, 0.3]),
        BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}),
        ConvNextImageProcessorPil(size={"shortest_edge": 28}),
    ],
    ids=lambda source: type(source).__name__,
)
def test_photos_look_as_the_source_s_processor_makes_them(source, tmp_path):
    """Up to rounding: ours cuts and then resizes, those of transformers resize and then cut."""
    saved("resnet", tmp_path)
    source.save_pretrained(tmp_path)
    gradient = torch.linspace(0, 255, 96)[None, :, None] * torch.ones(64, 1, 3)
    photo = Image.fromarray(gradient.to(torch.uint8).numpy())
    expected = torch.as_tensor(source(photo, return_tensors="pt")["pixel_values"])
    found = image_processor_for(tmp_path)(photo, return_tensors="pt")["pixel_values"]
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) < 0.1 * float(expected.max() - expected.min())
    assert float((found - expected).abs().mean()) < 0.02 * float(expected.max() - expected.min())


def test_without_a_processor_the_size_is_the_encoder_s(tmp_path):
    saved("siglip2", tmp_path)
    assert dict(image_processor_for(tmp_path).size) == {"height": 32, "width": 32}


# Training


@pytest.fixture
def config(tmp_path):
    saved("convnext", tmp_path)
    ConvNextImageProcessorPil(size={"shortest_edge": 32}, image_mean=[0.4, 0.5, 0.6]).save_pretrained(tmp_path)
    text = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = {"text_config": {**text, "max_position_embeddings": 32}, "image_token_grids": [2, 1]}
    return TrainConfig(encoder_from=str(tmp_path), model=model, freeze=["model.vision_model.*"])


@pytest.fixture
def tokenizer():
    return train_tokenizer(["a red square.", "a green square.", "two small squares"], vocab_size=270)


def test_a_run_starts_from_the_encoder(config, tokenizer, tmp_path):
    model = build_model(config, tokenizer)
    expected = load_encoder(tmp_path).state_dict()
    found = model.model.vision_model.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert not any(parameter.requires_grad for parameter in model.model.vision_model.parameters())
    processor = build_processor(config, model.config, tokenizer).image_processor
    assert tuple(processor.image_mean) == (0.4, 0.5, 0.6) and processor.crop_pct == 0.875
    assert isinstance(processor, IGCaptionerImageProcessor)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_run_with_a_pretrained_encoder(workspace, tmp_path, frozen):
    """EfficientNet, whose batch norms must not move where it is frozen; resumed in the middle."""
    source = saved("efficientnet", tmp_path / "encoder")
    text = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    options = {
        "model.vision_config": None,
        "model.text_config": {**text, "max_position_embeddings": 16},
        "model.image_token_grids": [2, 1],
        "model.image_token_norm": True,
        "encoder_from": str(tmp_path / "encoder"),
        "freeze": ["model.vision_model.*"] if frozen else [],
    }
    train(run_config(workspace, tmp_path / "run", **options, max_steps=2, checkpoint_steps=2))
    final = train(run_config(workspace, tmp_path / "run", **options, max_steps=4, resume_with_changes=True))
    model = IGCaptionerForConditionalGeneration.from_pretrained(final)
    kept = [
        name
        for name, value in model.model.vision_model.state_dict().items()
        if torch.equal(value, source.state_dict()[name])
    ]
    assert len(kept) == len(model.model.vision_model.state_dict()) if frozen else len(kept) < 10
    rows = [row for row in read_rows(tmp_path / "run" / "log.jsonl") if "loss" in row]
    assert rows[-1]["step"] == 4 and rows[-1]["loss"] > 0


def test_a_recipe_may_describe_an_encoder_of_transformers(tokenizer):
    vision = json.loads(ENCODERS["swin"][0].to_json_string(use_diff=True))
    config = build_model_config({"vision_config": vision}, tokenizer)
    assert config.vision_config.embed_dim == 8
    with pytest.raises(ValueError, match="model.vision_config is that of encoder_from"):
        build_model_config({"vision_config": vision}, tokenizer, ENCODERS["swin"][0])


def test_what_no_feature_depends_on_is_not_trained(config, tokenizer):
    config.freeze = []
    model = build_model(config, tokenizer)
    encoder = model.model.vision_model
    assert unused_parameters(encoder) == ["layernorm.weight", "layernorm.bias"]
    frozen = [name for name, parameter in encoder.named_parameters() if not parameter.requires_grad]
    assert frozen == ["layernorm.weight", "layernorm.bias"]
    model.model.vision_model.requires_grad_(False)
    freeze_unused(model)
