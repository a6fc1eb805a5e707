"""`ig-captioner score` and `retrieve` against the model, pair by pair."""

import csv
import io
import json
import os

import pytest
import torch
from command_line import FIELDS, write_photo

from ig_captioner import IGCaptionerForConditionalGeneration
from ig_captioner.checkpoint import load_model, load_processor
from ig_captioner.processing_ig_captioner import load_rgb_image


pytestmark = pytest.mark.usefixtures("here")


TEXTS = ["a cat", "a photo of a dog.", "of", "a cat"]
PHOTOS = ["0.png", "1.png", "2.png"]
SCORES = FIELDS[2:]


@pytest.fixture
def expected(checkpoint, here):
    """One photo and one text at a time: log P(T|I), log P(T) and information gain at a prior weight of 0.75."""
    model = load_model(IGCaptionerForConditionalGeneration, checkpoint, dtype="float32")
    processor = load_processor(checkpoint)

    def score(photo: str, text: str) -> list[float]:
        pixels = processor(images=load_rgb_image(photo), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            scores = model.score(pixels, **processor(text=[text], return_tensors="pt"), prior_weight=0)
        caption, prior = scores.caption_log_likelihood.item(), scores.prior_log_likelihood.item()
        return [caption, prior, caption - 0.75 * prior]

    return {(photo, text): score(photo, text) for photo in PHOTOS for text in TEXTS}


@pytest.mark.parametrize("batch_size", ["1", "2", "8"])
def test_scores_are_those_of_single_pairs(run, expected, batch_size):
    arguments = ["score", *PHOTOS, "--texts", *TEXTS, "--batch-size", batch_size]
    code, lines, errors = run(*arguments, "--format", "jsonl")
    assert (code, errors) == (0, [])
    rows = list(csv.DictReader(io.StringIO("\n".join(run(*arguments, "--format", "csv")[1]))))
    assert list(rows[0]) == ["image", "text", *SCORES]
    assert [(row["image"], row["text"]) for row in rows] == [(photo, text) for photo in PHOTOS for text in TEXTS]
    for photo, line in zip(PHOTOS, lines, strict=True):
        result = json.loads(line)
        assert list(result) == ["image", "texts"] and result["image"] == photo
        for text, row in zip(TEXTS, result["texts"], strict=True):
            assert list(row) == ["text", *SCORES] and row["text"] == text
            assert [row[name] for name in SCORES] == pytest.approx(expected[photo, text], abs=1e-4)
            in_csv = rows.pop(0)
            assert [float(in_csv[name]) for name in SCORES] == [row[name] for name in SCORES]


def test_the_matrix_of_scores(run, expected, monkeypatch):
    monkeypatch.setattr("shutil.get_terminal_size", lambda *arguments, **options: os.terminal_size((30, 24)))
    code, lines, errors = run("score", *PHOTOS, "--texts", *TEXTS)
    assert (code, errors) == (0, []) and lines[0] == "IG = log P(T|I) - 0.75 * log P(T), in nats"
    assert lines[2:6] == [f"  [{number}]  {text}" for number, text in enumerate(TEXTS, 1)]
    tables = "\n".join(lines[7:]).split("\n\n")
    assert len(tables) == 2 and max(map(len, lines[7:])) <= 30
    start = 0
    for table in tables:
        header, *rows = table.splitlines()
        *numbers, last = header.split()
        assert last == "photo" and numbers == [f"[{start + number}]" for number in range(1, len(numbers) + 1)]
        for photo, row in zip(PHOTOS, rows, strict=True):
            *gains, name = row.split()
            texts = TEXTS[start : start + len(numbers)]
            assert name == photo and [*map(float, gains)] == pytest.approx(
                [expected[photo, text][2] for text in texts], abs=0.006
            )
        start += len(numbers)
    assert start == len(TEXTS)
    assert run("score", "missing.png", "--texts", *TEXTS)[:2] == (1, [])


def test_texts_of_a_file(run, here):
    (here / "texts.txt").write_bytes("\ufeffa photo of a dog.\r\n\n of".encode())
    given = run("score", *PHOTOS, "--texts", "a cat", "a photo of a dog.", "of")
    code, lines, notes = run("score", *PHOTOS, "--texts", "a cat", "--texts-file", "texts.txt")
    assert given == (0, lines, []) and code == 0
    assert len(notes) == 1 and "empty lines between others" in notes[0]
    code, lines, errors = run("score", *PHOTOS, "--texts-file", "missing.txt")
    assert (code, lines, errors) == (1, [], ["ig-captioner: error: no such file: 'missing.txt'"])


def test_photos_for_a_text(run, here, expected):
    for seed, name in enumerate(PHOTOS):
        write_photo(here / "photos" / name, seed)
    arguments = ["retrieve", "photos", "missing.png", "--query", "a cat", "of", "--top-k", "2"]
    code, lines, errors = run(*arguments, "--format", "jsonl")
    assert code == 1 and len(errors) == 1 and "missing.png" in errors[0]
    for query, line in zip(["a cat", "of"], lines, strict=True):
        result = json.loads(line)
        best = sorted(PHOTOS, key=lambda photo: -expected[photo, query][0])[:2]
        assert list(result) == ["query", "images"] and result["query"] == query
        assert [row["image"] for row in result["images"]] == [f"photos/{photo}" for photo in best]
        for photo, row in zip(best, result["images"], strict=True):
            assert [row[name] for name in SCORES] == pytest.approx(expected[photo, query], abs=1e-4)
    code, table, _ = run(*arguments)
    assert table[2] == "a cat" and len(table) == 2 + 2 * 4 + 1
    assert [line.split()[-1] for line in table[4:6]] == [row["image"] for row in json.loads(lines[0])["images"]]


def test_texts_for_a_photo(run, here, expected):
    (here / "texts.txt").write_text("\n".join(TEXTS))
    code, lines, errors = run("retrieve", *PHOTOS, "--texts-file", "texts.txt", "--top-k", "2", "--format", "jsonl")
    assert (code, errors) == (0, [])
    for photo, line in zip(PHOTOS, lines, strict=True):
        result = json.loads(line)
        best = sorted(TEXTS, key=lambda text: -expected[photo, text][2])[:2]
        assert result["image"] == photo and [row["text"] for row in result["texts"]] == best


def test_a_prior_weight_changes_the_gain_alone(run, expected):
    options = ["--prior-weight", "0", "--format", "jsonl"]
    for command in (["score", "0.png", "--texts", "of"], ["retrieve", "0.png", "--query", "of"]):
        code, (line,), _ = run(*command, *options)
        (row,) = list(json.loads(line).values())[1]
        assert code == 0 and row["information_gain"] == row["caption_log_likelihood"]
        assert row["prior_log_likelihood"] == pytest.approx(expected["0.png", "of"][1], abs=1e-4)


def test_scores_that_are_no_numbers_are_an_error(run, checkpoint, monkeypatch):
    def load_broken(*args, **kwargs):
        model = load_model(*args, **kwargs)
        model.lm_head.weight.data.fill_(float("nan"))
        return model

    monkeypatch.setattr("ig_captioner.captioners.own.load_model", load_broken)
    for command in (["classify", "0.png", "--labels", "cat"], ["score", "0.png", "--texts", "a"], ["caption", "0.png"]):
        for form in ("table", "csv", "jsonl"):
            code, lines, errors = run(*command, "--format", form)
            assert (code, lines, len(errors)) == (1, [], 1) and "nan" in errors[0], (command, form)
