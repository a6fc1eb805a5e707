"""What an image is: formats, modes and sizes, the same for everything that reads one."""

import io
import re
import shutil
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from ig_captioner import IGCaptionerImageProcessor, input_rules
from ig_captioner.data.shards import BrokenSampleError, image_of
from ig_captioner.demo.inputs import InputError, open_photo
from ig_captioner.input_rules import FORMATS, IGCaptionerWarning, ImageError, read_image_file, to_rgb
from ig_captioner.processing_ig_captioner import load_rgb_image


ROOT = Path(__file__).parent.parent
RAMP = np.tile(np.arange(0, 256, 16, dtype=np.uint8), (16, 1))  # [16, 16]
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n"


def as_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=-1)


def png(depth: int, colour: int, rows: bytes, key: bytes, size: int = 2) -> bytes:
    """A PNG of size x size pixels whose tRNS chunk is `key`; each row of `rows` begins with its filter, 0."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", size, size, depth, colour, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"tRNS", key), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def numbers(image) -> np.ndarray:
    return np.asarray(image)


# Modes


@pytest.mark.parametrize("form", ["pgm", "ppm", "png", "tif", "int32 of 8 bits", "int32 of 16 bits", "big-endian"])
def test_sixteen_bits_and_mode_i_look_like_their_eight_bit_copy(form, tmp_path):
    levels = RAMP.astype(np.uint16) * 257
    path = tmp_path / f"image.{form}"
    if form == "pgm":
        path.write_bytes(b"P5 16 16 65535\n" + levels.astype(">u2").tobytes())
    elif form == "ppm":
        path.write_bytes(b"P6 16 16 65535\n" + as_rgb(levels).astype(">u2").tobytes())
    elif form in ("png", "tif"):
        PIL.Image.fromarray(levels).save(path)
    images = [PIL.Image.open(path), read_image_file(path)] if path.exists() else []
    if form == "int32 of 8 bits":
        images = [PIL.Image.fromarray(RAMP.astype(np.int32))]
    elif form == "int32 of 16 bits":
        images = [PIL.Image.fromarray(levels.astype(np.int32))]
    elif form == "big-endian":
        images = [PIL.Image.frombytes("I;16B", (16, 16), levels.astype(">u2").tobytes())]
    with warnings.catch_warnings():
        warnings.simplefilter("error" if images[0].format else "ignore", IGCaptionerWarning)  # a file needs no guess
        for image in images:
            np.testing.assert_array_equal(numbers(to_rgb(image)), as_rgb(RAMP))


def test_a_dark_sixteen_bit_file_stays_dark(tmp_path):
    (tmp_path / "dark.pgm").write_bytes(b"P5 16 16 65535\n" + RAMP.astype(">u2").tobytes())
    assert numbers(read_image_file(tmp_path / "dark.pgm")).max() == 0


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (RAMP.astype(np.float32), RAMP),
        (RAMP.astype(np.float32) / 255, RAMP),
        (np.zeros((16, 16), np.float32), np.zeros((16, 16), np.uint8)),
    ],
)
def test_mode_f_is_read_by_its_largest_value_and_says_so(values, expected):
    with pytest.warns(IGCaptionerWarning, match="mode F"):
        np.testing.assert_array_equal(numbers(to_rgb(PIL.Image.fromarray(values))), as_rgb(expected))


@pytest.mark.parametrize(
    "values",
    [
        np.full((4, 4), -1, np.int32),
        np.full((4, 4), 70_000, np.int32),
        np.full((4, 4), 256.5, np.float32),
        np.full((4, 4), -0.5, np.float32),
        np.full((4, 4), np.nan, np.float32),
        np.full((4, 4), np.inf, np.float32),
    ],
)
def test_values_that_do_not_say_what_white_is_are_refused(values):
    with pytest.raises(ValueError, match=r"mode [IF]"):
        load_rgb_image(PIL.Image.fromarray(values))


def test_twelve_bits_of_a_tiff_are_not_taken_for_sixteen():
    image = PIL.Image.frombytes("I;16", (16, 16), (RAMP.astype(np.uint16) * 16).tobytes())
    image.tile = [("raw", (0, 0, 16, 16), 0, ("I;12", 0, 1))]
    assert numbers(to_rgb(image)).max() == 240


@pytest.mark.parametrize("bits", [8, 16])
def test_a_tiff_whose_white_is_zero_is_no_negative(bits):
    content = io.BytesIO()
    grey = 255 - RAMP
    PIL.Image.fromarray(grey if bits == 8 else grey.astype(np.uint16) * 257).save(content, "TIFF")
    entry = struct.pack("<HHIH", 262, 3, 1, 1)  # PhotometricInterpretation, which `save` sets itself
    assert content.getvalue().count(entry) == 1
    negative = content.getvalue().replace(entry, struct.pack("<HHIH", 262, 3, 1, 0))
    assert np.array_equal(numbers(read_image_file(io.BytesIO(negative))), as_rgb(RAMP))


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa"])
def test_every_mode_with_transparency_is_put_on_white(mode):
    grey, alpha = PIL.Image.fromarray(RAMP), PIL.Image.new("L", (16, 16), 255)
    alpha.paste(0, (8, 0, 16, 16))
    image = PIL.Image.merge("LA", (grey, alpha))
    if mode == "La":
        image = image.convert("La")
    elif mode == "PA":
        image = grey.convert("P").convert("PA")
        image.putalpha(alpha)
    elif mode != "LA":
        image = image.convert("RGBA").convert(mode)
    assert image.mode == mode
    expected = RAMP.copy()
    expected[:, 8:] = 255
    np.testing.assert_array_equal(numbers(to_rgb(image)), as_rgb(expected))


GREY_KEYS = {  # depth: (first row of the two pixels: the key and another value, key, grey of the other value)
    1: (b"\x40", 0, 255),
    2: (b"\x60", 1, 170),
    4: (b"\x38", 3, 136),
    8: (b"\x03\x88", 3, 136),
    16: (b"\x03\x00\x88\x00", 0x300, 136),
}


@pytest.mark.parametrize("depth", GREY_KEYS)
def test_the_transparent_grey_of_a_png_is_white_at_every_depth(depth):
    row, key, other = GREY_KEYS[depth]
    content = png(depth, 0, (b"\0" + row) * 2, struct.pack(">H", key))
    assert numbers(image_of({"png": content})).tolist() == [[[255] * 3, [other] * 3]] * 2


def test_the_transparent_colour_of_a_sixteen_bit_png_is_white():
    pixels = struct.pack(">6H", 0x1000, 0x2000, 0x3000, 0x8800, 0x8800, 0x8800)
    content = png(16, 2, (b"\0" + pixels) * 2, struct.pack(">3H", 0x1000, 0x2000, 0x3000))
    assert numbers(image_of({"png": content})).tolist() == [[[255] * 3, [0x88] * 3]] * 2


def test_a_palette_with_several_alpha_values():
    image = PIL.Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=bytes([255, 0]))
    assert numbers(image_of({"png": buffer.getvalue()})).tolist() == [[[10, 20, 30], [255, 255, 255]]]


@pytest.mark.parametrize("backend_array", [np.asarray, torch.from_numpy])
@pytest.mark.parametrize("values", [RAMP.astype(np.int32) * 257, RAMP.astype(np.float32) - 1, RAMP * np.float32("nan")])
def test_the_processor_refuses_arrays_beyond_eight_bits(values, backend_array):
    with pytest.raises(ValueError, match="from 0 to 255"):
        IGCaptionerImageProcessor(size=16)(backend_array(as_rgb(values)), return_tensors="pt")


# Files


@pytest.mark.parametrize("name", ["photo.jpg", "photo.png", "photo.eps"])
def test_postscript_never_starts_a_program(name, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *arguments, **options: pytest.fail(f"started {arguments}"))
    (tmp_path / name).write_bytes(POSTSCRIPT)
    for read in (read_image_file, load_rgb_image, IGCaptionerImageProcessor()):
        with pytest.raises(ValueError, match="no image of the formats JPEG"):
            read(str(tmp_path / name))
    with pytest.raises(ValueError, match="PostScript"):
        load_rgb_image(PIL.Image.open(tmp_path / name))
    with pytest.raises(BrokenSampleError, match="not an image"):
        image_of({"jpg": POSTSCRIPT})
    with pytest.raises(InputError, match="no photo"):
        open_photo(POSTSCRIPT)


def test_only_one_place_opens_image_files():
    """Others would have rules of their own; scripts that draw or test read what they have written themselves."""
    opening = re.compile(r"\bImage\.open\(")
    places = [ROOT / folder for folder in ("ig_captioner", "training", "examples")]
    found = [path.name for place in places for path in place.rglob("*.py") if opening.search(path.read_text("utf-8"))]
    assert found == ["input_rules.py"]


def test_every_reader_gives_the_same_pixels_for_every_format(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    for image_format in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF"):
        for extension in FORMATS[image_format]:
            path = tmp_path / f"photo.{extension}"
            PIL.Image.fromarray(pixels).save(path, format=image_format)
            expected = numbers(read_image_file(path))
            np.testing.assert_array_equal(numbers(load_rgb_image(path)), expected)
            np.testing.assert_array_equal(numbers(image_of({extension: path.read_bytes()})), expected)


@pytest.mark.parametrize("extension", ["gif", "tif", "png", "webp"])
def test_further_frames_are_left_out_and_said(extension, tmp_path):
    frames = [PIL.Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / f"two.{extension}", save_all=True, append_images=frames[1:])
    with pytest.warns(IGCaptionerWarning, match="first frame"):
        red, _, blue = load_rgb_image(tmp_path / f"two.{extension}").getpixel((1, 1))
    assert red > 200 and blue < 50
    with warnings.catch_warnings():
        warnings.simplefilter("error", IGCaptionerWarning)
        with pytest.raises(ValueError, match="two"):
            load_rgb_image(tmp_path / f"two.{extension}")


def test_the_size_is_checked_before_an_image_is_decoded(tmp_path):
    PIL.Image.new("L", (40, 30)).save(tmp_path / "photo.png")
    assert read_image_file(tmp_path / "photo.png", max_pixels=1200).size == (40, 30)
    for error in (ImageError, BrokenSampleError):
        with pytest.raises(error, match=r"40 x 30 pixels are more than 1,199|too many pixels"):
            content = (tmp_path / "photo.png").read_bytes()
            (read_image_file(io.BytesIO(content), 1199) if error is ImageError else image_of({"png": content}, 1199))


def test_the_rules_need_neither_torch_nor_the_package(tmp_path):
    shutil.copy(input_rules.__file__, tmp_path)
    code = "import sys, input_rules; assert not {'torch', 'transformers', 'ig_captioner'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={}, check=True)
