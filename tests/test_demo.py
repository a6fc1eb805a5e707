"""The web demo without a browser: what is let in, what is computed, what is drawn, and each handler of the page."""

import ast
import asyncio
import io
import math
import os
import re
import runpy
import signal
import socket
import struct
import threading
import time
import zlib
from configparser import ConfigParser
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_checkpoint import save_checkpoint

from ig_captioner import DEFAULT_CHECKPOINT, IGZeroShotImageClassificationPipeline
from ig_captioner.compiled_labels import encode_for
from ig_captioner.demo import inputs
from ig_captioner.demo import page as demo_page
from ig_captioner.demo.inputs import (
    FORMATS,
    MAX_BYTES,
    MAX_CHARACTERS,
    MAX_LABELS,
    MAX_PIXELS,
    MAX_REDIRECTS,
    InputError,
    check_characters,
    check_number,
    fetch,
    is_public,
    open_photo,
    parse_labels,
    parse_templates,
    read_upload,
)
from ig_captioner.demo.lanes import SHORT_TEXTS, Lanes
from ig_captioner.demo.page import caption_view, label_bars, number, token_view, visible
from ig_captioner.demo.scores import Captioner, Piece, RankedLabel, Scores, TextTokens, as_code, large_set
from tiny import naive_log_likelihoods


SPACE = Path(__file__).parent.parent / "examples" / "space"
LABELS = ["cat", "dog", "a photo of a cat", "photo"]
TAGS = {"div", "span", "p", "bdi", "small", "details", "summary", "table", "tr", "th", "td"}
TEMPLATES = ["a photo of a {}.", "{}"]
WEIGHTS = (0.0, 0.5, 1.0, 1.5)
# what no label may break: quotes, brackets, other scripts and directions, control characters, markup
ODD_LABELS = [
    "it's",
    '"""',
    "\\",
    "{}",
    "{x}",
    "שלום",
    "\u202egnp",
    "🐱\u200d👤",
    "\x00\x1b[31m",
    "<img src=x>",
    "a" * 500,
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return str(save_checkpoint(tmp_path_factory.mktemp("demo") / "tiny"))


@pytest.fixture(scope="module")
def captioner(checkpoint) -> Captioner:
    return Captioner(checkpoint, "cpu")


@pytest.fixture(scope="module")
def handlers(captioner):
    pytest.importorskip("gradio")
    from ig_captioner.demo.app import Handlers

    return Handlers(captioner)


@pytest.fixture
def raises_on_the_page():
    gradio = pytest.importorskip("gradio")
    return lambda match: pytest.raises(gradio.Error, match=match)


@pytest.fixture(scope="module")
def photo() -> PIL.Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise).resize((60, 40))


@pytest.fixture(scope="module")
def pixel_values(captioner, photo) -> torch.Tensor:
    return captioner.read(photo)


def encoded(image: PIL.Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


PRIVATE = """
127.0.0.1 10.0.0.1 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 255.255.255.255
198.18.0.1 192.0.2.1
::1 :: fe80::1 fe80::1%eth0 fc00::1 fec0::1 ff02::1 2001:db8::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::127.0.0.1
64:ff9b::7f00:1 64:ff9b::a00:1 2002:7f00:1:: 2002:c0a8:101::
"""


# Labels and sentences


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("cat", ["cat"]),
        ("cat, dog,horse ", ["cat", "dog", "horse"]),
        (" cat, dog \n", ["cat", "dog"]),
        ("cat, sitting\r\n\n  dog \n", ["cat, sitting", "dog"]),
        ("dog\ncat\ndog", ["dog", "cat"]),
        (",,cat,,cat,", ["cat"]),
        ("שלום\n🐱", ["שלום", "🐱"]),
    ],
)
def test_labels_are_lines_or_parts_of_a_single_line(text, labels):
    assert parse_labels(text) == labels


