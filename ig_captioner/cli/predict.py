"""Commands that ask a model about photos: `classify`, `caption`, `score`, `retrieve`; and `demo`, in a browser.

Legend: B photos, N texts.
"""

import argparse
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from .arguments import (
    MODEL_HELP,
    Photos,
    add_captioner,
    add_command,
    add_device,
    add_format,
    add_labels,
    add_photos,
    add_prior,
    add_prior_weight,
    add_strict,
    add_texts,
    check_candidates,
    check_texts,
    integer_up_to,
    positive_integer,
    read_candidates,
    read_texts,
    read_texts_file,
    runs_exported,
    threshold,
)
from .output import Fields, Results, check_finite, note_if_slow, table, terminal_columns


MOST_BEAMS = 64
WIDEST_NAME = 30  # columns that a matrix leaves to names of photos, at most
LABELS_ARE_COMPILED = (
    "compiling the labels; `ig-captioner compile-labels DIR ...` does it once, and --labels-file DIR takes the result"
)
CLASSIFIER_HELP = f"{MODEL_HELP}, or a folder of python -m ig_captioner.export"
TEXTS_ARE_READ = "reading the labels one by one, as exported graphs do; for many a checkpoint is faster"
SCORE_FIELDS = ("caption_log_likelihood", "prior_log_likelihood", "information_gain")
PREDICTION_FIELDS = ("label", "score", *SCORE_FIELDS)

CLASSIFY_EXAMPLES = """\
examples:
  ig-captioner classify cat.jpg --labels cat dog car
  ig-captioner classify holiday/ --labels-file places.txt --top-k 5
  ig-captioner classify 'holiday/**/*.jpg' --labels beach city --format csv > holiday.csv
  ig-captioner classify cat.jpg --labels cat dog --template "a photo of a {}." "a drawing of a {}."
  ig-captioner classify cat.jpg --labels cat dog --prior-weight 0    # by likelihood only
  ig-captioner classify *.jpg --labels cat dog --abstain-below 0     # "none of these" where no text gains
  ig-captioner classify photos/ --labels-file my-labels/             # from ig-captioner compile-labels
  ig-captioner classify cat.jpg --labels cat dog --model my-graphs/  # exported: starts at once, for few labels
  ig-captioner classify *.jpg --labels cat dog --format jsonl | jq -r '.predictions[0].label'

Photos come first: everything after --labels, up to the next option, is a label.
"""
CAPTION_EXAMPLES = """\
examples:
  ig-captioner caption cat.jpg dog.jpg
  ig-captioner caption holiday/ --num-beams 4 --max-new-tokens 20 --format csv > captions.csv
"""
SCORE_EXAMPLES = """\
examples:
  ig-captioner score cat.jpg dog.jpg --texts "a cat on a sofa" "a dog in the snow"
  ig-captioner score photos/ --texts-file captions.txt --format csv > scores.csv

The table shows information gain; CSV and JSON have a row for each photo with each text, and all three figures.
"""
RETRIEVE_EXAMPLES = """\
examples:
  ig-captioner retrieve holiday/ --query "a dog on a beach"               # photos for a text
  ig-captioner retrieve holiday/ --query "a dog" "a boat" --top-k 3
  ig-captioner retrieve cat.jpg --texts-file captions.txt --top-k 5       # texts for a photo
"""
DEMO_EXAMPLES = """\
examples:
  ig-captioner demo
  ig-captioner demo --model my-captioner --port 8000 --open
"""


# ---------------------------------------------------------------------------------------------------------------------
# Parsers


def add_classify(commands) -> None:
    summary = "Rank labels for photos by information gain, log P(T|I) - prior weight * log P(T)."
    labels = "--labels LABEL..."
    parser = add_command(
        commands, classify, f"PHOTO... {labels}", summary, CLASSIFY_EXAMPLES, CLASSIFIER_HELP, check_candidates
    )
    parser.set_defaults(reads_exported=True)
    add_photos(parser, labels)
    add_labels(parser)
    compiled = "folder of ig-captioner compile-labels; --labels-file takes it as well"
    parser.add_argument("--compiled-labels", type=Path, metavar="DIR", help=compiled)
    add_prior_weight(parser)
    add_prior(parser)
    before = "how likely each label is before the photo is seen, in their order: weights above 0, or log-probabilities"
    parser.add_argument("--label-prior", type=float, nargs="+", metavar="W", help=before)
    parser.add_argument("--top-k", type=positive_integer, metavar="K", help="show the best K labels (default: all)")
    several = "score each label on its own, by the sigmoid of its information gain: several may fit"
    parser.add_argument("--multi-label", action="store_true", help=several)
    below = (
        '"none of these" comes first where no label has this information gain (default: the checkpoint\'s; '
        "--abstain-below=-inf switches it off)"
    )
    parser.add_argument("--abstain-below", type=threshold, metavar="NATS", help=below)
    add_format(parser)
    add_strict(parser)
    add_captioner(parser)
    add_device(parser)


