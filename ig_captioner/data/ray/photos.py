"""Photos in folders, WebDataset shards and Parquet files as rows of a Ray data set, on any file system.

A row has a `key`, the `source` file that it is from ("" for a photo that is a file itself), and the content of the
photo's file as `image`, or an `error`, which is a reason of a few words, in some cases with a colon and more:

| input | key |
|---|---|
| a folder of images | path below the folder |
| shards | `shard:key of the sample`; the rest of a shard that breaks off is one row whose key is the shard |
| Parquet | its column of keys, or `file:number of the row` where it has none |

Nothing but the photo is read of a sample: broken captions and broken JSON are no errors here.

The driver lists files, 64 to a task, or one shard or Parquet file; tasks read them. So a billion photos belong into
shards: their paths alone would fill the driver's memory.
"""

import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray.data
from pyarrow import parquet

from ...input_rules import IMAGE_EXTENSIONS, shorten
from ..archive import MAX_BYTES
from ..folders import BESIDE_IMAGES, extension_of, is_image, list_images, tell_passed_over
from ..remote import UnreachableError, is_url, open_url
from ..shards import (
    SHARD_REASONS,
    SHARD_SUFFIXES,
    RawSample,
    Skipped,
    expand_braces,
    find_shards,
    read_shard,
)
from .places import Place, read_location


WORDS = pa.string()
PHOTOS = pa.schema([("key", WORDS), ("source", WORDS), ("image", pa.large_binary()), ("error", WORDS)])
PHOTOS_PER_TASK = 64  # of a folder
PHOTOS_PER_TABLE = 16  # as many are held at once before they are decoded
DOWNLOADS = 16  # at once, in one task
UNREADABLE, UNREACHABLE, BROKEN_FILE, NO_IMAGE = "unreadable file", "unreachable file", "broken file", "missing image"
PARQUET_SUFFIX = ".parquet"
READING_ERRORS = (OSError, ValueError, ImportError)


class Photo(NamedTuple):
    """A row: see the module."""

    key: str
    source: str
    image: bytes | None
    error: str | None = None


def read_photos(
    location: str | os.PathLike,
    *,
    filesystem: Any = None,
    key_column: str = "key",
    image_column: str = "image",
    num_cpus: float | None = None,
    done: Any = None,
) -> ray.data.Dataset:
    """A data set of photos, to be read when it is used.

    Args:
        location: a folder of images, of shards or of Parquet files; a shard or a Parquet file; or a pattern of shards
            with braces or globs (braces alone for URLs). A path, or a URL of pyarrow or fsspec.
        filesystem: of pyarrow or fsspec, on which `location` is a path.
        key_column: of Parquet files; rows are numbered where there is no such column.
        image_column: of Parquet files: bytes, URLs or paths, or structs of `bytes` and `path`, as `datasets` writes.
        num_cpus: that a reading task reserves; None for Ray's default of 1.
        done: digests of keys that are left out, see `digests`; or a reference to them in the object store.

    Raises:
        FileNotFoundError: if there is nothing at `location`.
        ValueError: if Parquet files have no column of that name.
    """
    items, read = _find(os.fspath(location), filesystem, key_column, image_column)
    # One block for each item, since a block is what a task gets. Paths need not be UTF-8.
    paths = [{"paths": [os.fsencode(path) for path in item]} for item in items]
    listed = ray.data.from_items(paths, override_num_blocks=len(paths))
    arguments = {"read": read, "done": done}
    return listed.map_batches(read_items, batch_size=1, batch_format="pyarrow", fn_kwargs=arguments, num_cpus=num_cpus)


Wanted = Callable[[str], bool]
"""Whether the photo of a key is to be read."""
Read = Callable[[Iterable[str], Wanted], Iterator[Photo]]
"""Reads those photos of the files of an item that are wanted."""


