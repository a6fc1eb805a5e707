"""What the web demo lets in: labels, templates, photos, files and URLs."""

import asyncio
import os
import socket
import struct
import zlib

import httpx
import numpy as np
import PIL.Image
import pytest
from demo_room import FUZZ, ODD_CHARACTERS, Site, encoded
from hypothesis import given
from hypothesis import strategies as st

from ig_captioner.demo import inputs
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
    with pytest.raises(InputError, match=f"more than {MAX_BYTES >> 20} MiB"):
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
