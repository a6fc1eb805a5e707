"""What the web demo computes, and the code that it shows."""

import math
from pathlib import Path

import pytest
import torch
from demo_room import LABELS, ODD_LABELS, TEMPLATES, WEIGHTS
from small_checkpoint import save_checkpoint

from ig_captioner import DEFAULT_CHECKPOINT, IGZeroShotImageClassificationPipeline
from ig_captioner.compiled_labels import encode_for
from ig_captioner.demo.inputs import open_photo
from ig_captioner.demo.scores import Captioner, RankedLabel, Scores, TextTokens, as_code, large_set
from tiny import naive_log_likelihoods


# Scores


def by_label(rows: list[RankedLabel]) -> dict[str, tuple]:
    return {row.label: tuple(row)[1:] for row in rows}


def expected_rows(captioner, photo, labels, template, prior_weight) -> list[dict]:
    classify = IGZeroShotImageClassificationPipeline(
        model=captioner.scorer.model,
        tokenizer=captioner.scorer.processor.tokenizer,
        image_processor=captioner.scorer.processor.image_processor,
        device="cpu",
    )
    settings = {"hypothesis_template": template, "prior_weight": prior_weight, "return_log_likelihoods": True}
    return classify(photo, candidate_labels=list(labels), **settings)


def check_rows(rows: list[RankedLabel], expected: list[dict]) -> None:
    assert [row.label for row in rows] == [entry["label"] for entry in expected]
    for row, entry in zip(rows, expected, strict=True):
        assert row._asdict() == pytest.approx(entry, abs=1e-4)


def test_every_prior_weight_follows_from_one_run_of_the_model(captioner, photo, pixel_values, monkeypatch):
    scores = captioner.classify(pixel_values, LABELS, TEMPLATES)
    expected = {weight: expected_rows(captioner, photo, LABELS, TEMPLATES, weight) for weight in WEIGHTS}
    monkeypatch.setattr(captioner, "scorer", None)
    for weight in WEIGHTS:
        check_rows(scores.ranked(weight), expected[weight])
        assert scores.ranked(weight, 2) == scores.ranked(weight)[:2]
    orders = {tuple(row.label for row in scores.ranked(weight)) for weight in WEIGHTS}
    assert len(orders) > 1  # the comparison is not of equal rankings


def test_tokens_are_what_one_forward_pass_each_gives(captioner, pixel_values):
    scores = captioner.classify(pixel_values, LABELS, ["a {}."])
    for label, tokens, caption, prior in zip(
        LABELS, scores.tokens, scores.caption_log_likelihood, scores.prior_log_likelihood, strict=True
    ):
        assert tokens.ids == captioner.scorer.processor.tokenizer(f"a {label}.")["input_ids"]
        with torch.no_grad():
            conditional = naive_log_likelihoods(captioner.scorer.model, pixel_values[0], tokens.ids)
            unconditional = naive_log_likelihoods(captioner.scorer.model, None, tokens.ids)
        assert tokens.conditional == pytest.approx(conditional, abs=1e-4)
        assert tokens.unconditional == pytest.approx(unconditional, abs=1e-4)
        assert sum(tokens.conditional) == pytest.approx(caption, abs=1e-4)
        assert sum(tokens.unconditional) == pytest.approx(prior, abs=1e-4)
        assert tokens.information_gain == pytest.approx(caption - prior, abs=1e-4)
        assert tokens.confidence == pytest.approx(math.exp(caption / len(tokens.ids)), rel=1e-4)


def test_texts_that_are_cut_are_counted(captioner, pixel_values):
    fitting, cut = "cat " * (captioner.max_tokens - 1), "cat " * captioner.max_tokens
    assert captioner.classify(pixel_values, [fitting, "dog"], ["{}"]).num_cut == 0
    assert captioner.classify(pixel_values, [fitting, cut, cut + "dog"], ["{}"]).num_cut == 2


def test_scores_that_underflow():
    rows = Scores(("a", "b"), ("{}",), [-9000.0, -1.0], [-1.0, -9000.0]).ranked(1.0)
    assert [row.label for row in rows] == ["b", "a"] and [row.score for row in rows] == [1.0, 0.0]


