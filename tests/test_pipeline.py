"""The zero-shot pipeline: the stock interface, the model's scores behind it, errors that name the value."""

import json
import math
from itertools import chain

import numpy as np
import PIL.Image
import pytest
import torch
from small_checkpoint import WORDS, make_config, make_pipeline, make_tokenizer
from torch.utils.data import Dataset
from transformers.pipelines.pt_utils import KeyDataset

from ig_captioner import (
    IGCaptionerForConditionalGeneration,
    IGCaptionerForZeroShotImageClassification,
    IGZeroShotImageClassificationPipeline,
    compiled_labels,
    input_rules,
)
from ig_captioner.compiled_labels import encode_for
from ig_captioner.processing_ig_captioner import encode_texts
from tiny import assert_clear_order


LABELS = ["cat", "dog", "photo of a cat"]
TEMPLATE = "a photo of a {}."
FIELDS = ("caption_log_likelihood", "prior_log_likelihood", "information_gain")


@pytest.fixture(scope="module")
def model() -> IGCaptionerForZeroShotImageClassification:
    torch.manual_seed(0)
    return IGCaptionerForZeroShotImageClassification(make_config()).eval()


@pytest.fixture
def classifier(model) -> IGZeroShotImageClassificationPipeline:
    return make_pipeline(model)


def direct_scores(classifier, images, texts, **kwargs):
    """`model.score` without the pipeline."""
    pixels = classifier.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return classifier.model.score(pixels, **encode_texts(classifier.tokenizer, texts), **kwargs)


def by_label(entries: list[dict]) -> dict[str, dict]:
    return {entry["label"]: entry for entry in entries}


def scores_of(results: list[list[dict]]) -> torch.Tensor:
    """Scores [B, C] in the order of LABELS."""
    return torch.tensor([[by_label(entries)[label]["score"] for label in LABELS] for entries in results])


# The stock interface


def test_one_image(classifier, photos):
    entries = classifier(photos[0], candidate_labels=LABELS)
    assert [list(entry) for entry in entries] == [["score", "label"]] * 3
    assert {entry["label"] for entry in entries} == set(LABELS)
    scores = [entry["score"] for entry in entries]
    assert scores == sorted(scores, reverse=True) and sum(scores) == pytest.approx(1)
    assert all(type(score) is float for score in scores)
    assert classifier(photos[0], LABELS) == entries  # by position
    assert classifier(images=photos[0], candidate_labels=LABELS) == entries  # the stock pipeline's older name


class Photos(Dataset):
    def __init__(self, photos):
        self.photos = photos

    def __len__(self):
        return len(self.photos)

    def __getitem__(self, i):
        return self.photos[i]


def test_many_images(classifier, photos):
    photos = photos[:3]
    singly = [classifier(photo, candidate_labels=LABELS) for photo in photos]
    assert classifier(photos, candidate_labels=LABELS) == singly
    assert classifier(tuple(photos), candidate_labels=LABELS) == singly
    assert classifier(photos[:1], candidate_labels=LABELS) == singly[:1]
    rows = Photos([{"image": photo} for photo in photos])
    for stream in ((photo for photo in photos), Photos(photos), KeyDataset(rows, "image")):
        results = classifier(stream, candidate_labels=LABELS)
        assert not isinstance(results, list) and list(results) == singly


def test_no_images_give_no_results(classifier):
    for nothing in ([], (), Photos([]), KeyDataset(Photos([]), "image"), (photo for photo in [])):
        assert list(classifier(nothing, candidate_labels=LABELS)) == []
    with pytest.raises(ValueError, match=r"\[\]"):
        classifier([], candidate_labels=[])


@pytest.mark.parametrize("template", [TEMPLATE, [TEMPLATE, "{}"]])
def test_batches_change_nothing_but_the_number_of_passes(classifier, photos, template, monkeypatch):
    passes, texts_read = [], []
    score, encode = classifier.model.score, encode_texts

    def counted_score(pixel_values, *args, **kwargs):
        passes.append(len(pixel_values))
        return score(pixel_values, *args, **kwargs)

    def counted_encode(tokenizer, texts, *args, **kwargs):
        texts_read.append(len(texts))
        return encode(tokenizer, texts, *args, **kwargs)

    monkeypatch.setattr(classifier.model, "score", counted_score)
    monkeypatch.setattr(compiled_labels, "encode_texts", counted_encode)
    arguments = {"candidate_labels": LABELS, "hypothesis_template": template, "return_log_likelihoods": True}
    singly = classifier(photos, batch_size=1, **arguments)
    assert passes == [1] * len(photos) and len(texts_read) == 1
    assert_clear_order(torch.tensor([[entry["information_gain"] for entry in entries] for entries in singly]))
    for images in (photos, Photos(photos), (photo for photo in photos)):
        passes.clear(), texts_read.clear()
        batched = list(classifier(images, batch_size=8, **arguments))
        assert passes == [8, 3] and len(texts_read) == 1
        assert [[entry["label"] for entry in entries] for entries in batched] == [
            [entry["label"] for entry in entries] for entries in singly
        ]
        for one, other in zip(chain(*singly), chain(*batched), strict=True):
            assert one == pytest.approx(other, abs=1e-5)


