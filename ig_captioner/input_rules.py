"""Rules of what an image and a text are: one set for the pipeline, the commands, evaluation, training and the demo.

Images. `FORMATS` says which files are images: by their names in a folder or a shard, by their content when they are
opened. Pillow knows more formats; some of them start programs (PostScript starts ghostscript) and are never tried.
Every image becomes RGB with 8 bits, upright (EXIF), and with white behind what is transparent:

| Pillow's mode | what becomes of it |
|---|---|
| 1, L, P, RGB, CMYK, YCbCr, HSV, LAB | converted by Pillow |
| LA, La, PA, RGBA, RGBa; colours that a PNG or GIF calls transparent | put on white |
| I;16 and 16-bit files of mode I | the upper 8 bits |
| I and F otherwise | from 0 to 255 as they are, I up to 65535 by the upper 8 bits, F up to 1 times 255; else refused |

The last row is a guess, since such images do not say what white is. Of an animation, or of a TIFF with several pages,
the first frame is taken. Both are said as an `IGCaptionerWarning`.

Texts. Words with one space between them: no line breaks, no-break spaces, byte-order marks or other invisible
characters, in Unicode's normal form C. A text without a word is refused. A label becomes texts by templates.

Needs Pillow, numpy and the standard library only: a folder of ONNX graphs holds a copy of this file.
"""

import base64
import io
import os
import unicodedata
import urllib.request
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps


FORMATS = {  # Pillow's name of each format, and what names of its files end with
    "JPEG": ("jpg", "jpeg", "jpe", "jfif"),
    "MPO": ("mpo",),  # JPEG with more pictures after the first, as many phones write it
    "PNG": ("png",),
    "WEBP": ("webp",),
    "BMP": ("bmp", "dib"),
    "TIFF": ("tif", "tiff"),
    "PPM": ("ppm", "pgm", "pbm", "pnm"),
    "GIF": ("gif",),
    "AVIF": ("avif",),
    "HEIF": ("heic", "heif"),  # Pillow needs the plugin pillow_heif; without it they are reported, not passed over
}
IMAGE_EXTENSIONS = tuple(extension for extensions in FORMATS.values() for extension in extensions)
# Twice the size from which Pillow warns of decompression bombs; photos of phones have up to 200 million pixels.
MAX_PIXELS = 2 * 89_478_485

NOT_AN_IMAGE = "not an image"
TOO_MANY_PIXELS = "too many pixels"
UNDECODABLE = "undecodable image"

# Soft hyphen, grapheme joiner, zero-width space, marks of direction, word joiner, invisible operators, byte-order mark,
# fillers of Korean syllables; not the joiners and selectors that emoji need.
INVISIBLE = "\u00ad\u034f\u061c\u180e\u200b\u200e\u200f\ufeff\u115f\u1160\u3164\uffa0"
RANGES_OF_INVISIBLE = ((0x202A, 0x202E), (0x2060, 0x206F))
WITHOUT_INVISIBLE = dict.fromkeys(map(ord, INVISIBLE))
WITHOUT_INVISIBLE |= dict.fromkeys(code for first, last in RANGES_OF_INVISIBLE for code in range(first, last + 1))
DEFAULT_TEMPLATE = "a photo of a {}."
LIST_SEPARATORS = (
    "\n\t;\uff1b|\u3001\uff0c,"  # the first that there is separates, so that "Paris, France; Rome" is of two
)


class IGCaptionerWarning(UserWarning):
    """Something was cut, skipped or guessed, or cannot be meant; the message says what, and how often.

    `warnings.simplefilter("error", IGCaptionerWarning)` makes an error of it.
    """


# Images


class ImageError(ValueError):
    """A file that gives no image. `reason` is one of a few words, for counting."""

    def __init__(self, reason: str, message: str = "") -> None:
        super().__init__(message or reason)
        self.reason = reason


