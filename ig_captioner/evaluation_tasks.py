"""The tasks of `ig-captioner evaluate`: from its arguments to results on disk and tables on the screen.

Each returns the exit code. What is measured and how is in the modules that they put together.
"""

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from torch import tensor
from torch.nn.functional import one_hot

from . import TINY_CHECKPOINT, IGCaptionerForConditionalGeneration, IGCaptionerForZeroShotImageClassification
from .calibration import BINS, Calibration, abstain_threshold, calibrate, check_target, coverage_curve, save_calibration
from .captioning import captioning_row, generate_captions
from .cli_arguments import choose_device, dtype_on
from .cli_predict import caption_tokens
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
from .contrastive import ContrastiveModel
from .evaluation import (
    RESAMPLES,
    class_row,
    gain_row,
    image_to_text_row,
    image_to_text_rows,
    select_images,
    text_to_image_row,
    text_to_image_rows,
    zero_shot_rows,
)
from .evaluation_data import Samples, describe_skipped, split_by_hash
from .hub import load_model, load_processor
from .linear_probe import choose_shots, count_shots, mean_pooled_features, probe_row
from .lit import IMAGES_PER_PASS, DualEncoder, Recipe, choose_tower, read_pairs
from .processes import is_first, place
from .processing_ig_captioner import DEFAULT_TEMPLATE
from .prompts import is_text_file, read_class_names, read_templates
from .report import describe_run, draw_confusion, draw_coverage, draw_reliability, to_markdown, write_results
from .retrieval import score_pairs, true_pairs
from .shards import first_by_hash, read_captions, read_image
from .zero_shot import classify_images, label_from_field, labelled_decoder


ZERO_SHOT_NOTES = [
    "Ties count against; classes of one name are one class. Blind: the class with the likeliest text, log P(T), "
    "whatever the image.",
    "Calibration is about the score of the best class, the softmax of information gain / temperature. ECE: expected "
    f"calibration error, {BINS} bins of equal width; its intervals are moved by what resampling alone adds to it. "
    "Intervals of fitted temperatures are over held-out samples, by one Newton step per resample.",
    "Abstaining: answers of the surest images alone. Right class there: how often an image is surer with all "
    "classes than one without its own class.",
]


def zero_shot(arguments: argparse.Namespace) -> int:
    """Top-1, top-5 and mean per class, calibration, and pictures of both. May save what was fitted."""
    saves = arguments.save_temperature or arguments.save_threshold is not None
    if saves:
        check_target(arguments.model)
    class_names, templates = read_class_names(arguments.class_names), _templates(arguments)
    model, processor, clip = _load(arguments)
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
    data = {**_describe(arguments, samples, split), "classes": len(class_names), "templates": len(templates)}
    data["held-out samples are"] += " and the temperatures"
    _finish(arguments, model, "Zero-shot classification", tables, ZERO_SHOT_NOTES, data, details=calibration.details)
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
    fields = {"temperature": calibration.temperature} if arguments.save_temperature else {}
    if arguments.save_threshold is not None:
        fields["abstain_threshold"] = abstain_threshold(calibration.held_out.certainty, arguments.save_threshold)
    save_calibration(arguments.model, **fields)
    print(f"saved in {arguments.model}: " + ", ".join(f"{name} {value:.3f}" for name, value in fields.items()))


def _templates(arguments: argparse.Namespace) -> list[str]:
    if arguments.templates is not None:
        return read_templates(arguments.templates)
    return [DEFAULT_TEMPLATE] if is_text_file(arguments.class_names) else read_templates(arguments.class_names)


def retrieval(arguments: argparse.Namespace) -> int:
    """Recall and median rank, both ways; an image may have several captions."""
    model, processor, clip = _load(arguments)
    # Read three times: the texts have to be known before the first image is scored, and images may not fit in memory.
    samples = Samples(arguments.data, _captioned, arguments.limit)
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
    notes = [
        "Every image ranks the captions of all test images, and every caption all test images; of several right "
        "answers the best counts, and ties count against. Blind: the likeliest text, log P(T), whatever the image."
    ]
    data = {**_describe(arguments, samples, split), "texts": len(owners)}
    _finish(arguments, model, "Image-text retrieval", tables, notes, data)
    return 0


