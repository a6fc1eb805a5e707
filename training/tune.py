"""Chooses the templates and the prior weight that a checkpoint carries, on training data that no run has seen.

    python -m training.tune --run RUN [--names_run RUN_WITH_NAMES_LEFT_OUT] --output FILE.json [--save]

Both runs must have a feature cache. Measured are, at every prior weight:

- held-out photos of known names, each among all names of its source;
- `mixed`: photos among 20 names, 10 of which the training never had (`data.sources.*.holdout_names_fraction`; of RUN,
  or of another, shorter run with the same sources). On known names alone, a weight that overshoots goes unnoticed;
- held-out captioned photos, each among the captions of all of them, and each caption among all photos.

Taken are templates and weight with the highest mean of the first two; of templates that are within 0.5 points of the
best, the first, as the candidates are listed from the cheapest on. `--save` writes both to the config of RUN/final.

Legend: B images, P image tokens, D their width, N texts, C names, T templates.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ig_captioner import IGCaptionerForConditionalGeneration
from ig_captioner.compiled_labels import encode_for
from ig_captioner.data.shards import first_by_hash, is_held_out
from ig_captioner.evaluation.ranking import PRIOR_WEIGHTS, ranks
from ig_captioner.input_rules import DEFAULT_TEMPLATE, format_labels

from .config import TrainConfig, load_config
from .data import is_left_out
from .feature_cache import FeatureStore, open_features


MAX_PHOTOS = 1000  # per source
TRIALS, NAMES_PER_TRIAL = 100, 20
WITHIN = 0.005  # of the best top-1 share, fewer templates are taken
CANDIDATES = (
    [DEFAULT_TEMPLATE],
    ["{}"],
    ["a photo of the {}."],
    [DEFAULT_TEMPLATE, "{}"],
    [DEFAULT_TEMPLATE, "{}", "a photo of the {}.", "a close-up photo of a {}."],
    [
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ],  # the seven of CLIP's that its authors found best together
)

Score = Callable[[Tensor, list[str]], tuple[Tensor, Tensor]]
"""From features [B, P, D] and N texts to log P(T|I) [B, N] and log P(T) [N]."""


class HeldOut(NamedTuple):
    """Samples of one source that were not trained on, with the features of their first view."""

    features: Tensor
    """[B, P, D], float32."""
    names: list[str]
    """Class names; empty for a captioned source."""
    captions: list[str]
    """The first caption of each."""
    known: Tensor
    """bool [B], whether the run has trained on other photos of the same name."""
    all_names: list[str]
    """Of the whole source, sorted."""


def read_held_out(config: TrainConfig, stores: dict[str, FeatureStore]) -> dict[str, HeldOut]:
    """The held-out samples of every source, at most MAX_PHOTOS of known and as many of left-out names."""
    result = {}
    for name, store in stores.items():
        source = config.data.sources[name]
        rows: dict[bool, dict[str, int]] = {True: {}, False: {}}
        for row, record in enumerate(store.records):
            left_out = is_left_out(record.metadata, source)
            if left_out or is_held_out(record.key, source.holdout_fraction):
                rows[not left_out][record.key] = row
        chosen = [(known, rows[known][key]) for known in rows for key in first_by_hash(rows[known], MAX_PHOTOS)]
        if not chosen:
            continue
        chosen.sort(key=lambda pair: pair[1])
        records = [store.records[row] for _, row in chosen]
        names = [str(record.metadata.get("class_name", "")) for record in records]
        result[name] = HeldOut(
            torch.from_numpy(np.stack([store.features[row, 0] for _, row in chosen])).float(),
            names if all(names) else [],
            [record.captions[0] for record in records],
            torch.tensor([known for known, _ in chosen]),
            sorted({str(record.metadata["class_name"]) for record in store.records}) if all(names) else [],
        )
    return result


def held_out_figures(
    config: TrainConfig,
    stores: dict[str, FeatureStore],
    score: Score,
    weights: Sequence[float] = PRIOR_WEIGHTS,
    candidates: Sequence[Sequence[str]] = ((DEFAULT_TEMPLATE,),),
) -> list[dict[str, Any]]:
    """For each of the candidate templates, figures per source: lists of shares at each of `weights`.

    They are `known` and `mixed` top-1 of classes, and recall of captions, which have no templates.
    """
    held_out = read_held_out(config, stores)
    captioned = {name: caption_figures(each, score, weights) for name, each in held_out.items() if not each.names}
    labelled = {name: each for name, each in held_out.items() if each.names}
    return [
        captioned | {name: class_figures(each, score, weights, list(templates)) for name, each in labelled.items()}
        for templates in candidates
    ]


def class_figures(samples: HeldOut, score: Score, weights: Sequence[float], templates: list[str]) -> dict[str, Any]:
    """`known`: top-1 among all names; `mixed`: mean over classes of top-1 among names half of which were left out."""
    caption, prior = score(samples.features, format_labels(samples.all_names, templates))
    count = len(samples.all_names)
    caption, prior = (values.unflatten(-1, (-1, count)).mean(dim=-2) for values in (caption, prior))
    place = {name: index for index, name in enumerate(samples.all_names)}
    labels = torch.tensor([place[name] for name in samples.names])
    figures: dict[str, Any] = {"photos": int(samples.known.sum()), "known": [], "mixed": []}
    for weight in weights:
        scores = caption - weight * prior
        correct = scores.argmax(dim=1) == labels
        if samples.known.any():
            figures["known"].append(round(correct[samples.known].float().mean().item(), 4))
        if not samples.known.all():
            figures["mixed"].append(round(mixed_top1(scores, labels, samples.known), 4))
    return figures


def mixed_top1(scores: Tensor, labels: Tensor, known: Tensor) -> float:
    """Mean over TRIALS draws of names, half of them left out, of the mean per class of top-1 among these names.

    Args:
        scores: [B, C].
        labels: int [B].
        known: bool [B].
    """
    rng = np.random.default_rng(0)
    left_out = labels[~known].unique().numpy()
    seen = np.setdiff1d(labels[known].unique().numpy(), left_out)
    half = min(NAMES_PER_TRIAL // 2, len(left_out), len(seen))
    shares = []
    for _ in range(TRIALS):
        names = torch.from_numpy(np.concatenate([rng.choice(part, half, replace=False) for part in (left_out, seen)]))
        rows = torch.isin(labels, names).nonzero().flatten()
        correct = names[scores[rows][:, names].argmax(dim=1)] == labels[rows]
        shares += [correct[labels[rows] == name].float().mean().item() for name in names]
    return float(np.mean(shares))


def caption_figures(samples: HeldOut, score: Score, weights: Sequence[float]) -> dict[str, Any]:
    """R@10 from image to text at each weight, and from text to image; only first captions."""
    caption, prior = score(samples.features, samples.captions)
    is_true = torch.tensor([[own == other for other in samples.captions] for own in samples.captions])

    def recall(scores: Tensor) -> float:
        return round((ranks(scores, is_true) < 10).float().mean().item(), 4)

    return {
        "photos": len(samples.captions),
        "image to text R@10": [recall(caption - weight * prior) for weight in weights],
        "text to image R@10": recall(caption.T),
    }


def captioner_score(model: Any, tokenizer: Any, batch_size: int = 128) -> Score:
    """The `Score` of a captioner in evaluation mode."""

    def score(features: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
        compiled = model.compile_texts(**encode_for(model, tokenizer, texts))
        parts = []
        with torch.no_grad():
            for part in features.split(batch_size):
                scores = model.score(None, compiled, image_features=part.to(model.device))
                parts.append(scores.caption_log_likelihood.cpu())
        return torch.cat(parts), scores.prior_log_likelihood.cpu()

    return score


# Choosing


def measure_run(run: Path, candidates: Sequence[list[str]]) -> list[dict[str, Any]]:
    """`held_out_figures` of a run's final model with each of the candidate templates."""
    config = load_config(run / "config.yaml")
    features = open_features(config)
    model = IGCaptionerForConditionalGeneration.from_pretrained(run / "final", dtype=torch.float32)
    score = captioner_score(model.to(features.device).eval(), features.tokenizer)
    return held_out_figures(config, features.stores, score, candidates=candidates)