def _find(location: str, filesystem: Any, key_column: str, image_column: str) -> tuple[Sequence[list[str]], Read]:
    """The files of all items, and what reads them."""
    place = None if _is_pattern(location) or _is_http(location) else Place.find(location, filesystem)
    if place is None:
        return _shards_of_pattern(location, filesystem)
    if place.is_file():
        folder, _, name = place.path.rpartition("/")
        root, names = Place(place.filesystem, folder or "/"), [name]
    elif place.is_folder():
        root, names = place, place.files()
    else:
        raise FileNotFoundError(f"nothing at {location!r}: no folder, shard or Parquet file")
    if shards := [name for name in names if name.endswith(SHARD_SUFFIXES)]:
        return [[name] for name in shards], partial(read_shards, root)
    if tables := [name for name in names if name.endswith(PARQUET_SUFFIX) and not name.startswith((".", "_"))]:
        check_columns(root / tables[0], image_column)
        return [[name] for name in tables], partial(read_parquet, root, key_column, image_column)
    if place.is_file():
        raise ValueError(f"{location!r} is neither a shard nor a Parquet file: name the folder that it is in")
    photos = list_photos(root)
    if not photos:
        raise FileNotFoundError(f"no images in the folder {location!r}")
    starts = range(0, len(photos), PHOTOS_PER_TASK)
    return [photos[start : start + PHOTOS_PER_TASK] for start in starts], partial(read_folder, root)


def _is_pattern(location: str) -> bool:
    return any(character in location for character in "{*?[") and not os.path.lexists(location)


def _is_http(location: str) -> bool:
    return location.startswith(("http://", "https://"))


def _shards_of_pattern(pattern: str, filesystem: Any) -> tuple[Sequence[list[str]], Read]:
    """Shards whose keys begin behind the folder that all of them are in by the pattern itself."""
    fixed = pattern[: min((pattern.find(c) for c in "{*?[" if c in pattern), default=len(pattern))]
    folder = fixed.rpartition("/")[0]
    if filesystem is None and (_is_http(pattern) or not is_url(pattern)):
        found = find_shards([pattern])
    else:
        found = expand_braces(pattern)
    names = [path[len(os.path.expanduser(folder)) :].lstrip("/") if folder else path for path in found]
    if _is_http(pattern):
        return [[name] for name in names], partial(read_shards, folder)
    return [[name] for name in names], partial(read_shards, Place.find(folder or os.curdir, filesystem))


def list_photos(root: Place) -> list[str]:
    """Lists the images below a folder by their paths relative to it; hidden files and folders do not count."""
    if root.is_local:
        return [Path(path).relative_to(root.path).as_posix() for path in list_images(root.path)]
    photos: list[str] = []
    others: Counter[str] = Counter()
    for name in root.files(recursive=True):
        if any(part.startswith(".") for part in name.split("/")):
            continue
        if is_image(name):
            photos.append(name)
        elif extension_of(name) not in BESIDE_IMAGES:
            others[f".{extension_of(name)}" if extension_of(name) else "no extension"] += 1
    tell_passed_over(root.path, others)
    return photos


# ---------------------------------------------------------------------------------------------------------------------
# In tasks


def read_items(batch: pa.Table, read: Read, done: Any) -> Iterator[pa.Table]:
    """The photos of one item, without those whose keys are done, a few at a time."""
    finished = digests([]) if done is None else value_of(done)
    rows: list[Photo] = []
    size = 0
    for paths in batch.column("paths").to_pylist():
        for photo in read([os.fsdecode(path) for path in paths], lambda key: not is_done(key, finished)):
            rows.append(photo)
            size += len(photo.image or b"")
            if len(rows) == PHOTOS_PER_TABLE or size > MAX_BYTES:
                yield as_table(rows)
                rows, size = [], 0
    yield as_table(rows)  # also of none, so that the schema is known


def value_of(given: Any) -> Any:
    """What a reference to an object in the object store stands for; anything else as it is."""
    return ray.get(given) if isinstance(given, ray.ObjectRef) else given


def as_table(rows: Sequence[Photo]) -> pa.Table:
    """Rows as Ray passes them on."""
    columns = zip(*rows, strict=True) if rows else [()] * len(PHOTOS)
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, PHOTOS, strict=True)], PHOTOS)


def read_folder(root: Place, names: Iterable[str], wanted: Wanted) -> Iterator[Photo]:
    """Photos that are files."""
    for name in names:
        key = key_of(name)
        if not wanted(key):
            continue
        try:
            yield Photo(key, "", (root / name).read(MAX_BYTES))
        except OSError as error:
            yield Photo(key, "", None, describe(UNREADABLE, error))


def read_shards(root: Place | str, names: Iterable[str], wanted: Wanted) -> Iterator[Photo]:
    """Photos in shards below a folder, or a URL."""
    for name in names:
        for item in read_shard(name, open_file=partial(_open_below, root)):
            photo = _photo_of_sample(key_of(name), item)
            if wanted(photo.key):
                yield photo


