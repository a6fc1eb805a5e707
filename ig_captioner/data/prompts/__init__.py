"""Class names and templates of data sets: those of CLIP's evaluation are here, a JSON file each; yours may be anywhere.

A file has the form `{"source": ..., "classes": [...], "templates": [...]}`. The order of the classes is that of the
data set's class indices.
"""

import json
from pathlib import Path
from typing import NamedTuple

from ...input_rules import clean_text
from ..texts import read_label_lines, read_lines, read_text


FOLDER = Path(__file__).parent


class Prompts(NamedTuple):
    """Names of the classes of a data set, and the sentences that the names are put in."""

    class_names: list[str]
    templates: list[str]


def known_prompts() -> list[str]:
    """Names of the data sets whose prompts are here: "cifar10", "imagenet", ..."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load_prompts(name_or_file: str | Path) -> Prompts:
    """Prompts of a known data set, or of a file of the same form. Case does not matter in a name.

    A class with several names (facial emotions have some) goes by the first.

    Raises:
        ValueError: naming what is known, if it is neither; naming the file, if that has another form.
    """
    path = FOLDER / f"{str(name_or_file).lower()}.json"
    if str(name_or_file).lower() not in known_prompts():
        path = Path(name_or_file)
        if not path.is_file():
            known = ", ".join(known_prompts())
            raise ValueError(f"no prompts {str(name_or_file)!r}: there is no such file, and known are {known}")
    try:
        content = json.loads(read_text(path))
        class_names = [names if isinstance(names, str) else names[0] for names in content["classes"]]
        templates = list(content["templates"])
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise ValueError(f"{path} does not hold prompts: {type(error).__name__}: {error}") from error
    texts = class_names + templates
    if not class_names or not templates or not all(isinstance(text, str) and clean_text(text) for text in texts):
        raise ValueError(f"{path} does not hold prompts: classes and templates must be lists of texts, none empty")
    return Prompts(*([clean_text(text) for text in texts] for texts in (class_names, templates)))


def read_class_names(name_or_file: str) -> list[str]:
    """Reads class names of `load_prompts`, or of a text file: a line each."""
    return read_label_lines(name_or_file) if is_text_file(name_or_file) else load_prompts(name_or_file).class_names


def read_templates(name_or_file: str) -> list[str]:
    """Reads templates of `load_prompts`, or of a text file: a line each."""
    return read_lines(name_or_file) if is_text_file(name_or_file) else load_prompts(name_or_file).templates


def is_text_file(name_or_file: str) -> bool:
    """Tells whether it is a file of lines: neither known, nor JSON."""
    path = Path(name_or_file)
    return name_or_file.lower() not in known_prompts() and path.suffix != ".json" and path.exists()
