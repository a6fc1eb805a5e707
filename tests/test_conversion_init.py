"""Captioners that start from encoders of transformers: features as the source's, on tiny models of random weights."""

import pytest
import torch
from test_conversion_tokenizer import write_model
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from conversion import init_from_pretrained as script
from conversion.init_from_pretrained import init_from_pretrained
from conversion.reading import ConversionError
from conversion.tokenizer import load_tokenizer
from ig_captioner import IGCaptionerForConditionalGeneration
from ig_captioner.hub import load_model, load_processor


SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 16, "patch_size": 4}
TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SIGLIP = {"vision_config": {**SIZES, "intermediate_size": 40}, "text_config": {**TEXT, "vocab_size": 9}}
SOURCES = {
    "siglip_vision": lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES, intermediate_size=40)),
    "siglip": lambda: SiglipModel(SiglipConfig(**SIGLIP)),
    "vit": lambda: ViTModel(ViTConfig(**SIZES, intermediate_size=40)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SIZES, mlp_ratio=2)),
    "registers": lambda: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**SIZES, mlp_ratio=2, num_register_tokens=3)
    ),
}


@pytest.fixture
def tokenizer(tmp_path):
    load_tokenizer(write_model(tmp_path / "c4.model"), 9).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def save_source(path, make):
    torch.manual_seed(3)
    source = make().eval()
    for parameter in source.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    source.save_pretrained(path)
    return source


@pytest.mark.parametrize("name", SOURCES)
def test_features_equal_the_source(tmp_path, tokenizer, name):
    source = save_source(tmp_path / "source", SOURCES[name])
    report = init_from_pretrained(tmp_path / "source", tokenizer, tmp_path / "out", text_config=TEXT)
    encoder = source.vision_model if name == "siglip" else source
    model = load_model(IGCaptionerForConditionalGeneration, tmp_path / "out")
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = encoder(pixel_values=images).last_hidden_state[:, -16:]
        found = model.model.vision_model(pixel_values=images)
    assert (found.last_hidden_state[:, :16] - expected).abs().max() < 1e-4 * expected.abs().max()
    assert found.last_hidden_state.shape[1] == 16 + {"vit": 1, "dinov2": 1, "registers": 4}.get(name, 0)
    known = set(report.loaded) | set(report.dropped)
    assert known == set(encoder.state_dict()) and all("head" in n or "pool" in n or "mask" in n for n in report.dropped)
    processor = load_processor(tmp_path / "out")
    assert processor.image_processor.image_mean[0] == (0.485 if "dino" in name or name == "registers" else 0.5)
    texts = processor(text=["a photo", "a cat!"], return_tensors="pt")
    with torch.no_grad():
        scores = model.score(images, texts["input_ids"], texts["attention_mask"])
    assert scores.information_gain.shape == (2, 2) and bool(scores.information_gain.isfinite().all())


def test_another_image_size_and_the_command(tmp_path, tokenizer, capsys):
    save_source(tmp_path / "source", SOURCES["dinov2"])
    (tmp_path / "text.json").write_text('{"hidden_size": 16, "num_attention_heads": 2, "fusion": "cross_attention"}')
    arguments = ["--encoder", str(tmp_path / "source"), "--tokenizer", str(tokenizer), "--image_size", "8", "24"]
    arguments += ["--output_dir", str(tmp_path / "out"), "--text_config", str(tmp_path / "text.json")]
    script.main(arguments)
    printed = capsys.readouterr().out
    assert "dropped embeddings.mask_token" in printed and "resampled from images of (16, 16) to (8, 24)" in printed
    model = load_model(IGCaptionerForConditionalGeneration, tmp_path / "out")
    assert model.config.vision_config.grid_size == (2, 6) and model.config.text_config.fusion == "cross_attention"
    processor = load_processor(tmp_path / "out")
    assert dict(processor.image_processor.size) == {"height": 8, "width": 24}
    assert processor.tokenizer.model_max_length == 64
    assert "has to be trained" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(SystemExit, match="--overwrite"):
        script.main(arguments)


def test_what_cannot_be_used_is_refused(tmp_path, tokenizer):
    clip = CLIPVisionModel(CLIPVisionConfig(**SIZES, intermediate_size=40))
    clip.save_pretrained(tmp_path / "clip")
    with pytest.raises(ConversionError, match="'clip_vision_model' cannot be used: it has a norm in front"):
        init_from_pretrained(tmp_path / "clip", tokenizer, tmp_path / "out")
    Dinov2Model(Dinov2Config(**SIZES, use_swiglu_ffn=True)).save_pretrained(tmp_path / "giant")
    with pytest.raises(ConversionError, match="use_swiglu_ffn=True is not supported"):
        init_from_pretrained(tmp_path / "giant", tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_features_are_noticed(tmp_path, tokenizer, monkeypatch):
    save_source(tmp_path / "source", SOURCES["dinov2"])
    monkeypatch.setattr(
        script, "_fold_layer_scale", lambda weights: [weights.pop(n) for n in list(weights) if "scale" in n]
    )
    with pytest.raises(ConversionError, match="features differ from the source's"):
        init_from_pretrained(tmp_path / "source", tokenizer, tmp_path / "out", text_config=TEXT)
    assert not (tmp_path / "out").exists()
