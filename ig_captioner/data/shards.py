"""WebDataset shards to decoded samples, for training and evaluation.

A shard is a `.tar` or `.tar.gz`, a local file or a URL (see `remote`), whose consecutive members `key.jpg` (or another
of `IMAGE_EXTENSIONS`), `key.txt` and `key.json` form a sample (`group_members` has the rule). Its captions are the
`captions` of the JSON where there are any, else the text file.

A broken sample is skipped, never fatal: it comes out as `Skipped(key, reason)`, and is logged, and so is the rest of a
shard that breaks off or cannot be reached. A shard set without a single usable sample is an `EmptySourceError` with
the counts.

`read_shard` gives the files of each sample, `read_decoded` what a function makes of them, `read_samples` the pixels and
caption tokens that training takes.
"""

import glob
import hashlib
import io
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from ..input_rules import IMAGE_EXTENSIONS, MAX_PIXELS, ImageError, check_unicode, clean_text, read_image_file, tell
from ..processing_ig_captioner import gives_scored_form
from .archive import MAX_BYTES, TOO_LARGE, Archive, Member
from .fingerprints import Fingerprint, HashingFile, name_of
from .remote import UnreachableError, check_url, is_url, open_url
from .texts import decode_text


logger = logging.getLogger(__name__)

BROKEN_SHARD, UNREACHABLE_SHARD = "broken shard", "unreachable shard"
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MAX_FILES = 64  # of a sample
SHARD_REASONS = (BROKEN_SHARD, UNREACHABLE_SHARD)  # of a Skipped that stands for the rest of a shard

T = TypeVar("T")
Encode = Callable[[list[str]], list[list[int]]]
RawSample = tuple[str, dict[str, bytes]]  # key, {extension: content}


class Skipped(NamedTuple):
    """A sample that could not be used. `reason` is one of a few words, for counting."""

    key: str
    reason: str


class EmptySourceError(ValueError):
    """A set of shards without a usable sample."""


class BrokenSampleError(Exception):
    """Raised while a sample is decoded; the argument is the reason."""


class EncodedCaptions(Sequence[list[int]]):
    """Captions that become token ids when they are asked for: a stream uses one of each sample's."""

    def __init__(self, texts: list[str], encode: Encode):
        self.texts = texts
        self.encode = encode

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: Any) -> Any:
        return self.encode([self.texts[index]])[0]


class Sample(NamedTuple):
    """One image with its captions: uint8 [H, W, 3], or as it was decoded; `captions` are token ids in scored form."""

    key: str
    image: np.ndarray | Image.Image
    captions: Sequence[list[int]]


def describe_empty(name: str, paths: list[str], reasons: Counter[str]) -> str:
    counts = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common()) or "no samples at all"
    return f"source {name!r} has no usable sample in {len(paths)} shard(s) {paths[:3]}: {counts}"