def compositional(arguments: argparse.Namespace) -> int:
    """Shares of items whose right caption wins: by category, and text alone on all of them."""
    items = read_items(arguments.format, arguments.pairs)
    if arguments.limit is not None:
        chosen = first_by_hash(map(str, range(len(items))), arguments.limit)
        items = [item for index, item in enumerate(items) if str(index) in chosen]
    model, processor, clip = _load(arguments)
    priors = prior_of_texts(model, processor.tokenizer, items)
    tables, data = {}, {"data": str(arguments.pairs), "items": len(items)}
    if arguments.data is not None:
        tables, data = _score_items(arguments, items, priors, model, processor, clip)
    if len(items[0].images) == 1:
        tables["All items, text alone"] = blind_rows(priors, [item.category for item in items])
    elif arguments.data is None:
        raise ValueError(f"text alone answers nothing of --format {arguments.format}: --data is missing")
    notes = [
        "Shares of items whose right caption scores higher than the wrong ones; ties count against. Blind: the "
        "likelier text, log P(T), whatever the image; with two images per item it cannot be right."
    ]
    _finish(arguments, model, f"Compositional understanding: {arguments.format}", tables, notes, data)
    return 0


def _score_items(arguments: argparse.Namespace, items, priors, model, processor, clip):
    """The table of the items whose images are there, and what is in it."""
    names = {name for item in items for name in item.images}

    def decode(key: str, files: dict[str, bytes]):
        name = find_name(key, names)
        return name, None if name is None else read_image(files)

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
    device, processor = choose_device(arguments.device), load_processor(arguments.model)
    model = load_model(IGCaptionerForConditionalGeneration, arguments.model, **dtype_on(device)).to(device).eval()
    options = {
        "num_beams": arguments.num_beams,
        "max_new_tokens": caption_tokens(arguments.max_new_tokens, model.config.text_config),
    }
    samples = Samples(arguments.data, _captioned, arguments.limit)
    references: list[list[str]] = []

    def images():
        for image, captions in samples:
            references.append(captions)
            yield image

    captions = generate_captions(model, processor, images(), arguments.batch_size, **options)
    row = captioning_row(f"{arguments.num_beams} beams" if arguments.num_beams > 1 else "greedy", captions, references)
    if is_first():
        arguments.output.mkdir(parents=True, exist_ok=True)
        with open(arguments.output / "captions.jsonl", "w", encoding="utf-8") as file:
            for key, caption, own in zip(samples.keys, captions, references, strict=True):
                file.write(json.dumps({"key": key, "caption": caption, "references": own}, ensure_ascii=False) + "\n")
    notes = [
        "CIDEr-D at most 1000 %. Words are split without Stanford's PTB tokenizer, so that published figures are not "
        "strictly comparable; the weights of words come from these images' references."
    ]
    if "bleu4" not in row["metrics"]:
        notes.append("No BLEU: sacrebleu is not installed.")
    if "meteor" in row["metrics"]:
        notes.append("METEOR is that of nltk (2007: exact words, stems, WordNet's synonyms), not Meteor 1.5 in Java.")
    else:
        notes.append("No METEOR: nltk or its WordNet is not installed (python -m nltk.downloader wordnet).")
    data = {**_describe(arguments, samples), "different captions": len(set(captions))}
    _finish(arguments, model, "Captioning", {"Captions": [row]}, notes, data)
    return 0


