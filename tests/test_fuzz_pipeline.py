"""The pipeline under odd inputs: a proper result, or a ValueError that names the value, and no more memory than stated.

Inputs are made up by hypothesis, see `fuzz.py`. That nothing hangs is seen from the tests coming to an end.
"""

import base64
import io
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import PIL.Image
import pytest
from fuzz import (
    FILES,
    LONG_TEXTS,
    ODD_TEXTS,
    PHOTO,
    bounded_memory,
    check,
    mutated_photos,
    odd,
    surrogates,
    texts,
)
from hypothesis import example, given
from hypothesis import strategies as st

from ig_captioner import IGZeroShotImageClassificationPipeline
from ig_captioner.input_rules import clean_text


@pytest.fixture(scope="module")
def classifier(model, processor):
    parts = {"tokenizer": processor.tokenizer, "image_processor": processor.image_processor, "device": "cpu"}
    return IGZeroShotImageClassificationPipeline(model=model, task="zero-shot-image-classification", **parts)


@pytest.fixture(scope="module", autouse=True)
def memory(classifier):
    classifier(PHOTO, candidate_labels=["cat"])  # the first call is not counted
    with bounded_memory():
        yield


# Texts


@odd()
@given(
    st.lists(texts.filter(clean_text), min_size=1, max_size=12),
    st.sampled_from(["{}", "a photo of a {}.", "\u202e{}\0", "{} {}"]),
)
@example(LONG_TEXTS, "a photo of a {}.")
@example(["cat"] * 50, "{}")
@example(list(filter(clean_text, ODD_TEXTS)), "{}")
def test_every_text_is_a_label(classifier, labels, template):
    entries = classifier(PHOTO, candidate_labels=labels, hypothesis_template=template)
    check(entries, labels)
    scores: dict[str, float] = {}
    for entry in entries:
        assert scores.setdefault(entry["label"], entry["score"]) == entry["score"]


@odd()
@given(st.lists(texts, min_size=1, max_size=3), texts, st.booleans())
def test_templates(classifier, around, label, multi_label):
    template = "{}".join(around)
    arguments = {"candidate_labels": [label, "cat"], "hypothesis_template": template, "multi_label": multi_label}
    if "{}" in template and not clean_text(label):
        with pytest.raises(ValueError, match="one of candidate_labels is empty"):
            classifier(PHOTO, **arguments)
    elif "{}" in template:
        check(classifier(PHOTO, **arguments), [label, "cat"], multi_label)
    else:
        with pytest.raises(ValueError, match="hypothesis_template must be"):
            classifier(PHOTO, **arguments)


@odd()
@given(surrogates, st.text(max_size=5), st.booleans())
def test_half_a_surrogate_pair_is_no_text(classifier, half, text, in_template):
    broken = text + half
    labels, template = (["cat"], "{}" + broken) if in_template else (["cat", broken], "{}")
    with pytest.raises(ValueError, match="must be Unicode text") as caught:
        classifier(PHOTO, candidate_labels=labels, hypothesis_template=template)
    assert repr(half)[1:-1] in str(caught.value)


anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.binary(max_size=5), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=4,
)


@odd()
@given(anything)
@example(np.array(["cat"]))
@example({"cat", "dog"})
def test_labels_of_any_type(classifier, labels):
    if isinstance(labels, list) and labels and all(isinstance(label, str) and clean_text(label) for label in labels):
        check(classifier(PHOTO, candidate_labels=labels), labels)
    else:
        with pytest.raises(ValueError, match="candidate_labels"):
            classifier(PHOTO, candidate_labels=labels)


# Numbers

numbers = st.one_of(
    st.floats(),
    st.integers(),
    st.fractions(),
    st.sampled_from([10**400, -(10**400), 5e-324, 1.7e308, Fraction(1, 10**400), Decimal("0.5"), Decimal("nan")]),
    st.sampled_from(
        [
            np.float32(0.5),
            np.float64("nan"),
            np.float16(2),
            np.float16("inf"),
            np.int64(3),
            np.array(1.0),
            np.bool_(True),
        ]
    ),
    st.sampled_from(["1", b"1", True, None, 1 + 1j, [1.0], {}]),
)


@odd(150)
@given(st.sampled_from(["prior_weight", "temperature", "abstain_threshold", "top_k"]), numbers, st.booleans())
@example("prior_weight", 1e300, False)
@example("temperature", 5e-324, False)
@example("temperature", 5e-324, True)
@example("abstain_threshold", 10**300, True)
@example("abstain_threshold", -math.inf, False)
def test_numbers(classifier, name, value, multi_label):
    labels = ["cat", "dog", "hot dog"]
    arguments = {"candidate_labels": labels, "multi_label": multi_label, name: value}
    try:
        entries = classifier(PHOTO, **arguments)
    except ValueError as error:
        assert name in str(error)
        # a weight may be fine as a number and too large for the likelihoods
        assert repr(value) in str(error) or (name == "prior_weight" and value > 1e30)
        return
    if name == "top_k":
        assert len(entries) == (3 if value is None else min(value, 3))
        labels = [entry["label"] for entry in entries]
        entries += classifier(PHOTO, **{**arguments, name: None})[len(entries) :]
    if name == "abstain_threshold" and value not in (None, -math.inf):
        entries = [{**entry, "label": entry["label"] or ""} for entry in entries]
        labels = [*labels, ""]
    check(entries, ["cat", "dog", "hot dog"] if name == "top_k" else labels, multi_label)


# Images


def classify_or_name(classifier, image, name: str) -> None:
    try:
        entries = classifier(image, candidate_labels=["cat", "dog"])
    except ValueError as error:
        assert "cannot read the image" in str(error) and name in str(error)
    else:
        check(entries, ["cat", "dog"])


@odd(120)
@pytest.mark.filterwarnings("ignore")  # Pillow's, about damaged files
@given(mutated_photos)
def test_damaged_files(classifier, tmp_path, content):
    path = tmp_path / "damaged.image"
    path.write_bytes(content)
    classify_or_name(classifier, path, "damaged.image")
    classify_or_name(classifier, "data:image/png;base64," + base64.b64encode(content).decode(), "data:image/png")
    with pytest.raises(ValueError, match="got bytes: "):
        classifier(content, candidate_labels=["cat"])
    try:
        image = PIL.Image.open(io.BytesIO(content))
    except Exception:  # whatever Pillow raises is not the pipeline's
        return
    classify_or_name(classifier, image, "Image")


shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
dtypes = st.sampled_from(["uint8", "int64", "bool", "float16", "float32", "float64", "complex64", "object", "U1"])


@odd()
@given(shapes, dtypes, st.sampled_from([0, 1, 0.5, 255, -1, math.nan, math.inf]))
@example((0, 0, 3), "uint8", 0)
@example((1, 3000, 3), "uint8", 0)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_arrays(classifier, shape, dtype, value):
    value = 0 if dtype in ("uint8", "int64") and not math.isfinite(value) else value
    array = np.full(shape, 0 if dtype == "uint8" and value == -1 else value, dtype=dtype)
    classify_or_name(classifier, array, "array(")


def test_huge_images_are_refused_before_they_are_decoded(classifier, tmp_path):
    path = tmp_path / "huge.bmp"
    content = bytearray(FILES["BMP"])
    content[18:26] = (60_000).to_bytes(4, "little") * 2
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"huge\.bmp.*exceeds limit"):
        classifier(path, candidate_labels=["cat"])
