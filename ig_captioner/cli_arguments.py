"""What commands share: their parser, arguments of several of them, and reading what those name."""

import argparse
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from . import TINY_CHECKPOINT
from .cli_output import report


class UsageError(Exception):
    """A combination of arguments that argparse cannot see is wrong."""


class Parser(argparse.ArgumentParser):
    """Errors of one line, with a hint where photos and options were given in an order that argparse cannot read."""

    def __init__(self, *args, **kwargs):
        kwargs = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter, **kwargs}
        super().__init__(*args, **kwargs)

    def error(self, message: str):
        if "required: PHOTO" in message or message.startswith("unrecognized arguments"):
            message += "; photos come before the options: PHOTO... --labels LABEL..."
        self.exit(2, f"{self.prog}: error: {message} (--help says more)\n")


def add_command(commands, run, usage: str, summary: str, examples: str, model_help: str) -> argparse.ArgumentParser:
    name, usage = run.__name__.replace("_", "-"), f"%(prog)s {usage} [options]"
    parser = commands.add_parser(name, usage=usage, help=summary, description=summary, epilog=examples)
    parser.set_defaults(run=run)
    parser.add_argument("--model", default=TINY_CHECKPOINT, metavar="DIR_OR_REPO", help=model_help)
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    return parser


def add_photo_arguments(parser: argparse.ArgumentParser, batch_size: int) -> None:
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help="image files or URLs")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument(
        "--batch-size",
        type=positive_integer,
        default=batch_size,
        metavar="N",
        help="photos per pass; changes speed and memory, not results (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per photo and line, figures in nats")


def positive_integer(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def weight(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a finite number, zero or more, got {text!r}")
    return value


def read_labels(labels: list[str], file: Path | None) -> list[str]:
    """Labels of the command line, then those of a file. Blank lines are none."""
    for label in labels:
        if Path(label).suffix and os.path.isfile(label):
            raise UsageError(f"{label!r} stands among the labels but is a file: photos come before --labels")
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8: {error}") from error
        labels = labels + [line.strip() for line in lines if line.strip()]
        if not labels:
            raise ValueError(f"there are no labels in {file}")
    if not labels:
        raise UsageError("no labels: give --labels or --labels-file")
    return labels


def read_photos(names: Iterable[str], batch_size: int, failed: list[str]) -> Iterator[list[tuple[str, Any]]]:
    """Batches of names and RGB images. Files that cannot be read are reported, and added to `failed`."""
    from .processing_ig_captioner import load_rgb_image

    batch: list[tuple[str, Any]] = []
    for name in names:
        try:
            if os.path.isdir(name):
                raise ValueError(f"cannot read the image {name!r}: it is a folder")
            batch.append((name, load_rgb_image(name)))
        except ValueError as error:
            failed.append(name)
            report(str(error))
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def choose_device(name: str):
    """The torch device of "auto", "cpu" or "cuda". Raises ValueError where there is no such device."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no GPU is available to torch")
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))


def dtype_on(device) -> dict[str, Any]:
    """On a CPU half precision is slow and gains nothing: float32 there, elsewhere as stored."""
    return {"dtype": "float32"} if device.type == "cpu" else {}
