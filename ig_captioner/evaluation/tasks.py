"""Tasks of `ig-captioner evaluate` that ask a checkpoint as it is: zero-shot, retrieval, compositional, captioning.

Each goes from the command's arguments to results on disk and tables on the screen, and returns the exit code. What is
measured and how is in the modules that they put together; tasks that fit something first are in
`transfer.py`.
"""

import argparse
import json
from collections.abc import Collection
from pathlib import Path

from torch import tensor
from torch.nn.functional import one_hot

from .. import IGCaptionerForConditionalGeneration
from ..checkpoint import caption_tokens, load_on_device, load_processor
from ..data.prompts import read_class_names
from ..data.samples import Samples, captioned, describe_skipped, label_from_field, labelled_decoder, split_by_hash
from ..data.shards import first_by_hash, image_of
from .calibration import (
    BINS,
    Calibration,
    abstain_threshold,
    calibrate,
    check_checkpoint_folder,
    coverage_curve,
    save_calibration,
)
from .captioning import captioning_row, generate_captions
from .compositional import (
    blind_rows,
    compositional_rows,
    find_name,
    prior_of_texts,
    read_items,
    score_images,
    score_own_texts,
    stack_scores,
)
from .processes import is_first
from .report import draw_confusion, draw_coverage, draw_reliability
from .rows import gain_row, image_to_text_rows, select_images, text_to_image_rows, zero_shot_rows
from .scores import score_pairs, true_pairs
from .task import choose_templates, describe_samples, finish, load_models
from .zero_shot import classify_images


ZERO_SHOT_NOTES = [
    "Ties count against; classes of one name are one class. Blind: the class with the likeliest text, log P(T), "
    "whatever the image.",
    "Calibration is about the score of the best class, the softmax of information gain / temperature. ECE: expected "
    f"calibration error, {BINS} bins of equal width; its intervals are moved by what resampling alone adds to it. "
    "Intervals of fitted temperatures are over held-out samples, by one Newton step per resample.",
    "Abstaining: answers of the surest images alone. Right class there: how often an image is surer with all "
    "classes than one without its own class.",
]
RETRIEVAL_NOTES = [
    "Every image ranks the captions of all test images, and every caption all test images; of several right "
    "answers the best counts, and ties count against. Blind: the likeliest text, log P(T), whatever the image.",
]
COMPOSITIONAL_NOTES = [
    "Shares of items whose right caption scores higher than the wrong ones; ties count against. Blind: the "
    "likelier text, log P(T), whatever the image; with two images per item it cannot be right.",
]


def zero_shot(arguments: argparse.Namespace) -> int:
    """Top-1, top-5 and mean per class, calibration, and pictures of both. May save what was fitted."""
    saves = arguments.save_temperature or arguments.save_threshold is not None
    if saves:
        check_checkpoint_folder(arguments.model)
    class_names = read_class_names(arguments.class_names)
    model, processor, clip = load_models(arguments)
    templates = choose_templates(arguments, model.config)
    decode = labelled_decoder(label_from_field(class_names, arguments.label_field))
    samples = Samples(arguments.data, decode, arguments.limit)
    size = {"batch_size": arguments.batch_size}
    matrix, labels = classify_images(model, processor, samples, class_names, templates, **size)
    others = {}
    if clip is not None:
        images = clip.embed_images((image for image, _ in samples), **size)
        others[arguments.clip] = images @ clip.embed_classes(class_names, templates).T
    split = split_by_hash(samples.keys, arguments.held_out_fraction)
    rows = zero_shot_rows(matrix, labels, class_names, split, others)
    confusions = {row["name"]: row.pop("confusion") for row in rows}
    calibration = calibrate(matrix, labels, class_names, split, rows[2]["prior_weight"], model.config)
    gain = gain_row(select_images(matrix, split[1]), one_hot(labels[split[1]], len(class_names)).bool())
    tables = {f"{len(class_names)} classes": rows, "True classes": [gain], **calibration.tables}
    data = {**describe_samples(arguments, samples, split), "classes": len(class_names), "templates": len(templates)}
    data["held-out samples are"] += " and the temperatures"
    notes = [*ZERO_SHOT_NOTES, *calibration.doubts]
    finish(arguments, model, "Zero-shot classification", tables, notes, data, details=calibration.details)
    if is_first():
        _draw(arguments.output, confusions, class_names, calibration)
        if saves:
            _save_calibration(arguments, calibration)
    return 0


