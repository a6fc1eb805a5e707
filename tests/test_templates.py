"""A checkpoint's own templates and the line that says what it is: kept in its folder, used wherever none is given."""

import json
import sys

import pytest
import torch
from small_checkpoint import make_config, make_pipeline, save_checkpoint

from ig_captioner import (
    DEFAULT_CHECKPOINT,
    IGCaptionerConfig,
    IGCaptionerForZeroShotImageClassification,
    IGCaptionerProcessor,
    cli,
    compile_labels,
)
from ig_captioner.card import CardFacts, write_facts
from ig_captioner.evaluation.scores import classify_images
from ig_captioner.input_rules import default_templates
from ig_captioner.release import read_in_short


pytestmark = pytest.mark.usefixtures("here")


OWN = ["photo of a {}", "a {}."]
LABELS = ["cat", "dog", "photo of a cat"]


@pytest.fixture
def folder(tmp_path):
    folder = save_checkpoint(tmp_path / "own", prompt_templates=OWN)
    write_facts(folder, CardFacts(in_short="It knows\n cats."))
    return folder


@pytest.fixture
def classifier(folder):
    return make_pipeline(IGCaptionerForZeroShotImageClassification.from_pretrained(folder).eval())


def test_templates_are_saved_and_loaded(folder, tmp_path):
    config = IGCaptionerConfig.from_pretrained(folder)
    assert config.prompt_templates == OWN == default_templates(config)
    config.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["prompt_templates"] == OWN
    assert default_templates(make_config()) == ["a photo of a {}."] and make_config().prompt_templates is None


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ([], "at least one template"),
        (["a {}", "a photo"], "one {} in it, got 'a photo'"),
        (["{} {}"], "one {} in it, got '{} {}'"),
        ("a {}", "prompt_templates"),
        ([3], "prompt_templates"),
    ],
)
def test_templates_that_are_none_are_refused(templates, message):
    with pytest.raises(Exception, match=message):
        make_config(prompt_templates=templates)


def test_pipeline_and_compile_labels_take_the_checkpoints_templates(classifier, photos):
    arguments = {"candidate_labels": LABELS, "return_log_likelihoods": True}
    own = classifier(photos[0], hypothesis_template=OWN, **arguments)
    assert classifier(photos[0], **arguments) == classifier(photos[0], hypothesis_template=None, **arguments) == own
    assert classifier(photos[0], hypothesis_template="{}", **arguments) != own
    compiled = compile_labels(classifier.model, classifier.tokenizer, LABELS)
    assert compiled.templates == tuple(OWN)
    assert classifier(photos[0], compiled, return_log_likelihoods=True) == own
    processor = IGCaptionerProcessor(classifier.image_processor, classifier.tokenizer)
    samples = [(photos[0], 0)]
    matrix, _ = classify_images(classifier.model, processor, samples, LABELS)
    expected, _ = classify_images(classifier.model, processor, samples, LABELS, OWN)
    assert all(map(torch.equal, matrix, expected))


def test_classify_takes_the_checkpoints_templates(run, folder):
    (folder.parent / "labels.txt").write_text("\n".join(LABELS))
    command = ["classify", "0.png", "--format", "jsonl", "--model", str(folder)]
    own = run(*command, "--labels", *LABELS)
    assert own == run(*command, "--labels", *LABELS, "--template", *OWN) == run(*command, "--labels-file", "labels.txt")
    assert own[0] == 0 and own != run(*command, "--labels", *LABELS, "--template", "a photo of a {}.")
    assert run("compile-labels", "kept", "--model", str(folder), "--labels", *LABELS)[1][0].endswith("in 2 templates")
    assert run(*command, "--compiled-labels", "kept") == own


def test_the_demo_begins_with_the_checkpoints_templates(folder):
    demo = pytest.importorskip("ig_captioner.demo.app", exc_type=ImportError)
    blocks = demo.build_app(str(folder), "cpu").blocks.values()
    (template,) = [block.value for block in blocks if getattr(block, "elem_id", None) == "template"]
    assert template.splitlines() == OWN
    (head,) = [block.value for block in blocks if "<h1>" in str(getattr(block, "value", ""))]
    assert "It knows cats." in head and "own" in head


def test_info_says_what_a_checkpoint_is(run, folder, here):
    described = json.loads(run("info", str(folder), "--format", "jsonl")[1][0])
    assert described["in_short"] == "It knows cats." and described["templates"] == "photo of a {} | a {}."
    bare = save_checkpoint(here / "bare")
    assert json.loads(run("info", str(bare), "--format", "jsonl")[1][0])["in_short"] == "unknown"
    (folder / "card.yaml").write_text("in_short: [")
    assert read_in_short(folder) is None


def test_a_line_says_what_the_model_is_that_nobody_chose(capsys, monkeypatch, folder, here):
    monkeypatch.setattr(sys.modules["ig_captioner.cli.main"], "DEFAULT_CHECKPOINT", str(folder))
    asked = ["classify", "0.png", "1.png", "--labels", "cat"]
    capsys.readouterr()  # what the fixtures have caused
    assert cli.main(asked) == 0
    assert capsys.readouterr().err == (
        "ig-captioner: no --model given, so the checkpoint in the package: It knows cats.\n"
    )
    assert cli.main([*asked, "--model", str(folder)]) == 0
    assert capsys.readouterr().err == ""
    assert "Flickr8k" in read_in_short(DEFAULT_CHECKPOINT)
