"""Parts that commands share: their parser, arguments of several commands, and reading what these name."""

import argparse
import glob
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .output import FORMATS, one_line, progress, report


MODEL_HELP = "folder or Hub repository of any captioner (default: the checkpoint in the package)"
LARGEST_BATCH = 65_536
LARGEST_PRIOR_WEIGHT = 100.0
# Options that the graphs of an exported model have no place for, and their values that it can do with.
NOT_EXPORTED = {
    "prior_source": (None,),
    "reference_images": (None,),
    "reference_mean": (None,),
    "label_prior": (None,),
    "prompt": (None,),
    "trust_remote_code": (False,),
    "device": ("auto", "cpu"),
}


class UsageError(Exception):
    """A combination of arguments that argparse cannot see is wrong."""


class Parser(argparse.ArgumentParser):
    """Errors of one line, from the parser of the command that they are about.

    Attributes:
        hint: added where arguments were given in an order that argparse cannot read.
    """

    hint = ""

    def __init__(self, *args, **kwargs):
        kwargs = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter, **kwargs}
        super().__init__(*args, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        for word in args or ():
            if word.startswith("--") and word.partition("=")[2] == "--":  # argparse loses it before Python 3.13
                self.error(f"'--' is no value: {word}")
        # The parser of all commands would refuse the rest, without knowing the command.
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown

    def error(self, message: str):
        if "required: PHOTO" in message or message.startswith("unrecognized arguments"):
            message += self.hint
        self.exit(2, f"{self.prog}: error: {one_line(message)} (--help says more)\n")


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def add_command(
    commands,
    run: Callable,
    usage: str,
    summary: str,
    examples: str,
    model_help: str | None = None,
    check: Callable[[argparse.Namespace], None] | None = None,
) -> Parser:
    """Adds a command called as `run` is.

    Args:
        model_help: of `--model`, which the command does not have without.
        check: raises UsageError for arguments that do not go together, before anything slow is imported.
    """
    name = run.__name__.replace("_", "-")
    usage = " ".join(["%(prog)s", *usage.split(), "[options]"])
    parser = commands.add_parser(name, usage=usage, help=summary, description=summary, epilog=examples)
    parser.set_defaults(run=run, check=check)
    if model_help is not None:
        parser.add_argument("--model", metavar="DIR_OR_REPO", help=model_help)
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    return parser


def add_photos(parser: Parser, list_option: str | None = None, batch_size: int = 8) -> None:
    """`list_option`: an option that takes several values, and so would take photos after it; as usage shows it."""
    if list_option is not None:
        parser.hint = f"; photos come before the options: PHOTO... {list_option}"
    where = "image files, URLs, folders (with all folders in them), or quoted patterns such as 'photos/**/*.jpg'"
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help=where)
    parser.add_argument(
        "--batch-size",
        type=integer_up_to(LARGEST_BATCH),
        default=batch_size,
        metavar="N",
        help="photos per pass; changes speed and memory, not results (default: %(default)s)",
    )


def add_strict(parser: argparse.ArgumentParser) -> None:
    help = "take input that is skipped, cut or guessed for an error; without this, a note says so"
    parser.add_argument("--strict", action="store_true", help=help)


def add_format(parser: argparse.ArgumentParser) -> None:
    help = "a table to read, or for programs: CSV, or one JSON object per line (default: %(default)s)"
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0], help=help)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one (the default)"
    )


def add_prior_weight(parser: argparse.ArgumentParser) -> None:
    help = "0: likelihood only; 1: information gain (default: the model's own, as info prints it)"
    parser.add_argument("--prior-weight", type=prior_weight, metavar="W", help=help)


def add_captioner(parser: argparse.ArgumentParser) -> None:
    prompt = "instruction before every text, for captioners of the Hub (default: as ig-captioner info prints it)"
    parser.add_argument("--prompt", metavar="TEXT", help=prompt)
    code = "let code from the repository of --model run; read it first"
    parser.add_argument("--trust-remote-code", action="store_true", help=code)


def add_prior(parser: argparse.ArgumentParser) -> None:
    source = (
        "where log P(T) comes from: the model without an image, or a mean over reference images (default: as "
        "ig-captioner info prints it)"
    )
    parser.add_argument("--prior-source", choices=("unconditional", "reference_images"), help=source)
    photos = "photos over which log P(T) is averaged"
    parser.add_argument("--reference-images", nargs="+", action="extend", metavar="PHOTO", help=photos)
    mean = "the mean of P(T|I), or of log P(T|I), over those photos (default: arithmetic)"
    parser.add_argument("--reference-mean", choices=("arithmetic", "geometric"), help=mean)


