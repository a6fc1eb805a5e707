"""`ig-captioner evaluate`: zero-shot, retrieval, compositional, captioning and linear-probe.

Each writes `results.json`, `results.md` and `model-index.yml` into a folder, and prints the tables. Options that all
share are declared once; what is slow to import is imported where it is used.
"""

import argparse
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import TINY_CHECKPOINT


ZERO_SHOT_EXAMPLES = """\
examples:
  ig-captioner evaluate zero-shot --data "cifar10-test-*.tar.gz" --class-names cifar10 --output out
  ig-captioner evaluate zero-shot --data photos/ --class-names names.txt --templates imagenet --output out
  ig-captioner evaluate zero-shot --data imagenet/val --class-names imagenet --label-field class_id --output out
  ig-captioner evaluate zero-shot --data photos/ --class-names cifar10 --clip openai/clip-vit-base-patch32 --output out
"""
RETRIEVAL_EXAMPLES = """\
examples:
  ig-captioner evaluate retrieval --data "flickr8k-val-*.tar" --output out
  ig-captioner evaluate retrieval --data "flickr8k-val-*.tar" --clip openai/clip-vit-base-patch32 --output out
"""
COMPOSITIONAL_EXAMPLES = """\
examples:
  ig-captioner evaluate compositional --format sugarcrepe --pairs sugarcrepe/ --output out       # text alone
  ig-captioner evaluate compositional --format sugarcrepe --pairs sugarcrepe/ --data coco/val2017 --output out
  ig-captioner evaluate compositional --format winoground --pairs examples.jsonl --data images/ --output out
"""
CAPTIONING_EXAMPLES = """\
examples:
  ig-captioner evaluate captioning --data "flickr8k-val-*.tar" --num-beams 4 --output out
"""
LINEAR_PROBE_EXAMPLES = """\
examples:
  ig-captioner evaluate linear-probe --train train/ --data test/ --class-names names.txt --output out
"""
MODEL_HELP = "folder or Hub repository (default: the checkpoint in the package)"
DATA_HELP = "shards (pattern or folder), a folder of images, or a folder of the datasets library"

AddCommand = Callable[..., argparse.ArgumentParser]


def add_evaluate(commands, add_command: AddCommand, positive_integer: Callable[[str], int]) -> None:
    """Registers the commands with the parser of `ig-captioner`."""
    summary = "Measure a checkpoint on labelled or captioned images, at prior weight 0, 1 and a tuned one."
    parser = commands.add_parser("evaluate", help=summary, description=summary)
    tasks = parser.add_subparsers(metavar="TASK", required=True)

    def add_task(run, usage: str, summary: str, examples: str, **options) -> argparse.ArgumentParser:
        task = add_command(tasks, run, f"{usage} --output DIR", summary, examples, MODEL_HELP)
        _add_common(task, positive_integer, **options)
        return task

    usage = "--data DATA --class-names FILE_OR_NAME"
    task = add_task(zero_shot, usage, "Classify labelled images by their class names.", ZERO_SHOT_EXAMPLES)
    _add_labels(task)
    task.add_argument(
        "--templates",
        metavar="FILE_OR_NAME",
        help="as for --class-names (default: those of the same prompts; of a text file: 'a photo of a {}.')",
    )
    add_task(retrieval, "--data DATA", "Find captions for images, and images for captions.", RETRIEVAL_EXAMPLES)
    usage = "--format FORMAT --pairs FILE_OR_FOLDER [--data DATA]"
    summary = "Tell the right caption of an image from one that differs in a word or in order."
    task = add_task(compositional, usage, summary, COMPOSITIONAL_EXAMPLES, data_required=False)
    task.add_argument("--format", required=True, choices=("sugarcrepe", "aro", "winoground"), help="whose files")
    task.add_argument("--pairs", type=Path, required=True, metavar="FILE_OR_FOLDER", help="the captions")
    summary = "Write captions and compare them with those of people."
    task = add_task(captioning, "--data DATA", summary, CAPTIONING_EXAMPLES, is_tuned=False)
    task.add_argument("--num-beams", type=positive_integer, default=1, metavar="N", help="1: greedy (default)")
    task.add_argument(
        "--max-new-tokens",
        type=positive_integer,
        metavar="N",
        help="longest caption (default: as ig-captioner caption)",
    )
    usage = "--train DATA --data DATA --class-names FILE_OR_NAME"
    summary = "Classify labelled images by a linear map of frozen features, fitted to a few images per class."
    task = add_task(linear_probe, usage, summary, LINEAR_PROBE_EXAMPLES)
    _add_labels(task)
    task.add_argument("--train", required=True, metavar="DATA", help="where the shots are taken from; forms as --data")
    task.add_argument(
        "--shots", type=positive_integer, default=10, metavar="N", help="images per class (default: %(default)s)"
    )