def test_the_large_set_is_compiled_once(captioner, photo, pixel_values, monkeypatch):
    assert len(large_set()) == len(set(large_set())) == 283
    compiled, compile_texts = [], captioner.scorer.model.compile_texts
    monkeypatch.setattr(
        captioner.scorer.model,
        "compile_texts",
        lambda *args, **kwargs: compiled.append(1) or compile_texts(*args, **kwargs),
    )
    scores = captioner.classify_large_set(pixel_values, TEMPLATES)
    other = captioner.classify_large_set(-pixel_values, TEMPLATES)
    assert len(compiled) == 1 and other.caption_log_likelihood != scores.caption_log_likelihood
    expected = expected_rows(captioner, photo, large_set(), TEMPLATES, 1.0)
    rows = by_label(scores.ranked(1.0))
    for entry in expected:
        assert rows[entry.pop("label")][2:] == pytest.approx((entry["information_gain"], entry["score"]), abs=1e-4)


def test_captions_are_scored_as_texts(captioner, pixel_values):
    caption = captioner.caption(pixel_values)
    ids = captioner.scorer.model.generate(pixel_values=pixel_values, max_new_tokens=captioner.max_tokens - 1)
    assert caption.text == captioner.scorer.processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
    text = encode_for(captioner.scorer.model, captioner.scorer.processor.tokenizer, [caption.text])
    with torch.no_grad():
        scores = captioner.scorer.model.score(pixel_values, **text, prior_weight=1.0)
    assert sum(caption.tokens.conditional) == pytest.approx(scores.caption_log_likelihood.item(), abs=1e-4)
    assert caption.tokens.information_gain == pytest.approx(scores.information_gain.item(), abs=1e-4)


@pytest.mark.parametrize("text", ["a cat.", "émile's 🐱 cup of coffee, 猫", "שלום", "\x00\x1b", "\ufffd\ufffd x", ""])
def test_pieces_are_the_text_without_broken_characters(shipped, text):
    ids = shipped.scorer.processor.tokenizer(text)["input_ids"]
    values = [float(2**i) for i in range(len(ids))]  # a sum of them says which they were
    pieces = shipped.pieces(TextTokens(ids, values, [1.0] * len(ids)))
    assert "".join(piece.text for piece in pieces).strip() == text.strip()
    assert sum(piece.conditional for piece in pieces) == sum(values) and pieces[-1] == ("", values[-1], 1.0)
    assert sum(piece.unconditional for piece in pieces) == len(ids)
    assert "\ufffd" in text or not any("\ufffd" in piece.text for piece in pieces)
    if text == "a cat.":
        assert [piece.text.strip() for piece in pieces] == ["a", "cat", ".", ""]


# Code


@pytest.mark.parametrize("labels", [LABELS, ODD_LABELS])
def test_code_gives_the_same_scores(captioner, checkpoint, photo, labels, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photo.save("photo.jpg", quality=95)
    scores = captioner.classify(captioner.read(open_photo(Path("photo.jpg").read_bytes())), labels, ['it\'s "a" {}\\'])
    code = as_code(checkpoint, scores, 0.35)
    assert not any(character in code for character in "\u202e\x00\x1b")  # code reads as it runs
    names: dict = {}
    exec(compile(code, "code", "exec"), names)
    check_rows(scores.ranked(0.35), names["predictions"])
    assert len(capsys.readouterr().out.splitlines()) == len(labels)


def test_code_of_a_calibrated_checkpoint_gives_the_scores_of_the_page(photo, tmp_path, monkeypatch):
    checkpoint = str(save_checkpoint(tmp_path / "tiny", score_temperature=2.0, abstain_threshold=100.0))
    monkeypatch.chdir(tmp_path)
    photo.save("photo.jpg", quality=95)
    captioner = Captioner(checkpoint, "cpu")
    scores = captioner.classify(captioner.read(open_photo(Path("photo.jpg").read_bytes())), LABELS, ["a {}"])
    rows = scores.ranked(1.0)
    first, second = rows[:2]
    ratio = math.exp((first.information_gain - second.information_gain) / 2)
    assert first.score / second.score == pytest.approx(ratio)
    names: dict = {}
    exec(compile(as_code(checkpoint, scores, 1.0), "code", "exec"), names)
    check_rows(rows, names["predictions"])  # without "none of these"
    large = captioner.classify_large_set(captioner.read(photo), ["a {}"])
    assert (large.temperature, large.abstain_threshold) == (2.0, 100.0)


def test_code_of_the_shipped_checkpoint_shows_no_path(shipped):
    code = as_code(shipped.name, Scores(("cat",), ("{}",), [-1.0], [-1.0]), 1)
    assert "model=DEFAULT_CHECKPOINT,\n" in code and DEFAULT_CHECKPOINT not in code
    compile(code, "code", "exec")