def add_labels(parser: argparse.ArgumentParser) -> None:
    quoting = "quote a label of several words"
    parser.add_argument("--labels", nargs="+", action="extend", default=[], metavar="LABEL", help=quoting)
    known = "a text file with a line each, or the name of a data set whose names are in the package, such as imagenet"
    compiled = "; classify also takes a folder of ig-captioner compile-labels, in place of labels and templates"
    parser.add_argument("--labels-file", metavar="FILE_OR_NAME", help=f"more labels: {known}{compiled}")
    template = "text with {} for the label (default: the checkpoint's own); several are averaged"
    parser.add_argument("--template", nargs="+", action="extend", default=[], metavar="TEMPLATE", help=template)
    parser.add_argument("--templates-file", metavar="FILE_OR_NAME", help="more templates, as for --labels-file")


def add_texts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--texts", nargs="+", action="extend", default=[], metavar="TEXT", help="quote each text")
    parser.add_argument("--texts-file", metavar="FILE", help="more texts, a line each")


def integer_up_to(largest: int) -> Callable[[str], int]:
    def positive_integer(text: str) -> int:
        if not text.isascii() or not text.isdecimal() or len(text) > 18 or not 1 <= int(text) <= largest:
            raise argparse.ArgumentTypeError(f"must be a positive integer, at most {largest}, got {text!r}")
        return int(text)

    return positive_integer


positive_integer = integer_up_to(10**9)


