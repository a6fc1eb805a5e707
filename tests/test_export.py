"""Exported programs and graphs score as the model does, whatever the sizes; quantised models score nearly so."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoProcessor, TorchAoConfig

from ig_captioner import DEFAULT_CHECKPOINT
from ig_captioner import IGCaptionerForZeroShotImageClassification as ZeroShot
from ig_captioner.export import TRIE_FIELDS, TextPrior, export_onnx, export_programs, main
from ig_captioner.label_trie import build_trie
from tiny import BOS, VARIANTS, assert_clear_order, naive_scores, padded, random_images, random_texts, tiny_model


EXAMPLE = Path(__file__).parent.parent / "examples" / "onnx_classify.py"
# images and lengths of texts; those of the examples that programs are exported with are 2 and 8 x 3
SIZES = [(1, (3,)), (2, (1, 1)), (3, (4, 4, 1, 12))]


def inputs_for(number, lengths, height=16, width=16):
    """Images, texts as lists, and what programs take of texts: as they are, and as a trie in two blocks or more."""
    texts = random_texts(lengths)
    ids, mask = padded(texts)
    trie = build_trie(ids, mask, BOS, block_size=1)
    return (
        random_images(number, height, width),
        texts,
        {"input_ids": ids, "attention_mask": mask},
        {name: getattr(trie, name) for name in TRIE_FIELDS},
    )


# torch.export


# graphs of "prefix" are tested by default, too; exporting takes seconds each time
@pytest.mark.parametrize(
    ("variant", "width"),
    [
        ("cross_rotary", 24),
        pytest.param("prefix", 16, marks=pytest.mark.slow),
        pytest.param("prefix_rotary", 24, marks=pytest.mark.slow),
        pytest.param("cross", 16, marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_programs_score_as_one_pass_per_token(variant, width):
    """At other sizes than those exported with; where images are wider than the configuration says, too."""
    model = tiny_model(variant, ZeroShot)
    programs = {name: program.module() for name, program in export_programs(model, (16, width)).items()}
    captioner = tiny_model(variant)
    for number, lengths in SIZES:
        images, texts, tokens, trie = inputs_for(number, lengths, width=width)
        read = programs["image_encoder"](pixel_values=images)
        expected = naive_scores(captioner, images, texts)
        scores = {
            "text_scorer": programs["text_scorer"](image_key_values=read, **tokens),
            "label_scorer": programs["label_scorer"](image_key_values=read, **trie),
        }
        for name, score in scores.items():
            torch.testing.assert_close(score, expected, atol=1e-4, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
        prior = programs["text_prior"](**tokens)
        torch.testing.assert_close(prior, naive_scores(captioner, None, texts), atol=1e-4, rtol=0)


@torch.no_grad()
def test_prior_over_reference_images():
    model = tiny_model("cross", ZeroShot, prior_source="reference_images")
    images, _, tokens, _ = inputs_for(1, (5, 2))
    expected = model.score(images, **tokens).prior_log_likelihood
    torch.testing.assert_close(TextPrior(model)(**tokens), expected, atol=1e-4, rtol=0)


def test_models_that_cannot_be_exported(tmp_path):
    with pytest.raises(ValueError, match="training mode"):
        export_programs(tiny_model(model_class=ZeroShot).train())
    with pytest.raises(ValueError, match="not a multiple of the patch size"):
        export_programs(tiny_model(model_class=ZeroShot), 20)
    with pytest.raises(ValueError, match=r"float32, but the model is torch\.bfloat16"):
        export_onnx(tiny_model(model_class=ZeroShot).bfloat16(), None, tmp_path)


# ONNX


def processor_for(height, width):
    processor = AutoProcessor.from_pretrained(DEFAULT_CHECKPOINT)
    processor.image_processor.size = {"height": height, "width": width}
    return processor


def run(folder, name, **inputs):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(folder / f"{name}.onnx")
    (output,) = session.run(None, {key: np.asarray(value) for key, value in inputs.items()})
    return torch.from_numpy(output)


@pytest.fixture(
    scope="module", params=["prefix", *(pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS if v != "prefix")]
)
def onnx(request, tmp_path_factory):
    pytest.importorskip("onnxscript")
    folder = tmp_path_factory.mktemp(request.param) / "new"
    export_onnx(tiny_model(request.param, ZeroShot), processor_for(16, 16), folder)
    return request.param, folder


@torch.no_grad()
def test_onnx_scores_as_one_pass_per_token(onnx):
    variant, folder = onnx
    captioner = tiny_model(variant)
    for number, lengths in SIZES:
        images, texts, tokens, trie = inputs_for(number, lengths)
        read = run(folder, "image_encoder", pixel_values=images)
        expected = naive_scores(captioner, images, texts)
        for name, of_texts in (("text_scorer", tokens), ("label_scorer", trie)):
            score = run(folder, name, image_key_values=read, **of_texts)
            torch.testing.assert_close(score, expected, atol=1e-4, rtol=0)
        prior = run(folder, "text_prior", **tokens)
        torch.testing.assert_close(prior, naive_scores(captioner, None, texts), atol=1e-4, rtol=0)


def test_graphs_share_their_weights(onnx):
    variant, folder = onnx
    weights = sum(parameter.nbytes for parameter in tiny_model(variant).parameters())
    assert (folder / "weights.bin").stat().st_size < 1.25 * weights
    assert sum(path.stat().st_size for path in folder.glob("*.bin")) == (folder / "weights.bin").stat().st_size


def test_what_feeds_the_graphs(onnx):
    _, folder = onnx
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    assert settings["prior_weight"] == 1.0 and settings["score_temperature"] == 1.0
    assert settings["abstain_threshold"] is None
    assert settings["image_processor"]["size"] == {"height": 16, "width": 16}
    assert settings["image_processor"]["image_mean"] == pytest.approx([127 / 255] * 3)
    texts = ["A photo of a Cat.", "", "dog", " ".join(["word"] * 100)]
    ours = Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(texts)
    expected = processor_for(16, 16)(text=texts, max_length=20)
    assert [text.ids for text in ours] == expected["input_ids"]
    assert [text.attention_mask for text in ours] == expected["attention_mask"]


def test_what_is_no_checkpoint_is_an_error_of_one_line(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    for model, message in ((tmp_path / "missing", "no such model folder"), (tmp_path / "pickled", "safetensors")):
        with pytest.raises(SystemExit) as stop:
            main([str(model), str(tmp_path / "onnx")])
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 1 and message in lines[-1] and lines[-1].startswith("python -m ig_captioner.export: ")
    assert not (tmp_path / "onnx").exists()


@pytest.mark.slow
def test_the_example_gives_the_models_scores_without_torch(tmp_path):
    """The shipped checkpoint; photos are noise, as large as the processor's, so that nothing is resized."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model, processor = (
        ZeroShot.from_pretrained(DEFAULT_CHECKPOINT).eval(),
        AutoProcessor.from_pretrained(DEFAULT_CHECKPOINT),
    )
    export_onnx(model, processor, tmp_path / "onnx")
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    levels = np.asarray(photo)[..., 0]
    alpha = Image.fromarray(np.where(levels > 100, 255, 0).astype(np.uint8))
    photos = {
        "photo.png": photo,
        "16-bits.png": Image.fromarray(levels.astype(np.uint16) << 8),
        "transparent.png": Image.merge("RGBA", (*photo.split(), alpha)),
    }
    for name, image in photos.items():
        image.save(tmp_path / name)
    labels = ["cat", "a long label of many words", "ship"]
    code = (
        f"import runpy, sys; runpy.run_path({str(EXAMPLE)!r}, run_name='__main__'); assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, "onnx", *photos, "--labels", "cat", f" {labels[1]}\n", labels[2]]
    lines = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.splitlines()
    texts = processor(text=[f"a photo of a {label}." for label in labels], return_tensors="pt")
    for name in photos:
        with torch.no_grad():
            gains = model.score(**processor(images=str(tmp_path / name), return_tensors="pt"), **texts)
        assert_clear_order(gains.information_gain)
        for i in gains.information_gain[0].argsort(descending=True).tolist():
            line, gain = " ".join(lines.pop(0).split()), gains.information_gain[0]
            assert line.startswith(f"{name} {labels[i]}: {gain.softmax(dim=-1)[i]:.3f}, ")
            assert float(line.split()[-2]) == pytest.approx(gain[i].item(), abs=0.0051)


# Quantised


INT8 = ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"]  # the second rounds inputs of layers, too


@cache
def quantised(name: str):
    """The shipped checkpoint with weights in int8."""
    quantization = pytest.importorskip("torchao.quantization")
    return ZeroShot.from_pretrained(
        DEFAULT_CHECKPOINT, quantization_config=TorchAoConfig(getattr(quantization, name)())
    )


@cache
def exact_weights() -> dict[str, torch.Tensor]:
    """Weights of the shipped checkpoint's linear layers."""
    model = ZeroShot.from_pretrained(DEFAULT_CHECKPOINT)
    return {name: layer.weight for name, layer in model.named_modules() if type(layer) is nn.Linear}


def int8_layers(model) -> dict[str, nn.Linear]:
    layers = {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear}
    return {name: layer for name, layer in layers.items() if name != "lm_head"}


@pytest.mark.parametrize("name", INT8)
@torch.no_grad()
def test_int8_weights_are_off_by_their_rounding_and_no_more(name):
    """Rounding to steps of `maximum / 127.5` moves a weight of a row by half a step at most."""
    original = exact_weights()
    layers = int8_layers(quantised(name))
    assert len(layers) > 30
    for layer_name, layer in layers.items():
        exact = original[layer_name]
        step = exact.abs().amax(dim=1, keepdim=True) / 127.5
        shift = (layer.weight.dequantize() - exact).abs() / step
        assert 0 < shift.max() <= 0.501, layer_name


def exact_sums(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Sums [B, N] of products of whole numbers [B, K] and [N, K]."""
    return inputs.double() @ weight.double().T


def cut_sums(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The same as processors without 8-bit dot products (VNNI) make them, by the instruction vpmaddubsw.

    oneDNN adds 128 to the inputs, since the instruction wants one side without sign. It sums two neighbouring products
    to 16 bits, which 255 * 127 * 2 exceeds: such sums end at the largest number of 16 bits.
    """
    pairs = ((inputs.double() + 128)[:, None] * weight.double()).unflatten(2, (-1, 2)).sum(dim=3)
    return pairs.clamp(-(2**15), 2**15 - 1).sum(dim=2) - 128 * weight.double().sum(dim=1)


def whole_inputs(width: int, largest: int = 127) -> torch.Tensor:
    """Whole numbers [4, width] below the largest, which begins each row.

    Rounding to steps of `largest / (largest + 0.5)` leaves them as they are.
    """
    numbers = torch.randint(1 - largest, largest, (4, width), generator=torch.Generator().manual_seed(0))
    numbers[:, 0] = largest
    return numbers


def is_close(outputs: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(outputs.double(), expected.double(), rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@torch.no_grad()
def test_layers_with_int8_weights_are_float_layers_of_the_rounded_weights():
    for name, layer in int8_layers(quantised("Int8WeightOnlyConfig")).items():
        inputs = whole_inputs(layer.in_features).float()
        expected = nn.functional.linear(inputs, layer.weight.dequantize(), layer.bias)
        assert is_close(layer(inputs), expected), name


@torch.no_grad()
def test_layers_with_int8_inputs_multiply_whole_numbers():
    """Every layer is exact, or every layer cuts at 16 bits; which one the processor decides."""
    original = exact_weights()
    is_exact, is_cut = [], []
    for name, layer in int8_layers(quantised("Int8DynamicActivationInt8WeightConfig")).items():
        weight_step = original[name].abs().amax(dim=1, keepdim=True) / 127.5
        weight = (layer.weight.dequantize() / weight_step).round()
        inputs = whole_inputs(layer.in_features)
        steps = 127 / 127.5 * weight_step.T  # of inputs, and of the weights of each output
        bias = 0 if layer.bias is None else layer.bias
        outputs = layer(inputs.float())
        is_exact.append(is_close(outputs, steps * exact_sums(inputs, weight) + bias))
        is_cut.append(is_close(outputs, steps * cut_sums(inputs, weight) + bias))
    assert all(is_exact) or all(is_cut)


@torch.no_grad()
def test_seven_bits_are_exact_on_every_processor():
    """What docs/serving.md advises for processors without VNNI: no sum of two products exceeds 16 bits."""
    quantization = pytest.importorskip("torchao.quantization")
    layer = nn.Linear(64, 48)
    weight_step = layer.weight.abs().amax(dim=1, keepdim=True) / 63.5
    quantization.quantize_(layer, quantization.Int8DynamicActivationInt8WeightConfig(reduce_range=True))
    weight = (layer.weight.dequantize() / weight_step).round()
    inputs = whole_inputs(64, largest=63)
    assert is_close(layer(inputs.float()), 63 / 63.5 * weight_step.T * exact_sums(inputs, weight) + layer.bias)
    torch.testing.assert_close(cut_sums(inputs, weight), exact_sums(inputs, weight), rtol=0, atol=0)


@pytest.mark.parametrize("name", INT8)
@torch.no_grad()
def test_int8_models_load_score_compile_and_save(name, tmp_path):
    model = quantised(name)
    _, _, tokens, _ = inputs_for(1, (5, 2, 7))
    images = random_images(2, 64, 64)
    scores = model.score(images, **tokens).information_gain
    assert scores.isfinite().all()
    compiled = model.compile_texts(**tokens)
    torch.testing.assert_close(model.score(images, compiled).information_gain, scores)
    assert compiled.fingerprint != ZeroShot.from_pretrained(DEFAULT_CHECKPOINT).fingerprint()
    model.save_pretrained(tmp_path)
    again = ZeroShot.from_pretrained(tmp_path)
    torch.testing.assert_close(again.score(images, compiled).information_gain, scores)