def _add_labels(parser: argparse.ArgumentParser) -> None:
    known = "text file with a line each, JSON file of prompts, or name of a data set whose prompts are in the package"
    parser.add_argument("--class-names", required=True, metavar="FILE_OR_NAME", help=known)
    parser.add_argument(
        "--label-field",
        default="class_name",
        metavar="NAME",
        help="field of a sample's JSON, or column, that holds its class name or index; of a folder per class "
        "class_name (the folder) or class_id (its place in sorted order) (default: %(default)s)",
    )


def _add_common(
    parser: argparse.ArgumentParser,
    positive_integer: Callable[[str], int],
    data_required: bool = True,
    is_tuned: bool = True,
) -> None:
    parser.add_argument("--data", required=data_required, metavar="DATA", help=DATA_HELP)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--limit", type=positive_integer, metavar="N", help="samples, a fixed choice by their keys (default: all)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument(
        "--batch-size",
        type=positive_integer,
        default=16,
        metavar="N",
        help="images per pass; changes speed and memory, not results (default: %(default)s)",
    )
    if is_tuned:
        held_out = "share of the samples, by hash of the key, for tuning alone; no figure is about them"
        parser.add_argument(
            "--held-out-fraction", type=_fraction, default=0.2, metavar="F", help=f"{held_out} (default: %(default)s)"
        )
        parser.add_argument("--clip", metavar="DIR_OR_REPO", help="a CLIP or SigLIP of transformers to compare with")


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text!r}")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Tasks


def zero_shot(arguments: argparse.Namespace) -> int:
    """Top-1, top-5 and mean per class, and pictures of what is taken for what."""
    from .evaluation import zero_shot_rows
    from .evaluation_data import Samples, split_by_hash
    from .prompts import read_class_names
    from .report import draw_confusion
    from .zero_shot import classify_images, label_from_field, labelled_decoder

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
    notes = [
        "Ties count against; classes of one name are one class. Blind: the class with the likeliest text, log P(T), "
        "whatever the image."
    ]
    tables = {f"{len(class_names)} classes": rows}
    data = {**_describe(arguments, samples, split), "classes": len(class_names), "templates": len(templates)}
    _finish(arguments, model, "Zero-shot classification", tables, notes, data)
    if not draw_confusion(arguments.output / "confusion.png", confusions, class_names):
        print("no confusion.png: matplotlib is not installed")
    return 0


def _templates(arguments: argparse.Namespace) -> list[str]:
    from .processing_ig_captioner import DEFAULT_TEMPLATE
    from .prompts import is_text_file, read_templates

    if arguments.templates is not None:
        return read_templates(arguments.templates)
    return [DEFAULT_TEMPLATE] if is_text_file(arguments.class_names) else read_templates(arguments.class_names)


def retrieval(arguments: argparse.Namespace) -> int:
    """Recall and median rank, both ways; an image may have several captions."""
    from torch import tensor

    from .evaluation import gain_row, image_to_text_rows, text_to_image_rows
    from .evaluation_data import Samples, split_by_hash
    from .retrieval import score_pairs, true_pairs
    from .shards import read_captions, read_image

    model, processor, clip = _load(arguments)
    # Read three times: the texts have to be known before the first image is scored, and images may not fit in memory.
    samples = Samples(arguments.data, lambda key, files: (read_image(files), read_captions(files)), arguments.limit)
    captions = [own for _, own in samples]
    split = split_by_hash(samples.keys, arguments.held_out_fraction)

    def images_of(indices: list[int]):
        return (image for index, (image, _) in enumerate(samples) if index in indices)

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
        "Text to image": text_to_image_rows(*test, owners, others),
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
    from .compositional import blind_rows, prior_of_texts, read_items
    from .shards import first_by_hash

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
        raise ValueError(
            f"--format {arguments.format} asks for nothing that text alone could answer: --data is missing"
        )
    notes = [
        "Shares of items whose right caption scores higher than the wrong ones; ties count against. Blind: the "
        "likelier text, log P(T), whatever the image; with two images per item it cannot be right."
    ]
    _finish(arguments, model, f"Compositional understanding: {arguments.format}", tables, notes, data)
    return 0