def test_forms_of_one_image(classifier, photos, tmp_path):
    path = tmp_path / "photo.png"
    photos[0].save(path)
    array = np.asarray(photos[0])
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    expected = classifier(photos[0], candidate_labels=LABELS)
    for form in (str(path), path, array, tensor, tensor / 255):
        assert classifier(form, candidate_labels=LABELS) == expected


# What the scores are


def test_scores_are_bayes_posterior_of_the_models_information_gain(classifier, photos):
    direct = direct_scores(classifier, photos, [TEMPLATE.replace("{}", label) for label in LABELS])
    results = classifier(photos, candidate_labels=LABELS, return_log_likelihoods=True, batch_size=4)
    torch.testing.assert_close(scores_of(results), direct.information_gain.softmax(dim=-1), atol=1e-5, rtol=1e-5)
    assert scores_of(results).max() > 0.5  # the comparison is not of uniform scores
    for i, entries in enumerate(results):
        assert [list(entry) for entry in entries] == [["score", "label", *FIELDS]] * 3
        for j, label in enumerate(LABELS):
            entry = by_label(entries)[label]
            assert entry["caption_log_likelihood"] == pytest.approx(
                direct.caption_log_likelihood[i, j].item(), abs=1e-4
            )
            assert entry["prior_log_likelihood"] == pytest.approx(direct.prior_log_likelihood[j].item(), abs=1e-4)
            assert entry["information_gain"] == pytest.approx(direct.information_gain[i, j].item(), abs=1e-4)


@pytest.mark.parametrize("head", [IGCaptionerForZeroShotImageClassification, IGCaptionerForConditionalGeneration])
@pytest.mark.parametrize("prior_weight", [0, 0.5, 1.0, None])
def test_prior_weight(head, prior_weight, photos):
    torch.manual_seed(1)
    classifier = make_pipeline(head(make_config(prior_weight=0.25)).eval())
    weight = 0.25 if prior_weight is None else prior_weight
    entries = classifier(photos[0], LABELS, prior_weight=prior_weight, return_log_likelihoods=True)
    for entry in entries:
        gain = entry["caption_log_likelihood"] - weight * entry["prior_log_likelihood"]
        assert entry["information_gain"] == pytest.approx(gain, abs=1e-4)
    gains = torch.tensor([entry["information_gain"] for entry in entries])
    assert [entry["score"] for entry in entries] == pytest.approx(gains.softmax(dim=-1).tolist(), abs=1e-5)


def test_templates_are_ensembled_by_the_mean_of_log_likelihoods(classifier, photos):
    templates = [TEMPLATE, "{}", "a {} a {}"]
    arguments = {"candidate_labels": LABELS, "return_log_likelihoods": True}
    together = by_label(classifier(photos[0], hypothesis_template=templates, **arguments))
    apart = [by_label(classifier(photos[0], hypothesis_template=template, **arguments)) for template in templates]
    for label in LABELS:
        for field in FIELDS:
            mean = sum(entries[label][field] for entries in apart) / len(templates)
            assert together[label][field] == pytest.approx(mean, abs=1e-4)
    gains = torch.tensor([together[label]["information_gain"] for label in LABELS])
    assert scores_of([list(together.values())])[0].tolist() == pytest.approx(gains.softmax(-1).tolist(), abs=1e-5)
    one = classifier(photos[0], hypothesis_template=[TEMPLATE], **arguments)
    assert one == classifier(photos[0], hypothesis_template=TEMPLATE, **arguments)


def test_top_k_keeps_the_scores_over_all_labels(classifier, photos):
    everything = classifier(photos[0], candidate_labels=LABELS)
    for top_k in (1, 2, 3, 9):
        assert classifier(photos[0], candidate_labels=LABELS, top_k=top_k) == everything[:top_k]
    assert classifier(photos[0], candidate_labels=LABELS, top_k=None) == everything


