"""The command line: `ig-captioner classify`, `caption` and `release`; `evaluate` is in `cli_evaluate.py`.

Exit codes: 0; 1 if something could not be read, done or written; 2 for wrong usage; 130 when interrupted. Errors are
one line on stderr. A photo that cannot be read is reported there and costs only itself: the other photos are still
done, and the exit code is 1 in the end.

What is slow to import is imported where it is used.
"""

import argparse
import json
import os
import sys
import traceback
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import TINY_CHECKPOINT, __version__
from .cli_evaluate import add_evaluate


TASK = "zero-shot-image-classification"
MAX_CAPTION_TOKENS = 30
SCORE_FIELDS = ("caption_log_likelihood", "prior_log_likelihood", "information_gain")
PREDICTION_FIELDS = ("label", "score", *SCORE_FIELDS)
CLASSIFY_EXAMPLES = """\
examples:
  ig-captioner classify cat.jpg --labels cat dog car
  ig-captioner classify holiday/*.jpg --labels-file places.txt --top-k 5
  ig-captioner classify cat.jpg --labels cat dog --template "a photo of a {}." "a drawing of a {}."
  ig-captioner classify cat.jpg --labels cat dog --prior-weight 0    # by likelihood alone
  ig-captioner classify *.jpg --labels cat dog --json | jq -r '.predictions[0].label'

Photos come first: everything behind --labels, up to the next option, is a label.
"""
CAPTION_EXAMPLES = """\
examples:
  ig-captioner caption cat.jpg dog.jpg
  ig-captioner caption *.jpg --num-beams 4 --max-new-tokens 20 --json
"""
RELEASE_EXAMPLES = """\
examples:
  ig-captioner release my-captioner                              # the checkpoint in the package
  ig-captioner release my-captioner --model runs/tiny/checkpoint-00002000/model --repo-id me/my-captioner
"""


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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code."""
    try:
        arguments = build_parser().parse_args(argv)
    except SystemExit as stop:  # --help, --version, wrong usage
        return int(stop.code or 0)
    try:
        with _quiet():
            return arguments.run(arguments)
    except UsageError as error:
        return _report(f"{error} (--help says more)", 2)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head`; Python would complain again when it flushes stdout on exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        # Broad on purpose: a damaged checkpoint raises whatever its reader raises.
        if arguments.traceback:
            traceback.print_exc()
        expected = isinstance(error, (ValueError, OSError))
        return _report(str(error) if expected and str(error) else f"{type(error).__name__}: {error}")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ig-captioner",
        description="Zero-shot image classification and captions by an image captioner.",
        epilog="ig-captioner COMMAND --help shows examples.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_classify(commands)
    _add_caption(commands)
    _add_release(commands)
    add_evaluate(commands, _add_command, _positive_integer)
    return parser


def _add_command(commands, run, usage: str, summary: str, examples: str, model_help: str) -> argparse.ArgumentParser:
    name, usage = run.__name__.replace("_", "-"), f"%(prog)s {usage} [options]"
    parser = commands.add_parser(name, usage=usage, help=summary, description=summary, epilog=examples)
    parser.set_defaults(run=run)
    parser.add_argument("--model", default=TINY_CHECKPOINT, metavar="DIR_OR_REPO", help=model_help)
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    return parser


def _add_photo_arguments(parser: argparse.ArgumentParser, batch_size: int) -> None:
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help="image files or URLs")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument(
        "--batch-size",
        type=_positive_integer,
        default=batch_size,
        metavar="N",
        help="photos per pass; changes speed and memory, not results (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per photo and line, figures in nats")


def _add_classify(commands) -> None:
    summary = "Rank labels for photos by information gain, log P(T|I) - prior weight * log P(T)."
    model = "folder or Hub repository (default: the checkpoint in the package)"
    parser = _add_command(commands, classify, "PHOTO... --labels LABEL...", summary, CLASSIFY_EXAMPLES, model)
    _add_photo_arguments(parser, batch_size=8)
    quoting = "quote a label of several words"
    parser.add_argument("--labels", nargs="+", action="extend", default=[], metavar="LABEL", help=quoting)
    parser.add_argument("--labels-file", type=Path, metavar="FILE", help="more labels, a line each; compiled once")
    parser.add_argument(
        "--template",
        nargs="+",
        action="extend",
        metavar="TEMPLATE",
        help='text with {} for the label (default: "a photo of a {}."); several are averaged',
    )
    parser.add_argument(
        "--prior-weight", type=_weight, metavar="W", help="0: likelihood alone (default: the checkpoint's, as a rule 1)"
    )
    parser.add_argument("--top-k", type=_positive_integer, metavar="K", help="show the best K labels (default: all)")


def _add_caption(commands) -> None:
    summary = "Write a caption for each photo, with log P(T|I), log P(T) and information gain."
    model = "folder or Hub repository (default: the checkpoint in the package)"
    parser = _add_command(commands, caption, "PHOTO...", summary, CAPTION_EXAMPLES, model)
    _add_photo_arguments(parser, batch_size=8)
    parser.add_argument(
        "--num-beams", type=_positive_integer, metavar="N", help="1: greedy (default: what the checkpoint says, or 1)"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=_positive_integer,
        metavar="N",
        help=f"longest caption (default: {MAX_CAPTION_TOKENS}, or what the model has positions for)",
    )


def _add_release(commands) -> None:
    summary = "Write the complete Hub folder of a checkpoint: weights, code, tokenizer, processor, card."
    model = "checkpoint to release, folder or Hub repository (default: the one in the package)"
    parser = _add_command(commands, release, "DIR", summary, RELEASE_EXAMPLES, model)
    parser.add_argument("directory", type=Path, metavar="DIR", help="folder to write, missing or empty")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier release, with all files in DIR")
    parser.add_argument("--repo-id", metavar="NAME", help="what the examples of a new card load (default: DIR's name)")
    parser.add_argument("--license", metavar="ID", help="licence in the card's metadata, such as apache-2.0")


def _positive_integer(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def _weight(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a finite number, zero or more, got {text!r}")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def classify(arguments: argparse.Namespace) -> int:
    """Prints the ranked labels of each photo. Returns 1 if a photo could not be read."""
    labels = _read_labels(arguments.labels, arguments.labels_file)
    settings = {"candidate_labels": labels, "top_k": arguments.top_k, "prior_weight": arguments.prior_weight}
    if arguments.template is not None:
        settings["hypothesis_template"] = arguments.template
    classifier = _load_classifier(arguments, settings)
    candidates = labels if arguments.labels_file is None else _compile_once(classifier, labels, arguments.template)
    weight = classifier.model.config.prior_weight if arguments.prior_weight is None else arguments.prior_weight
    failed: list[str] = []
    for batch in _read_photos(arguments.photos, arguments.batch_size, failed):
        names, photos = zip(*batch, strict=True)
        results = classifier(list(photos), candidate_labels=candidates, batch_size=arguments.batch_size)
        for name, entries in zip(names, results, strict=True):
            if arguments.json:
                _print_json({"image": name, "predictions": [_in_order(entry, PREDICTION_FIELDS) for entry in entries]})
            else:
                _print_predictions(name, entries, weight)
    return 1 if failed else 0


def caption(arguments: argparse.Namespace) -> int:
    """Prints a caption for each photo. Returns 1 if a photo could not be read."""
    from . import IGCaptionerForConditionalGeneration
    from .hub import load_model, load_processor

    device = choose_device(arguments.device)
    processor = load_processor(arguments.model)
    model = load_model(IGCaptionerForConditionalGeneration, arguments.model, **dtype_on(device)).to(device)
    options = {"max_new_tokens": caption_tokens(arguments.max_new_tokens, model.config.text_config)}
    if arguments.num_beams is not None:
        options["num_beams"] = arguments.num_beams
    failed: list[str] = []
    for batch in _read_photos(arguments.photos, arguments.batch_size, failed):
        names, photos = zip(*batch, strict=True)
        inputs = processor(images=list(photos), return_tensors="pt").to(device, model.dtype)
        tokens = model.generate(pixel_values=inputs["pixel_values"], **options)
        captions = [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
        for name, text, pixels in zip(names, captions, inputs["pixel_values"], strict=True):
            scores = _score_caption(model, processor, pixels, text)
            if arguments.json:
                _print_json({"image": name, "caption": text, **scores})
            else:
                print(f"{_printable(name)}: {_printable(text)}")
                print("  log P(T|I) {:.2f}, log P(T) {:.2f}, IG {:.2f} nats".format(*scores.values()), flush=True)
    return 1 if failed else 0


def release(arguments: argparse.Namespace) -> int:
    """Writes a release and prints what is in it."""
    from .hub import save_release

    names = {"repo_id": arguments.repo_id, "license": arguments.license}
    folder = save_release(arguments.directory, arguments.model, overwrite=arguments.overwrite, **names)
    files = sorted(path for path in folder.iterdir())
    print(f"{_printable(folder)}: {len(files)} files, written and loaded again")
    rows = [[path.name, f"{path.stat().st_size:,}"] for path in files]
    print(_table([["", "bytes"], *rows]))
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Input


def _read_labels(labels: list[str], file: Path | None) -> list[str]:
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


def _read_photos(names: Iterable[str], batch_size: int, failed: list[str]) -> Iterator[list[tuple[str, Any]]]:
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
            _report(str(error))
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


def _load_classifier(arguments: argparse.Namespace, settings: dict[str, Any]):
    """The pipeline. Settings are checked before the weights are read."""
    from . import IGCaptionerForZeroShotImageClassification, IGZeroShotImageClassificationPipeline
    from .hub import load_model, load_processor
    from .processing_ig_captioner import format_labels

    format_labels(settings["candidate_labels"], settings.get("hypothesis_template", "{}"))
    device = choose_device(arguments.device)
    processor = load_processor(arguments.model)
    return IGZeroShotImageClassificationPipeline(
        model=load_model(IGCaptionerForZeroShotImageClassification, arguments.model, **dtype_on(device)),
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
        task=TASK,
        device=device,
        return_log_likelihoods=True,
        **settings,
    )


def _compile_once(classifier, labels: list[str], templates: list[str] | None):
    """Labels from a file tend to be many, and the same in the next run."""
    from .label_cache import compile_labels_once

    return compile_labels_once(classifier.model, classifier.tokenizer, labels, templates)


def caption_tokens(wanted: int | None, text_config) -> int:
    """Longest caption in tokens: one position is left for end-of-sequence, which is scored too."""
    limit = text_config.max_position_embeddings - 1
    if wanted is not None and wanted > limit:
        raise ValueError(f"--max-new-tokens {wanted}: this model's captions have {limit} tokens at most")
    return min(MAX_CAPTION_TOKENS, limit) if wanted is None else wanted


def _score_caption(model, processor, pixels, text: str) -> dict[str, float]:
    """Log-likelihoods and information gain of a caption as a text of its own, end-of-sequence included."""
    import torch

    from .processing_ig_captioner import encode_texts

    limit = min(processor.tokenizer.model_max_length, model.config.text_config.max_position_embeddings)
    encoded = encode_texts(processor.tokenizer, [text], max_length=limit)
    with torch.no_grad():
        scores = model.score(pixels[None], **{name: values.to(model.device) for name, values in encoded.items()})
    return {name: scores[name].item() for name in SCORE_FIELDS}


# ---------------------------------------------------------------------------------------------------------------------
# Output


def _print_predictions(name: str, entries: list[dict[str, Any]], prior_weight: float) -> None:
    header = ["label", "log P(T|I) [nats]", "log P(T) [nats]", "IG [nats]", "score"]
    rows = [
        [entry["label"], *(f"{entry[field]:.2f}" for field in SCORE_FIELDS), f"{entry['score']:.3f}"]
        for entry in entries
    ]
    weight = "" if prior_weight == 1 else f"    (IG = log P(T|I) - {prior_weight:g} * log P(T))"
    print(f"{_printable(name)}{weight}\n{_table([header, *rows])}\n", flush=True)


def _print_json(content: dict[str, Any]) -> None:
    """One line, ASCII only, so that it survives any terminal encoding and any file name."""
    print(json.dumps(content, allow_nan=False), flush=True)


def _in_order(entry: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: entry[name] for name in names}


def _table(rows: list[list[str]]) -> str:
    """Indented lines with aligned columns, the first to the left and the others to the right."""
    rows = [[_printable(cell) for cell in row] for row in rows]
    widths = [max(map(_columns, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first + " " * (widths[0] - _columns(first))]
        cells += [" " * (width - _columns(cell)) + cell for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  " + "  ".join(cells))
    return "\n".join(lines)


def _columns(text: str) -> int:
    """Columns of a terminal: East Asian characters and emoji take two, combining marks none."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    marks = sum(unicodedata.category(character) in ("Mn", "Me") for character in text)
    return len(text) + wide - marks


def _printable(text: Any) -> str:
    """Text without what would steer a terminal: control characters and broken file names are escaped."""
    characters = (character if character.isprintable() else repr(character)[1:-1] for character in str(text))
    return "".join(characters)


def _report(message: str, code: int = 1) -> int:
    """Prints one line on stderr. Returns the exit code."""
    print(f"ig-captioner: error: {_printable(' '.join(message.split()))}", file=sys.stderr, flush=True)
    return code


@contextmanager
def _quiet() -> Iterator[None]:
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


if __name__ == "__main__":
    sys.exit(main())
