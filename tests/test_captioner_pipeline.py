"""The zero-shot pipeline with captioners of the Hub, loaded in every way that people try."""

import pytest
import torch
import transformers as hf
from captioner_folders import captioner, photo, save_folder
from transformers import pipeline

from ig_captioner import (
    DEFAULT_CHECKPOINT,
    CaptionScorer,
    CompiledLabels,
    IGZeroShotImageClassificationPipeline,
    zero_shot_pipeline,
)


LABELS = ["cat", "dog", "horse"]
TEMPLATES = ["a photo of a {}.", "a drawing of a {}."]
PHOTOS = [photo(1), photo(2)]


@pytest.fixture(scope="module", params=["blip", "llava"])
def folder(request, tmp_path_factory) -> str:
    return save_folder(request.param, tmp_path_factory.mktemp(request.param))


def gains_of(entries: list[dict]) -> dict[str, float]:
    return {entry["label"]: entry["information_gain"] for entry in entries}


def expected_gains(folder: str, image, **options) -> dict[str, float]:
    scorer = CaptionScorer.from_pretrained(folder)
    gains = scorer.score(image, scorer.compile_labels(LABELS, TEMPLATES, **options)).information_gain
    return dict(zip(LABELS, gains[0].tolist(), strict=True))


def ask(classify, images=PHOTOS[0], **options):
    settings = {"candidate_labels": LABELS, "hypothesis_template": TEMPLATES, "return_log_likelihoods": True}
    return classify(images, **{**settings, **options})


def test_the_one_obvious_call(folder):
    entries = ask(zero_shot_pipeline(folder))
    assert gains_of(entries) == pytest.approx(expected_gains(folder, PHOTOS[0]), abs=1e-4)
    assert sum(entry["score"] for entry in entries) == pytest.approx(1)
    assert [entry["score"] for entry in entries] == sorted((entry["score"] for entry in entries), reverse=True)


def test_the_call_of_transformers_for_captioners(folder):
    """Its class is right, and the pipeline finds the processor."""
    classify = pipeline(
        "image-text-to-text", model=folder, pipeline_class=IGZeroShotImageClassificationPipeline, device="cpu"
    )
    assert gains_of(ask(classify)) == pytest.approx(expected_gains(folder, PHOTOS[0]), abs=1e-4)


def test_the_call_of_transformers_for_zero_shot_loads_the_right_class(folder, recwarn):
    """For a BLIP captioner transformers takes BlipModel, whose text tower is random."""
    task = "zero-shot-image-classification"
    classify = pipeline(task, model=folder, pipeline_class=IGZeroShotImageClassificationPipeline, device="cpu")
    assert type(classify.model).__name__ in ("BlipForConditionalGeneration", "LlavaForConditionalGeneration")
    assert gains_of(ask(classify)) == pytest.approx(expected_gains(folder, PHOTOS[0]), abs=1e-4)


def test_a_model_in_memory_that_is_the_wrong_class_is_refused():
    wrong = hf.BlipModel(captioner("blip")[0].config)
    wrong.config.architectures = ["BlipForConditionalGeneration"]
    parts = captioner("blip")[1]
    with pytest.raises(ValueError, match=r"may be random: load it with ig_captioner.zero_shot_pipeline"):
        IGZeroShotImageClassificationPipeline(
            model=wrong, tokenizer=parts.tokenizer, image_processor=parts.image_processor, task="image-text-to-text"
        )


def test_contrastive_models_are_sent_to_the_stock_pipeline():
    config = hf.CLIPConfig(
        text_config={"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1},
        vision_config={"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1},
    )
    parts = captioner("blip")[1]
    with pytest.raises(ValueError, match="use transformers' own pipeline"):
        IGZeroShotImageClassificationPipeline(
            model=hf.CLIPModel(config), tokenizer=parts.tokenizer, image_processor=parts.image_processor, task="x"
        )


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_lists_and_batches(folder, batch_size):
    classify = zero_shot_pipeline(folder)
    images = [*PHOTOS, photo(3)]
    together = ask(classify, images, batch_size=batch_size)
    for entries, image in zip(together, images, strict=True):
        assert gains_of(entries) == pytest.approx(gains_of(ask(classify, image)), abs=1e-4)
    generated = ask(classify, (image for image in images))
    expected = [pytest.approx(gains_of(entries), abs=1e-4) for entries in together]
    assert [gains_of(entries) for entries in generated] == expected


def test_priors_labels_and_prompts(folder, tmp_path):
    classify = zero_shot_pipeline(folder)
    references = [photo(4), photo(5)]
    prior = {"reference_images": references, "reference_mean": "geometric"}
    expected = expected_gains(folder, PHOTOS[0], **prior)
    assert gains_of(ask(classify, **prior)) == pytest.approx(expected, abs=1e-4)
    shifted = gains_of(ask(classify, **prior, label_prior=[2, 1, 1]))
    assert shifted["cat"] - expected["cat"] == pytest.approx(torch.tensor(0.5).log().item(), abs=1e-4)
    with pytest.raises(ValueError, match="one number for each of 3 labels"):
        ask(classify, label_prior=[1, 1])
    with pytest.raises(ValueError, match="reference_mean must be"):
        ask(classify, reference_mean="median")
    with pytest.raises(ValueError, match="tokenizer_kwargs"):
        ask(classify, tokenizer_kwargs={"padding": True})

    classify.scorer.compile_labels(LABELS, TEMPLATES, **prior).save(tmp_path)
    compiled = classify(PHOTOS[0], CompiledLabels.load(tmp_path), return_log_likelihoods=True)
    assert gains_of(compiled) == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match="have their prior already, but reference_images"):
        classify(PHOTOS[0], CompiledLabels.load(tmp_path), **prior)

    asked = zero_shot_pipeline(folder, prompt="What is it?", candidate_labels=LABELS, top_k=1)
    assert len(asked(PHOTOS[0])) == 1
    assert "What is it?" in asked.scorer.prompt.context


def test_abstaining_and_many_labels_work_as_for_our_own(folder):
    classify = zero_shot_pipeline(folder)
    best = ask(classify, abstain_threshold=1e6)[0]
    assert best["label"] is None
    scores = [entry["score"] for entry in ask(classify, multi_label=True)]
    assert all(0 <= score <= 1 for score in scores)


def test_our_own_checkpoint_takes_the_same_call():
    classify = zero_shot_pipeline(DEFAULT_CHECKPOINT)
    assert classify.scorer is None
    stock = pipeline(
        "zero-shot-image-classification", model=DEFAULT_CHECKPOINT, pipeline_class=IGZeroShotImageClassificationPipeline
    )
    assert gains_of(ask(classify)) == pytest.approx(gains_of(ask(stock)), abs=1e-4)
    plain, shifted = gains_of(ask(classify)), gains_of(ask(classify, label_prior=[1, 1, 2]))
    assert shifted["horse"] - plain["horse"] == pytest.approx(torch.tensor(0.5).log().item(), abs=1e-4)


def test_a_scorer_may_be_passed():
    scorer = CaptionScorer(*captioner("llava"))
    assert zero_shot_pipeline(scorer).scorer is scorer
    with pytest.raises(ValueError, match="loaded already, but prompt"):
        zero_shot_pipeline(scorer, prompt="What?")