def linear_probe(arguments: argparse.Namespace) -> int:
    """Top-1, top-5 and mean per class of a linear map, fitted to a few images per class."""
    class_names = read_class_names(arguments.class_names)
    if len(set(class_names)) < len(class_names):
        raise ValueError(f"{arguments.class_names} has several classes of one name: a probe cannot tell them apart")
    model, processor, clip = _load(arguments)
    decode = labelled_decoder(label_from_field(class_names, arguments.label_field))
    train, test = Samples(arguments.train, decode), Samples(arguments.data, decode, arguments.limit)
    all_labels = [label for _, label in train]
    shots = choose_shots(train.keys, all_labels, arguments.shots)
    labels = tensor([all_labels[index] for index in shots]), tensor([label for _, label in test])
    split = split_by_hash(test.keys, arguments.held_out_fraction)

    def row(name: str, embed, baseline: bool = False):
        chosen = set(shots)
        of_shots = embed((image for index, (image, _) in enumerate(train) if index in chosen))
        of_test = embed((image for image, _ in test))
        return probe_row(name, (of_shots, labels[0]), (of_test, labels[1]), split, len(class_names), baseline)

    size = arguments.batch_size
    rows = [row("mean of the patches", lambda images: mean_pooled_features(model, processor, images, size))]
    if clip is not None:
        rows.append(row(arguments.clip, lambda images: clip.embed_images(images, size), baseline=True))
    data = {
        **_describe(arguments, test, split, tuned="penalty"),
        "train": arguments.train,
        "shots": count_shots(labels[0].tolist()),
    }
    notes = [
        "Ridge regression onto one-hot labels. The shots are one fixed choice by hash of the key; the intervals do not "
        "say how much another choice would change."
    ]
    _finish(arguments, model, "Linear probe", {f"{len(class_names)} classes": rows}, notes, data)
    return 0


def lit(arguments: argparse.Namespace) -> int:
    """Recall and accuracy of a text tower that is trained for the frozen image encoder."""
    if arguments.data is None and arguments.labelled is None:
        raise ValueError("nothing to test on: give --data for retrieval, --labelled for classification, or both")
    if arguments.labelled is not None and arguments.class_names is None:
        raise ValueError("--labelled needs --class-names")
    model, processor, _ = _load(arguments)
    train = Samples(arguments.train, _captioned)
    pairs = read_pairs(model, processor, train)
    held_out, fit = split_by_hash(train.keys, arguments.held_out_fraction)
    recipe = Recipe(**{name: getattr(arguments, name) for name in ("steps", "batch_size", "width", "layers", "seed")})
    recipes = [recipe._replace(learning_rate=rate) for rate in arguments.learning_rates]
    parts = pairs.select(fit), pairs.select(held_out)
    tower, selection = choose_tower(*parts, processor.tokenizer, recipes, model.device)
    tables: dict[str, list] = {}
    data: dict[str, Any] = {
        "train": arguments.train,
        "skipped in training": describe_skipped(train.skipped) or "none",
        "training samples": len(fit),
        "held-out training samples": len(held_out),
    }
    if arguments.data is not None:
        tables |= _lit_retrieval(arguments, model, processor, tower, data)
    if arguments.labelled is not None:
        tables |= _lit_classification(arguments, model, processor, tower, data)
    tables["Learning rates on held-out training pairs, image to text"] = selection
    notes = [
        "The image encoder is frozen; the text tower and a linear projection on each side are trained from scratch, "
        "with the learning rate that has the lowest geometric mean rank on the held-out training pairs. Tested on the "
        "samples that the tasks zero-shot and retrieval test on."
    ]
    _finish(arguments, model, "LiT tuning", tables, notes, data)
    return 0


def _lit_retrieval(arguments: argparse.Namespace, model, processor, tower: DualEncoder, data: dict) -> dict[str, list]:
    samples = Samples(arguments.data, _captioned, arguments.limit)
    pairs = read_pairs(model, processor, samples)
    test = split_by_hash(samples.keys, arguments.held_out_fraction)[1]
    features, captions = pairs.select(test)
    texts = [caption for own in captions for caption in own]
    owners = tensor([image for image, own in enumerate(captions) for _ in own])
    scores, is_true = tower.score(features, texts), true_pairs(captions, texts)
    data |= {"data": arguments.data, "skipped": describe_skipped(samples.skipped) or "none"}
    data |= {"test samples": len(test), "texts": len(texts)}
    return {
        "Image to text": [image_to_text_row("LiT", scores, is_true, baseline=False)],
        "Text to image": [text_to_image_row("LiT", scores, is_true, owners)],
    }


