"""What the web demo draws, and each handler of its page."""

import ast
import asyncio
import math
import re
import threading

import numpy as np
import pytest
import torch
from demo_room import FUZZ, LABELS, ODD_LABELS, ODD_TEXTS, TAGS, WEIGHTS, Elements, encoded
from hypothesis import given
from hypothesis import strategies as st

from ig_captioner.demo import examples
from ig_captioner.demo import page as demo_page
from ig_captioner.demo.inputs import MAX_LABELS, parse_labels
from ig_captioner.demo.page import (
    CSS,
    LESS_LIKELY,
    LIKELIER,
    PAPER,
    caption_view,
    header,
    label_bars,
    number,
    token_view,
    visible,
)
from ig_captioner.demo.scores import Piece, RankedLabel, Scores, TextTokens, as_code, large_set


# Drawing


def rows_of(*pairs: tuple[float, float], weight: float = 1.0) -> list[RankedLabel]:
    names = tuple(f"label {i}" for i in range(len(pairs)))
    return Scores(names, "{}", [pair[0] for pair in pairs], [pair[1] for pair in pairs]).ranked(weight)


def test_longer_bars_are_higher_values():
    rows = rows_of((-10.0, -12.0), (-5.0, -4.0), (-12.0, -13.0))
    page = Elements(label_bars(rows, 3, 1.0))
    bars = [page.styles("ig-bar")[i::4] for i in range(4)]
    assert all(bar["left"] == 0 for column in (bars[0], *bars[2:]) for bar in column)
    for column, values in (
        (bars[0], [row.score for row in rows]),
        (bars[2], [row.caption_log_likelihood for row in rows]),
        (bars[3], [row.prior_log_likelihood for row in rows]),
    ):
        widths = [bar["width"] for bar in column]
        assert sorted(widths) == [width for _, width in sorted(zip(values, widths, strict=True))]
        assert all(0 < width <= 100 for width in widths)


def test_bars_are_as_long_as_what_they_show():
    page = Elements(label_bars(rows_of((-10.0, -20.0), (-5.0, -4.0), weight=0.5), 2, 0.5))
    bars = page.styles("ig-bar")
    assert len(bars) == 8
    score, gain, caption, prior = zip(bars[:4], bars[4:], strict=True)
    assert [bar["width"] for bar in score] == pytest.approx([95.26, 4.74], abs=0.01)  # softmax of 0 and -3 nats
    assert gain == ({"left": 100, "width": 0}, {"left": 0, "width": 100})
    # on one scale, from -21 nats to 0
    assert [bar["width"] for bar in caption] == pytest.approx([100 * 11 / 21, 100 * 16 / 21], abs=0.01)
    assert [bar["width"] for bar in prior] == pytest.approx([100 * 1 / 21, 100 * 17 / 21], abs=0.01)
    assert "0.5 · log P(T)" in page.text


def test_blue_is_likelier_and_orange_less_likely():
    page = Elements(label_bars(rows_of((-1.0, -3.0), (-5.0, -4.0)), 2, 1.0))
    assert [len(page.styles(name)) for name in ("ig-bar", "ig-below")] == [8, 1]
    style = "background:color-mix(in srgb, var(--ig-{}) "
    up, down = token_view([Piece("a", -1.0, -2.0)]), token_view([Piece("a", -2.0, -1.0)])
    assert style.format("likelier") in up and style.format("less-likely") in down
    assert f"--ig-likelier: {LIKELIER}" in CSS and f"--ig-less-likely: {LESS_LIKELY}" in CSS


def test_bars_fit_their_tracks():
    for weight in WEIGHTS:
        rows = rows_of((-10.0, -20.0), (-5.0, -40.0), (-3.0, -1.0), (0.0, 0.0), weight=weight)
        for style in Elements(label_bars(rows, 4, weight)).styles("ig-bar"):
            assert style["left"] >= 0 and style["width"] >= 0 and style["left"] + style["width"] <= 100.01
    assert "nan" not in label_bars(rows_of((0.0, 0.0)), 1, 1.0)


