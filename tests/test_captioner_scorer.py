"""`CaptionScorer`: any captioner with its real processor, from images and strings to scores."""

import copy
import json
import pickle

import pytest
import torch
from captioner_folders import FOLDERS, captioner, photo, save_folder

from ig_captioner import DEFAULT_CHECKPOINT, CaptionScorer, CompiledLabels
from ig_captioner.captioners.readers import forced_log_likelihoods
from ig_captioner.captioners.scorer import plain_images
from ig_captioner.information_gain import label_log_prior, mean_over_references, token_means_over_references


TEXTS = ["a cat", "a cat on a mat", "two dogs", "a"]
PHOTOS = [photo(1), photo(2)]
TOLERANCE = 1e-4  # nats
REFERENCES = [photo(seed) for seed in (3, 4, 5)]


def scorer_of(name: str, **kwargs) -> CaptionScorer:
    return CaptionScorer(*captioner(name), **kwargs)


def forced(scorer: CaptionScorer, image, text: str) -> float:
    """log P(T | image, prompt) from the model's own `generate()`."""
    encoded = scorer.prompt.encode([text])
    inputs = scorer.prompt.inputs(image, encoded.dropped)
    with torch.no_grad():
        return float(forced_log_likelihoods(scorer.family, inputs, encoded.input_ids[0].tolist()).sum())


def forced_matrix(scorer: CaptionScorer, images, texts=TEXTS) -> torch.Tensor:
    return torch.tensor([[forced(scorer, image, text) for text in texts] for image in images])


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((actual - expected).abs().max() < TOLERANCE)


@pytest.mark.parametrize("name", FOLDERS)
def test_scores_are_those_of_generate(name, tmp_path):
    """Two images, texts of several lengths, log P(T) as the family has it, and compiled labels saved and loaded."""
    scorer = scorer_of(name)
    captions = forced_matrix(scorer, PHOTOS)
    if scorer.default_prior_source == "unconditional":
        priors = forced_matrix(scorer, [None])
    else:
        priors = forced_matrix(scorer, REFERENCES).logsumexp(dim=0, keepdim=True) - torch.tensor(3.0).log()
    references = None if scorer.default_prior_source == "unconditional" else REFERENCES
    scores = scorer.score(PHOTOS, TEXTS, reference_images=references)
    assert close(scores.caption_log_likelihood, captions)
    assert close(scores.prior_log_likelihood, priors[0])
    assert close(scores.information_gain, captions - priors)

    scorer.compile_labels(TEXTS, "{}", reference_images=references).save(tmp_path)
    again = scorer_of(name).score(PHOTOS, CompiledLabels.load(tmp_path), prior_weight=0.5)
    assert close(again.information_gain, captions - 0.5 * priors)


@pytest.mark.parametrize("mode", ["rows", "generate"])
def test_the_reading_mode_can_be_set(mode):
    scorer = scorer_of("llava", reading_mode=mode)
    assert scorer.verification.mode == mode and "not measured" in str(scorer.verification)
    assert close(scorer.score(PHOTOS, TEXTS).information_gain, scorer_of("llava").score(PHOTOS, TEXTS).information_gain)


def test_verification_comes_with_the_first_texts():
    scorer = scorer_of("blip")
    assert scorer.verification is None and "first use" in scorer.describe()["reading mode"]
    scorer.compile_labels(["a cat"])
    assert scorer.verification.mode == "tree" and scorer.verification.errors["tree"] < TOLERANCE


def test_images_in_any_number_and_form(tmp_path):
    scorer = scorer_of("llava")
    expected = scorer.score(PHOTOS, TEXTS).caption_log_likelihood
    PHOTOS[0].save(tmp_path / "photo.png")
    tensor = torch.stack([torch.tensor(list(image.tobytes())).view(16, 16, 3) for image in PHOTOS])
    as_floats = tensor.permute(0, 3, 1, 2) / 255
    for images in (str(tmp_path / "photo.png"), tmp_path / "photo.png", PHOTOS[0]):
        assert close(scorer.score(images, TEXTS).caption_log_likelihood, expected[:1])
    assert close(scorer.score(as_floats, TEXTS).caption_log_likelihood, expected)
    assert close(scorer.score(iter(PHOTOS), TEXTS).caption_log_likelihood, expected)
    with pytest.raises(ValueError, match="empty list"):
        scorer.score([], TEXTS)
    with pytest.raises(ValueError, match="cannot read the image"):
        scorer.score(["no-such-file.jpg"], TEXTS)


