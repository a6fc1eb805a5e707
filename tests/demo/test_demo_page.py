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

from ig_captioner.demo import page as demo_page
from ig_captioner.demo.inputs import MAX_LABELS, parse_labels
from ig_captioner.demo.page import caption_view, label_bars, number, token_view, visible
from ig_captioner.demo.scores import Piece, RankedLabel, Scores, TextTokens, as_code


# Drawing


def rows_of(*pairs: tuple[float, float], weight: float = 1.0) -> list[RankedLabel]:
    names = tuple(f"label {i}" for i in range(len(pairs)))
    return Scores(names, "{}", [pair[0] for pair in pairs], [pair[1] for pair in pairs]).ranked(weight)


def test_bars_are_as_long_as_what_they_show():
    page = Elements(label_bars(rows_of((-10.0, -20.0), (-5.0, -4.0), weight=0.5), 2, 0.5))
    bars = page.styles("ig-bar")
    assert len(bars) == 8
    caption, whole, counted, gain = zip(bars[:4], bars[4:], strict=True)
    assert caption == ({"left": 50, "width": 50}, {"left": 75, "width": 25})  # of 20 nats, up to the right end
    assert whole == ({"left": 0, "width": 100}, {"left": 0, "width": 20})
    assert counted == ({"left": 0, "width": 50}, {"left": 0, "width": 10})
    assert gain == ({"left": 100, "width": 0}, {"left": 0, "width": 100})  # 0 and -3 nats
    assert "0.5 · log P(T)" in page.text


def test_bars_fit_their_tracks():
    for weight in WEIGHTS:
        rows = rows_of((-10.0, -20.0), (-5.0, -40.0), (-3.0, -1.0), (0.0, 0.0), weight=weight)
        for style in Elements(label_bars(rows, 4, weight)).styles("ig-bar"):
            assert style["left"] >= 0 and style["width"] >= 0 and style["left"] + style["width"] <= 100.01
    assert "nan" not in label_bars(rows_of((0.0, 0.0)), 1, 1.0)


def test_the_choice_of_each_column_is_marked():
    page = Elements(label_bars(rows_of((-10.0, -20.0), (-5.0, -4.0)), 2, 1.0))
    marked = [a["class"] for _, a in page.found if "ig-best" in (a.get("class") or "")]
    assert marked == ["ig-cell ig-gain ig-best", "ig-cell ig-caption ig-best"]
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


def test_numbers():
    assert [number(value) for value in (-1.234, 0.0, -0.001, 12.0)] == ["&minus;1.23", "0.00", "0.00", "12.00"]
    assert [number(value, "+") for value in (-1.0, 0.001, 2.0)] == ["&minus;1.00", "0.00", "+2.00"]
    assert visible("\ud800\x7f\ue000") == "[U+D800][U+007F][U+E000]"


# Handlers of the page


def test_read(handlers, photo, pixel_values, tmp_path, raises_on_the_page, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    (tmp_path / "photo").write_bytes(encoded(photo))
    (tmp_path / "text.png").write_text("no <b>image</b>")
    assert torch.equal(handlers.read({"path": str(tmp_path / "photo"), "url": "http://127.0.0.1/other"}), pixel_values)
    with raises_on_the_page("no photo that can be read"):
        handlers.read({"path": str(tmp_path / "text.png")})
    with raises_on_the_page("Choose a photo"):
        handlers.read(None)
    for upload in ({}, {"path": None}, {"path": __file__}, {"path": "<b>"}):
        with raises_on_the_page("no uploaded file"):
            handlers.read(upload)


def test_fetch(handlers, site, photo, pixel_values, raises_on_the_page):
    shown, values = asyncio.run(handlers.fetch(f"http://{site}/photo"))
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
    monkeypatch.setattr(captioner, "scorer", None)
    for weight in WEIGHTS:
        bars, code = handlers.rank(scores, weight)
        assert bars == label_bars(scores.ranked(weight), 4, weight) and f"prior_weight={weight!r}" in code
        assert handlers.rank_large_set(large, weight) == label_bars(large.ranked(weight, 20), 998, weight)
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
    assert len(scores.labels) == 998 and bars == label_bars(scores.ranked(1.0, 20), 998, 1.0)
    caption = captioner.caption(pixel_values)
    assert handlers.caption(pixel_values) == caption_view(caption, captioner.pieces(caption.tokens))
    for handler in (lambda: handlers.classify_large_set(None, "{}", 1.0), lambda: handlers.caption(None)):
        with raises_on_the_page("Choose a photo"):
            handler()
    assert handlers.explain(None, "cat") == handlers.explain(scores, "no such label") == ""
    assert handlers.forget()[:3] == (None, None, None)


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