def read_image_file(file: Any, max_pixels: int = MAX_PIXELS, formats: Collection[str] = FORMATS) -> PIL.Image.Image:
    """Opens and decodes an image file: RGB.

    Args:
        file: a path, or an open binary file.
        max_pixels: of the image; its size is known before it is decoded.
        formats: those of `FORMATS` that are accepted.

    Raises:
        ImageError: for what is no image of these formats, has too many pixels, or cannot be decoded.
        OSError: for a path that cannot be opened.
    """
    if isinstance(file, (str, os.PathLike)):
        with open(file, "rb") as opened:
            return read_image_file(opened, max_pixels, formats)
    PIL.Image.init()
    try:
        image = PIL.Image.open(file, formats=[name for name in formats if name in PIL.Image.OPEN])
        if image.width * image.height > max_pixels:
            raise ImageError(TOO_MANY_PIXELS, f"{image.width} x {image.height} pixels are more than {max_pixels:,}")
        if _has_more_frames(image):
            tell("only the first frame of an animation, or the first page of a TIFF, is read")
        return to_rgb(image)
    except (ImageError, IGCaptionerWarning):  # the second where warnings are errors
        raise
    except PIL.Image.DecompressionBombError as error:  # Pillow's own limit, which a program may have lowered
        raise ImageError(TOO_MANY_PIXELS, str(error)) from error
    except PIL.UnidentifiedImageError as error:
        raise ImageError(NOT_AN_IMAGE, f"it is no image of the formats {', '.join(formats)}") from error
    except Exception as error:  # Pillow raises many kinds for a broken file: OSError, SyntaxError, struct.error
        raise ImageError(UNDECODABLE, f"it cannot be decoded: {error}") from error


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Converts an image to RGB by the rules in the module's docstring.

    Raises:
        ValueError: for PostScript, and for values of the modes I and F that say nothing about what white is.
    """
    if image.format == "EPS":
        raise ValueError("PostScript is a program, not an image: convert it to PNG first")
    raw_mode = _raw_mode(image)
    file_format = image.format
    is_negative = _is_negative(image)
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _to_eight_bits(image, raw_mode, file_format)
        image = PIL.ImageOps.invert(image) if is_negative else image
    elif image.mode == "La":
        image = image.convert("LA")
    elif "transparency" in image.info and image.mode in ("L", "RGB"):
        image.info["transparency"] = _eight_bit_key(image.info["transparency"], raw_mode)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it once more


def _to_eight_bits(image: PIL.Image.Image, raw_mode: str, file_format: str | None) -> PIL.Image.Image:
    """An image of mode I;16, I or F as L, or LA where a value is called transparent."""
    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise ValueError(f"an image of mode {image.mode} has pixels that are not finite")
    grey = _scale_to_eight_bits(values, image.mode, raw_mode, file_format).astype(np.uint8)
    key = image.info.get("transparency")
    if key is None:
        return PIL.Image.fromarray(grey)
    return PIL.Image.fromarray(np.stack([grey, np.where(values == key, 0, 255).astype(np.uint8)], axis=-1))


def _scale_to_eight_bits(values: np.ndarray, mode: str, raw_mode: str, file_format: str | None) -> np.ndarray:
    """Values [H, W] of one of the modes to 0 ... 255."""
    if mode.startswith("I;16"):
        return values >> (4 if raw_mode.startswith("I;12") else 8)
    if mode == "I" and file_format in ("PNG", "PPM"):  # where Pillow gives 16 bits as mode I, scaled to 65535
        return values >> 8
    low = values.min()
    high = values.max()
    if low >= 0 and mode == "F" and high <= 1:
        tell("an image of mode F is read with 1 as white, since none of its values is larger")
        return (values * 255).round()
    if low >= 0 and high <= 255:
        tell(f"an image of mode {mode} is read with 255 as white, since none of its values is larger")
        return values.round()
    if low >= 0 and mode == "I" and high <= 65535:
        tell("an image of mode I is read with 65535 as white, since some of its values are larger than 255")
        return values >> 8
    raise ValueError(f"mode {mode} with values from {low} to {high} does not say what white is: convert it to 8 bits")


def _eight_bit_key(key: Any, raw_mode: str) -> Any:
    """The colour that a PNG calls transparent, on the scale of the decoded pixels: the file has it on its own scale."""
    if isinstance(key, tuple) and (raw_mode == "RGB;16B" or max(key) > 255):
        return tuple(value >> 8 for value in key)
    if raw_mode in ("L;2", "L;4"):
        return key * {"L;2": 85, "L;4": 17}[raw_mode]
    return key


def _raw_mode(image: PIL.Image.Image) -> str:
    """Layout of the pixels in the file, such as "L;4"; "" once they are decoded."""
    tiles = getattr(image, "tile", None) or [(None, None, None, "")]
    arguments = tiles[0][3]
    return arguments if isinstance(arguments, str) else str(next(iter(arguments or ()), ""))


def _is_negative(image: PIL.Image.Image) -> bool:
    """Tells whether 0 is white in the file, a TIFF, which Pillow minds in modes of up to 8 bits only."""
    photometric_interpretation = getattr(image, "tag_v2", {}).get(262)
    return image.format == "TIFF" and photometric_interpretation == 0


def _has_more_frames(image: PIL.Image.Image) -> bool:
    """Tells whether other frames follow; those of MPO are the same photo again, or its depth."""
    if image.format in ("JPEG", "MPO"):
        return False
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # of a damaged frame that is not read
        return True


def centre_box(
    height: int, width: int, size: tuple[int, int], crop_pct: float | None = None
) -> tuple[int, int, int, int]:
    """The part `(left, top, right, bottom)` of an image, in pixels, that is resized to `size` (height, width).

    Args:
        crop_pct: None for all of the image; or else the part in its centre that has the proportions of `size`, of this
            share of the largest such part.
    """
    if crop_pct is None:
        return 0, 0, width, height
    scale = crop_pct * min(height / size[0], width / size[1])
    box_height = max(1, round(scale * size[0]))
    box_width = max(1, round(scale * size[1]))
    left = (width - box_width) // 2
    top = (height - box_height) // 2
    return left, top, left + box_width, top + box_height


def read_image(source: str, timeout: float | None = None) -> PIL.Image.Image:
    """Reads one RGB image from a path, URL or base64 string.

    Args:
        timeout: seconds to wait for a URL.

    Raises:
        ValueError: naming the source, if there is none, or it cannot be read or decoded.
    """
    with naming_the_image(source):
        return check_pixels(_open(source, timeout))


def _open(source: str, timeout: float | None) -> PIL.Image.Image:
    if source.startswith(("http://", "https://")):
        request = urllib.request.Request(source, headers={"User-Agent": "ig_captioner"})
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return read_image_file(io.BytesIO(answer.read()))
    if os.path.isfile(source):
        return read_image_file(source)
    is_data_uri = source.startswith("data:image/")
    try:
        data = base64.decodebytes((source.split(",", 1)[-1] if is_data_uri else source).encode())
        return read_image_file(io.BytesIO(data))
    except Exception as error:
        if is_data_uri:
            raise
        raise FileNotFoundError("no such file, and neither a URL nor a base64 image") from error


@contextmanager
def naming_the_image(image: Any) -> Iterator[None]:
    """Makes a ValueError that names the image of whatever goes wrong while it is read."""
    try:
        yield
    except Exception as error:
        # Broad on purpose: Pillow raises OSError, SyntaxError, struct.error and more, an HTTP client its own.
        raise ValueError(f"cannot read the image {shorten(image)}: {error}") from error


def check_pixels(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image. Raises ValueError for one without pixels."""
    if 0 in image.size:
        raise ValueError("it has no pixels")
    return image