def add_caption(commands) -> None:
    summary = "Write a caption for each photo, with log P(T|I), log P(T) and information gain."
    parser = add_command(commands, caption, "PHOTO...", summary, CAPTION_EXAMPLES, MODEL_HELP)
    add_photos(parser)
    beams = "1: greedy (default: what the checkpoint says, or 1)"
    parser.add_argument("--num-beams", type=integer_up_to(MOST_BEAMS), metavar="N", help=beams)
    longest = "longest caption, in tokens (default: 30, or fewer if the model has no positions for them)"
    parser.add_argument("--max-new-tokens", type=positive_integer, metavar="N", help=longest)
    add_format(parser)
    add_strict(parser)
    add_captioner(parser)
    add_device(parser)


def add_score(commands) -> None:
    summary = "Score every photo with every text: a matrix."
    texts = "--texts TEXT..."
    parser = add_command(commands, score, f"PHOTO... {texts}", summary, SCORE_EXAMPLES, MODEL_HELP, _check_score)
    add_photos(parser, texts)
    add_texts(parser)
    add_prior_weight(parser)
    add_prior(parser)
    add_format(parser)
    add_strict(parser)
    add_captioner(parser)
    add_device(parser)


def add_retrieve(commands) -> None:
    summary = "Find photos for a text, or texts for a photo."
    query = "--query TEXT..."
    usage = f"PHOTO... ({query} | --texts-file FILE)"
    parser = add_command(commands, retrieve, usage, summary, RETRIEVE_EXAMPLES, MODEL_HELP, _check_retrieve)
    add_photos(parser, query)
    directions = parser.add_mutually_exclusive_group(required=True)
    directions.add_argument("--query", nargs="+", action="extend", metavar="TEXT", help="find photos for each of these")
    directions.add_argument("--texts-file", metavar="FILE", help="find texts for each photo, among these lines")
    add_prior_weight(parser)
    add_prior(parser)
    best = "show the best K (default: %(default)s)"
    parser.add_argument("--top-k", type=positive_integer, default=10, metavar="K", help=best)
    add_format(parser)
    add_strict(parser)
    add_captioner(parser)
    add_device(parser)


def add_demo(commands) -> None:
    summary = "Try a checkpoint in the browser."
    parser = add_command(commands, demo, "", summary, DEMO_EXAMPLES, MODEL_HELP)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address; 0.0.0.0 opens it to the network (default: %(default)s)"
    )
    parser.add_argument(
        "--port", type=integer_up_to(65_535), metavar="P", help="port of the page (default: the first that is free)"
    )
    parser.add_argument("--open", action="store_true", help="open it in the browser")
    add_device(parser)


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def classify(arguments: argparse.Namespace) -> int:
    """Prints the ranked labels of each photo."""
    if runs_exported(arguments):
        return _classify_exported(arguments)
    from ..captioners.arguments import load_scorer, read_prior
    from ..captioners.pipelines import zero_shot_pipeline

    labels, templates = read_candidates(arguments)
    photos = Photos(arguments.photos, streams=True)
    scorer = load_scorer(arguments)
    classifier = zero_shot_pipeline(scorer)
    weight = _prior_weight(arguments, scorer)
    with note_if_slow(LABELS_ARE_COMPILED):
        predictions = classifier(
            (photo for photo in photos),
            candidate_labels=labels,
            hypothesis_template=templates,
            prior_weight=weight,
            **read_prior(arguments),
            label_prior=arguments.label_prior,
            top_k=arguments.top_k,
            multi_label=arguments.multi_label,
            abstain_threshold=arguments.abstain_below,
            batch_size=arguments.batch_size,
            return_log_likelihoods=True,
        )
    note = f"{_formula(weight)}; score: {_score_note(arguments, classifier.model.config)}"
    results = Results(arguments.format, "image", "predictions", note)
    for index, entries in enumerate(predictions):
        results.add(photos.read[index], [{name: entry[name] for name in PREDICTION_FIELDS} for entry in entries])
    return photos.exit_code


