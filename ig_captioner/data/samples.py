"""Data to evaluate on: WebDataset shards, a folder of images, or a `datasets` data set on disk.

All three come out as `shards.read_shard` gives them, key and files, so that one decoder serves them all:

- shards: patterns with braces and globs, or a folder that holds `.tar` or `.tar.gz` files.
- a folder of images: those that `folders.list_images` finds. The key is the path without extension, unless several
  images share that; `key.txt` and `key.json` beside an image belong to it. Where it lacks them, the JSON gets
  `class_name`, the first folder on the path with spaces for underscores, and `class_id` (see `folders.class_numbers`;
  where that is a place among the folders, `class_folders` says how many there are).
- a data set that `save_to_disk` wrote: the key is `key` or `id` of the row where it has one, else its number. Columns
  are the JSON; a column of class labels also gives `class_name`; `caption` or `text` do for `captions`.

Which samples belong to the held-out part, on which prior weights are tuned, is decided by a hash of the key.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import PIL.Image

from ..input_rules import tell
from .folders import are_places, class_numbers, extension_of, fold_name, is_image, list_images
from .remarks import Remarks
from .shards import (
    IMAGE_EXTENSIONS,
    SHARD_SUFFIXES,
    EmptySourceError,
    RawSample,
    Skipped,
    decode_item,
    find_shards,
    first_by_hash,
    image_of,
    is_held_out,
    read_captions,
    read_metadata,
    read_shard,
)


logger = logging.getLogger(__name__)

CAPTION_COLUMNS = ("captions", "caption", "text")

T = TypeVar("T")


def read_source(data: str) -> Iterator[RawSample | Skipped]:
    """Key and files of all samples, in a fixed order.

    Raises:
        FileNotFoundError: if there is nothing at `data`.
        ValueError: for a folder of several splits, or a data set without a column of images.
    """
    folder = Path(data).expanduser()
    if not folder.is_dir():
        return _read_shards(_find_shards(data))
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.name for path in folder.iterdir() if path.is_dir())
        raise ValueError(f"{data} holds several splits: name one of {', '.join(f'{data}/{split}' for split in splits)}")
    if (folder / "dataset_info.json").is_file():
        return _read_dataset(folder)
    shards = sorted(str(path) for path in folder.iterdir() if path.name.endswith(SHARD_SUFFIXES))
    if shards:
        others = [path.name for path in sorted(folder.iterdir()) if path.is_dir() or is_image(path.name)]
        if others:
            tell(f"shards of {data} are read, its folders and images are not", others)
        return _read_shards(shards)
    return _read_folder(folder)


def _find_shards(data: str) -> list[str]:
    if is_image(data) and Path(data).is_file():
        raise ValueError(f"{data} is an image: name the folder that it is in")
    try:
        return find_shards([data])
    except FileNotFoundError as error:
        raise FileNotFoundError(f"nothing at {data!r}: no folder, and no shard") from error


def _read_shards(paths: list[str]) -> Iterator[RawSample | Skipped]:
    for path in paths:
        yield from read_shard(path)


def _read_folder(folder: Path) -> Iterator[RawSample | Skipped]:
    images = [Path(image) for image in list_images(str(folder))]
    numbers = class_numbers([path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != "."])
    images_of_stem = Counter(path.with_suffix("") for path in images)
    for path in images:
        place = path.relative_to(folder)
        alone = images_of_stem[path.with_suffix("")] == 1
        key = (place.with_suffix("") if alone else place).as_posix()
        try:
            files = {extension_of(path.name): path.read_bytes()}
            for beside in (".txt", ".json"):
                for other in (path.with_suffix(beside.upper()), path.with_suffix(beside)):
                    if other.is_file():
                        files[beside[1:]] = other.read_bytes()
        except OSError as error:
            logger.warning("%s: %s", path, error)
            yield Skipped(key, "unreadable file")
            continue
        if len(place.parts) > 1:
            files["json"] = _with_class(files.get("json", b"{}"), place.parts[0], numbers)
        yield key, files


def _with_class(content: bytes, name: str, numbers: dict[str, int]) -> bytes:
    """The JSON of an image with what its class folder says, where it does not say so itself; broken JSON as it is."""
    try:
        metadata = json.loads(content)
    except (ValueError, RecursionError):
        return content
    if not isinstance(metadata, dict):
        return content
    metadata.setdefault("class_name", fold_name(name))
    if name in numbers and "class_id" not in metadata:
        metadata["class_id"] = numbers[name]
        if are_places(numbers):
            metadata["class_folders"] = len(numbers)
    return json.dumps(metadata).encode()


def _read_dataset(folder: Path) -> Iterator[RawSample | Skipped]:
    from datasets import ClassLabel, Image, load_from_disk

    data = load_from_disk(str(folder))
    images = [name for name, feature in data.features.items() if isinstance(feature, Image)]
    labels = {name: feature for name, feature in data.features.items() if isinstance(feature, ClassLabel)}
    if not images:
        raise ValueError(f"{folder} has no column of images, but {', '.join(data.column_names)}")
    for kind, columns in (("images", images), ("class labels, for class_name,", list(labels))):
        if len(columns) > 1:
            tell(f"of the columns of {kind} in {folder} the first is read", columns)
    data = data.cast_column(images[0], Image(decode=False)).remove_columns(images[1:])
    for number, row in enumerate(data):
        image = row.pop(images[0]) or {}
        key = str(row.get("key", row.get("id", number)))
        try:
            content = image.get("bytes") or (Path(image["path"]).read_bytes() if image.get("path") else b"")
        except OSError as error:
            logger.warning("%s: %s", image["path"], error)
            yield Skipped(key, "unreadable file")
            continue
        for name, feature in labels.items():
            if row[name] is not None and row[name] >= 0:
                row.setdefault("class_name", feature.int2str(row[name]))
        row["captions"] = next((row[name] for name in CAPTION_COLUMNS if row.get(name)), [])
        yield key, {IMAGE_EXTENSIONS[0]: content, "json": json.dumps(row, default=str).encode()}


class Samples(Iterable[T]):
    """The usable samples of a source, as `decode(key, files)` makes them; may be read several times.

    Args:
        data: see `read_source`.
        decode: raises BrokenSampleError for a sample that cannot be used.
        limit: how many samples, chosen by a hash of their keys; None: all.

    Attributes:
        keys: of the samples that have come out, while they are read and afterwards.
        skipped: how many have not, by reason. When all are read, a warning says so, with the first keys.
    """

    def __init__(self, data: str, decode: Callable[[str, dict[str, bytes]], T], limit: int | None = None):
        self.data = data
        self.decode = decode
        self.keys: list[str] = []
        self.skipped: Counter[str] = Counter()
        self.chosen: set[str] | None = None
        if limit is not None:
            self.chosen = first_by_hash((item[0] for item in read_source(data) if not isinstance(item, Skipped)), limit)

    def __iter__(self) -> Iterator[T]:
        self.keys = []
        self.skipped = Counter()
        without: list[str] = []
        remarks = Remarks()
        for item in read_source(self.data):
            if not isinstance(item, Skipped) and self.chosen is not None and item[0] not in self.chosen:
                continue
            with remarks.about(item[0]):
                result = decode_item(item, self.decode)
            if isinstance(result, Skipped):
                self.skipped[result.reason] += 1
                without.append(result.key)
                continue
            self.keys.append(item[0])
            yield result
        remarks.tell()
        if not self.keys:
            raise EmptySourceError(
                f"no usable sample in {self.data!r}: {describe_skipped(self.skipped) or 'it is empty'}"
            )
        if without:
            tell(f"samples of {self.data} were skipped: {describe_skipped(self.skipped)}", without)


def describe_skipped(skipped: Counter[str]) -> str:
    """As in "3 x missing image, 1 x bad JSON"; "" if there are none."""
    return ", ".join(f"{count} x {reason}" for reason, count in skipped.most_common())


def split_by_hash(keys: Iterable[str], fraction: float) -> tuple[list[int], list[int]]:
    """Indices of the held-out keys, and of the others.

    Raises:
        ValueError: if one of the two is empty.
    """
    held_out: list[int] = []
    others: list[int] = []
    for index, key in enumerate(keys):
        (held_out if is_held_out(key, fraction) else others).append(index)
    if not held_out or not others:
        parts = f"{len(held_out)} samples to tune on and {len(others)} to test on"
        raise ValueError(f"a held-out fraction of {fraction:g} makes {parts}: there must be both")
    return held_out, others


FindLabel = Callable[[dict[str, bytes]], int]
"""The class index of a sample, from its files."""


def label_from_field(class_names: Sequence[str], field: str = "class_name") -> FindLabel:
    """Labels are a field of the sample's JSON: a class name (the first of that name), or an integer index.

    Names may differ in spaces and underscores and in the encoding of accents.
    """
    places: dict[str, int] = {}
    for fold in (str, fold_name):  # names to the letter come first
        for number, name in enumerate(class_names):
            places.setdefault(fold(name), number)

    def find_label(files: dict[str, bytes]) -> int:
        metadata = read_metadata(files)
        value = metadata.get(field)
        folders = metadata.get("class_folders", len(class_names))
        if field == "class_id" and folders != len(class_names):
            raise ValueError(
                f"class_id is a place among {folders} folders, but there are {len(class_names)} class names: use names "
                "of folders (--label-field class_name), or numbers as names of folders"
            )
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(class_names):
            return value
        if isinstance(value, str) and (value in places or fold_name(value) in places):
            return places[value] if value in places else places[fold_name(value)]
        if field == "class_id" and value is None:
            raise ValueError(
                "there is no class_id: folders say one by names that are numbers, or by their order, unless that is "
                "another by the numbers in names (class10 before class2)"
            )
        if value is None:
            raise ValueError(f"there is no {field!r}: photos have one by a folder per class, or by JSON beside them")
        raise ValueError(f"field {field!r} of a sample's JSON is {value!r}: not one of {len(class_names)} classes")

    return find_label


def labelled_decoder(find_label: FindLabel) -> Callable[[str, dict[str, bytes]], tuple[PIL.Image.Image, int]]:
    """The `decode` that gives image and class index.

    It raises ValueError, naming key and label, for a label that is none of the classes: names and data do not fit.
    """

    def decode(key: str, files: dict[str, bytes]) -> tuple[PIL.Image.Image, int]:
        try:
            label = find_label(files)
        except ValueError as error:
            raise ValueError(f"sample {key!r}: {error}") from error
        return image_of(files), label

    return decode


def captioned(key: str, files: dict[str, bytes]):
    """The image and the captions of a sample, for `Samples`."""
    return image_of(files), read_captions(files)


def separate(samples: Iterable[tuple[PIL.Image.Image, T]]) -> tuple[Iterator[PIL.Image.Image], list[T]]:
    """Images, to be read once, and what comes with them: a list that fills while the images are read."""
    others: list[T] = []

    def images() -> Iterator[PIL.Image.Image]:
        for image, other in samples:
            others.append(other)
            yield image

    return images(), others