@pytest.mark.parametrize("text", ["", " \n\t\n", ",", " , ,"])
def test_no_labels(text):
    with pytest.raises(InputError, match="no labels"):
        parse_labels(text)


def test_limits_of_texts():
    assert len(parse_labels("\n".join(map(str, range(MAX_LABELS))))) == MAX_LABELS
    with pytest.raises(InputError, match="10,000 labels are too many: 1,000 at most"):
        parse_labels("\n".join(map(str, range(10_000))))
    assert parse_labels("a" * MAX_CHARACTERS) == ["a" * MAX_CHARACTERS]
    with pytest.raises(InputError, match="label 'aaa.* has 10,000 characters"):
        parse_labels("a" * 10_000)
    with pytest.raises(InputError, match=r"half a character, '\\ud83d'"):
        parse_labels("cat\n\ud83d")
    assert parse_templates("{} {}") == ["{} {}"]
    assert parse_templates(" a {} \n\nthe {}\n") == ["a {}", "the {}"]
    check_number(["cat"] * 500, ["{}", "a {}"])
    with pytest.raises(InputError, match="501 labels in 2 sentences are 1,002 texts: 1,000 at most"):
        check_number(["cat"] * 501, ["{}", "a {}"])
    labels = ["a" * 99] * 1000
    check_characters(labels, ["{}."])
    for templates, count in ((["a {}."], "102,000"), (["{} {}"], "199,000"), (["{}", "{}."], "199,000")):
        with pytest.raises(InputError, match=f"have {count} characters in all: 100,000 at most"):
            check_characters(labels, templates)
    with pytest.raises(InputError, match="17 sentences"):
        parse_templates("{}\n" * 17)
    for template, match in (
        ("a photo", "has no {}"),
        ("", "has no {}"),
        ("{}" * 300, "600 characters"),
        ("{} " * 4, "4 places for the label: 3 at most"),
    ):
        with pytest.raises(InputError, match=match):
            parse_templates(template)


# Photos


@pytest.mark.parametrize("format", FORMATS)
def test_photos(photo, format):
    image = open_photo(encoded(photo, format))
    assert image.mode == "RGB" and image.size == photo.size
    if format in ("PNG", "BMP"):
        assert np.array_equal(image, photo)


def test_photos_are_upright_and_transparency_is_white(photo):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    assert open_photo(encoded(photo, "JPEG", exif=exif)).size == photo.size[::-1]
    assert open_photo(encoded(PIL.Image.new("RGBA", (2, 2), (0, 0, 0, 0)))).getpixel((0, 0)) == (255, 255, 255)


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG file that says how large it is, and holds nothing."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(8_000, 8_001), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_pixels_are_counted_before_they_are_decoded(size):
    with pytest.raises(InputError, match=f"more than {MAX_PIXELS // 10**6} megapixels"):
        open_photo(png_header(*size))


def test_files_that_are_no_photo(photo):
    whole = encoded(photo)
    assert open_photo(whole + bytes(MAX_BYTES - len(whole))).size == photo.size
    with pytest.raises(InputError, match="more than 10 MiB"):
        open_photo(whole + bytes(MAX_BYTES - len(whole) + 1))
    for content in (b"", b"a text, no image", b"<svg xmlns='http://www.w3.org/2000/svg'/>", encoded(photo, "TIFF")):
        with pytest.raises(InputError, match="no photo that can be read"):
            open_photo(content)
    jpeg = encoded(photo, "JPEG")
    for damaged in (whole[:200], jpeg[: len(jpeg) - 200], png_header(60, 40)):
        with pytest.raises(InputError, match="damaged"):
            open_photo(damaged)


