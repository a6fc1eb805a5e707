"""Captions and lists of texts in files: how they are encoded, and what a line is."""

import codecs
import re
from pathlib import Path

from ..input_rules import clean_text, split_list, tell


BYTE_ORDER_MARKS = {  # UTF-32 first: its little-endian mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def decode_text(content: bytes) -> str:
    """Decodes UTF-8, or what a byte-order mark says. Raises UnicodeDecodeError, for NUL as well: no text holds it."""
    marked = (encoding for mark, encoding in BYTE_ORDER_MARKS.items() if content.startswith(mark))
    encoding = next(marked, "utf-8")
    text = content.decode(encoding)
    if "\0" in text:
        place = content.index(0)
        raise UnicodeDecodeError(encoding, content, place, place + 1, "NUL, as in UTF-16 without a byte-order mark")
    return text


def read_text(path: str | Path) -> str:
    """Reads a text file. Raises ValueError, naming it, where it is not encoded as its byte-order mark says."""
    try:
        return decode_text(Path(path).read_bytes())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8, nor what its byte-order mark says: {error}") from error


def read_lines(path: str | Path) -> list[str]:
    """Reads the clean texts of a file, a line each; empty lines are left out, and said where others follow.

    Lines that look like columns, quotes or JSON are texts as they stand, which is said.

    Raises:
        ValueError: naming the file, if it has no lines or another encoding.
    """
    text = read_text(path).replace("\r\n", "\n").replace("\r", "\n").rstrip()
    odd = [line for line in text.split("\n") if _is_no_plain_line(line.strip())]
    if odd:
        tell(f"lines of {path} that look like columns, quotes or JSON are texts as they stand", odd)
    lines = [clean_text(line) for line in text.split("\n")]
    empty = [number for number, line in enumerate(lines, start=1) if not line]
    lines = [line for line in lines if line]
    if not lines:
        raise ValueError(f"there are no lines in {path}")
    if empty:
        tell(f"{path} has empty lines between others, which were left out", [f"line {number}" for number in empty])
    return lines


def _is_no_plain_line(line: str) -> bool:
    """Tells whether a line has tabs or rarer breaks inside, or quotes or brackets around it: CSV, TSV or JSON."""
    return len(re.split(r"[\t\v\f\x1c-\x1e\x85\u2028\u2029]", line)) > 1 or line[:1] + line[-1:] in ('""', "[]", "{}")


def read_label_lines(path: str | Path) -> list[str]:
    """Reads labels as `read_lines` does; a single line is a list between commas or the like, which is said."""
    lines = read_lines(path)
    labels = split_list(lines)
    if labels != lines:
        tell(f"{path} was read as one list", labels)
    return labels
