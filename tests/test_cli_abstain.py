"""`ig-captioner classify` where several labels, or none, may fit."""

import json

import pytest
from command_line import LABELS
from small_checkpoint import save_checkpoint


pytestmark = pytest.mark.usefixtures("here")


def predictions(run, *options: str) -> list[dict]:
    code, lines, errors = run("classify", "0.png", "--labels", *LABELS, "--format", "jsonl", *options)
    assert (code, errors) == (0, [])
    return json.loads(lines[0])["predictions"]


def test_none_of_these_is_an_answer(run):
    plain = predictions(run)
    best = plain[0]["information_gain"]
    above = predictions(run, "--abstain-below", str(best + 1))
    assert above[0]["label"] is None and above[0]["information_gain"] == best + 1
    assert [row["label"] for row in above[1:]] == [row["label"] for row in plain]
    below = predictions(run, "--abstain-below", str(best - 1e-3))
    assert below[0]["label"] == plain[0]["label"] and None in {row["label"] for row in below}
    code, lines, _ = run("classify", "0.png", "--labels", *LABELS, "--abstain-below", str(best + 1))
    assert code == 0 and lines[4].split()[-3:] == ["(none", "of", "these)"]


def test_labels_on_their_own(run):
    for row in predictions(run, "--multi-label"):
        assert (row["score"] > 0.5) == (row["information_gain"] > 0)
    code, lines, _ = run("classify", "0.png", "--labels", *LABELS, "--multi-label")
    assert code == 0 and "each label on its own" in lines[0]


def test_a_saved_threshold_can_be_switched_off(run, here):
    model = ("--model", str(save_checkpoint(here / "calibrated", abstain_threshold=1e4)))
    assert predictions(run, *model)[0]["label"] is None
    off = predictions(run, *model, "--abstain-below=-inf")
    assert {row["label"] for row in off} == set(LABELS)


def test_tables_tell_what_was_calibrated(run, here):
    model = str(save_checkpoint(here / "calibrated", score_temperature=2.5, abstain_threshold=-1.25))
    notes = {
        (): 'softmax of IG / 2.5 over the labels, with "none of these" at IG = -1.25',
        ("--abstain-below", "3"): 'softmax of IG / 2.5 over the labels, with "none of these" at IG = 3',
        ("--abstain-below=-inf", "--multi-label"): "sigmoid of IG / 2.5, each label on its own",
    }
    for options, note in notes.items():
        lines = run("classify", "0.png", "--labels", *LABELS, "--model", model, *options)[1]
        assert lines[0].split("; score: ")[1] == note
    described = json.loads(run("info", model, "--format", "jsonl")[1][0])
    assert (described["score_temperature"], described["abstain_threshold"]) == (2.5, -1.25)


@pytest.mark.parametrize("text", ["nan", "inf", "none"])
def test_a_threshold_must_be_a_number(run, text):
    code, lines, errors = run("classify", "0.png", "--labels", "cat", "--abstain-below", text)
    assert (code, lines, len(errors)) == (2, [], 1) and repr(text) in errors[0] and "-inf" in errors[0]