def expand_braces(pattern: str) -> list[str]:
    """`a{00..02}.tar` -> a00.tar, a01.tar, a02.tar; `{a,b}` -> a, b; any number of groups."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span:
        width = len(span[1]) if span[1].startswith("0") else 0
        choices = [f"{number:0{width}d}" for number in range(int(span[1]), int(span[2]) + 1)]
    else:
        choices = match[1].split(",")
    return [
        expanded
        for choice in choices
        for expanded in expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])
    ]


def find_shards(patterns: Iterable[str], root: str = "") -> list[str]:
    """Existing files for patterns with braces and globs, in order, relative ones below `root`; URLs with braces.

    Whether URLs exist is seen when they are read.

    Raises:
        FileNotFoundError: a pattern matches no file.
        ImportError, ValueError: nothing is installed that reads a URL.
    """
    paths: list[str] = []
    for pattern in patterns:
        whole = pattern if is_url(pattern) else os.path.join(root, os.path.expanduser(pattern))
        if is_url(whole):
            check_url(whole)
            paths.extend(expand_braces(whole))
            continue
        for expanded in expand_braces(whole):
            found = sorted(glob.glob(expanded)) if glob.has_magic(expanded) else [expanded]
            if not found or not os.path.isfile(found[0]):
                raise FileNotFoundError(f"no shard at {expanded!r} (from {pattern!r}; data_root is {root!r})")
            paths.extend(found)
    return paths


def open_shard(path: str) -> io.BufferedReader:
    """Opens a local file or a URL."""
    return open_url(path) if is_url(path) else open(path, "rb")


def read_shard(
    path: str,
    fingerprints: list[Fingerprint] | None = None,
    open_file: Callable[[str], io.BufferedReader] = open_shard,
) -> Iterator[RawSample | Skipped]:
    """Yields (key, {extension: content}) for each sample of a shard, or Skipped where the archive breaks off.

    Args:
        fingerprints: gets that of the shard when it has been read.
        open_file: opens `path`.
    """
    last = ""
    name = os.path.basename(path)
    hashing = None

    def members(archive: Archive) -> Iterator[Member]:
        nonlocal last
        for member in archive.members():
            last = split_name(member.name)[0]
            yield member

    try:
        with open_file(path) as file:
            if fingerprints is not None:
                hashing = HashingFile(file)
                file = io.BufferedReader(hashing, 2**20)
            archive = Archive(file)
            yield from group_members(members(archive), name)
            archive.check_end()
            if not last:
                logger.warning("%s holds no files", path)
            if hashing is not None and fingerprints is not None:
                fingerprints.append(hashing.fingerprint(path))
    except Exception as error:  # broad on purpose: on garbage tarfile and the decompressors raise many kinds
        # What was read of the current sample may be cut short, so it goes with the rest of the shard.
        logger.warning("%s breaks off at %r: %s: %s", path, last, type(error).__name__, error)
        reason = UNREACHABLE_SHARD if isinstance(error, UnreachableError) else BROKEN_SHARD
        if fingerprints is not None:
            fingerprints.append(_fingerprint_of_broken(path))
        yield Skipped(f"{name}:{last}", reason)


def _fingerprint_of_broken(path: str) -> Fingerprint:
    """The fingerprint of a shard that could not be read to its end: of a local file all the same."""
    if is_url(path) or not os.path.isfile(path):
        return Fingerprint(name_of(path))
    with open(path, "rb") as file:
        return HashingFile(file).fingerprint(path)


# Members to samples


def split_name(name: str) -> tuple[str, str]:
    """Splits a member's name at its last dot into folder and stem, and extension: `a/22.00.JPG` to `a/22.00`, `jpg`.

    The extension of hidden files, such as those that macOS puts into archives, is "", as where there is none.
    """
    stem, dot, extension = name.rpartition(".")
    is_hidden = any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))
    return (name, "") if is_hidden or not dot or "/" in extension else (stem, extension.lower())


def base_of(stem: str) -> str:
    """Takes words of letters after dots off a stem: `key.seg` is of the sample `key`, `22.00` is one of its own."""
    while match := re.fullmatch(r"(.*[^/])\.[A-Za-z][A-Za-z_-]*", stem, flags=re.DOTALL):
        stem = match[1]
    return stem


def group_members(members: Iterable[Member], archive: str = "") -> Iterator[RawSample | Skipped]:
    """Puts consecutive files into samples.

    The key is all before the last dot. Where files stand beside them whose names have a word more, as in `key.jpg`,
    `key.seg.png`, `key.txt`, those belong to the sample as `seg.png`; without `key.*`, or with an image and a text of
    their own, they are samples themselves.
    Hidden files are passed over, and so are files without an extension, which is logged.
    """
    group: list[File] = []
    others: list[str] = []
    for member in members:
        stem, extension = split_name(member.name)
        if not extension:
            if not any(part.startswith(".") for part in member.name.split("/")):
                others.append(member.name)
            continue
        if group and (base_of(stem) != base_of(group[0].stem) or (len(group) >= MAX_FILES and stem != group[-1].stem)):
            yield from _samples_of(group)
            group = []
        refused = member.refused
        if sum(len(file.content) for file in group) + member.size > MAX_BYTES:
            refused = refused or TOO_LARGE
        group.append(File(stem, extension, b"" if refused else member.read(), refused))
    yield from _samples_of(group)
    if others:
        logger.warning("%s: %d files without an extension are in no sample: %s", archive, len(others), others[:3])


class File(NamedTuple):
    """A file of a sample, read, or why it is not."""

    stem: str
    extension: str
    content: bytes
    refused: str


def _samples_of(group: list[File]) -> Iterator[RawSample | Skipped]:
    """The samples of files whose names have the same base."""
    whole = next((file.stem for file in group if base_of(file.stem) == file.stem), None)
    with_image = {file.stem for file in group if file.extension in IMAGE_EXTENSIONS}
    complete = with_image & {file.stem for file in group if file.extension in ("txt", "json")}
    samples: dict[str, dict[str, bytes]] = {}
    refused: dict[str, str] = {}
    for file in group:
        key = file.stem
        extension = file.extension
        if whole is not None and file.stem != whole and file.stem not in complete:
            key = whole
            extension = f"{file.stem[len(whole) + 1 :]}.{extension}"
        files = samples.setdefault(key, {})
        if file.refused or extension in files:
            refused[key] = file.refused or "two files of one name"
        files[extension] = file.content
    for key, files in samples.items():
        yield Skipped(key, refused[key]) if key in refused else (key, files)


# Which samples


def is_held_out(key: str, fraction: float) -> bool:
    """Tells whether a key belongs to the held-out part: digits 8 to 16 of its SHA-1, as a fraction of 16**8."""
    return int(hash_of(key).hex()[8:16], 16) < fraction * 16**8


def hash_of(key: str) -> bytes:
    """The SHA-1 of a key, which may be the name of a file that is not UTF-8."""
    return hashlib.sha1(key.encode("utf-8", "surrogateescape")).digest()


def first_by_hash(keys: Iterable[str], count: int | None) -> set[str]:
    """A random-looking but fixed subset of `count` keys (None: all), whatever their order: shards may be sorted."""
    return set(sorted(keys, key=hash_of)[:count])


def image_of(files: dict[str, bytes], max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The RGB image of a sample."""
    found = [extension for extension in IMAGE_EXTENSIONS if extension in files]
    if not found:
        raise BrokenSampleError("missing image")
    if len(found) > 1:
        tell("of a sample's images, which differ in their extensions only, the first is read", found)
    content = files[found[0]]
    if not content:
        raise BrokenSampleError("empty image file")
    try:
        return read_image_file(io.BytesIO(content), max_pixels)
    except ImageError as error:
        raise BrokenSampleError(error.reason) from error