def _classify_exported(arguments: argparse.Namespace) -> int:
    """As `classify`, by exported graphs."""
    from ..exported import ExportedClassifier

    labels, templates = read_candidates(arguments)
    try:
        with note_if_slow(TEXTS_ARE_READ):
            classifier = ExportedClassifier(arguments.model, labels, templates)
    except ImportError as error:
        if (error.name or "").split(".")[0] != "onnxruntime":
            raise
        raise ValueError("exported graphs need onnxruntime: pip install 'ig_captioner[export]'") from error
    weight = classifier.settings.prior_weight if arguments.prior_weight is None else arguments.prior_weight
    note = f"{_formula(weight)}; score: {_score_note(arguments, classifier.settings)}"
    results = Results(arguments.format, "image", "predictions", note)
    photos = Photos(arguments.photos, streams=True)
    options = {"abstain_threshold": arguments.abstain_below, "multi_label": arguments.multi_label}
    for photo in photos:
        entries = classifier(photo, prior_weight=weight, top_k=arguments.top_k, **options)
        results.add(photos.read[-1], [{name: entry[name] for name in PREDICTION_FIELDS} for entry in entries])
    return photos.exit_code


def caption(arguments: argparse.Namespace) -> int:
    """Prints a caption for each photo."""
    from ..captioners.arguments import load_scorer

    photos = Photos(arguments.photos, streams=True)
    scorer = load_scorer(arguments)
    options = {} if arguments.num_beams is None else {"num_beams": arguments.num_beams}
    results = Results(arguments.format, "image", None, _formula(scorer.default_prior_weight))
    done = 0
    for images in _batches(scorer, photos, arguments.batch_size):
        texts = _captions(scorer, images, arguments.max_new_tokens, options)
        for name, text, image in zip(photos.read[done:], texts, images, strict=False):
            scores = scorer.score([image], [text])
            results.add(name, [{"caption": text, **{field: scores[field].item() for field in SCORE_FIELDS}}])
        done += len(texts)
    return photos.exit_code


def score(arguments: argparse.Namespace) -> int:
    """Prints the scores of each photo with each text: a table of information gain in the end, or all as they come."""
    from ..captioners.arguments import load_scorer

    texts = read_texts(arguments.texts, arguments.texts_file, "--texts", read_texts_file)
    as_table = arguments.format == "table"
    photos = Photos(arguments.photos, streams=not as_table)
    scorer = load_scorer(arguments)
    note = _formula(_prior_weight(arguments, scorer))
    figures = _figures(arguments, scorer, photos, texts)
    if as_table:
        gains = [of_photo[:, -1].tolist() for of_photo in figures]
        if gains:
            print(f"{note}\n\n{_matrix(photos.read, texts, gains)}")
        return photos.exit_code
    results = Results(arguments.format, "image", "texts", note)
    for index, of_photo in enumerate(figures):
        results.add(photos.read[index], _rows("text", texts, of_photo))
    return photos.exit_code


def retrieve(arguments: argparse.Namespace) -> int:
    """Prints the best photos of each text, or the best texts of each photo."""
    from ..captioners.arguments import load_scorer

    texts = read_texts(arguments.query or [], arguments.texts_file, "--query", read_texts_file)
    photos = Photos(arguments.photos, streams=arguments.query is None)
    scorer = load_scorer(arguments)
    note = _formula(_prior_weight(arguments, scorer))
    figures = _figures(arguments, scorer, photos, texts)
    if arguments.query is None:
        results = Results(arguments.format, "image", "texts", note)
        for index, of_photo in enumerate(figures):
            results.add(photos.read[index], _rows("text", texts, of_photo, arguments.top_k))
        return photos.exit_code
    results = Results(arguments.format, "query", "images", note)
    of_photos = list(figures)
    for index, query in enumerate(texts if of_photos else []):
        of_query = [of_photo[index] for of_photo in of_photos]
        results.add(query, _rows("image", photos.read, of_query, arguments.top_k))
    return photos.exit_code


def demo(arguments: argparse.Namespace) -> int:
    """Serves the demo until it is interrupted."""
    options = {"host": arguments.host, "port": arguments.port, "device": arguments.device}
    try:
        from ..demo.app import launch

        launch(arguments.model, **options, open_browser=arguments.open)
    except ImportError as error:
        if (error.name or "").split(".")[0] != "gradio":
            raise
        raise ValueError("the demo needs gradio: pip install 'ig_captioner[app]'") from error
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# What they do