def _score_items(arguments: argparse.Namespace, items, priors, model, processor, clip):
    """The table of the items whose images are there, and what is in it."""
    from .compositional import compositional_rows, find_name, score_images, stack_scores
    from .evaluation_data import Samples, describe_skipped, split_by_hash
    from .retrieval import score_pairs
    from .shards import read_image

    names = {name for item in items for name in item.images}

    def decode(key: str, files: dict[str, bytes]):
        name = find_name(key, names)
        return name, None if name is None else read_image(files)

    def score(image, texts: list[str]):
        return score_pairs(model, processor, [image], texts).caption_log_likelihood[0]

    def score_by_clip(image, texts: list[str]):
        return (clip.embed_images([image]) @ clip.embed_texts(texts).T)[0]

    samples = Samples(arguments.data, decode)
    all_scores = score_images(items, samples, score)
    there = [index for index, scores in enumerate(all_scores) if scores is not None]
    if not there:
        raise ValueError(f"none of {len(items)} items has its images in {arguments.data!r}")
    matrix = stack_scores([all_scores[index] for index in there], [priors[index] for index in there])
    others = {}
    if clip is not None:
        scores_of_clip = score_images(items, samples, score_by_clip)
        stacked = stack_scores([scores_of_clip[index] for index in there], [priors[index] for index in there])
        others[arguments.clip] = stacked.caption_log_likelihood
    split = split_by_hash([items[index].images[0] for index in there], arguments.held_out_fraction)
    rows = compositional_rows(matrix, [items[index].category for index in there], split, others)
    data = {
        "data": str(arguments.pairs),
        "images": arguments.data,
        "items": f"{len(items)}, of which {len(items) - len(there)} are skipped: an image is missing",
        "test samples": len(split[1]),
        "held-out samples": f"{len(split[0])} (by hash of the first image's name; they tune the prior weight)",
        "skipped images": describe_skipped(samples.skipped) or "none",
    }
    return {"Items with their images": rows}, data


def captioning(arguments: argparse.Namespace) -> int:
    """CIDEr-D and BLEU-4 of generated captions; the captions go to `captions.jsonl`."""
    from . import IGCaptionerForConditionalGeneration
    from .captioning import captioning_row, generate_captions
    from .cli import caption_tokens, choose_device, dtype_on
    from .evaluation_data import Samples
    from .hub import load_model, load_processor
    from .shards import read_captions, read_image

    device, processor = choose_device(arguments.device), load_processor(arguments.model)
    model = load_model(IGCaptionerForConditionalGeneration, arguments.model, **dtype_on(device)).to(device).eval()
    options = {
        "num_beams": arguments.num_beams,
        "max_new_tokens": caption_tokens(arguments.max_new_tokens, model.config.text_config),
    }
    samples = Samples(arguments.data, lambda key, files: (read_image(files), read_captions(files)), arguments.limit)
    references: list[list[str]] = []

    def images():
        for image, captions in samples:
            references.append(captions)
            yield image

    captions = generate_captions(model, processor, images(), arguments.batch_size, **options)
    row = captioning_row(f"{arguments.num_beams} beams" if arguments.num_beams > 1 else "greedy", captions, references)
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
    data = {**_describe(arguments, samples), "different captions": len(set(captions))}
    _finish(arguments, model, "Captioning", {"Captions": [row]}, notes, data)
    return 0


def linear_probe(arguments: argparse.Namespace) -> int:
    """Top-1, top-5 and mean per class of a linear map, fitted to a few images per class."""
    from torch import tensor

    from .evaluation_data import Samples, split_by_hash
    from .linear_probe import choose_shots, count_shots, mean_pooled_features, probe_row
    from .prompts import read_class_names
    from .zero_shot import label_from_field, labelled_decoder

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


# ---------------------------------------------------------------------------------------------------------------------
# What all tasks share


def _load(arguments: argparse.Namespace):
    """Model, processor, and the contrastive model if there is one."""
    from . import IGCaptionerForZeroShotImageClassification
    from .cli import choose_device, dtype_on
    from .contrastive import ContrastiveModel
    from .hub import load_model, load_processor

    device = choose_device(arguments.device)
    model = load_model(IGCaptionerForZeroShotImageClassification, arguments.model, **dtype_on(device)).to(device).eval()
    clip = None if arguments.clip is None else ContrastiveModel.load(arguments.clip, device)
    return model, load_processor(arguments.model), clip


def _describe(arguments: argparse.Namespace, samples, split=None, tuned: str = "prior weight") -> dict[str, Any]:
    """How many samples there are, of which kind."""
    from .evaluation_data import describe_skipped

    held_out = {}
    if split is not None:
        held_out = {"held-out samples": f"{len(split[0])} (by hash of the key; they tune the {tuned})"}
    return {
        "data": arguments.data,
        "test samples": len(samples.keys) if split is None else len(split[1]),
        **held_out,
        "skipped": describe_skipped(samples.skipped) or "none",
        **({"limit": arguments.limit} if arguments.limit else {}),
    }


def _finish(arguments: argparse.Namespace, model, title: str, tables: dict, notes: list[str], data: dict) -> None:
    """Writes and prints the results."""
    from .evaluation import RESAMPLES
    from .report import describe_run, to_markdown, write_results

    task = arguments.run.__name__.replace("_", "-")
    intervals = (
        f"In brackets: 95 % bootstrap intervals over test samples ({RESAMPLES} resamples, percentiles, a fixed seed). "
        "They say nothing about other training runs."
    )
    results = {
        "task": task,
        "title": title,
        "tables": tables,
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
    options = [[f"--{name.replace('_', '-')}", str(value)] for name, value in given.items() if value is not None]
    return shlex.join(["ig-captioner", "evaluate", task, *(word for option in options for word in option)])