def read_metadata(files: dict[str, bytes]) -> dict[str, Any]:
    """The JSON of a sample; empty if there is none."""
    try:
        metadata = json.loads(files["json"]) if "json" in files else {}
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError, endless brackets
        raise BrokenSampleError("bad JSON") from error
    return metadata if isinstance(metadata, dict) else {}


def read_captions(files: dict[str, bytes]) -> list[str]:
    """All captions of a sample as clean texts (see `input_rules`), empty ones left out.

    The `captions` of the JSON, a list or one text, win over the text file, which is one caption whatever its lines.
    """
    captions = read_metadata(files).get("captions") or []
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise BrokenSampleError("captions that are not texts")
    try:
        captions = captions or [read_caption_file(files.get("txt", b""))]
        check_unicode("".join(captions), "a caption")  # JSON may hold halves of surrogate pairs
    except ValueError as error:
        raise BrokenSampleError("caption is not UTF-8") from error
    captions = [caption for caption in map(clean_text, captions) if caption]
    if not captions:
        raise BrokenSampleError("missing caption")
    return captions


def read_caption_file(content: bytes) -> str:
    """The one caption in a text file."""
    text = decode_text(content)
    if len(text.strip().splitlines()) > 1:
        tell("a text file of several lines is read as one caption")
    return text