def number(meaning: str, is_valid: Callable[[float], bool]) -> Callable[[str], float]:
    """Makes a reader of numbers that are valid, which nan never is; the error for others says "must be `meaning`"."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not is_valid(value):
            raise argparse.ArgumentTypeError(f"must be {meaning}, got {text!r}")
        return value

    return read


prior_weight = number(f"a number from 0 to {LARGEST_PRIOR_WEIGHT:g}", lambda value: 0 <= value <= LARGEST_PRIOR_WEIGHT)
threshold = number("a finite number, or -inf for never", lambda value: value < math.inf)


# ---------------------------------------------------------------------------------------------------------------------
# Exported graphs


def runs_exported(arguments: argparse.Namespace) -> bool:
    """Tells whether `--model` is a folder of `python -m ig_captioner.export`.

    Raises:
        UsageError: for commands and options that its graphs do not know.
    """
    from ..exported import is_exported

    if not is_exported(getattr(arguments, "model", None)):
        return False
    if not getattr(arguments, "reads_exported", False):
        raise UsageError(f"--model {arguments.model!r} holds exported graphs, which only classify reads")
    wanted = [name for name, fitting in NOT_EXPORTED.items() if getattr(arguments, name) not in fitting]
    compiled = _option_of_compiled_labels(arguments)
    if compiled is not None:
        wanted.append(compiled)
    if wanted:
        option = f"{_option(wanted[0])} {getattr(arguments, wanted[0])}"
        raise UsageError(f"{option} is for checkpoints, but --model {arguments.model!r} holds exported graphs")
    return True


# ---------------------------------------------------------------------------------------------------------------------
# What they name


def read_labels(arguments: argparse.Namespace) -> tuple[list[str], list[str] | None]:
    """Labels and templates, checked; see `read_texts`. No templates are None, for the checkpoint's own.

    Labels that are evidently one list are split, which is said, as it is where some have commas and are
    kept whole.
    """
    from ..data.prompts import read_class_names, read_templates
    from ..input_rules import DEFAULT_TEMPLATE, format_labels, split_list, tell

    given = arguments.labels
    arguments.labels = split_list(given)
    if arguments.labels != given:
        tell("--labels was read as one list, between commas or the like; --labels-file keeps them", arguments.labels)
    elif with_commas := [label for label in given if "," in label]:
        tell("labels with commas in them are one label each", with_commas)
    labels = read_texts(arguments.labels, arguments.labels_file, "--labels", read_class_names)
    templates = None
    if arguments.template or arguments.templates_file is not None:
        templates = read_texts(arguments.template, arguments.templates_file, "--template", read_templates)
    format_labels(labels, templates or DEFAULT_TEMPLATE, "--template")
    return labels, templates


def check_labels(arguments: argparse.Namespace) -> None:
    """Raises UsageError for labels or templates that `read_labels` must not be given."""
    check_texts(arguments.labels, arguments.labels_file, "--labels")
    if arguments.template or arguments.templates_file is not None:
        check_texts(arguments.template, arguments.templates_file, "--template")


def check_candidates(arguments: argparse.Namespace) -> None:
    """Raises UsageError for labels or templates beside compiled ones, and as `check_labels`."""
    source = _option_of_compiled_labels(arguments)
    if source is None:
        check_labels(arguments)
        return
    for name in ("labels", "labels_file", "template", "templates_file"):
        if name != source and getattr(arguments, name):
            raise UsageError(f"{_option(source)} brings its labels and templates, but {_option(name)} is given, too")


def _option_of_compiled_labels(arguments: argparse.Namespace) -> str | None:
    """The argument that names a folder of compiled labels; None if there are none."""
    if getattr(arguments, "compiled_labels", None) is not None:
        return "compiled_labels"
    if arguments.labels_file is not None and Path(arguments.labels_file).is_dir():
        return "labels_file"
    return None


def read_candidates(arguments: argparse.Namespace):
    """Labels, which may be compiled, and templates, or None for those of the checkpoint or the compiled labels."""
    source = _option_of_compiled_labels(arguments)
    if source is None:
        return read_labels(arguments)
    from ..compiled_labels import CompiledLabels

    return CompiledLabels.load(getattr(arguments, source)), None


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check_texts(texts: list[str], file: str | None, option: str) -> None:
    """Raises UsageError for a photo among the texts, or if there are neither texts nor a file."""
    if not texts and file is None:
        raise UsageError(f"no {option.strip('-')}: give {option} or {option}-file")
    for text in texts:
        if Path(text).suffix and os.path.isfile(text):
            raise UsageError(f"{text!r} stands behind {option} but is a file: photos come before {option}")


def read_texts(texts: list[str], file: str | None, option: str, read: Callable[[str], list[str]]) -> list[str]:
    """Reads texts of the command line, then those of a file, all clean.

    Args:
        option: where the texts come from.
        read: gives the texts of the file.

    Raises:
        ValueError: for an empty text, a file without texts, and for texts that are not UTF-8.
    """
    from ..input_rules import clean_texts

    return clean_texts(texts, option) + ([] if file is None else read(file))


def read_texts_file(file: str) -> list[str]:
    """Texts of a file, a line each."""
    from ..data.texts import read_lines

    if not os.path.exists(file):
        raise FileNotFoundError(f"no such file: {file!r}")
    return read_lines(file)


class Photos:
    """The photos that arguments name, opened one at a time. Names that lead to none are reported.

    Args:
        names: files, URLs, folders, patterns.
        streams: see `progress`.

    Attributes:
        names: of single photos; those of a folder or pattern are in sorted order.
        read: names of those that have come out, while they are read and afterwards.
        exit_code: 1 if any name has led to none.
    """

    def __init__(self, names: list[str], streams: bool):
        self.names: list[str] = []
        self.read: list[str] = []
        self.exit_code = 0
        self.streams = streams
        for name in names:
            try:
                self.names += find_photos(name, self._report)
            except ValueError as error:
                self._report(error)

    def __iter__(self) -> Iterator[Any]:
        from ..data.remarks import Remarks
        from ..input_rules import read_image

        remarks = Remarks()
        for name in progress(self.names, "photo", self.streams):
            try:
                with remarks.about(name):
                    image = read_image(name)
            except ValueError as error:
                self._report(error)
            else:
                self.read.append(name)
                yield image
        remarks.tell()

    def _report(self, error: Exception) -> None:
        self.exit_code = report(str(error))


def find_photos(name: str, on_error: Callable[[OSError], None]) -> list[str]:
    """The photos in a folder or of a pattern, sorted; anything else is one photo, which need not exist.

    In folders they are those of `list_images`, as in `evaluate`. `on_error` is told of folders that cannot be read.

    Raises:
        ValueError: if there are none.
    """
    from ..data.folders import is_image, list_images

    if os.path.isdir(name):
        found = list_images(name, on_error)
        kind = "folder"
    elif glob.has_magic(name) and not os.path.lexists(name) and "://" not in name:
        places = glob.glob(os.path.expanduser(name), recursive=True)
        found = sorted(place for place in places if is_image(place) and os.path.isfile(place))
        kind = "pattern"
    else:
        return [name]
    if not found:
        raise ValueError(f"no images in the {kind} {name!r}")
    return found
