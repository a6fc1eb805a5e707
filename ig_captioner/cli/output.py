"""Output of commands: results as tables, CSV or JSON lines, errors of one line, progress.

In a table figures come first and text last, so that a long name puts nothing out of line.
"""

import csv
import json
import math
import shutil
import sys
import threading
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from logging import ERROR, getLogger
from typing import Any, TypeVar


FORMATS = ("table", "csv", "jsonl")
HEADS = {
    "score": "score",
    "caption_log_likelihood": "log P(T|I)",
    "prior_log_likelihood": "log P(T)",
    "information_gain": "IG",
}
NONE_OF_THESE = "(none of these)"
SLOW = 3.0  # seconds
# of single samples, which are counted, and of torchao, which reports what of it does not fit the machine
QUIET_LOGGERS = ("ig_captioner.data", "torchao", "torch.utils._pytree")
LONGEST_MESSAGE = 1000  # characters

Fields = dict[str, Any]
T = TypeVar("T")


class Results:
    """Prints rankings as they come, each about a photo or a text: rows of a text and figures.

    - table: a title and the rows; one line for both where there is one row each
    - csv: a line per row, which begins with what it is about
    - jsonl: an object per ranking; ASCII only, so that it survives any terminal encoding and any file name

    Args:
        form: one of `FORMATS`.
        about: what the rankings are about, "image" or "query".
        rows: what the list of rows is called in JSON; None if each has one row, which is not a list there.
        note: first line of tables: what the figures are.
    """

    def __init__(self, form: str, about: str, rows: str | None, note: str):
        self.form = form
        self.about = about
        self.rows = rows
        self.note = note
        self.is_first = True

    def add(self, name: str, rows: list[Fields]) -> None:
        """Prints one ranking.

        Args:
            name: of the photo, or the text.
            rows: the best first; the first entry of a row is its text, the others are figures.

        Raises:
            ValueError: for a figure that is not finite.
        """
        for row in rows:
            check_finite(row)
        if self.form == "jsonl":
            print_json({self.about: name, **({self.rows: rows} if self.rows else rows[0])})
        elif self.form == "csv":
            print_csv([{self.about: name, **row} for row in rows], header=self.is_first)
        else:
            self._add_table(name, rows)
        self.is_first = False

    def _add_table(self, name: str, rows: list[Fields]) -> None:
        if self.is_first:
            print(f"{self.note}\n")
        header, *lines = _cells(rows)
        if self.rows is not None:
            space = "" if self.is_first else "\n"
            print(f"{space}{printable(name)}\n{table([header, *lines])}", flush=True)
            return
        width = max(map(len, HEADS.values()))  # the same for all, which come one by one
        if self.is_first:
            print(table([[*header[:-1], f"{self.about}: {header[-1]}"]], width))
        print(table([[*lines[0][:-1], f"{name}: {lines[0][-1]}"]], width), flush=True)


def check_finite(row: Fields) -> None:
    """Raises ValueError naming a figure that is infinite or no number."""
    for name, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is {value} in {row}: the weights or the prior weight are out of bounds")


def print_json(content: Fields) -> None:
    print(json.dumps(content, allow_nan=False), flush=True)


class _Lines:
    """A file for a CSV writer, which would not quote carriage returns if told to end lines with only a line feed."""

    def write(self, line: str) -> None:
        sys.stdout.write(line.removesuffix("\r\n") + "\n")


def print_csv(rows: list[Fields], header: bool = True) -> None:
    """Rows with the same names; the names come first."""
    writer = csv.writer(_Lines())
    if header and rows:
        writer.writerow(rows[0])
    writer.writerows(row.values() for row in rows)
    sys.stdout.flush()


def _cells(rows: list[Fields]) -> list[list[str]]:
    """Header and rows: figures with two decimals, `score` with three, and then the text.

    The text None is "none of these", the pipeline's answer where nothing fits; it lacks some figures.
    """
    text, *figures = rows[0]

    def cells(row: Fields) -> list[str]:
        shown = ("" if row[name] is None else f"{row[name]:.{3 if name == 'score' else 2}f}" for name in figures)
        return [*shown, NONE_OF_THESE if row[text] is None else row[text]]

    return [[*(HEADS[name] for name in figures), text], *map(cells, rows)]


