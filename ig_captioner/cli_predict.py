"""Commands that ask a model about photos: `classify` and `caption`."""

import argparse
from pathlib import Path
from typing import Any

from .cli_arguments import (
    add_command,
    add_photo_arguments,
    choose_device,
    dtype_on,
    positive_integer,
    read_labels,
    read_photos,
    weight,
)
from .cli_output import in_order, print_json, printable, table


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


def add_classify(commands) -> None:
    summary = "Rank labels for photos by information gain, log P(T|I) - prior weight * log P(T)."
    model = "folder or Hub repository (default: the checkpoint in the package)"
    parser = add_command(commands, classify, "PHOTO... --labels LABEL...", summary, CLASSIFY_EXAMPLES, model)
    add_photo_arguments(parser, batch_size=8)
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
        "--prior-weight", type=weight, metavar="W", help="0: likelihood alone (default: the checkpoint's, as a rule 1)"
    )
    parser.add_argument("--top-k", type=positive_integer, metavar="K", help="show the best K labels (default: all)")


def add_caption(commands) -> None:
    summary = "Write a caption for each photo, with log P(T|I), log P(T) and information gain."
    model = "folder or Hub repository (default: the checkpoint in the package)"
    parser = add_command(commands, caption, "PHOTO...", summary, CAPTION_EXAMPLES, model)
    add_photo_arguments(parser, batch_size=8)
    parser.add_argument(
        "--num-beams", type=positive_integer, metavar="N", help="1: greedy (default: what the checkpoint says, or 1)"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=positive_integer,
        metavar="N",
        help=f"longest caption (default: {MAX_CAPTION_TOKENS}, or what the model has positions for)",
    )


def classify(arguments: argparse.Namespace) -> int:
    """Prints the ranked labels of each photo. Returns 1 if a photo could not be read."""
    labels = read_labels(arguments.labels, arguments.labels_file)
    settings = {"candidate_labels": labels, "top_k": arguments.top_k, "prior_weight": arguments.prior_weight}
    if arguments.template is not None:
        settings["hypothesis_template"] = arguments.template
    classifier = load_classifier(arguments, settings)
    candidates = labels if arguments.labels_file is None else _compile_once(classifier, labels, arguments.template)
    weight = classifier.model.config.prior_weight if arguments.prior_weight is None else arguments.prior_weight
    failed: list[str] = []
    for batch in read_photos(arguments.photos, arguments.batch_size, failed):
        names, photos = zip(*batch, strict=True)
        results = classifier(list(photos), candidate_labels=candidates, batch_size=arguments.batch_size)
        for name, entries in zip(names, results, strict=True):
            if arguments.json:
                print_json({"image": name, "predictions": [in_order(entry, PREDICTION_FIELDS) for entry in entries]})
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
    for batch in read_photos(arguments.photos, arguments.batch_size, failed):
        names, photos = zip(*batch, strict=True)
        inputs = processor(images=list(photos), return_tensors="pt").to(device, model.dtype)
        tokens = model.generate(pixel_values=inputs["pixel_values"], **options)
        captions = [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
        for name, text, pixels in zip(names, captions, inputs["pixel_values"], strict=True):
            scores = _score_caption(model, processor, pixels, text)
            if arguments.json:
                print_json({"image": name, "caption": text, **scores})
            else:
                print(f"{printable(name)}: {printable(text)}")
                print("  log P(T|I) {:.2f}, log P(T) {:.2f}, IG {:.2f} nats".format(*scores.values()), flush=True)
    return 1 if failed else 0


def load_classifier(arguments: argparse.Namespace, settings: dict[str, Any]):
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


def _print_predictions(name: str, entries: list[dict[str, Any]], prior_weight: float) -> None:
    header = ["label", "log P(T|I) [nats]", "log P(T) [nats]", "IG [nats]", "score"]
    rows = [
        [entry["label"], *(f"{entry[field]:.2f}" for field in SCORE_FIELDS), f"{entry['score']:.3f}"]
        for entry in entries
    ]
    weight = "" if prior_weight == 1 else f"    (IG = log P(T|I) - {prior_weight:g} * log P(T))"
    print(f"{printable(name)}{weight}\n{table([header, *rows])}\n", flush=True)