# Texts


def clean_text(text: str) -> str:
    """Joins the words of a text by single spaces, in normal form C; "" if there are none."""
    return unicodedata.normalize("NFC", " ".join(text.translate(WITHOUT_INVISIBLE).split()))


def clean_texts(texts: Sequence[str], name: str) -> list[str]:
    """Cleans texts that somebody typed, and says so where that changes one.

    Args:
        name: what the texts are called in messages.

    Raises:
        ValueError: for a text without a word, and for one that is not Unicode.
    """
    for text in texts:
        check_unicode(text, f"each of {name}")
    cleaned = [clean_text(text) for text in texts]
    if "" in cleaned:
        raise ValueError(f"one of {name} is empty: {shorten(texts[cleaned.index('')])}")
    changed = [text for text, clean in zip(texts, cleaned, strict=True) if text != clean]
    if changed:
        tell(f"white space, byte-order marks or letters in parts were made plain in {name}", changed)
    return cleaned


def split_list(labels: list[str]) -> list[str]:
    """Splits what is evidently one list: a single label with separators in it, or labels that end with separators.

    Labels with separators among several others stay as they are. See `LIST_SEPARATORS`.
    """
    stripped = [label.strip() for label in labels]
    for separator in LIST_SEPARATORS:
        if (len(labels) == 1 and separator in stripped[0]) or any(label.endswith(separator) for label in stripped):
            return [part for part in map(clean_text, " ".join(stripped).split(separator)) if part]
    return labels