def _lit_classification(
    arguments: argparse.Namespace, model, processor, tower: DualEncoder, data: dict
) -> dict[str, list]:
    class_names, templates = read_class_names(arguments.class_names), _templates(arguments)
    decode = labelled_decoder(label_from_field(class_names, arguments.label_field))
    samples, labels = Samples(arguments.labelled, decode, arguments.limit), list[int]()

    def images():
        for image, label in samples:
            labels.append(label)
            yield image

    features = mean_pooled_features(model, processor, images(), IMAGES_PER_PASS)
    test = split_by_hash(samples.keys, arguments.held_out_fraction)[1]
    scores = tower.score_classes(features[test], class_names, templates)
    row = class_row("LiT", scores, tensor(labels)[test], class_names, baseline=False)
    del row["confusion"]
    data |= {"labelled": arguments.labelled, "skipped of labelled": describe_skipped(samples.skipped) or "none"}
    data |= {"labelled test samples": len(test), "classes": len(class_names), "templates": len(templates)}
    return {f"{len(class_names)} classes": [row]}


def _captioned(key: str, files: dict[str, bytes]):
    return read_image(files), read_captions(files)


# What all tasks share


def _load(arguments: argparse.Namespace):
    """Model, processor, and the contrastive model if there is one."""
    device = choose_device(arguments.device)
    model = load_model(IGCaptionerForZeroShotImageClassification, arguments.model, **dtype_on(device)).to(device).eval()
    clip = None if arguments.clip is None else ContrastiveModel.load(arguments.clip, device)
    return model, load_processor(arguments.model), clip


def _describe(arguments: argparse.Namespace, samples, split=None, tuned: str = "prior weight") -> dict[str, Any]:
    """How many samples there are, of which kind."""
    described = {"data": arguments.data, "skipped": describe_skipped(samples.skipped) or "none"}
    if arguments.limit is not None:
        described["limit"] = arguments.limit
    if split is None:
        return {**described, "test samples": len(samples.keys)}
    return {
        **described,
        "test samples": len(split[1]),
        "held-out samples": len(split[0]),
        "held-out samples are": f"chosen by a hash of the key, and tune the {tuned}",
    }


def _finish(
    arguments: argparse.Namespace, model, title: str, tables: dict, notes: list[str], data: dict, **more: Any
) -> None:
    """Writes and prints the results; of several processes only the first does."""
    if not is_first():
        return
    task = arguments.run.__name__.replace("_", "-")
    intervals = (
        f"In brackets: 95 % bootstrap intervals over test samples ({RESAMPLES} resamples, percentiles, a fixed seed). "
        "They say nothing about other training runs."
    )
    results = {
        "task": task,
        "title": title,
        "tables": tables,
        **more,
        "notes": [*notes, intervals],
        "data": data,
        "run": describe_run(model, arguments.model, _command_line(task, arguments)),
    }
    write_results(arguments.output, results)
    print(to_markdown(results), end="")


def _command_line(task: str, arguments: argparse.Namespace) -> str:
    """The command with the value of every option."""
    hidden = {"run", "traceback"} | ({"model"} if arguments.model == TINY_CHECKPOINT else set())
    given: dict[str, Any] = {name: value for name, value in vars(arguments).items() if name not in hidden}
    options: list[str] = []
    for name, value in given.items():
        if value is not None and value is not False:
            values = [] if value is True else value if isinstance(value, list) else [value]
            options += [f"--{name.replace('_', '-')}", *map(str, values)]
    processes = place()[1]
    many = ["torchrun", "--nproc_per_node", str(processes), "-m", "ig_captioner.cli"]
    program = ["ig-captioner"] if processes == 1 else many
    return shlex.join([*program, "evaluate", task, *options])
