"""Captions and lists of texts in files: how they are encoded, and what a line is."""

import codecs
from pathlib import Path

from ..input_rules import clean_text, split_at_commas, tell


BYTE_ORDER_MARKS = {  # UTF-32 first: its little-endian mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def decode_text(content: bytes) -> str:
    """Decodes UTF-8, or what a byte-order mark says. Raises UnicodeDecodeError."""
    marked = (encoding for mark, encoding in BYTE_ORDER_MARKS.items() if content.startswith(mark))
    return content.decode(next(marked, "utf-8"))


def read_text(path: str | Path) -> str:
    """Reads a text file. Raises ValueError, naming it, where it is not encoded as its byte-order mark says."""
    try:
        return decode_text(Path(path).read_bytes())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8, nor what its byte-order mark says: {error}") from error


def read_lines(path: str | Path) -> list[str]:
    """Reads the clean texts of a file, a line each; empty lines are left out, and said where others follow.

    Raises:
        ValueError: naming the file, if it has no lines or another encoding.
    """
    text = read_text(path).replace("\r\n", "\n").replace("\r", "\n").rstrip()
    lines = [clean_text(line) for line in text.split("\n")]
    empty = [number for number, line in enumerate(lines, start=1) if not line]
    lines = [line for line in lines if line]
    if not lines:
        raise ValueError(f"there are no lines in {path}")
    if empty:
        tell(f"{path} has empty lines between others, which were left out", [f"line {number}" for number in empty])
    return lines


def read_label_lines(path: str | Path) -> list[str]:
    """Reads labels as `read_lines` does; a single line is a list between commas, which is said."""
    lines = read_lines(path)
    labels = split_at_commas(lines)
    if labels != lines:
        tell(f"{path} was read as a list between commas", labels)
    return labels