def test_only_uploaded_files_are_read(tmp_path):
    folder, outside = tmp_path / "uploads", tmp_path / "uploads.png"
    (folder / "a").mkdir(parents=True)
    for file in (folder / "a" / "photo.png", outside):
        file.write_bytes(bytes(MAX_BYTES + 2))
    (tmp_path / "link").symlink_to(folder)
    for name in (
        folder / "a" / "photo.png",
        tmp_path / "link" / "a" / "photo.png",
        folder / "a" / ".." / "a/photo.png",
    ):
        for place in (folder, tmp_path / "link"):
            assert len(read_upload(str(name), str(place))) == MAX_BYTES + 1
    (folder / "out.png").symlink_to(outside)
    (folder / "round").symlink_to("round")
    os.mkfifo(folder / "pipe")
    names = [
        "../uploads.png",
        "a/../../uploads.png",
        "out.png",
        "round",
        "pipe",
        "a",
        "",
        "none.png",
        "a\0b",
        "a" * 300,
    ]
    for path in (None, 0, [], {}, "", "photo.png", "/dev/zero", str(outside), *(f"{folder}/{name}" for name in names)):
        with pytest.raises(InputError, match="no uploaded file"):
            read_upload(path, str(folder))


# URLs


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_public_addresses(address):
    assert is_public(address)


@pytest.mark.parametrize("address", ["192.88.99.1", "192.0.0.8", "3fff::1", "2001:2::1", "100.64.0.1", "198.18.0.1"])
def test_special_purpose_addresses(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", PRIVATE.split())
def test_private_addresses(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("http://127.0.0.1/a.png", "not on the public internet"),
        ("https://127.0.0.1/a.png", "not on the public internet"),
        ("http://localhost:7860/", "not on the public internet"),
        ("http://[::1]/", "not on the public internet"),
        ("http://[::ffff:127.0.0.1]/", "not on the public internet"),
        ("http://169.254.169.254/latest/meta-data/", "not on the public internet"),
        ("http://2130706433/", "not on the public internet"),
        ("http://0x7f.1/", "not on the public internet"),
        ("http://0/", "not on the public internet"),
        ("http://user:word@10.0.0.1/", "not on the public internet"),
        ("file:///etc/passwd", "no http or https URL"),
        ("ftp://8.8.8.8/a.png", "no http or https URL"),
        ("data:image/png;base64,AAAA", "no http or https URL"),
        ("", "no http or https URL"),
        ("cat.jpg", "no http or https URL"),
        ("http://", "no http or https URL"),
        ("http://[::1", "Cannot load"),
        ("http://8.8.8.8:99999/", "no http or https URL"),
        ("http://a\x00b/", "Cannot load"),
        ("https://" + "a" * 2_000, "2,008 characters"),
    ],
)
def test_urls_that_are_refused(url, match, monkeypatch):
    monkeypatch.setattr(httpx.AsyncClient, "send", None)  # nothing may be sent
    with pytest.raises(InputError, match=match):
        asyncio.run(fetch(url))


class Site(BaseHTTPRequestHandler):
    """A site on this machine that plays one on the internet."""

    photo = b""
    seen: list = []

    def do_GET(self):
        self.seen.append((self.headers["Host"], self.path, self.headers["Authorization"]))
        name, _, value = self.path[1:].partition("/")
        getattr(self, f"send_{name}")(value)

    def send_photo(self, _):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.photo)

    def send_status(self, status):
        self.send_response(int(status))
        self.end_headers()

    def send_to(self, url):
        self.send_response(302)
        self.send_header("Location", url)
        self.end_headers()

    def send_endless(self, _):
        self.send_response(200)
        self.end_headers()
        while self.write(bytes(2**16)):
            pass

    def send_drops(self, _):
        self.send_response(200)
        self.end_headers()
        while self.write(b"\x89"):
            time.sleep(0.01)

    def write(self, content):
        try:
            self.wfile.write(content)
            return True
        except OSError:
            return False

    def log_message(self, *args):
        pass