def _draw(folder: Path, confusions: dict, class_names: list[str], calibration: Calibration) -> None:
    curves = {name: coverage_curve(answers) for name, answers in calibration.coverage.items()}
    is_drawn = (
        draw_confusion(folder / "confusion.png", confusions, class_names)
        and draw_reliability(folder / "reliability.png", calibration.reliability)
        and draw_coverage(folder / "coverage.png", curves)
    )
    if not is_drawn:
        print("no pictures: matplotlib is not installed")


def _save_calibration(arguments: argparse.Namespace, calibration: Calibration) -> None:
    """Raises ValueError where there are doubts about what was fitted."""
    if calibration.doubts:
        raise ValueError(f"nothing is saved in {arguments.model}. {' '.join(calibration.doubts)}")
    fields = {"score_temperature": calibration.temperature} if arguments.save_temperature else {}
    if arguments.save_threshold is not None:
        fields["abstain_threshold"] = abstain_threshold(calibration.held_out.certainty, arguments.save_threshold)
    save_calibration(arguments.model, **fields)
    print(f"saved in {arguments.model}: " + ", ".join(f"{name} {value:.3f}" for name, value in fields.items()))


def retrieval(arguments: argparse.Namespace) -> int:
    """Recall and median rank, both ways; an image may have several captions."""
    model, processor, clip = load_models(arguments)
    # Read three times: the texts have to be known before the first image is scored, and images may not fit in memory.
    samples = Samples(arguments.data, captioned, arguments.limit)
    captions = [own[: arguments.captions] for _, own in samples]
    split = split_by_hash(samples.keys, arguments.held_out_fraction)

    def images_of(indices: list[int]):
        chosen = set(indices)
        return (image for index, (image, _) in enumerate(samples) if index in chosen)

    def texts_of(indices: list[int]) -> list[str]:
        return [caption for index in indices for caption in captions[index]]

    def scores(indices: list[int]):
        texts, options = texts_of(indices), {"batch_size": arguments.batch_size}
        matrix = score_pairs(model, processor, images_of(indices), texts, **options)
        return matrix, true_pairs([captions[index] for index in indices], texts)

    held_out, test = map(scores, split)
    others = {}
    if clip is not None:
        images = clip.embed_images(images_of(split[1]), batch_size=arguments.batch_size)
        others[arguments.clip] = images @ clip.embed_texts(texts_of(split[1])).T
    owners = tensor([image for image, index in enumerate(split[1]) for _ in captions[index]])
    tables = {
        "Image to text": image_to_text_rows(held_out, test, others),
        "Text to image": text_to_image_rows(test[0], test[1], owners, others),
        "True pairs": [gain_row(*test)],
    }
    data = {**describe_samples(arguments, samples, split), "texts": len(owners)}
    finish(arguments, model, "Image-text retrieval", tables, RETRIEVAL_NOTES, data)
    return 0


def compositional(arguments: argparse.Namespace) -> int:
    """Shares of items whose right caption wins: by category, and text alone on all of them."""
    items = read_items(arguments.format, arguments.pairs)
    if arguments.limit is not None:
        chosen = first_by_hash(map(str, range(len(items))), arguments.limit)
        items = [item for index, item in enumerate(items) if str(index) in chosen]
    model, processor, clip = load_models(arguments)
    priors = prior_of_texts(model, processor.tokenizer, items)
    tables, data = {}, {"data": str(arguments.pairs), "items": len(items)}
    if arguments.data is not None:
        tables, data = _score_items(arguments, items, priors, model, processor, clip)
    if len(items[0].images) == 1:
        tables["All items, text alone"] = blind_rows(priors, [item.category for item in items])
    elif arguments.data is None:
        raise ValueError(f"text alone answers nothing of --format {arguments.format}: --data is missing")
    finish(arguments, model, f"Compositional understanding: {arguments.format}", tables, COMPOSITIONAL_NOTES, data)
    return 0