def test_equal_labels_stay_in_order_and_share_the_score(classifier, photos):
    entries = classifier(photos[0], candidate_labels=["dog", "Dog", "dog", "DOG"])
    assert [entry["label"] for entry in entries] == ["dog", "Dog", "dog", "DOG"]
    assert [entry["score"] for entry in entries] == pytest.approx([0.25] * 4)


def test_scores_are_the_plain_softmax_in_double_precision(classifier, photos):
    for entries in classifier(photos, LABELS, return_log_likelihoods=True):
        gains = torch.tensor([entry["information_gain"] for entry in entries], dtype=torch.float64)
        assert [entry["score"] for entry in entries] == pytest.approx(gains.softmax(dim=-1).tolist(), rel=1e-12, abs=0)
        assert all(list(entry) == ["score", "label", *FIELDS] for entry in entries)


@pytest.mark.parametrize("temperature", [0.25, 1, 3.0, 1e-300, 1e300])
def test_temperature_changes_scores_and_no_order(classifier, photos, temperature):
    plain = classifier(photos[0], LABELS, return_log_likelihoods=True)
    entries = classifier(photos[0], LABELS, temperature=temperature, return_log_likelihoods=True)
    assert [entry["label"] for entry in entries] == [entry["label"] for entry in plain]
    gains = [entry["information_gain"] for entry in plain]
    assert [entry["information_gain"] for entry in entries] == gains
    weights = [math.exp((gain - max(gains)) / temperature) for gain in gains]
    assert [entry["score"] for entry in entries] == pytest.approx([weight / sum(weights) for weight in weights])


def test_multi_label_scores_each_label_on_its_own(classifier, photos):
    arguments = {"multi_label": True, "temperature": 2.0, "return_log_likelihoods": True}
    together = by_label(classifier(photos[0], LABELS, **arguments))
    for label in LABELS:
        (alone,) = classifier(photos[0], [label], **arguments)
        assert together[label] == pytest.approx(alone, abs=1e-5)
        assert alone["score"] == pytest.approx(1 / (1 + math.exp(-alone["information_gain"] / 2)))
    assert sum(entry["score"] for entry in together.values()) != pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("multi_label", [False, True])
def test_none_of_these_is_a_candidate_at_the_threshold(classifier, photos, multi_label):
    arguments = {"return_log_likelihoods": True, "multi_label": multi_label}
    plain = classifier(photos[0], LABELS, **arguments)
    gains = [entry["information_gain"] for entry in plain]
    assert gains[0] > gains[1] > gains[2]
    thresholds = [gains[0] + 1, gains[0], (gains[0] + gains[1]) / 2, gains[2] - 1]
    for place, threshold in zip([0, 1, 1, 3], thresholds, strict=True):
        entries = classifier(photos[0], LABELS, abstain_threshold=threshold, **arguments)
        nothing = entries.pop(place)
        assert nothing["label"] is None and nothing["information_gain"] == threshold
        assert nothing["caption_log_likelihood"] is None and nothing["prior_log_likelihood"] is None
        assert [entry["label"] for entry in entries] == [entry["label"] for entry in plain]
        logits = torch.tensor([*gains, threshold], dtype=torch.float64)
        expected = logits.sigmoid() if multi_label else logits.softmax(dim=-1)
        assert [entry["score"] for entry in [*entries, nothing]] == pytest.approx(expected.tolist())
    (best,) = classifier(photos[0], LABELS, abstain_threshold=gains[0] + 1, top_k=1)
    assert list(best) == ["score", "label"] and best["label"] is None
    assert json.loads(json.dumps(best)) == best


def test_the_config_says_temperature_and_threshold(photos):
    torch.manual_seed(0)
    calibrated = IGCaptionerForZeroShotImageClassification(
        make_config(score_temperature=3, abstain_threshold=-2.0)
    ).eval()
    torch.manual_seed(0)
    classifier, plain = make_pipeline(calibrated), make_pipeline(type(calibrated)(make_config()).eval())
    expected = plain(photos, LABELS, temperature=3, abstain_threshold=-2)
    assert classifier(photos, LABELS) == expected and len(expected[0]) == 4
    off = {"temperature": 1, "abstain_threshold": -math.inf}
    assert classifier(photos, LABELS, **off) == plain(photos, LABELS)
    assert make_pipeline(calibrated, **off)(photos, LABELS) == plain(photos, LABELS)


