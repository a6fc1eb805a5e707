"""Models as people wrap them (offloaded, quantised, compiled, still in training mode) score as they are."""

import copy
import warnings

import PIL.Image
import pytest
import torch
from small_checkpoint import TASK, make_config, make_image_processor, make_pipeline, make_tokenizer
from test_pipeline import LABELS
from torch import nn

from ig_captioner import (
    CompiledLabels,
    IGCaptionerForZeroShotImageClassification,
    IGCaptionerWarning,
    IGZeroShotImageClassificationPipeline,
    compile_labels,
)


IMAGE = PIL.Image.linear_gradient("L").convert("RGB").resize((30, 20))


def build(**text) -> IGCaptionerForZeroShotImageClassification:
    torch.manual_seed(0)
    config = make_config()
    for name, value in text.items():
        setattr(config.text_config, name, value)
    return IGCaptionerForZeroShotImageClassification(config).eval()


def pipeline_of(model) -> IGZeroShotImageClassificationPipeline:
    """A pipeline that finds the device by itself."""
    parts = {"tokenizer": make_tokenizer(model_max_length=12), "image_processor": make_image_processor()}
    return IGZeroShotImageClassificationPipeline(model=model, task=TASK, **parts)


def gains(model, labels=None) -> dict[str, float]:
    """Information gain by label, of the pipeline."""
    classifier = pipeline_of(model)
    entries = classifier(IMAGE, LABELS if labels is None else labels, return_log_likelihoods=True)
    return {entry["label"]: entry["information_gain"] for entry in entries}


def compiled_gains(model) -> dict[str, float]:
    """The same by compiled labels and `score`."""
    classifier = pipeline_of(model)
    pixels = classifier.image_processor(IMAGE, return_tensors="pt")["pixel_values"]
    labels = compile_labels(model, classifier.tokenizer, LABELS)
    with torch.no_grad():
        return dict(zip(LABELS, model.score(pixels, labels).information_gain[0].tolist(), strict=True))


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_offloaded_models(kind, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, expected = build(), gains(build())
    if kind == "cpu":
        accelerate.cpu_offload(model, torch.device("cpu"))
    else:
        accelerate.disk_offload(model, tmp_path / "weights", torch.device("cpu"))
    assert next(model.parameters()).is_meta and model.device == torch.device("cpu")
    assert gains(model) == pytest.approx(expected, abs=1e-4)
    assert compiled_gains(model) == pytest.approx(expected, abs=1e-4)
    classifier = pipeline_of(model)
    compile_labels(model, classifier.tokenizer, LABELS).save(tmp_path / "labels")
    loaded = CompiledLabels.load(tmp_path / "labels")
    assert gains(model, loaded) == pytest.approx(expected, abs=1e-4)


def test_labels_compiled_for_an_offloaded_model_are_stale_for_other_weights(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, other = build(), build()
    with torch.no_grad():
        other.model.decoder.norm.weight.add_(0.1)
    for each in (model, other):
        accelerate.cpu_offload(each, torch.device("cpu"))
    labels = compile_labels(model, pipeline_of(model).tokenizer, LABELS)
    with pytest.raises(ValueError, match="compiled with other weights"):
        gains(other, labels)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_dynamically_quantised_models():
    model, expected = build(), gains(build())
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    assert type(quantised.lm_head) is not nn.Linear
    found = gains(quantised)
    assert compiled_gains(quantised) == pytest.approx(found, abs=1e-4)
    assert all(abs(found[label] - expected[label]) < 1.0 for label in LABELS)  # 8 bits are not 32
    again = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    assert quantised.fingerprint() == again.fingerprint() != model.fingerprint()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.uint8])
def test_images_of_any_format_of_numbers(dtype):
    classifier = make_pipeline(build())
    values = (torch.arange(3 * 16 * 24).view(3, 16, 24) % 2).to(dtype)  # exact in all of them
    expected = classifier((values.float() * 255).to(torch.uint8), LABELS)
    image = values * 255 if dtype == torch.uint8 else values
    found = {entry["label"]: entry["score"] for entry in classifier(image, LABELS)}
    assert found == pytest.approx({entry["label"]: entry["score"] for entry in expected}, abs=1e-5)
    if dtype != torch.uint8:
        pixels = [
            classifier.image_processor(each, do_rescale=False)["pixel_values"][0] for each in (image, values.float())
        ]
        assert torch.allclose(*(torch.as_tensor(each).float() for each in pixels), atol=1e-2)


def test_dropout_never_changes_what_the_pipeline_says():
    model = build(dropout=0.4)
    expected = gains(model)
    model.train()
    model.model.vision_model.eval()  # as of a frozen encoder
    modes = [module.training for module in model.modules()]
    assert gains(model) == pytest.approx(expected, abs=1e-5)
    assert [module.training for module in model.modules()] == modes
    model.eval()
    model.lm_head.train()  # even a part of it
    assert gains(model) == pytest.approx(expected, abs=1e-5) and model.lm_head.training


def test_scores_with_dropout_are_told():
    model, images = build(dropout=0.4).train(), torch.randn(1, 3, 16, 24)
    texts = torch.tensor([[5, 2]])
    with torch.no_grad(), pytest.warns(IGCaptionerWarning, match="in training mode, so that dropout"):
        model.score(images, texts)
    with warnings.catch_warnings():
        warnings.simplefilter("error", IGCaptionerWarning)
        model.score(images, texts)  # with gradients: this is training
        with torch.no_grad():
            model.eval().score(images, texts)
            build().train().score(images, texts)  # there is no dropout


# Texts that are too long


def test_texts_that_are_cut_are_told_by_name_and_count():
    classifier = make_pipeline(build())
    long = ["cat " * 20 + "dog", "dog" + " dog" * 19, "cat"]
    message = r"longer than the 12 tokens that the model reads, and were cut \(2: 'cat cat .*, 'dog dog"
    with pytest.warns(IGCaptionerWarning, match=message):
        classifier(IMAGE, long, hypothesis_template="{}")
    with pytest.warns(IGCaptionerWarning, match=message):
        compile_labels(classifier.model, classifier.tokenizer, long, "{}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", IGCaptionerWarning)
        classifier(IMAGE, ["cat " * 10 + "dog", "cat"], hypothesis_template="{}")  # 12 tokens
        classifier(IMAGE, long, hypothesis_template="{}", tokenizer_kwargs={"max_length": 5})  # was asked for
        with pytest.raises(IGCaptionerWarning, match="were cut"):
            classifier(IMAGE, long, hypothesis_template="{}")


def test_words_that_look_like_special_tokens_are_words():
    tokenizer = make_pipeline(build()).tokenizer
    classifier = make_pipeline(build(), tokenizer=tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", IGCaptionerWarning)
        entries = classifier(IMAGE, [f"cat {name} dog" for name in tokenizer.all_special_tokens])
    assert len(entries) == len(tokenizer.all_special_tokens)
