"""Folders of images: which files are images, and which class a folder is."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from ..input_rules import IMAGE_EXTENSIONS, clean_text, tell


BESIDE_IMAGES = ("txt", "json", "jsonl", "csv", "tsv", "md")  # passed over without a word


def extension_of(name: str) -> str:
    """Gives what follows the last dot of a file's name, in lower case; "" without a dot."""
    return os.path.splitext(name)[1][1:].lower()


def is_image(name: str) -> bool:
    """Tells an image by the extension of its file's name."""
    return extension_of(name) in IMAGE_EXTENSIONS


def list_images(root: str, on_error: Callable[[OSError], None] | None = None) -> list[str]:
    """Lists the image files below a folder, sorted by folder; hidden files and folders do not count.

    Links are followed, but for a folder that leads back to one above it. Other files are said, as a warning.

    Args:
        on_error: is told of folders that cannot be read; None: they raise OSError.
    """

    def stop(error: OSError) -> None:
        raise error

    images: list[str] = []
    others: Counter[str] = Counter()
    for folder, folders, files in os.walk(root, onerror=on_error or stop, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".") and not _leads_back(folder, name)]
        for name in files:
            if is_image(name) and not name.startswith("."):
                images.append(os.path.join(folder, name))
            elif not name.startswith(".") and extension_of(name) not in BESIDE_IMAGES:
                others[f".{extension_of(name)}" if extension_of(name) else "no extension"] += 1
    tell_passed_over(root, others)
    return sorted(images, key=lambda image: Path(image).parts)


def tell_passed_over(place: str, extensions: Counter[str]) -> None:
    """Warns of files at `place` that are no images by their names, if there are any."""
    if extensions:
        counts = ", ".join(f"{count} x {extension}" for extension, count in extensions.most_common())
        tell(f"files in {place} that are no images by their names were passed over: {counts}")


def _leads_back(folder: str, name: str) -> bool:
    """Tells a link to a folder that holds the link itself."""
    path = os.path.join(folder, name)
    return os.path.islink(path) and Path(folder).resolve().is_relative_to(Path(path).resolve())


# Classes


def fold_name(name: str) -> str:
    """Makes names comparable that differ in spaces and underscores, or in how letters with accents are encoded."""
    return clean_text(name.replace("_", " "))


def class_numbers(folders: Sequence[str]) -> dict[str, int]:
    """Numbers the classes whose folders these are.

    Folders of other names are numbered in sorted order; nothing comes out where that is another order by the numbers in
    names (`class10` before `class2`). Where all names are numbers, from 0 on with or without gaps they are the
    classes, and from 1 to the last without a gap one less, which is said. Other numbers do not say which classes they
    are, and nothing comes out.
    """
    if not all(name.isascii() and name.isdecimal() for name in folders):
        ordered_names = sorted(folders, key=lambda name: (unicodedata.normalize("NFC", name), name))
        if ordered_names != sorted(ordered_names, key=_by_numbers):
            return {}
        return {name: number for number, name in enumerate(ordered_names)}
    numbers = {name: int(name) for name in folders}  # also of no folders at all
    ordered = sorted(numbers.values())
    if len(set(ordered)) < len(ordered):
        tell("folders have names that are the same number, so that there is no class_id", sorted(folders))
        return {}
    if not ordered or ordered[0] == 0:
        return numbers
    if ordered == list(range(1, len(ordered) + 1)):
        tell(f"folders 1 to {len(ordered)} are classes 0 to {len(ordered) - 1} in class_id")
        return {name: number - 1 for name, number in numbers.items()}
    tell(f"folders from {ordered[0]} to {ordered[-1]} with gaps do not say which classes they are: no class_id")
    return {}


def _by_numbers(name: str) -> list[tuple[str, int]]:
    """Key that sorts `class2` before `class10`: text and number, in turn."""
    parts = re.findall(r"([^0-9]*)([0-9]*)", unicodedata.normalize("NFC", name))
    return [(text, int(number or -1)) for text, number in parts]


def are_places(numbers: dict[str, int]) -> bool:
    """Tells whether class numbers depend on which folders there are, as places in an order do."""
    return not all(name.isdecimal() and int(name) == number for name, number in numbers.items())
