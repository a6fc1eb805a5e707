"""Class names and templates that come with the package, and those of files."""

import json

import pytest

from ig_captioner.data.prompts import FOLDER, known_prompts, load_prompts, read_class_names, read_templates
from ig_captioner.input_rules import format_labels


# The published numbers of classes: a file that lost a line would show.
NUMBER_OF_CLASSES = {
    "birdsnap": 500,
    "caltech101": 102,
    "cifar10": 10,
    "cifar100": 100,
    "clevrcounts": 8,
    "country211": 211,
    "describabletextures": 47,
    "eurosat": 10,
    "everyday": 283,
    "facialemotionrecognition2013": 7,
    "fgvcaircraft": 100,
    "flowers102": 102,
    "food101": 101,
    "gtsrb": 43,
    "hatefulmemes": 2,
    "imagenet": 1000,
    "kinetics700": 700,
    "kitti": 4,
    "mnist": 10,
    "oxfordpets": 37,
    "pascalvoc2007": 20,
    "patchcamelyon": 2,
    "resisc45": 45,
    "sst2": 2,
    "stanfordcars": 196,
    "stl10": 10,
    "sun397": 397,
    "ucf101": 101,
}


@pytest.mark.parametrize("name", NUMBER_OF_CLASSES)
def test_prompts_are_complete_and_usable(name):
    class_names, templates = load_prompts(name)
    assert len(class_names) == NUMBER_OF_CLASSES[name]
    assert len(set(class_names)) == {"imagenet": 998}.get(name, len(class_names))
    assert len(set(templates)) == len(templates)
    assert all(text == text.strip() and text for text in class_names + templates)
    assert len(format_labels(class_names, templates)) == len(class_names) * len(templates)
    source = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))["source"]
    assert ("written for this project" if name == "everyday" else "(MIT)") in source


def test_names_are_known_whatever_their_case():
    assert known_prompts() == sorted(NUMBER_OF_CLASSES)
    assert load_prompts("CIFAR10") == load_prompts("cifar10")
    assert load_prompts("cifar10").class_names[:2] == ["airplane", "automobile"]
    assert load_prompts("FacialEmotionRecognition2013").class_names[3:5] == ["happy", "sad"]


def test_files_of_the_same_form_and_of_lines(tmp_path):
    path, lines = tmp_path / "mine.json", tmp_path / "mine.txt"
    path.write_text(json.dumps({"classes": ["cat", ["dog", "hound"]], "templates": ["a {}"]}))
    lines.write_text("\ufeffcat\n\n dog \n", encoding="utf-8")
    assert load_prompts(path) == (["cat", "dog"], ["a {}"])
    assert read_class_names(str(path)) == read_class_names(str(lines)) == ["cat", "dog"]
    assert read_templates(str(path)) == ["a {}"] and len(read_templates("cifar10")) == 18


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"classes": ["cat"]}',
        '{"classes": [], "templates": ["{}"]}',
        '{"classes": [1], "templates": []}',
        "[" * 100_000,
    ],
)
def test_wrong_files_are_named(tmp_path, content):
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"mine\.json does not hold prompts"):
        load_prompts(path)


def test_unknown_names_and_unreadable_lines(tmp_path):
    with pytest.raises(ValueError, match=r"'cifar11'.*cifar10, cifar100.*imagenet"):
        read_class_names("cifar11")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xff")
    for name, message in (("empty.txt", "no lines in"), ("binary.txt", "not UTF-8")):
        with pytest.raises(ValueError, match=message):
            read_templates(str(tmp_path / name))
