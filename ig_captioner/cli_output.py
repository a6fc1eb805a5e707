"""What commands print: tables, JSON lines, errors of one line; and what libraries print, which is kept off."""

import json
import sys
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


def print_json(content: dict[str, Any]) -> None:
    """One line, ASCII only, so that it survives any terminal encoding and any file name."""
    print(json.dumps(content, allow_nan=False), flush=True)


def in_order(entry: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: entry[name] for name in names}


def table(rows: list[list[str]]) -> str:
    """Indented lines with aligned columns, the first to the left and the others to the right."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(columns, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first + " " * (widths[0] - columns(first))]
        cells += [" " * (width - columns(cell)) + cell for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  " + "  ".join(cells))
    return "\n".join(lines)


def columns(text: str) -> int:
    """Columns of a terminal: East Asian characters and emoji take two, combining marks none."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    marks = sum(unicodedata.category(character) in ("Mn", "Me") for character in text)
    return len(text) + wide - marks


def printable(text: Any) -> str:
    """Text without what would steer a terminal: control characters and broken file names are escaped."""
    characters = (character if character.isprintable() else repr(character)[1:-1] for character in str(text))
    return "".join(characters)


def report(message: str, code: int = 1) -> int:
    """Prints one line on stderr. Returns the exit code."""
    print(f"ig-captioner: error: {printable(' '.join(message.split()))}", file=sys.stderr, flush=True)
    return code


@contextmanager
def quiet() -> Iterator[None]:
    """Progress bars and warnings of libraries off, and no crash on what the terminal cannot show."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    hub_verbosity, verbosity = hub_logging.get_verbosity(), logging.get_verbosity()
    bar = logging.is_progress_bar_enabled()
    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hub_logging.set_verbosity(hub_verbosity)
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