def _check_score(arguments: argparse.Namespace) -> None:
    check_texts(arguments.texts, arguments.texts_file, "--texts")


def _check_retrieve(arguments: argparse.Namespace) -> None:
    check_texts(arguments.query or [], arguments.texts_file, "--query")


def _prior_weight(arguments: argparse.Namespace, scorer) -> float:
    return scorer.default_prior_weight if arguments.prior_weight is None else arguments.prior_weight


def _formula(prior_weight: float) -> str:
    """The formula of IG, for the head of a table."""
    weight = "" if prior_weight == 1 else f"{prior_weight:g} * "
    return f"IG = log P(T|I) - {weight}log P(T), in nats"


def _score_note(arguments: argparse.Namespace, config) -> str:
    """Explains the column "score" of the table of `classify`."""
    temperature = getattr(config, "score_temperature", 1)  # a captioner of the Hub has none
    gain = "IG" if temperature == 1 else f"IG / {temperature:g}"
    note = (
        f"sigmoid of {gain}, each label on its own" if arguments.multi_label else f"softmax of {gain} over the labels"
    )
    limit = getattr(config, "abstain_threshold", None) if arguments.abstain_below is None else arguments.abstain_below
    if limit is None or limit == -math.inf:
        return note
    return f'{note}, with "none of these" at IG = {limit:g}'


def _batches(scorer, photos: Iterable, batch_size: int) -> Iterator[list[Any]]:
    """Photos as the scorer keeps them: large ones are held one at a time."""
    prepared = map(scorer.prepare, photos)
    while batch := list(islice(prepared, batch_size)):
        yield batch


def _captions(scorer, images: list[Any], max_new_tokens: int | None, options: dict[str, Any]) -> list[str]:
    try:
        return scorer.caption(images, max_new_tokens, **options)
    except ValueError as error:
        if max_new_tokens is None:
            raise
        raise ValueError(f"--max-new-tokens: {error}") from error


def _figures(arguments: argparse.Namespace, scorer, photos: Photos, texts: list[str]) -> Iterator[Any]:
    """The `SCORE_FIELDS` of N texts for each photo as it comes: float32 [N, 3], on the CPU."""
    import torch

    from ..captioners.arguments import read_prior

    compiled = scorer.compile_labels(texts, "{}", **read_prior(arguments))
    weight = _prior_weight(arguments, scorer)
    for images in _batches(scorer, photos, arguments.batch_size):
        scores = scorer.score(images, compiled, prior_weight=weight)
        fields = torch.broadcast_tensors(*(scores[name] for name in SCORE_FIELDS))
        yield from torch.stack(fields, dim=-1)


def _rows(kind: str, names: Sequence[str], figures: Sequence[Any], top_k: int | None = None) -> list[Fields]:
    """A row for each of N names, or for the best by information gain, of which equals stay in order.

    Args:
        kind: what the names are, "text" or "image".
        figures: [N, 3], see `_figures`.
    """
    rows = [
        {kind: name, **dict(zip(SCORE_FIELDS, values.tolist(), strict=True))}
        for name, values in zip(names, figures, strict=True)
    ]
    return rows if top_k is None else sorted(rows, key=lambda row: -row["information_gain"])[:top_k]


def _matrix(names: Sequence[str], texts: Sequence[str], gains: Sequence[Sequence[float]]) -> str:
    """The numbered texts, and a line per photo; in several tables where the terminal is too narrow for one.

    Args:
        gains: information gain of B photos and N texts, [B, N].
    """
    for row in gains:
        check_finite(dict(zip(texts, row, strict=True)))
    numbers = [f"[{number}]" for number in range(1, len(texts) + 1)]
    lines = [
        ["photo", *numbers],
        *([name, *(f"{gain:.2f}" for gain in row)] for name, row in zip(names, gains, strict=True)),
    ]
    width = max(len(cell) for _, *cells in lines for cell in cells) + 2
    room = terminal_columns() - 2 - min(WIDEST_NAME, max(map(len, names)))
    step = max(1, room // width)
    tables = [
        table([[*cells[start : start + step], name] for name, *cells in lines]) for start in range(0, len(texts), step)
    ]
    return "\n\n".join([table([[*pair] for pair in zip(numbers, texts, strict=True)]), *tables])