@pytest.mark.parametrize("name", FOLDERS)
def test_images_can_be_prepared_in_other_processes(name):
    """What prepares them can be pickled, and holds no weights."""
    scorer = scorer_of(name, reading_mode="tree")
    sent = pickle.dumps(scorer.preparer())
    weights = sum(value.numel() * value.element_size() for value in scorer.model.state_dict().values())
    assert len(sent) < max(100_000, weights // 2)
    prepare = pickle.loads(sent)
    prepared = scorer.log_likelihoods([prepare(image) for image in PHOTOS], TEXTS)
    assert torch.equal(prepared, scorer.log_likelihoods(PHOTOS, TEXTS))


def test_images_whose_prompts_differ_in_length_are_read_apart():
    scorer = scorer_of("pix2struct", batch_size=2)
    images = [photo(1), photo(2), photo(3, (48, 16)), photo(4)]
    alone = torch.cat([scorer.score(image, TEXTS).caption_log_likelihood for image in images])
    assert close(scorer.score(images, TEXTS).caption_log_likelihood, alone)


def test_the_default_references_are_plain_images():
    scorer = scorer_of("blip")
    assert scorer.default_prior_source == "reference_images"
    assert [image.getpixel((0, 0))[0] for image in plain_images()] == [0, 128, 255]
    expected = scorer.score(PHOTOS, TEXTS, reference_images=plain_images())
    assert close(scorer.score(PHOTOS, TEXTS).prior_log_likelihood, expected.prior_log_likelihood)


def test_likelihoods_alone_are_those_of_scores():
    for scorer in (scorer_of("llava"), CaptionScorer.from_pretrained(DEFAULT_CHECKPOINT)):
        expected = scorer.score(PHOTOS, TEXTS).caption_log_likelihood
        assert close(scorer.log_likelihoods(PHOTOS, TEXTS), expected)
        with pytest.raises(ValueError, match="at least one text"):
            scorer.log_likelihoods(PHOTOS, [])


def test_an_empty_text_is_the_end_of_one():
    """Captions may be empty."""
    scorer = scorer_of("llava")
    expected = forced(scorer, PHOTOS[0], "")
    assert float(scorer.score(PHOTOS[0], [""]).caption_log_likelihood) == pytest.approx(expected, abs=TOLERANCE)


def test_both_means_over_reference_images():
    scorer = scorer_of("llava")
    under = scorer.score(REFERENCES, TEXTS).caption_log_likelihood.double()
    given = {"reference_images": REFERENCES}
    arithmetic = scorer.score(PHOTOS, TEXTS, **given).prior_log_likelihood
    assert close(arithmetic.double(), under.exp().mean(dim=0).log())
    geometric = scorer.score(PHOTOS, TEXTS, **given, reference_mean="geometric").prior_log_likelihood
    assert close(geometric.double(), under.mean(dim=0))
    assert (arithmetic > geometric).all()


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_token_means_sum_to_the_mean_of_texts(mean):
    of_tokens = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)) - 2
    expected = mean_over_references(of_tokens.sum(dim=-1, keepdim=True), mean)[0]
    assert float(token_means_over_references(of_tokens, mean).sum()) == pytest.approx(float(expected), abs=1e-5)


