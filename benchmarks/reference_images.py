"""Which images stand for "no image" where log P(T) is a mean over reference images: accuracy by kind of reference.

    python -m benchmarks.reference_images --classes 'cifar10-test-*.tar.gz' --captions 'flickr8k-val-*.tar' \
        --photos 'flickr8k-train-0000.tar' 'cifar10-train-0000.tar.gz' --output benchmarks/results/reference_images

Images are scored once; every row is arithmetic on the same log P(T|I), at prior weight 1. Rows of photos are means over
draws, with the standard deviation of the draws in brackets. Any captioner will do: `--model` takes what
`CaptionScorer.from_pretrained` takes.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ig_captioner import DEFAULT_CHECKPOINT, CaptionScorer, CompiledLabels
from ig_captioner.data.prompts import load_prompts
from ig_captioner.data.samples import Samples, captioned, label_from_field, labelled_decoder
from ig_captioner.evaluation.ranking import ranks, true_pairs
from ig_captioner.evaluation.report import cpu_model, git_commit
from ig_captioner.information_gain import REFERENCE_MEANS, mean_over_references, mean_over_templates
from ig_captioner.input_rules import format_labels


SIZE = (64, 64)
NUM_NOISE, NUM_PHOTOS, DRAWS = 16, 64, 5
PLAIN = {"grey": (128,), "black": (0,), "white": (255,), "black, grey and white": (0, 128, 255)}


def log_likelihoods(scorer: CaptionScorer, images: Sequence[Image.Image], labels: CompiledLabels) -> Tensor:
    """log P(T|I), [B, N], a few images at a time."""
    parts = [
        scorer.score(list(images[at : at + 32]), labels).caption_log_likelihood for at in range(0, len(images), 32)
    ]
    return torch.cat(parts)


def priors(
    scorer: CaptionScorer, labels: CompiledLabels, photos: dict[str, list[Image.Image]]
) -> dict[str, list[Tensor]]:
    """log P(T), [N], of every kind of reference, as often as it was drawn."""
    found = {"weight 0, no prior": [torch.zeros(len(labels))]}
    found["without an image"] = [labels.texts.prior_log_likelihood.cpu()]
    noise = torch.rand(NUM_NOISE, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    likelihoods = {f"{NUM_NOISE} of noise": log_likelihoods(scorer, list(noise), labels)}
    for name, levels in PLAIN.items():
        images = [Image.new("RGB", SIZE, (level,) * 3) for level in levels]
        likelihoods[name] = log_likelihoods(scorer, images, labels)
    for name, of_images in likelihoods.items():
        for mean in REFERENCE_MEANS[: len(of_images)]:  # of one image both are the same
            found[_title(name, mean, len(of_images))] = [mean_over_references(of_images, mean)]
    for source, images in photos.items():
        under = log_likelihoods(scorer, images, labels)
        for mean in REFERENCE_MEANS:
            draws = [torch.randperm(len(under), generator=torch.Generator().manual_seed(seed)) for seed in range(DRAWS)]
            name = _title(f"{NUM_PHOTOS} of {source}", mean, NUM_PHOTOS)
            found[name] = [mean_over_references(under[draw[:NUM_PHOTOS]], mean) for draw in draws]
    return found


def _title(name: str, mean: str, number: int) -> str:
    return name if number == 1 else f"{name}, {mean} mean"


def classification(scorer: CaptionScorer, arguments: argparse.Namespace, photos: Any) -> dict[str, list[float]]:
    """Top-1 per cent with CLIP's templates, by kind of reference."""
    prompts = load_prompts(arguments.class_names)
    decode = labelled_decoder(label_from_field(prompts.class_names))
    images, classes = zip(*Samples(arguments.classes, decode, arguments.limit), strict=True)
    texts = format_labels(list(prompts.class_names), list(prompts.templates))
    labels = scorer.compile_labels(texts, "{}")
    caption = log_likelihoods(scorer, images, labels)
    truth = torch.tensor(classes)

    def top1(prior: Tensor) -> float:
        gains = mean_over_templates(caption - prior, len(prompts.templates))
        return 100 * (gains.argmax(dim=-1) == truth).double().mean().item()

    return _measure(top1, priors(scorer, labels, photos))


def retrieval(scorer: CaptionScorer, arguments: argparse.Namespace, photos: Any) -> dict[str, list[float]]:
    """Image to text R@10 in per cent, by kind of reference."""
    images, captions = zip(*Samples(arguments.captions, captioned, arguments.limit_captions), strict=True)
    texts = list(dict.fromkeys(text for own in captions for text in own))
    labels = scorer.compile_labels(texts, "{}")
    caption = log_likelihoods(scorer, images, labels)
    is_true = true_pairs(captions, texts)

    def recall(prior: Tensor) -> float:
        return 100 * (ranks(caption - prior, is_true) < 10).double().mean().item()

    return _measure(recall, priors(scorer, labels, photos))


def _measure(quality: Callable[[Tensor], float], found: dict[str, list[Tensor]]) -> dict[str, list[float]]:
    return {name: [quality(prior) for prior in draws] for name, draws in found.items()}


def table(columns: dict[str, dict[str, list[float]]]) -> str:
    """Kinds of reference by what was measured, in Markdown."""
    lines = ["| reference images | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name in next(iter(columns.values())):
        lines.append(f"| {name} | " + " | ".join(_cell(column[name]) for column in columns.values()) + " |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    spread = f" ({statistics.stdev(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_CHECKPOINT)
    parser.add_argument("--classes", help="labelled images: shards, a folder or a data set")
    parser.add_argument("--class-names", default="cifar10", help="names and templates of the classes")
    parser.add_argument("--captions", help="images with captions: shards, a folder or a data set")
    parser.add_argument("--photos", nargs="*", default=[], help="captioned images to draw references from")
    parser.add_argument("--limit", type=int, default=1000, help="labelled images (default: %(default)s)")
    parser.add_argument("--limit-captions", type=int, default=80, help="captioned images (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="a folder for results.md")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    scorer = CaptionScorer.from_pretrained(arguments.model)
    photos = {
        Path(source).name.split("-")[0]: [image for image, _ in Samples(source, captioned, 4 * NUM_PHOTOS)]
        for source in arguments.photos
    }
    columns = {}
    if arguments.classes:
        columns[f"{arguments.class_names}, {arguments.limit} images, top-1 %"] = classification(
            scorer, arguments, photos
        )
    if arguments.captions:
        columns[f"{arguments.limit_captions} captioned images, R@10 %"] = retrieval(scorer, arguments, photos)
    run = f"Commit {git_commit()}, {cpu_model()}, model {Path(arguments.model).name}"
    result = f"{table(columns)}\n\n{run}."
    print(result)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "results.md").write_text(result + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
