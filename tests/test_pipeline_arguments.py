"""Arguments of the zero-shot pipeline: defaults of the constructor, and errors that name the value."""

import numpy as np
import pytest
import torch
from small_checkpoint import make_config, make_pipeline
from test_processing import broken_files

from ig_captioner import IGCaptionerForZeroShotImageClassification, IGZeroShotImageClassificationPipeline


LABELS = ["cat", "dog", "photo of a cat"]


@pytest.fixture(scope="module")
def model() -> IGCaptionerForZeroShotImageClassification:
    torch.manual_seed(0)
    return IGCaptionerForZeroShotImageClassification(make_config()).eval()


@pytest.fixture
def classifier(model) -> IGZeroShotImageClassificationPipeline:
    return make_pipeline(model)


def test_arguments_of_the_constructor_are_defaults_for_calls(model, classifier, photos):
    arguments = {"hypothesis_template": ["{}", "a {}"], "top_k": 2, "prior_weight": 0.5}
    arguments |= {"return_log_likelihoods": True, "tokenizer_kwargs": {"max_length": 3}}
    preset = make_pipeline(model, candidate_labels=LABELS, batch_size=4, **arguments)
    assert preset(photos) == classifier(photos, LABELS, batch_size=4, **arguments)
    overridden = {**arguments, "hypothesis_template": "{}", "top_k": None, "candidate_labels": ["dog", "cat"]}
    assert preset(photos[0], **overridden) == classifier(photos[0], **overridden)
    assert preset(photos[0]) == classifier(photos[0], LABELS, **arguments)  # and the constructor's are unchanged


WRONG = [
    ({"candidate_label": ["cat"]}, "candidate_label.*cat"),
    ({"candidate_labels": LABELS, "template": "a {}"}, "template.*a {}"),
    ({}, "candidate_labels.*None"),
    ({"candidate_labels": None}, "candidate_labels.*None"),
    ({"candidate_labels": []}, r"candidate_labels.*\[\]"),
    ({"candidate_labels": "cat,dog"}, "candidate_labels.*cat,dog"),
    ({"candidate_labels": {"cat": 1}}, "candidate_labels.*cat"),
    ({"candidate_labels": np.array(["cat"])}, "candidate_labels.*array"),
    ({"candidate_labels": ["cat", 7]}, "candidate_labels.*7"),
    ({"candidate_labels": ["cat", None]}, "candidate_labels.*None"),
    ({"hypothesis_template": "a photo"}, "hypothesis_template.*a photo"),
    ({"hypothesis_template": 3}, "hypothesis_template.*3"),
    ({"hypothesis_template": []}, r"hypothesis_template.*\[\]"),
    ({"hypothesis_template": ["{}", 3]}, "hypothesis_template.*3"),
    ({"hypothesis_template": ["{}", "none"]}, "hypothesis_template.*none"),
    ({"prior_weight": "1"}, "prior_weight.*'1'"),
    ({"prior_weight": True}, "prior_weight.*True"),
    ({"prior_weight": -0.5}, "prior_weight.*-0.5"),
    ({"prior_weight": float("nan")}, "prior_weight.*nan"),
    ({"prior_weight": float("inf")}, "prior_weight.*inf"),
    ({"top_k": 0}, "top_k.*0"),
    ({"top_k": -1}, "top_k.*-1"),
    ({"top_k": 1.5}, "top_k.*1.5"),
    ({"top_k": True}, "top_k.*True"),
    ({"timeout": 0}, "timeout.*0"),
    ({"timeout": "5"}, "timeout.*'5'"),
    ({"tokenizer_kwargs": ["max_length"]}, "tokenizer_kwargs.*max_length"),
    ({"return_log_likelihoods": 1}, "return_log_likelihoods.*1"),
    ({"multi_label": "yes"}, "multi_label.*'yes'"),
    ({"temperature": 0}, "temperature.*0"),
    ({"temperature": -1.0}, "temperature.*-1.0"),
    ({"temperature": float("nan")}, "temperature.*nan"),
    ({"temperature": float("inf")}, "temperature.*inf"),
    ({"temperature": True}, "temperature.*True"),
    ({"abstain_threshold": "0"}, "abstain_threshold.*'0'"),
    ({"abstain_threshold": float("inf")}, "abstain_threshold.*inf"),
    ({"abstain_threshold": float("nan")}, "abstain_threshold.*nan"),
    ({"abstain_threshold": False}, "abstain_threshold.*False"),
    ({"prior_weight": 10**400}, "prior_weight.*10000"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_arguments_are_named(model, classifier, photos, arguments, message):
    about_labels = not arguments or "candidate_label" in next(iter(arguments))
    call = arguments if about_labels else {"candidate_labels": LABELS, **arguments}
    for image in (photos[0], photos[:2], (photo for photo in photos)):
        with pytest.raises(ValueError, match=message):
            classifier(image, **call)
    if arguments:
        with pytest.raises(ValueError, match=message):
            make_pipeline(model, **arguments)


@pytest.mark.parametrize("name", ["missing.jpg", "truncated.jpg", "text.png", "empty.png", "folder.png"])
def test_unreadable_images_are_named(classifier, photos, tmp_path, name):
    path = broken_files(tmp_path, photos[0])[name]
    for image in (path, [photos[0], path], (entry for entry in [photos[0], path])):
        with pytest.raises(ValueError, match=name):
            list(classifier(image, LABELS))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "None"),
        (b"bytes", "bytes"),
        ({"image": 1}, "dict"),
        (7, "int.*7"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"\(2, 8, 8, 3\)"),
        (map(str, []), "map"),
    ],
)
def test_what_is_no_image_is_named(classifier, photos, image, message):
    for wrong in (image, [photos[0], image]):
        with pytest.raises(ValueError, match=message):
            classifier(wrong, LABELS)


def test_two_images_arguments_are_refused(classifier, photos):
    with pytest.raises(ValueError, match="both image and images"):
        classifier(photos[0], LABELS, images=photos[1])