def test_scores_of_broken_weights_are_an_error(photos):
    broken = IGCaptionerForZeroShotImageClassification(make_config()).eval()
    next(broken.model.vision_model.parameters()).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="information gain of 'cat' is nan"):
        make_pipeline(broken)(photos[0], LABELS)


def test_order_survives_scores_that_underflow(classifier):
    gains = torch.tensor([[-9000.0, 0.0, -8000.0]])
    outputs = dict.fromkeys(FIELDS, gains)
    assert [entry["label"] for entry in classifier.postprocess(outputs, ["a", "b", "c"])] == ["b", "c", "a"]


def test_braces_in_labels_survive(classifier, photos, monkeypatch):
    texts_read = []
    encode = encode_texts
    monkeypatch.setattr(
        compiled_labels,
        "encode_texts",
        lambda tok, texts, *args, **kw: texts_read.extend(texts) or encode(tok, texts, *args),
    )
    labels = ["{}", "{0}", "{cat"]
    assert set(by_label(classifier(photos[0], labels, hypothesis_template="{x} {}"))) == set(labels)
    assert texts_read == ["{x} {}", "{x} {0}", "{x} {cat"]


def test_tokenizer_kwargs_reach_the_tokenizer(classifier, photos):
    short = classifier(photos[0], LABELS, hypothesis_template="{}", tokenizer_kwargs={"max_length": 2})
    cut = ["cat", "dog", "photo"]
    direct = direct_scores(classifier, photos[:1], cut).information_gain.softmax(dim=-1)
    torch.testing.assert_close(scores_of([short]), direct, atol=1e-5, rtol=1e-5)
    padded = classifier(photos[0], LABELS, tokenizer_kwargs={"padding": "max_length"})
    torch.testing.assert_close(scores_of([padded]), scores_of([classifier(photos[0], LABELS)]), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="bogus"):
        classifier(photos[0], LABELS, tokenizer_kwargs={"padding": "bogus"})


def test_priors_from_reference_images(classifier, photos):
    asked = {"prior_source": "reference_images", "return_log_likelihoods": True}
    for references in (None, photos[3:6]):
        entries = by_label(classifier(photos[0], LABELS, reference_images=references, **asked))
        pixels = None
        if references is not None:
            pixels = classifier.image_processor(references, return_tensors="pt")["pixel_values"]
        texts = [TEMPLATE.format(label) for label in LABELS]
        options = {"prior_source": "reference_images", "reference_pixel_values": pixels}
        direct = direct_scores(classifier, photos[:1], texts, **options)
        actual = torch.tensor([entries[label]["information_gain"] for label in LABELS])
        torch.testing.assert_close(actual, direct.information_gain[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="prior_source must be .* got 'noise'"):
        classifier(photos[0], LABELS, prior_source="noise")
    with pytest.raises(ValueError, match=r"reference_images must be .* got \[\]"):
        classifier(photos[0], LABELS, reference_images=[])


def test_texts_are_cut_to_the_models_positions_and_keep_eos(model, photos):
    classifier = make_pipeline(model, tokenizer=make_tokenizer(model_max_length=10**30))
    long, longer = "a " * 20, "a " * 30
    entries = classifier(photos[0], [long, longer], hypothesis_template="{}")
    assert [entry["score"] for entry in entries] == pytest.approx([0.5, 0.5])
    assert encode_for(model, classifier.tokenizer, [long])["input_ids"].tolist() == [
        [WORDS.index("a")] * 11 + [WORDS.index("</s>")]
    ]


def test_images_from_the_web_follow_the_same_rules(classifier, tmp_path, monkeypatch):
    path, seen = tmp_path / "transparent.png", []
    PIL.Image.new("RGBA", (8, 8), (200, 0, 0, 0)).save(path)

    def urlopen(request, timeout):
        seen.append((request.full_url, timeout))
        return path.open("rb")

    monkeypatch.setattr(input_rules.urllib.request, "urlopen", urlopen)
    url = "http://localhost/cat.png"
    assert classifier(url, LABELS, timeout=3) == classifier(url, LABELS) == classifier(str(path), LABELS)
    assert seen == [(url, 3), (url, None)]


def test_half_precision(photos):
    torch.manual_seed(0)
    model = IGCaptionerForZeroShotImageClassification(make_config()).eval().to(torch.bfloat16)
    entries = make_pipeline(model)(photos, LABELS, batch_size=3)[0]
    assert sum(entry["score"] for entry in entries) == pytest.approx(1)