def quality_of(known: dict[str, Any], mixed: dict[str, Any]) -> np.ndarray:
    """At each weight, the mean of the shares of known names and of mixed ones, each a mean over sources.

    Without names left out, the former alone. Raises ValueError if there are no classes.
    """
    shares = [
        np.mean([source[name] for source in figures.values() if source.get(name)], axis=0)
        for figures, name in ((known, "known"), (mixed, "mixed"))
        if any(source.get(name) for source in figures.values())
    ]
    if not shares:
        raise ValueError("no held-out photos with class names: set holdout_fraction of a source that has them")
    return np.mean(shares, axis=0)


def choose(known: list[dict[str, Any]], mixed: list[dict[str, Any]]) -> tuple[int, float]:
    """Number of the templates and prior weight, from the figures of each of the candidates in two runs."""
    quality = [quality_of(one, two) for one, two in zip(known, mixed, strict=True)]
    best = max(curve.max() for curve in quality)
    number = next(index for index, curve in enumerate(quality) if curve.max() >= best - WITHIN)
    return number, PRIOR_WEIGHTS[int(quality[number].argmax())]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--names_run", type=Path, help="default: RUN itself")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--save", action="store_true", help="write templates and weight to the config of RUN/final")
    parser.add_argument(
        "--candidates", type=int, default=len(CANDIDATES), metavar="N", help="only the first N templates"
    )
    options = parser.parse_args(arguments)
    candidates = CANDIDATES[: options.candidates]
    known = measure_run(options.run, candidates)
    mixed = measure_run(options.names_run, candidates) if options.names_run else known
    number, weight = choose(known, mixed)
    result = {
        "prompt_templates": CANDIDATES[number],
        "prior_weight": weight,
        "weights": PRIOR_WEIGHTS,
        "candidates": [
            {"templates": templates, "run": one, "names_run": two}
            for templates, one, two in zip(candidates, known, mixed, strict=True)
        ],
    }
    options.output.write_text(json.dumps(result, indent=1), encoding="utf-8")
    if options.save:
        save_choice(options.run / "final", CANDIDATES[number], weight)
    print(f"templates {CANDIDATES[number]}, prior weight {weight}")


def save_choice(folder: Path, templates: list[str], prior_weight: float) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"prompt_templates": templates, "prior_weight": prior_weight}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