@pytest.fixture
def site(photo, monkeypatch):
    """`http://photos.test:PORT`. Its address counts as public; every name but `inside.test` leads there."""
    monkeypatch.setattr(Site, "photo", encoded(photo))
    monkeypatch.setattr(Site, "seen", [])
    lookups, real = [], socket.getaddrinfo

    def look_up(host, port, *args, **kwargs):
        if host.endswith(".test"):
            lookups.append(host)
            # the second time the name leads into the private network
            host = "127.0.0.1" if host != "inside.test" and lookups.count(host) == 1 else "127.0.0.2"
        return real(host, port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(inputs, "is_public", lambda address: address == "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"photos.test:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_photo_is_read_from_the_address_that_was_checked(site, photo):
    content = asyncio.run(fetch(f"  http://me:secret@{site}/photo/a b.png?x=1#part "))
    assert np.array_equal(open_photo(content), photo)
    assert Site.seen == [(site, "/photo/a%20b.png?x=1", None)]
    with pytest.raises(InputError, match="not on the public internet"):  # where the name leads by now
        asyncio.run(fetch(f"http://{site}/photo"))


def test_redirects_are_checked_like_urls(site):
    port = site.split(":")[1]
    assert asyncio.run(fetch(f"http://a.test:{port}/to/http://b.test:{port}/photo")) == Site.photo
    assert asyncio.run(fetch(f"http://127.0.0.1:{port}/to//photo")) == Site.photo
    for place, match in (
        (f"http://inside.test:{port}/photo", "'inside.test' is not on the public internet"),
        ("http://169.254.169.254/", "not on the public internet"),
        ("file:///etc/passwd", "no http or https URL"),
    ):
        with pytest.raises(InputError, match=match):
            asyncio.run(fetch(f"http://127.0.0.1:{port}/to/{place}"))
    assert all("photo" in path or "to/" in path for _, path, _ in Site.seen)
    Site.seen.clear()
    far = f"http://127.0.0.1:{port}" + "/to/" * (MAX_REDIRECTS + 1) + "photo"
    with pytest.raises(InputError, match=f"leads on more than {MAX_REDIRECTS} times"):
        asyncio.run(fetch(far))
    assert len(Site.seen) == MAX_REDIRECTS + 1


def test_limits_of_downloads(site, monkeypatch):
    monkeypatch.setattr(inputs, "MAX_BYTES", 2**20)
    port = site.split(":")[1]
    with pytest.raises(InputError, match="more than 1 MiB"):
        asyncio.run(fetch(f"http://127.0.0.1:{port}/endless"))
    with pytest.raises(InputError, match="answered 404"):
        asyncio.run(fetch(f"http://127.0.0.1:{port}/status/404"))
    monkeypatch.setattr(inputs, "FETCH_SECONDS", 0.5)
    with pytest.raises(InputError, match=r"within 0.5 seconds"):
        asyncio.run(fetch(f"http://127.0.0.1:{port}/drops"))


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
    assert len(large_set()) == len(set(large_set())) == 998
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


@pytest.fixture(scope="module")
def shipped() -> Captioner:
    return Captioner(DEFAULT_CHECKPOINT, "cpu")


@pytest.mark.parametrize("text", ["a cat.", "émile's 🐱 cup of coffee, 猫", "שלום", "\x00\x1b", "\ufffd\ufffd x", ""])
def test_pieces_are_the_text_without_broken_characters(shipped, text):
    ids = shipped.scorer.tokenizer(text)["input_ids"]
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


# Drawing


class Elements(HTMLParser):
    """Tags in order, checked to be closed in order; attributes of those of a class; all text."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(content)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def styles(self, name: str) -> list[dict[str, float]]:
        """Left end and width, in per cent, of the elements of a class."""
        styles = [a["style"] for _, a in self.found if name in (a.get("class") or "").split()]
        return [{key: float(value) for key, value in re.findall(r"(\w+):([-\d.]+)%", style)} for style in styles]


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


# Fuzzing: always a result without NaN, or a message


FUZZ = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
ODD_CHARACTERS = st.one_of(
    st.characters(),  # lone surrogates included
    st.sampled_from("\x00\x1b\x7f\u2028\u200f\u202e\u2066\ufeff\ufffd\u0301🐱\U0001f468\u200d<>&'\"{}$`\\,\n"),
)
ODD_TEXTS = st.text(ODD_CHARACTERS, max_size=40) | st.text(ODD_CHARACTERS, min_size=1, max_size=4).map(
    lambda t: t * 2500
)


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


@pytest.fixture(scope="module")
def files(photo) -> dict[str, bytes]:
    animation = {"save_all": True, "append_images": [photo.rotate(180)], "loop": 0}
    return {format: encoded(photo, format, **(animation if format == "GIF" else {})) for format in FORMATS}


@FUZZ
@given(st.data())
def test_any_bytes_give_pixels_or_a_message(captioner, files, data):
    content = bytearray(files[data.draw(st.sampled_from(FORMATS))])
    places = st.integers(0, len(content) - 1) | st.integers(0, 40)  # headers more often
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=8)):
        content[place] = value
    start, end = sorted(data.draw(st.tuples(places, places))) if data.draw(st.booleans()) else (0, 0)
    del content[start:end]
    try:
        image = open_photo(bytes(content))
    except InputError as error:
        assert str(error)
        return
    assert image.mode == "RGB" and image.width * image.height <= MAX_PIXELS
    assert captioner.read(image).isfinite().all()


@FUZZ
@given(
    start=st.sampled_from(["", "http://", "https://[", "http://1.1.1.", "http://a.test/"]),
    rest=st.text(ODD_CHARACTERS, max_size=30),
)
def test_any_url_gives_a_message(monkeypatch, start, rest):
    def no_such_host(*args, **kwargs):
        raise socket.gaierror("no such host")

    monkeypatch.setattr(socket, "getaddrinfo", no_such_host)
    with pytest.raises(InputError):
        asyncio.run(fetch(start + rest))


# The server


@pytest.fixture(scope="module")
def server(checkpoint):
    pytest.importorskip("gradio")
    from ig_captioner.demo import app as demo

    app = demo.build_app(checkpoint, "cpu")
    url = demo.serve(app)
    yield app, url
    app.close()


def test_the_server_is_private(server):
    app, url = server
    assert url.startswith("http://127.0.0.1:") and not app.share and app.share_url is None
    assert not app.analytics_enabled and not app.run_history and not app.enable_monitoring
    assert not any(fn.api_visibility == "public" for fn in app.fns.values())
    page = httpx.get(url).text
    assert not re.findall(r"(?:src|href)=\"(?:https?:)?//(?!127\.0\.0\.1)[^\"]*\"", page)


def test_the_server_limits_uploads(server):
    _, url = server
    for size, status in ((1000, 200), (MAX_BYTES + 1, 413)):
        answer = httpx.post(f"{url}gradio_api/upload", files={"files": ("a.png", bytes(size))})
        assert answer.status_code == status


def read_events(server, file: dict) -> str:
    """What the server answers to a client that says where its photo is."""
    app, url = server
    read = next(i for i, fn in app.fns.items() if fn.name == "read")
    job = {"data": [file], "fn_index": read, "session_hash": "s", "event_data": None, "trigger_id": None}
    httpx.post(f"{url}gradio_api/queue/join", json=job).raise_for_status()
    return httpx.get(f"{url}gradio_api/queue/data", params={"session_hash": "s"}, timeout=30).text


UPLOADED = {"_type": "gradio.FileData"}


@pytest.mark.parametrize("file", [{"meta": UPLOADED}, {"meta": {"_type": "x"}}, {}])
def test_a_client_cannot_name_a_file_or_url(server, site, photo, tmp_path, file):
    (tmp_path / "photo.png").write_bytes(encoded(photo))
    port = site.split(":")[1]
    urls = [f"http://{host}:{port}/photo" for host in ("127.0.0.1", "photos.test")]
    for path in (*urls, str(tmp_path / "photo.png"), __file__, "/dev/zero", "", None):
        events = read_events(server, {"path": path, **file})
        assert '"success":false' in events and '"success":true' not in events
        if file.get("meta") != UPLOADED:  # Gradio lets them through
            assert "no uploaded file" in events
        elif path in urls:
            assert "Photos are uploaded" in events
    assert Site.seen == []


@pytest.mark.parametrize("file", [{"meta": UPLOADED}, {}])
def test_a_client_can_name_what_it_uploaded(server, photo, file):
    answer = httpx.post(f"{server[1]}gradio_api/upload", files={"files": ("a.png", encoded(photo))})
    assert '"success":true' in read_events(server, {"path": answer.json()[0], **file})


def test_launch(checkpoint, monkeypatch, capsys):
    pytest.importorskip("gradio")
    from ig_captioner.demo import app as demo

    calls = []
    monkeypatch.setattr(demo, "serve", lambda app, *arguments: calls.append(arguments) or "http://there/")
    monkeypatch.setattr(demo.gr.Blocks, "block_thread", lambda self: calls.append("waits"))
    demo.launch(checkpoint, port=1234, device="cpu")
    assert calls == [("127.0.0.1", 1234, False), "waits"] and "http://there/" in capsys.readouterr().out
    with pytest.raises(OSError, match="no such model folder"):
        demo.launch("./missing")


def test_sigterm_ends_the_server_as_ctrl_c_does(checkpoint, monkeypatch):
    pytest.importorskip("gradio")
    from ig_captioner.demo import app as demo

    monkeypatch.setattr(demo, "serve", lambda *arguments: "http://there/")
    monkeypatch.setattr(demo.gr.Blocks, "block_thread", lambda self: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(KeyboardInterrupt):
            demo.launch(checkpoint, device="cpu")
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_short_request_does_not_wait_for_a_long_one():
    lanes, order, long_runs = Lanes(), [], threading.Event()

    def long_request():
        with lanes.enter(SHORT_TEXTS + 1):
            long_runs.set()
            short_is_done.wait(10)
            order.append("long")

    short_is_done = threading.Event()
    thread = threading.Thread(target=long_request)
    thread.start()
    assert long_runs.wait(10)
    with lanes.enter(SHORT_TEXTS):
        order.append("short")
    short_is_done.set()
    thread.join(10)
    assert order == ["short", "long"]


def test_long_requests_wait_for_one_another():
    lanes, running, most = Lanes(), [], []

    def long_request():
        with lanes.enter(SHORT_TEXTS + 1):
            running.append(1)
            most.append(len(running))
            time.sleep(0.01)
            running.pop()

    threads = [threading.Thread(target=long_request) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert most == [1, 1, 1, 1]


# The Space


def test_the_space_is_complete(monkeypatch):
    gradio = pytest.importorskip("gradio")
    from ig_captioner.demo import app as demo

    calls = []
    monkeypatch.setattr(demo, "launch", lambda model, **options: calls.append((model, options)))
    runpy.run_path(str(SPACE / "app.py"), run_name="__main__")
    assert calls == [(DEFAULT_CHECKPOINT, {"host": "0.0.0.0", "port": 7860})]
    about = yaml.safe_load((SPACE / "README.md").read_text("utf-8").split("---")[1])
    assert about["sdk"] == "gradio" and about["app_file"] == "app.py" and about["sdk_version"] == gradio.__version__
    setup = ConfigParser()
    setup.read(SPACE.parent.parent / "setup.cfg", "utf-8")
    needed = setup["options"]["install_requires"].split()
    lines = (SPACE / "requirements.txt").read_text("utf-8").splitlines()
    assert [line for line in lines if line and not line.startswith(("#", "--"))] == needed