def test_a_label_prior_is_added_to_scores():
    scorer = scorer_of("llava")
    plain = scorer.score(PHOTOS, TEXTS).information_gain
    weights = [4, 2, 1, 1]
    expected = plain + torch.tensor(weights).div(8).log()
    assert close(scorer.score(PHOTOS, TEXTS, label_prior=weights).information_gain, expected)
    logs = torch.tensor(weights).div(8).log()
    assert close(scorer.score(PHOTOS, TEXTS, label_prior=logs).information_gain, expected)
    compiled = scorer.compile_labels(["cat", "dog"], ["a {}", "one {}"])
    shifted = scorer.score(PHOTOS, compiled, label_prior=[3, 1]).information_gain
    plain = scorer.score(PHOTOS, compiled).information_gain
    assert close(shifted - plain, torch.tensor([0.75, 0.25]).log().expand(2, -1))


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        ([1.0], "one number for each of 2 labels"),
        ([0.5, 0.0], "weights, all above 0, or log-probabilities"),
        ([0.5, -1.0], "got 0.5 and -1.0"),
        ([float("nan"), 1.0], "finite"),
    ],
)
def test_a_wrong_label_prior_is_named(prior, message):
    with pytest.raises(ValueError, match=message):
        label_log_prior(prior, 2)


def test_nats_per_token():
    scorer = scorer_of("llava")
    scores = scorer.score(PHOTOS, TEXTS, reduction="mean")
    lengths = torch.tensor([len(text) + 1 for text in TEXTS])
    assert close(scores.caption_log_likelihood * lengths, scorer.score(PHOTOS, TEXTS).caption_log_likelihood)


@pytest.mark.parametrize("name", ["llava", "blip", "florence2"])
def test_token_gains_sum_to_scores(name):
    scorer = scorer_of(name)
    given = {"reference_images": REFERENCES, "prior_weight": 0.5}
    gains = scorer.token_gains(PHOTOS[0], TEXTS[1], **given)
    assert "".join(gain.token for gain in gains[:-1]) == TEXTS[1]
    scores = scorer.score(PHOTOS[0], [TEXTS[1]], **given)
    for field in ("caption_log_likelihood", "prior_log_likelihood", "information_gain"):
        total = sum(getattr(gain, field) for gain in gains)
        assert total == pytest.approx(float(scores[field].flatten()[0]), abs=TOLERANCE)


@pytest.mark.parametrize("name", FOLDERS)
def test_captions_are_those_of_generate_without_the_prompt(name):
    scorer = scorer_of(name)
    caption = scorer.caption(PHOTOS, max_new_tokens=4)
    assert len(caption) == 2
    image, tokens = scorer.prompt.inputs(PHOTOS[0]), []
    for _ in range(4):  # greedy, from scores of single tokens
        with torch.no_grad():
            prefix = scorer.family.prefill(extended(image, tokens))
        tokens.append(int(prefix.next_log_probs[0].argmax()))
        if tokens[-1] == scorer.prompt.default_end_token_id:
            break
    assert caption[0] == scorer.processors.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def extended(inputs: dict, tokens: list[int]) -> dict:
    """A prompt with more tokens behind it."""
    ids, made = torch.tensor([tokens], dtype=torch.long), dict(inputs)
    if "decoder_input_ids" in made:
        return {**made, "decoder_input_ids": torch.cat([made["decoder_input_ids"], ids], dim=1)}
    for name in ("attention_mask", "token_type_ids", "image_embeds_position_mask"):
        if name in made:
            made[name] = torch.cat([made[name], torch.full_like(ids, int(name != "image_embeds_position_mask"))], dim=1)
    return {**made, "input_ids": torch.cat([made["input_ids"], ids], dim=1)}


# What compiled labels are bound to


def test_compiled_labels_are_bound_to_model_prompt_mode_and_tokenizer(tmp_path):
    scorer = scorer_of("llava")
    labels = scorer.compile_labels(["cat", "dog"])
    described = json.loads(labels.texts.fingerprint)
    assert described["reading_mode"] == "tree" and described["model"] == "llava"
    assert "one short sentence" in described["prompt"]
    with pytest.raises(ValueError, match="compiled for prompt .*one short sentence.*, not .*What is it"):
        scorer_of("llava", prompt="What is it?").score(PHOTOS, labels)
    with pytest.raises(ValueError, match="compiled for reading_mode 'tree', not 'rows'"):
        scorer_of("llava", reading_mode="rows").score(PHOTOS, labels)
    with pytest.raises(ValueError, match="compiled for model 'llava', not 'idefics3'"):
        scorer_of("idefics3").score(PHOTOS, labels)
    with pytest.raises(ValueError, match="have their prior already, but prior_source"):
        scorer.score(PHOTOS, labels, prior_source="unconditional")
    other = CompiledLabels(("cat", "cow"), labels.templates, labels.texts, labels.tokens_sha256)
    with pytest.raises(ValueError, match="another tokenizer"):
        scorer.score(PHOTOS, other)