def table(rows: list[list[str]], width: int = 0) -> str:
    """Indented lines with aligned columns, the last to the left and the others, of `width` at least, to the right."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(width, *map(columns, column)) for column in zip(*rows, strict=True)]
    lines = []
    for *others, last in rows:
        cells = [" " * (wide - columns(cell)) + cell for cell, wide in zip(others, widths, strict=False)]
        lines.append("  " + "  ".join([*cells, last]))
    return "\n".join(lines)


def columns(text: str) -> int:
    """Columns of a terminal: East Asian characters and emoji take two, combining marks none."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    marks = sum(unicodedata.category(character) in ("Mn", "Me") for character in text)
    return len(text) + wide - marks


def terminal_columns() -> int:
    """Width of the terminal; 80 where there is none."""
    return shutil.get_terminal_size().columns


def printable(text: Any) -> str:
    """Text without what would steer a terminal: control characters and broken file names are escaped."""
    characters = (character if character.isprintable() else repr(character)[1:-1] for character in str(text))
    return "".join(characters)


def one_line(message: str) -> str:
    """A message without line breaks and control characters, cut where it is absurdly long."""
    line = printable(" ".join(message.split()))
    return line if len(line) <= LONGEST_MESSAGE else f"{line[:LONGEST_MESSAGE]}... ({len(line)} characters)"


def report(message: str, code: int = 1) -> int:
    """Prints one line on stderr. Returns the exit code."""
    _write_line(f"ig-captioner: error: {one_line(message)}")
    return code


def note(message: str) -> None:
    """Prints one line on stderr about what is no error."""
    _write_line(f"ig-captioner: note: {one_line(message)}")


def _write_line(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)  # above a bar, if there is one
    sys.stderr.flush()


def progress(items: Sequence[T], unit: str, streams: bool) -> Iterable[T]:
    """The items, with a bar on stderr if they take more than a second and it is a terminal.

    Args:
        streams: whether results are printed on the way, which shows progress enough where stdout is a terminal, too.
    """
    from tqdm import tqdm

    hidden = not sys.stderr.isatty() or (streams and sys.stdout.isatty())
    return tqdm(items, unit=unit, delay=1, leave=False, dynamic_ncols=True, disable=hidden)


@contextmanager
def note_if_slow(message: str) -> Iterator[None]:
    """Prints a line on stderr if what is inside takes more than `SLOW` seconds."""
    timer = threading.Timer(SLOW, lambda: print(f"ig-captioner: {message}", file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def quiet(strict: bool = False, libraries: bool = True) -> Iterator[None]:
    """Progress bars and warnings of libraries off, and no crash on what the terminal cannot show.

    Warnings of this package, about what was skipped, cut or guessed, are one line each, said once; with the log of
    single samples, which they count, the screen would be full.

    Args:
        strict: they are errors.
        libraries: whether the command uses transformers and the Hub, which are imported here to be told.
    """
    from ..input_rules import IGCaptionerWarning

    told: set[str] = set()

    def show(message: Warning | str, *arguments: Any, **options: Any) -> None:
        if str(message) not in told:
            told.add(str(message))
            note(str(message))

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    levels = {name: getLogger(name).level for name in QUIET_LOGGERS}
    for name in QUIET_LOGGERS:
        getLogger(name).setLevel(ERROR)
    try:
        with _quiet_libraries() if libraries else nullcontext(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error" if strict else "always", IGCaptionerWarning)
            warnings.showwarning = show
            yield
    finally:
        for name, level in levels.items():
            getLogger(name).setLevel(level)


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """transformers and huggingface_hub without progress bars and warnings."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_verbosity = hub_logging.get_verbosity()
    verbosity = logging.get_verbosity()
    bar = logging.is_progress_bar_enabled()
    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        hub_logging.set_verbosity(hub_verbosity)
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