def _score_items(arguments: argparse.Namespace, items, priors, model, processor, clip):
    """The table of the items whose images are there, and what is in it."""
    names = {name for item in items for name in item.images}

    def decode(key: str, files: dict[str, bytes]):
        name = find_name(key, names)
        return name, None if name is None else image_of(files)

    samples, size = Samples(arguments.data, decode), arguments.batch_size
    all_scores = score_images(items, samples, lambda asked: score_own_texts(model, processor, asked, size))
    there = [index for index, scores in enumerate(all_scores) if scores is not None]
    if not there:
        raise ValueError(f"none of {len(items)} items has its images in {arguments.data!r}")
    matrix = stack_scores([all_scores[index] for index in there], [priors[index] for index in there])
    others = {}
    if clip is not None:
        scores_of_clip = score_images(items, samples, lambda asked: clip.score_own_texts(asked, size))
        stacked = stack_scores([scores_of_clip[index] for index in there], [priors[index] for index in there])
        others[arguments.clip] = stacked.caption_log_likelihood
    split = split_by_hash([items[index].images[0] for index in there], arguments.held_out_fraction)
    rows = compositional_rows(matrix, [items[index].category for index in there], split, others)
    data = {
        "data": str(arguments.pairs),
        "images": arguments.data,
        "items": len(items),
        "items skipped for a missing image": len(items) - len(there),
        "images skipped": describe_skipped(samples.skipped) or "none",
        "test samples": len(split[1]),
        "held-out samples": len(split[0]),
        "held-out samples are": "chosen by a hash of the first image's name, and tune the prior weight",
    }
    return {"Items with their images": rows}, data


def captioning(arguments: argparse.Namespace) -> int:
    """CIDEr-D, BLEU-4 and METEOR of generated captions; the captions go to `captions.jsonl`."""
    model = load_on_device(IGCaptionerForConditionalGeneration, arguments.model, arguments.device)
    processor = load_processor(arguments.model)
    options = {
        "num_beams": arguments.num_beams,
        "max_new_tokens": caption_tokens(arguments.max_new_tokens, model.config.text_config),
    }
    samples = Samples(arguments.data, captioned, arguments.limit)
    references: list[list[str]] = []

    def images():
        for image, captions in samples:
            references.append(captions)
            yield image

    captions = generate_captions(model, processor, images(), arguments.batch_size, **options)
    row = captioning_row(f"{arguments.num_beams} beams" if arguments.num_beams > 1 else "greedy", captions, references)
    if is_first():
        _write_captions(arguments.output, samples.keys, captions, references)
    data = {**describe_samples(arguments, samples), "different captions": len(set(captions))}
    finish(arguments, model, "Captioning", {"Captions": [row]}, _captioning_notes(row["metrics"]), data)
    return 0


def _write_captions(folder: Path, keys: list[str], captions: list[str], references: list[list[str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "captions.jsonl", "w", encoding="utf-8") as file:
        for key, caption, own in zip(keys, captions, references, strict=True):
            file.write(json.dumps({"key": key, "caption": caption, "references": own}, ensure_ascii=False) + "\n")


def _captioning_notes(metrics: Collection[str]) -> list[str]:
    """What is to be known of the metrics that are there, and why others are not."""
    notes = [
        "CIDEr-D at most 1000 %. Words are split without Stanford's PTB tokenizer, so that published figures are not "
        "strictly comparable; the weights of words come from these images' references."
    ]
    if "bleu4" not in metrics:
        notes.append("No BLEU: sacrebleu is not installed.")
    if "meteor" in metrics:
        notes.append("METEOR is that of nltk (2007: exact words, stems, WordNet's synonyms), not Meteor 1.5 in Java.")
    else:
        notes.append("No METEOR: nltk or its WordNet is not installed (python -m nltk.downloader wordnet).")
    return notes