def test_compiled_labels_are_bound_to_weights():
    model, processors = captioner("blip")
    labels = scorer_of("blip").compile_labels(["cat"])
    changed = copy.deepcopy(model)
    changed.text_decoder.cls.predictions.bias.data[3] += 1
    with pytest.raises(ValueError, match="compiled for weights"):
        CaptionScorer(changed, processors).score(PHOTOS, labels)


def test_labels_of_our_own_models_are_not_taken_for_those_of_others():
    own = CaptionScorer.from_pretrained(DEFAULT_CHECKPOINT).compile_labels(["cat"])
    with pytest.raises(ValueError, match="compiled for model None, not 'blip'"):
        scorer_of("blip").score(PHOTOS, own)


# Wrong arguments


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prior_source": "noise"}, "prior_source must be 'unconditional' or 'reference_images', got 'noise'"),
        ({"prior_source": "unconditional", "reference_images": REFERENCES}, "uses no reference_images"),
        ({"reference_images": REFERENCES, "reference_mean": "harmonic"}, "got 'harmonic'"),
        ({"reduction": "max"}, "got 'max'"),
    ],
)
def test_wrong_arguments_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        scorer_of("llava").score(PHOTOS, TEXTS, **given)


def test_a_model_that_reads_no_text_without_an_image_says_so():
    with pytest.raises(ValueError, match="pix2struct models read no text without an image"):
        scorer_of("pix2struct").score(PHOTOS, TEXTS, prior_source="unconditional")


def test_texts_longer_than_the_model_has_positions_are_named():
    with pytest.raises(ValueError, match="need 1[0-9]{2} positions, but the model has 128"):
        scorer_of("blip").score(PHOTOS, ["a" * 150])


def test_training_mode_and_unknown_reading_modes_are_refused():
    model, processors = captioner("blip")
    model.train()
    try:
        with pytest.raises(ValueError, match="training mode"):
            CaptionScorer(model, processors)
    finally:
        model.eval()
    with pytest.raises(ValueError, match="got 'forest'"):
        scorer_of("blip", reading_mode="forest")


# This package's own captioners


def test_our_own_checkpoints_load_through_the_same_call(tmp_path):
    scorer = CaptionScorer.from_pretrained(DEFAULT_CHECKPOINT)
    photos = [photo(1, (64, 64)), photo(2, (64, 64))]
    pixels = scorer.processor(images=photos, return_tensors="pt")["pixel_values"]
    encoded = scorer.processor(text=TEXTS, return_tensors="pt")
    with torch.no_grad():
        expected = scorer.model.score(pixels, **encoded)
    for images in (photos, pixels):
        scores = scorer.score(images, TEXTS)
        assert close(scores.information_gain, expected.information_gain)
    scorer.compile_labels(TEXTS, "{}").save(tmp_path)
    assert close(scorer.score(photos, CompiledLabels.load(tmp_path)).information_gain, expected.information_gain)
    gains = scorer.token_gains(photos[0], TEXTS[0])
    assert sum(gain.information_gain for gain in gains) == pytest.approx(
        float(expected.information_gain[0, 0]), abs=1e-3
    )
    assert len(scorer.caption(photos)) == 2
    assert scorer.verification.mode == "tree" and "own" in scorer.describe()["family"]
    with pytest.raises(ValueError, match="have no prompt"):
        CaptionScorer.from_pretrained(DEFAULT_CHECKPOINT, prompt="What is it?")


# Folders


@pytest.mark.parametrize("name", ["blip", "llava", "vit_gpt2"])
def test_a_folder_loads_and_scores_as_the_model_that_it_holds(name, tmp_path):
    folder = save_folder(name, tmp_path)
    loaded = CaptionScorer.from_pretrained(folder)
    assert close(loaded.score(PHOTOS, TEXTS).information_gain, scorer_of(name).score(PHOTOS, TEXTS).information_gain)