def default_templates(config: Any) -> list[str]:
    """The templates for labels that come without one: the checkpoint's own, where its configuration has any."""
    return list(getattr(config, "prompt_templates", None) or [DEFAULT_TEMPLATE])


def format_labels(
    labels: Sequence[str], templates: str | Sequence[str], template_name: str = "a template"
) -> list[str]:
    """Every label in every template, template by template: T x C texts.

    Each `{}` of a template is replaced by the label; braces in labels and other braces in templates mean
    nothing. Labels may repeat. The texts are clean (see `clean_text`): `"dog "` gives those of `"dog"`, and a
    warning. `template_name` is what errors call a template.

    Raises:
        ValueError: naming the value, for labels that are not a list (or tuple) of at least one string, for
            templates that are not a string, or a list of at least one string, with `{}` in each, and for strings
            that are no text, with half of a surrogate pair in them.
    """
    if not isinstance(labels, (list, tuple)) or not labels:
        raise ValueError(f"candidate_labels must be a non-empty list of strings, got {shorten(labels)}")
    for label in labels:
        if not isinstance(label, str):
            raise ValueError(f"every entry of candidate_labels must be a string, got {shorten(label)}")
    listed = [templates] if isinstance(templates, str) else templates
    if not isinstance(listed, (list, tuple)) or not listed:
        raise ValueError(f"{template_name} must be one string or more, got {shorten(templates)}")
    for template in listed:
        if not isinstance(template, str) or "{}" not in template:
            raise ValueError(
                f"{template_name} must be a string with {{}} in it, where the label goes, got {shorten(template)}"
            )
    words = clean_texts(labels, "candidate_labels")
    sentences = clean_texts(listed, template_name)
    return [sentence.replace("{}", word) for sentence in sentences for word in words]


def check_unicode(text: str, name: str) -> None:
    """Raises ValueError for a text with half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be Unicode text (UTF-8), got {shorten(text)}: {error}") from error


# Messages


def tell(message: str, names: Sequence[str] = ()) -> None:
    """Warns that something was left out, changed or guessed, with the number of `names` and the first three."""
    if names:
        message = f"{message} ({len(names)}: {', '.join(map(shorten, names[:3]))}{', ...' if len(names) > 3 else ''})"
    warnings.warn(message, IGCaptionerWarning, stacklevel=3)


def shorten(value: Any, length: int = 120) -> str:
    """`repr` of a value for a message: base64 images are long."""
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}... ({len(text)} characters)"