def _open_below(root: Place | str, name: str) -> io.BufferedReader:
    return open_url(f"{root}/{name}") if isinstance(root, str) else (root / name).open()


def _photo_of_sample(shard: str, item: RawSample | Skipped) -> Photo:
    """The photo of a sample, or the error that stands for a sample or for the rest of the shard."""
    if not isinstance(item, Skipped):
        key, files = item
        image = next((files[extension] for extension in IMAGE_EXTENSIONS if extension in files), None)
        return Photo(f"{shard}:{key_of(key)}", shard, image, NO_IMAGE if image is None else None)
    if item.reason in SHARD_REASONS:
        last = item.key.partition(":")[2]
        return Photo(shard, shard, None, f"{item.reason}: at {last!r}" if last else item.reason)
    return Photo(f"{shard}:{key_of(item.key)}", shard, None, item.reason)


def check_columns(place: Place, image_column: str) -> None:
    """Raises ValueError if a Parquet file has no such column. A broken file is left to be a row with its error."""
    try:
        names = parquet.read_schema(place.path, filesystem=place.filesystem).names
    except (OSError, pa.ArrowException):
        return
    if image_column not in names:
        raise ValueError(
            f"{place.path} has no column {image_column!r}, but {', '.join(names)}: name that of the photos"
        )


def read_parquet(
    root: Place, key_column: str, image_column: str, names: Iterable[str], wanted: Wanted
) -> Iterator[Photo]:
    """Photos in rows of Parquet files; the rest of a file that cannot be read is one row whose key is the file."""
    for name in names:
        source = key_of(name)
        try:
            with root.filesystem.open_input_file((root / name).path) as file, ThreadPoolExecutor(DOWNLOADS) as pool:
                for rows in _keys_and_values(parquet.ParquetFile(file), source, key_column, image_column):
                    chosen = [(key, value) for key, value in rows if wanted(key)]
                    contents = pool.map(partial(fetch, folder=root), [value for _, value in chosen])
                    for (key, _), (content, error) in zip(chosen, contents, strict=True):
                        yield Photo(key, source, content, error)
        except (OSError, pa.ArrowException) as error:
            if wanted(source):
                yield Photo(source, source, None, describe(BROKEN_FILE, error))


def _keys_and_values(
    file: parquet.ParquetFile, source: str, key_column: str, image_column: str
) -> Iterator[list[tuple[str, Any]]]:
    """Keys, and what stands for the photos, of a few rows at a time."""
    number = 0
    names = [name for name in (key_column, image_column) if name in file.schema_arrow.names]
    for batch in file.iter_batches(PHOTOS_PER_TABLE, columns=names):
        columns = batch.to_pydict()
        numbered = (f"{source}:{number + place}" for place in range(len(batch)))
        keys = columns.get(key_column, numbered)
        values = columns.get(image_column, [None] * len(batch))
        yield [(str(key), value) for key, value in zip(keys, values, strict=True)]
        number += len(batch)


def fetch(value: Any, folder: Place) -> tuple[bytes | None, str | None]:
    """The content of a photo from bytes, from a URL or path, or from a struct of both; or the error."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if value is None:
        return None, NO_IMAGE
    if isinstance(value, bytes):
        return value, None
    if not isinstance(value, str):
        return None, f"{NO_IMAGE}: neither bytes nor a URL, but {shorten(value)}"
    try:
        return read_location(value, folder, MAX_BYTES), None
    except UnreachableError as error:
        return None, describe(UNREACHABLE, error)
    except READING_ERRORS as error:
        return None, describe(UNREADABLE, error)


def describe(reason: str, error: Exception) -> str:
    """A reason with what an exception says, in one line."""
    message = " ".join(str(error).split())
    return f"{reason}: {message[:500]}" if message else reason


# Keys


def key_of(name: str) -> str:
    """The name of a file or sample as Unicode: bytes that are not UTF-8 are escaped."""
    return name.encode("utf-8", "backslashreplace").decode()


def digests(keys: Iterable[str]) -> np.ndarray:
    """16 bytes for each key, sorted: to find out whether a key is among very many."""
    return np.sort(np.array([_digest(key) for key in keys], dtype="S16"))


def is_done(key: str, finished: np.ndarray) -> bool:
    """Whether a key is among those of `digests`."""
    digest = np.bytes_(_digest(key))
    place = np.searchsorted(finished, digest)
    return bool(place < len(finished) and finished[place] == digest)


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=16).digest().rstrip(b"\0")  # as numpy does
