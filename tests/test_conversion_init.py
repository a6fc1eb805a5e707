"""Captioners that start from models of transformers: features and logits as the sources', on tiny random models."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_conversion_tokenizer import write_model
from tiny_encoders import ENCODERS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    PreTrainedTokenizerFast,
    Siglip2VisionConfig,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from conversion import init_from_pretrained as script
from conversion import pretrained_decoder, pretrained_encoder
from conversion.init_from_pretrained import init_from_pretrained
from conversion.reading import ConversionError
from conversion.tokenizer import load_tokenizer
from ig_captioner import IGCaptionerForConditionalGeneration, IGCaptionerVisionModel
from ig_captioner.checkpoint import load_model, load_processor


SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 16, "patch_size": 4}
TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
MLP = {**SIZES, "intermediate_size": 40}
BOTH = {"vision_config": MLP, "text_config": {**TEXT, "vocab_size": 9, "bos_token_id": 1, "eos_token_id": 2}}
SOURCES = {
    "siglip_vision": lambda: SiglipVisionModel(SiglipVisionConfig(**MLP)),
    # SigLIP 2 at a fixed resolution is published as this class
    "siglip": lambda: SiglipModel(SiglipConfig(**BOTH)),
    "siglip_headless": lambda: SiglipVisionModel(SiglipVisionConfig(**MLP, vision_use_head=False)),
    "clip_vision": lambda: CLIPVisionModel(CLIPVisionConfig(**MLP)),
    "clip_projection": lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**MLP, hidden_act="gelu")),
    "clip": lambda: CLIPModel(CLIPConfig(**BOTH)),
    "vit": lambda: ViTModel(ViTConfig(**MLP)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SIZES, mlp_ratio=2)),
    "dinov2_giant": lambda: Dinov2Model(Dinov2Config(**SIZES, mlp_ratio=3, use_swiglu_ffn=True)),
    "dinov2_registers": lambda: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**SIZES, mlp_ratio=2, num_register_tokens=3)
    ),
}
EXTRA_TOKENS = {"clip": 1, "clip_vision": 1, "clip_projection": 1, "vit": 1, "dinov2": 1}
EXTRA_TOKENS |= {"dinov2_giant": 1, "dinov2_registers": 4}
BESIDE = ("text_model.", "text_projection.", "visual_projection.", "logit_")  # what is no part of the encoder
MEANS = {"siglip": 0.5, "clip": 0.48145466, "vit": 0.5, "dinov2": 0.485}


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


def assert_close(found, expected):
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", SOURCES)
def test_features_equal_the_source(tmp_path, tokenizer, name):
    source = save_source(tmp_path / "source", SOURCES[name])
    report = init_from_pretrained(tmp_path / "source", tokenizer, tmp_path / "out", text_config=TEXT)
    encoder = getattr(source, "vision_model", source)
    model = load_model(IGCaptionerForConditionalGeneration, tmp_path / "out")
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        theirs = encoder(pixel_values=images)
        expected = theirs.last_hidden_state[:, -16:]
        found = model.model.vision_model(pixel_values=images, output_hidden_states=True)
        if "clip" in name:  # which normalises its class token alone
            assert_close(found.hidden_states[-1][:, :16], expected)
            assert_close(found.last_hidden_state[:, 16], theirs.pooler_output)
            expected = encoder.post_layernorm(expected)
    assert_close(found.last_hidden_state[:, :16], expected)
    assert found.last_hidden_state.shape[1] == 16 + EXTRA_TOKENS.get(name, 0)
    loaded, dropped = report.encoder.loaded, report.encoder.dropped
    assert set(loaded) | {name for name in dropped if not name.startswith(BESIDE)} == set(encoder.state_dict())
    assert all(name.startswith((*BESIDE, "head.", "pooler.", "embeddings.mask_token")) for name in dropped)
    assert any(name.startswith("text_model.") for name in dropped) == (name in ("siglip", "clip"))
    processor = load_processor(tmp_path / "out")
    assert processor.image_processor.image_mean[0] == MEANS[name.split("_")[0]]
    texts = processor(text=["a photo", "a cat!"], return_tensors="pt")
    with torch.no_grad():
        scores = model.score(images, texts["input_ids"], texts["attention_mask"])
    assert scores.information_gain.shape == (2, 2) and bool(scores.information_gain.isfinite().all())


def test_another_image_size_and_the_command(tmp_path, tokenizer, capsys):
    save_source(tmp_path / "source", SOURCES["dinov2"])
    (tmp_path / "text.json").write_text('{"hidden_size": 16, "num_attention_heads": 2, "fusion": "cross_attention"}')
    pixels = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2, "do_center_crop": True}
    (tmp_path / "source" / "preprocessor_config.json").write_text(json.dumps(pixels))
    arguments = ["--encoder", str(tmp_path / "source"), "--tokenizer", str(tokenizer), "--image_size", "8", "24"]
    arguments += ["--output_dir", str(tmp_path / "out"), "--text_config", str(tmp_path / "text.json")]
    script.main(arguments)
    printed = capsys.readouterr().out
    assert "dropped embeddings.mask_token" in printed and "resampled from images of (16, 16) to (8, 24)" in printed
    model = load_model(IGCaptionerForConditionalGeneration, tmp_path / "out")
    assert model.config.vision_config.grid_size == (2, 6) and model.config.text_config.fusion == "cross_attention"
    processor = load_processor(tmp_path / "out")
    image_processor = processor.image_processor
    assert dict(image_processor.size) == {"height": 8, "width": 24} and not image_processor.do_center_crop
    assert list(image_processor.image_mean) == pixels["image_mean"] and image_processor.resample == 2
    assert list(image_processor.image_std) == pixels["image_std"]
    assert processor.tokenizer.model_max_length == 64
    assert "has to be trained" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(SystemExit, match="--overwrite"):
        script.main(arguments)


@pytest.mark.parametrize("name", ["resnet", "efficientnet", "dinov2_registers", "siglip"])
def test_encoders_as_they_are(tmp_path, tokenizer, name, capsys):
    """Those that could not be rewritten, and with `--as_is` the others, too."""
    sources = {kind: lambda kind=kind: AutoModel.from_config(ENCODERS[kind][0]) for kind in ("resnet", "efficientnet")}
    source = save_source(tmp_path / "source", {**SOURCES, **sources}[name])
    pixels = {"size": {"shortest_edge": 32}, "do_center_crop": True, "crop_size": 24, "image_mean": [0.1, 0.2, 0.3]}
    (tmp_path / "source" / "preprocessor_config.json").write_text(json.dumps(pixels))
    (tmp_path / "text.json").write_text(json.dumps(TEXT))
    arguments = ["--encoder", str(tmp_path / "source"), "--tokenizer", str(tokenizer), "--image_token_grids", "2", "1"]
    arguments += ["--output_dir", str(tmp_path / "out"), "--text_config", str(tmp_path / "text.json")]
    script.main([*arguments, "--image_token_norm", *(["--as_is"] if name in SOURCES else [])])
    assert f"tensors of the encoder {tmp_path / 'source'}; as it is" in capsys.readouterr().out
    model = load_model(IGCaptionerForConditionalGeneration, tmp_path / "out")
    assert not model.config.has_own_encoder
    assert model.config.image_token_grids == [2, 1] and model.config.image_token_norm
    weights = getattr(source, "vision_model", source).state_dict()
    for key, weight in model.model.vision_model.state_dict().items():
        assert torch.equal(weight, weights[key]), key
    image_processor = load_processor(tmp_path / "out").image_processor
    assert dict(image_processor.size) == {"height": 24, "width": 24} and image_processor.crop_pct == 0.75
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| image encoder | `{model.config.vision_config.model_type}` of transformers, width" in card


def stretched(table: np.ndarray, length: int) -> np.ndarray:
    """`table` [rows, ...] at `length` points between its first and its last row."""
    at = np.linspace(0, len(table) - 1, length)
    columns = [np.interp(at, range(len(table)), column) for column in table.reshape(len(table), -1).T]
    return np.stack(columns, axis=-1).reshape(length, *table.shape[1:])


@pytest.mark.parametrize("name", ["siglip", "clip", "dinov2_registers"])
def test_positions_are_resampled_and_nothing_else_changes(tmp_path, tokenizer, name):
    save_source(tmp_path / "source", SOURCES[name])
    init_from_pretrained(tmp_path / "source", tokenizer, tmp_path / "same", text_config=TEXT, image_size=(16, 16))
    init_from_pretrained(tmp_path / "source", tokenizer, tmp_path / "wide", text_config=TEXT, image_size=(12, 28))
    folders = (tmp_path / "same", tmp_path / "wide")
    same, wide = (load_model(IGCaptionerVisionModel, folder).state_dict() for folder in folders)
    positions = "embeddings.position_embedding"
    table = same.pop(positions).numpy().reshape(4, 4, -1)
    expected = stretched(stretched(table, 3).swapaxes(0, 1), 7).swapaxes(0, 1).reshape(21, -1)
    assert np.abs(wide.pop(positions).numpy() - expected).max() < 1e-5
    assert same.keys() == wide.keys() and all(torch.equal(same[key], wide[key]) for key in same)


def test_what_cannot_be_used_is_refused(tmp_path, tokenizer):
    Siglip2VisionConfig(**MLP).save_pretrained(tmp_path / "naflex")
    with pytest.raises(ConversionError, match="'siglip2_vision_model': .*as NaFlex does"):
        init_from_pretrained(tmp_path / "naflex", tokenizer, tmp_path / "out")
    OPTConfig().save_pretrained(tmp_path / "opt")
    with pytest.raises(ConversionError, match="vision_config of type 'opt': OPTModel does not take pixel_values"):
        init_from_pretrained(tmp_path / "opt", tokenizer, tmp_path / "out")
    Dinov2Model(Dinov2Config(**SIZES, qkv_bias=False)).save_pretrained(tmp_path / "dinov2")
    with pytest.raises(ConversionError, match="qkv_bias=False is not supported"):
        init_from_pretrained(tmp_path / "dinov2", tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def half(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


BROKEN = {
    "missing": (lambda weights, name: weights.pop(name), "{} is missing"),
    "misshapen": (lambda weights, name: weights.update({name: weights[name][1:].clone()}), "{} has the wrong shape"),
    "nan": (lambda weights, name: weights[name].view(-1)[3:4].fill_(torch.nan), "{} is not finite"),
}


@pytest.mark.parametrize("kind", [*BROKEN, "truncated", "pickle"])
@pytest.mark.parametrize("which", ["encoder", "gpt2"])
def test_broken_sources_are_refused_and_nothing_is_written(tmp_path, which, kind):
    save_source(tmp_path / "encoder", SOURCES["clip_vision"])
    save_decoder(tmp_path / "gpt2")
    name = {"encoder": "encoder.layers.1.layer_norm2.bias", "gpt2": "transformer.h.1.ln_2.bias"}[which]
    message = {"truncated": "truncated or damaged", "pickle": "no file named model.safetensors"}.get(kind)
    if kind in BROKEN:
        change, message = BROKEN[kind]
        rewrite(tmp_path / which, lambda weights: change(weights, name))
    else:
        {"truncated": half, "pickle": pickled}[kind](tmp_path / which)
    with pytest.raises((ConversionError, OSError), match=message.format(name)):
        init_from_pretrained(tmp_path / "encoder", None, tmp_path / "out", decoder=tmp_path / "gpt2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder", "gpt2"]


def test_weights_that_are_no_part_of_the_source_are_named(tmp_path, tokenizer):
    save_source(tmp_path / "source", SOURCES["vit"])
    rewrite(tmp_path / "source", lambda weights: weights.update({"classifier.bias": torch.ones(3)}))
    report = init_from_pretrained(tmp_path / "source", tokenizer, tmp_path / "out", text_config=TEXT)
    assert "classifier.bias" in report.encoder.dropped


def test_wrong_features_are_noticed(tmp_path, tokenizer, monkeypatch):
    save_source(tmp_path / "source", SOURCES["dinov2"])
    monkeypatch.setattr(
        pretrained_encoder, "_fold_layer_scale", lambda weights: [weights.pop(n) for n in list(weights) if "scale" in n]
    )
    with pytest.raises(ConversionError, match="features differ from the source's"):
        init_from_pretrained(tmp_path / "source", tokenizer, tmp_path / "out", text_config=TEXT)
    assert not (tmp_path / "out").exists()


# Decoders


def save_decoder(path, **config):
    """A tiny GPT-2 and its tokenizer, which is byte-level, has one special token, and adds it nowhere."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=[END], show_progress=False)
    tokenizer.train_from_iterator(["a photo of a cat"], trainer)
    names = {"bos_token": END, "eos_token": END, "unk_token": END}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(path)
    sizes = {"vocab_size": len(tokenizer.get_vocab()), "n_positions": 20, "n_embd": 24, "n_layer": 3, "n_head": 3}
    return save_source(
        path, lambda: GPT2LMHeadModel(GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": 0, **config}))
    )


END = "<|endoftext|>"
GPT2S = {
    "plain": {},
    "inner": {"n_inner": 40, "activation_function": "relu", "layer_norm_epsilon": 1e-3},
    "untied": {"tie_word_embeddings": False},
    "scales": {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False},
    "reads": {"add_cross_attention": True},
}


@pytest.mark.parametrize("fusion", ["prefix", "cross_attention"])
@pytest.mark.parametrize("name", GPT2S)
def test_unconditional_logits_equal_gpt2(tmp_path, name, fusion):
    source = save_decoder(tmp_path / "gpt2", **GPT2S[name])
    save_source(tmp_path / "encoder", SOURCES["siglip_vision"])
    text = {"fusion": fusion, "num_text_only_layers": 1}
    report = init_from_pretrained(
        tmp_path / "encoder", None, tmp_path / "out", decoder=tmp_path / "gpt2", text_config=text
    )
    model = load_model(IGCaptionerForConditionalGeneration, tmp_path / "out")
    tokens = torch.randint(source.config.vocab_size, (3, 20))
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        expected = source(tokens).logits
        assert_close(model(input_ids=tokens).logits, expected)
        conditional = model(input_ids=tokens, pixel_values=images).logits
    assert (conditional - expected).abs().max() > 1e-3 * expected.abs().max()
    parts = ("image_projection",) if fusion == "prefix" else ("layers.1.cross_attn", "layers.2.cross_attn")
    assert report.new and all(any(part in name for part in parts) for name in report.new)
    names = {name for name, _ in source.named_parameters()}
    assert set(report.decoder.loaded) | set(report.decoder.dropped) == names
    assert bool(report.decoder.dropped) == (name == "reads") and all("cross" in n for n in report.decoder.dropped)


def test_texts_of_a_gpt2_end_with_its_only_special_token(tmp_path):
    """Which is padding and start token, too."""
    source = save_decoder(tmp_path / "gpt2")
    save_source(tmp_path / "encoder", SOURCES["dinov2"])
    init_from_pretrained(tmp_path / "encoder", None, tmp_path / "out", decoder=tmp_path / "gpt2")
    model, processor = (
        load_model(IGCaptionerForConditionalGeneration, tmp_path / "out"),
        load_processor(tmp_path / "out"),
    )
    texts = processor(text=["a photo", "a cat of a photo"], return_tensors="pt")
    bare = processor.tokenizer(["a photo", "a cat of a photo"], add_special_tokens=False)["input_ids"]
    assert [row[mask.bool()].tolist() for row, mask in zip(*texts.values(), strict=True)] == [[*ids, 0] for ids in bare]
    assert processor.tokenizer.model_max_length == 20 and model.generation_config.max_length == 20
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        scores = model.score(images, texts["input_ids"], texts["attention_mask"])
        found_from_ids = model.score(images, texts["input_ids"])
        for text, log_likelihood in zip(bare, scores.prior_log_likelihood, strict=True):
            log_p = source(torch.tensor([[0, *text]])).logits[0].log_softmax(-1)
            assert abs(log_p.gather(-1, torch.tensor([[*text, 0]]).T).sum() - log_likelihood) < 1e-4 * abs(
                log_likelihood
            )
    assert torch.equal(scores.information_gain, found_from_ids.information_gain)
    generated = model.generate(pixel_values=images, do_sample=False, use_cache=True)
    assert torch.equal(generated, model.generate(pixel_values=images, do_sample=False, use_cache=False))
    assert bool((generated[:, 0] == 0).all()) and generated.shape[1] <= 20
    prompt = torch.tensor([[0, *bare[0]]])  # its first token is no end
    assert model.generate(prompt, pixel_values=images[:1])[:, : prompt.shape[1]].tolist() == prompt.tolist()


def test_the_command_with_a_decoder(tmp_path, capsys):
    source = save_decoder(tmp_path / "gpt2", add_cross_attention=True)
    save_source(tmp_path / "encoder", SOURCES["clip"])
    (tmp_path / "text.json").write_text('{"max_position_embeddings": 7, "dropout": 0.25}')
    arguments = ["--encoder", str(tmp_path / "encoder"), "--decoder", str(tmp_path / "gpt2"), "--output_dir"]
    arguments += [str(tmp_path / "out"), "--text_config", str(tmp_path / "text.json"), "--fusion", "cross_attention"]
    script.main([*arguments, "--num_text_only_layers", "2"])
    printed = capsys.readouterr().out
    assert "dropped transformer.h.0.crossattention.q_attn.weight" in printed and "new, random: " in printed
    assert "  model.decoder.layers.2.cross_attn.q_proj.weight" in printed
    model = load_model(IGCaptionerForConditionalGeneration, tmp_path / "out")
    text = model.config.text_config
    assert (text.max_position_embeddings, text.dropout, text.attention_dropout) == (7, 0.25, 0.1)
    assert torch.equal(model.model.decoder.embed_positions.weight, source.transformer.wpe.weight[:7])


def test_decoders_that_cannot_be_used_are_refused(tmp_path):
    save_source(tmp_path / "encoder", SOURCES["siglip_vision"])
    save_decoder(tmp_path / "gpt2")
    OPTConfig().save_pretrained(tmp_path / "opt")

    def start(decoder, text=None):
        init_from_pretrained(tmp_path / "encoder", None, tmp_path / "out", decoder=decoder, text_config=text)

    with pytest.raises(ConversionError, match="a decoder of type 'opt' cannot be used: known is 'gpt2'"):
        start(tmp_path / "opt")
    with pytest.raises(ConversionError, match="decide hidden_size, qk_norm; beside it you may choose fusion"):
        start(tmp_path / "gpt2", {"hidden_size": 16, "qk_norm": True, "num_hidden_layers": 3})
    with pytest.raises(ConversionError, match="max_position_embeddings is 21, but the decoder knows 20"):
        start(tmp_path / "gpt2", {"max_position_embeddings": 21})
    with pytest.raises(ConversionError, match="a new decoder needs a tokenizer"):
        start(None)
    save_decoder(tmp_path / "small", vocab_size=9)
    with pytest.raises(ConversionError, match="tokens, but the decoder 9"):
        start(tmp_path / "small")
    assert not (tmp_path / "out").exists()


def test_wrong_logits_are_noticed(tmp_path, monkeypatch):
    save_decoder(tmp_path / "gpt2")
    save_source(tmp_path / "encoder", SOURCES["siglip_vision"])
    monkeypatch.setattr(pretrained_decoder, "_query_factor", lambda config, layer: 1.1)
    with pytest.raises(ConversionError, match="logits differ from the source's"):
        init_from_pretrained(tmp_path / "encoder", None, tmp_path / "out", decoder=tmp_path / "gpt2")
    assert not (tmp_path / "out").exists()