def test_the_choice_of_each_column_is_marked():
    page = Elements(label_bars(rows_of((-10.0, -20.0), (-5.0, -4.0)), 2, 1.0))
    marked = [a["class"] for _, a in page.found if "ig-best" in (a.get("class") or "")]
    assert marked == [f"ig-cell {name} ig-best" for name in ("ig-score", "ig-gain", "ig-caption")]
    assert "The best 2 of 998 labels" in Elements(label_bars(rows_of((-1.0, -1.0), (-2.0, -1.0)), 998, 1.0)).text


@pytest.mark.parametrize("label", ODD_LABELS)
def test_what_visitors_type_stays_text(captioner, label):
    row = RankedLabel(label, -1.0, -2.0, 1.0, 1.0)
    views = [label_bars([row], 1, 1.0), token_view([Piece(label, -1.0, -2.0), Piece("", -0.1, -0.1)])]
    tokens = TextTokens([5, 2], [-1.0, -0.1], [-2.0, -0.1])
    views.append(caption_view(demo_page.Caption(label, tokens), [Piece(label, -1.0, -2.0), Piece("", -0.1, -0.1)]))
    for view in views:
        page = Elements(view)
        assert {tag for tag, _ in page.found} <= TAGS
        shown = label.replace("\x00", "\u2400").replace("\x1b", "\u241b")
        assert shown in page.text


def test_the_header_names_the_model_and_links_to_what_explains_it(checkpoint):
    folder, name = header(checkpoint, "it knows <little>"), header("me/my model", None)
    links = [a["href"] for tag, a in Elements(folder).found if tag == "a"]
    assert links == [PAPER] and "Model: tiny. it knows <little>" in Elements(folder).text
    links = [a["href"] for tag, a in Elements(name).found if tag == "a"]
    assert links == [PAPER, "https://huggingface.co/me/my%20model"] and "Model: me/my model." in Elements(name).text


def test_numbers():
    assert [number(value) for value in (-1.234, 0.0, -0.001, 12.0)] == ["&minus;1.23", "0.00", "0.00", "12.00"]
    assert [number(value, "+") for value in (-1.0, 0.001, 2.0)] == ["&minus;1.00", "0.00", "+2.00"]
    assert visible("\ud800\x7f\ue000") == "[U+D800][U+007F][U+E000]"


# Handlers of the page