def read_decoded(
    paths: Iterable[str],
    decode: Callable[[str, dict[str, bytes]], T],
    *,
    keep: Callable[[str], bool] = lambda key: True,
    fingerprints: list[Fingerprint] | None = None,
) -> Iterator[T | Skipped]:
    """`decode(key, files)` of the samples of shards whose key `keep` accepts.

    Args:
        decode: raises BrokenSampleError where a sample cannot be used; it comes out as Skipped.
        fingerprints: gets those of the shards as they have been read.
    """
    for path in paths:
        for item in read_shard(path, fingerprints):
            if isinstance(item, Skipped) or keep(item[0]):
                yield decode_item(item, decode)


def decode_item(item: RawSample | Skipped, decode: Callable[[str, dict[str, bytes]], T]) -> T | Skipped:
    """`decode(key, files)` of one item of `read_shard`; what is broken is logged and comes out as Skipped."""
    try:
        result = item if isinstance(item, Skipped) else decode(*item)
    except BrokenSampleError as error:
        result = Skipped(item[0], str(error))
    if isinstance(result, Skipped):
        logger.warning("skipped %s: %s", result.key, result.reason)
    return result


# Training's samples


def shrink(image: Image.Image, size: int, keep_proportions: bool = False) -> Image.Image:
    """Squashes to size x size when a side is longer than `size`; smaller images keep their pixels.

    Args:
        keep_proportions: the shorter side becomes `size` instead, when it is longer.
    """
    if keep_proportions:
        factor = min(1.0, size / min(image.size))
        width, height = (round(factor * side) for side in image.size)
    else:
        width, height = (size, size) if max(image.size) > size else image.size
    return image if (width, height) == image.size else image.resize((width, height), Image.Resampling.BICUBIC)


def sample_decoder(
    encode: Encode, max_pixels: int, size: int | None = None, keep_proportions: bool = False
) -> Callable[[str, dict[str, bytes]], Sample]:
    """The `decode` of `read_decoded` that gives pixels and caption tokens.

    Args:
        size, keep_proportions: see `shrink`; for samples that are kept: the pixels are then uint8 [H, W, 3], which
            takes less memory than the image as decoded, and all captions are encoded at once.
    """

    def decode(key: str, files: dict[str, bytes]) -> Sample:
        image = image_of(files, max_pixels)
        captions = read_captions(files)
        if size is None:
            return Sample(key, image, EncodedCaptions(captions, encode))
        return Sample(key, np.asarray(shrink(image, size, keep_proportions)), encode(captions))

    return decode


def read_samples(
    paths: Iterable[str],
    encode: Encode,
    *,
    max_pixels: int,
    size: int | None = None,
    keep_proportions: bool = False,
    keep: Callable[[str], bool] = lambda key: True,
    fingerprints: list[Fingerprint] | None = None,
) -> Iterator[Sample | Skipped]:
    """Pixels and caption tokens of the samples of shards whose key `keep` accepts.

    Args:
        size, keep_proportions: see `shrink`.
    """
    return read_decoded(
        paths, sample_decoder(encode, max_pixels, size, keep_proportions), keep=keep, fingerprints=fingerprints
    )


def make_encoder(tokenizer: Any, max_length: int) -> Encode:
    """Texts to token ids in scored form: tokens and EOS, no start token, at most `max_length`, EOS kept."""
    if not gives_scored_form(tokenizer):
        raise ValueError(
            f"the tokenizer must add EOS and nothing else; it turns 'a' into {tokenizer('a')['input_ids']}"
        )

    def encode(texts: list[str]) -> list[list[int]]:
        eos = tokenizer.eos_token_id
        rows = tokenizer(texts)["input_ids"]
        if any(len(tokens) > max_length for tokens in rows):
            tell(f"captions of more than {max_length} tokens are cut")
        return [tokens if len(tokens) <= max_length else [*tokens[: max_length - 1], eos] for tokens in rows]

    return encode