def test_read(handlers, photo, pixel_values, tmp_path, raises_on_the_page, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    (tmp_path / "photo").write_bytes(encoded(photo))
    (tmp_path / "text.png").write_text("no <b>image</b>")
    values, preview = handlers.read({"path": str(tmp_path / "photo"), "url": "http://127.0.0.1/other"})
    assert torch.equal(values, pixel_values) and np.array_equal(preview, photo)
    assert handlers.restore(preview) is preview and handlers.restore(None) is None
    with raises_on_the_page("no photo that can be read"):
        handlers.read({"path": str(tmp_path / "text.png")})
    with raises_on_the_page("Choose a photo"):
        handlers.read(None)
    for upload in ({}, {"path": None}, {"path": __file__}, {"path": "<b>"}):
        with raises_on_the_page("no uploaded file"):
            handlers.read(upload)


def test_fetch(handlers, site, photo, pixel_values, raises_on_the_page):
    shown, values, preview = asyncio.run(handlers.fetch(f"http://{site}/photo"))
    assert preview.size == photo.size
    assert np.array_equal(shown, photo) and torch.equal(values, pixel_values)
    with raises_on_the_page("not on the public internet"):
        asyncio.run(handlers.fetch("http://10.0.0.1/"))


def test_photos_are_decoded_off_the_event_loop(handlers, site, monkeypatch):
    threads = []
    monkeypatch.setattr(handlers.captioner, "read", lambda photo: threads.append(threading.current_thread()))
    asyncio.run(handlers.fetch(f"http://{site}/photo"))
    assert len(threads) == 1 and threads[0] is not threading.current_thread()


def test_classify(handlers, captioner, checkpoint, pixel_values, raises_on_the_page):
    scores, bars, code, choice, tokens = handlers.classify(pixel_values, "cat, dog, photo", "a {}", 0.5)
    best = scores.ranked(0.5)[0].label
    assert scores.labels == ("cat", "dog", "photo") and scores.templates == ("a {}",)
    assert bars == label_bars(scores.ranked(0.5), 3, 0.5) and code == as_code(checkpoint, scores, 0.5)
    assert choice.value == best and [value for _, value in choice.choices] == list(scores.labels)
    own = scores.tokens[scores.labels.index(best)]
    assert tokens == token_view(captioner.pieces(own)) == handlers.explain(scores, best)
    for values, text, template, match in (
        (None, "cat", "{}", "Choose a photo"),
        (pixel_values, "", "{}", "no labels"),
        (pixel_values, "cat", "a photo", "has no {}"),
        (pixel_values, "\n".join(map(str, range(10_000))), "{}", "10,000 labels"),
        (pixel_values, "<b>" * 200, "{}", "&lt;b&gt;"),
    ):
        with raises_on_the_page(match):
            handlers.classify(values, text, template, 1.0)


def test_the_slider_ranks_again(handlers, captioner, pixel_values, monkeypatch):
    scores = handlers.classify(pixel_values, "\n".join(LABELS), "{}", 1.0)[0]
    large = handlers.classify_large_set(pixel_values, "{}", 1.0)[0]
    monkeypatch.setattr(captioner.scorer, "model", None)  # only its tokenizer is needed
    for weight in WEIGHTS:
        bars, code, *_ = handlers.rank(scores, weight)
        assert bars == label_bars(scores.ranked(weight), 4, weight) and f"prior_weight={weight!r}" in code
        assert handlers.rank_large_set(large, weight) == label_bars(large.ranked(weight, 20), len(large_set()), weight)
    assert handlers.rank(None, 1.0)[1] == "" and "Choose a photo" in handlers.rank(None, 1.0)[0]
    assert "Not computed" in handlers.rank_large_set(None, 1.0)


def test_the_page_tells_the_settings_of_a_calibrated_checkpoint(captioner):
    demo = pytest.importorskip("ig_captioner.demo.app", exc_type=ImportError)
    handlers = demo.Handlers(captioner)
    settings = {"temperature": 2.5, "abstain_threshold": 1.25}
    scores = Scores(("a", "b"), ("{}",), [-1.0, -2.0], [-2.0, -2.0], **settings)
    for bars in (handlers.rank(scores, 1.0)[0], handlers.rank_large_set(scores, 1.0)):
        text = Elements(bars).text
        assert "softmax of IG / 2.5" in text and "threshold, IG 1.25; here the best does not reach it" in text
    assert "here the best reaches it" in handlers.rank(scores, 1.125)[0]  # IG 1.25, at the threshold
    plain = handlers.rank(Scores(("a",), ("{}",), [-1.0], [-2.0]), 1.0)[0]
    assert "softmax of IG over all labels" in plain and "threshold" not in plain


def test_many_and_long_labels(handlers, pixel_values):
    scores, bars, *_ = handlers.classify(pixel_values, "\n".join(f"cat {i}" for i in range(MAX_LABELS)), "{}", 1.0)
    assert len(scores.labels) == 1_000 and "The best 20 of 1,000 labels" in bars
    assert "1 texts were cut" in handlers.classify(pixel_values, "cat " * 100 + "\ndog", "{}", 1.0)[1]


def test_large_set_caption_explain_forget(handlers, captioner, pixel_values, raises_on_the_page):
    scores, bars = handlers.classify_large_set(pixel_values, "a {}", 1.0)
    assert scores.labels == large_set() and bars == label_bars(scores.ranked(1.0, 20), len(large_set()), 1.0)
    caption = captioner.caption(pixel_values)
    assert handlers.caption(pixel_values) == caption_view(caption, captioner.pieces(caption.tokens))
    for handler in (lambda: handlers.classify_large_set(None, "{}", 1.0), lambda: handlers.caption(None)):
        with raises_on_the_page("Choose a photo"):
            handler()
    assert handlers.explain(None, "cat") == handlers.explain(scores, "no such label") == ""
    assert handlers.forget()[:3] == handlers.forget_photo()[2:5] == (None, None, None)
    assert len(handlers.forget_photo()) == len(handlers.forget()) + 2


def test_example_photos_are_read_like_others(handlers, captioner):
    assert [photo.mode for photo in handlers.examples] == ["RGB"] * len(examples.LABEL_OF)
    photo, values, preview = handlers.read_example(1)
    assert photo is handlers.examples[1] and torch.equal(values, captioner.read(photo))
    assert max(preview.size) <= 800


def test_example_photos_are_small_and_their_origin_is_said():
    files = sorted(examples.FOLDER.glob("*.jpg"))
    assert {file.stem for file in files} == set(examples.LABEL_OF) >= examples.NO_CLASS
    sizes = [file.stat().st_size for file in files]
    assert max(sizes) < 60_000 and sum(sizes) < 500_000
    origins = (examples.FOLDER / "README.md").read_text("utf-8").splitlines()
    for file in files:
        (row,) = (line for line in origins if line.startswith(f"| `{file.name}` |"))
        assert "public domain" in row or "CC0 1.0" in row


def test_the_word_picker_follows_the_best_label_unless_one_was_picked(handlers):
    tokens = tuple(TextTokens([5, 2], [-1.0, -0.1], [-2.0, -0.1]) for _ in "abc")
    scores = Scores(("a", "b", "c"), ("{}",), [-1.0, -3.0, -9.0], [-1.0, -9.0, -8.0], tokens)
    assert [handlers.rank(scores, weight)[2].value for weight in (0.0, 1.0)] == ["a", "b"]
    shown, picked = handlers.pick(scores, "c")
    assert shown == handlers.explain(scores, "c")
    assert [handlers.rank(scores, weight, picked)[2].value for weight in (0.0, 1.0)] == ["c", "c"]
    assert handlers.rank(scores, 0.0, "no longer a label")[2].value == "a"


def test_what_was_changed_since_the_scores_is_marked(handlers):
    scores, large = (Scores(labels, ("a {}",), [-1.0] * 2, [-1.0] * 2) for labels in (("a", "b"), ("c", "d")))

    def changed(*inputs):
        return [Elements(shown).text for shown in handlers.changed(*inputs)]

    assert changed(None, None, "x", "y {}") == changed(scores, large, " a ,b\n", "a {}") == ["", ""]
    assert changed(scores, large, "a", "a {}") == ["Labels changed: press Classify.", ""]
    both, press = "Labels and sentence changed: press Classify.", "Sentence changed: press Rank them."
    assert changed(scores, large, "", "no place") == [both, press]
    assert changed(scores, None, "a, b", "the {}") == ["Sentence changed: press Classify.", ""]


def test_labels_of_the_last_visit(handlers):
    gradio = pytest.importorskip("gradio")
    assert handlers.remembered(handlers.remember("cat\ndog")) == "cat\ndog"
    assert all(handlers.remembered(nothing) == gradio.skip() for nothing in (None, "", ["cat"]))


def check_page(content: str) -> None:
    page = Elements(content)
    assert {tag for tag, _ in page.found} <= TAGS
    content.encode("utf-8")  # can be sent
    assert not re.search(r"(?:>|:|\+|;)(?:nan|-?inf)\b", content)


@FUZZ
@given(st.lists(ODD_TEXTS, max_size=5).map("\n".join), st.just("a {}") | ODD_TEXTS | ODD_TEXTS.map("{}".__add__))
def test_any_text_gives_scores_or_a_message(handlers, pixel_values, text, template):
    import gradio

    try:
        scores, bars, code, choice, tokens = handlers.classify(pixel_values, text, template, 1.0)
    except gradio.Error as error:
        check_page(error.message)
        return
    assert scores.labels == tuple(parse_labels(text)) and choice.value in scores.labels
    for weight in WEIGHTS:
        assert all(math.isfinite(value) for row in scores.ranked(weight) for value in row[1:])
        assert sum(row.score for row in scores.ranked(weight)) == pytest.approx(1)
    check_page(bars), check_page(tokens)
    call = ast.parse(code).body[3].value
    assert {key.arg: ast.literal_eval(key.value) for key in call.keywords}["candidate_labels"] == list(scores.labels)
