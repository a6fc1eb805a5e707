"""Which runs an experiment consists of: a recipe (YAML), and what each run changes of it.

- `comparison`: a captioner with CE(T|I) only, the IG captioner, the IG captioner with CapPa's parallel prediction for
  three quarters of the texts, and CLIP; each with several seeds. The learning rate of the IG captioner and of CLIP is
  searched before with the same budget; the other captioners take that of the IG captioner.
- `long_tail`: captioner and IG captioner on CIFAR-10 with classes as uneven as 100:1, tested on even ones.
- `ablations`: the IG captioner with one thing changed.
- `designs`: decoders whose trie nodes cost less: fewer layers that see the image, a narrower embedding and head; at
  equal samples, and the cheapest at equal CPU time of training, too.
"""

import copy
from dataclasses import field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from pydantic.dataclasses import dataclass

from training.config import STRICT, TrainConfig, from_dict, set_nested, validate


CAPTIONER = {"model.conditional_weight": 1.0, "model.unconditional_weight": 0.0}
IG_CAPTIONER = {"model.conditional_weight": 1.5, "model.unconditional_weight": 0.5}
ARMS: dict[str, dict[str, Any]] = {
    "captioner": CAPTIONER,
    "IG captioner": IG_CAPTIONER,
    "IG + parallel": {**IG_CAPTIONER, "model.parallel_prediction_prob": 0.75},
    "CLIP": {},
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "weights 1:1": {"model.conditional_weight": 1.0, "model.unconditional_weight": 1.0},
    "weights 1.8:0.2": {"model.conditional_weight": 1.8, "model.unconditional_weight": 0.2},
    "parallel 0.5": {**IG_CAPTIONER, "model.parallel_prediction_prob": 0.5},
    "no text-only layers": {**IG_CAPTIONER, "model.text_config.num_text_only_layers": 0},
    "cross-attention": {**IG_CAPTIONER, "model.text_config.fusion": "cross_attention"},
    "loss per text": {**IG_CAPTIONER, "model.loss_reduction": "sequence"},
}
# Six layers of width 192, of which so many see the image; "full" is an embedding of the decoder's width.
DECODER = {
    **IG_CAPTIONER,
    "model.text_config.hidden_size": 192,
    "model.text_config.intermediate_size": 768,
    "model.text_config.num_hidden_layers": 6,
}


def decoder_changes(fusion_layers: int, embedding_size: int | None) -> dict[str, Any]:
    changes = {**DECODER, "model.text_config.num_text_only_layers": 6 - fusion_layers}
    return changes if embedding_size is None else changes | {"model.text_config.embedding_size": embedding_size}


PRESENT_DESIGN = "3 fusion layers, full"
DESIGNS: dict[str, dict[str, Any]] = {
    f"{layers} fusion layer{'s' if layers > 1 else ''}, {size or 'full'}": decoder_changes(layers, size)
    for layers, size in ((3, None), (2, None), (1, None), (3, 128), (3, 64), (1, 128))
}
CHEAPEST_DESIGN = "1 fusion layer, 128"
SAME_TIME = ", equal CPU time"
LONG_TAIL_SHARD = "cifar10-long-tail.tar"


@dataclass(config=STRICT)
class Recipe:
    """What all runs share."""

    train: dict[str, Any] = field(default_factory=dict)
    """A training configuration (`training.config.TrainConfig`) without output_dir, tokenizer, seed."""
    vocab_size: int = 2000
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    rate_factors: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0])
    """Learning rates that are searched, as multiples of the recipe's."""
    test_captions: int = 400
    """Images of Flickr8k-val, with one caption each, that rank one another's."""
    reference_images: int = 64
    """Training images over which P(T|I) is averaged, where the prior is made of images."""
    long_tail_ratio: float = 100
    """Images of the most frequent class, CIFAR-10's first, for one of its last."""
    long_tail_samples: int = 64_000
    design_samples: int = 24_000
    """Of a design at equal samples: its decoder is deeper and wider than the recipe's, so that a step costs more."""


class Run(NamedTuple):
    """One training and its evaluation."""

    arm: str
    kind: Literal["captioner", "contrastive"]
    data: Literal["mixture", "long_tail"]
    changes: dict[str, Any]
    """Dotted keys of the training configuration, and their values."""
    seed: int
    rate_factor: float = 1.0

    @property
    def name(self) -> str:
        words = [self.data, self.arm, f"lr{self.rate_factor:g}", f"seed{self.seed}"]
        return "-".join(word.replace(",", "").replace(" ", "_").replace(":", "_") for word in words)


def load_recipe(path: Path) -> Recipe:
    """Raises ValueError for an unknown key, or a value of the wrong type."""
    return from_dict(Recipe, yaml.safe_load(path.read_text(encoding="utf-8")))


def search_runs(recipe: Recipe) -> list[Run]:
    """The learning rates of the IG captioner and of CLIP, with the first seed."""
    seed = recipe.seeds[0]
    return [make_run(arm, seed, factor) for factor in recipe.rate_factors for arm in ("IG captioner", "CLIP")]


def comparison_runs(recipe: Recipe, rates: dict[str, float]) -> list[Run]:
    return [make_run(arm, seed, rate_of(arm, rates)) for seed in recipe.seeds for arm in ARMS]


def ablation_runs(recipe: Recipe, rates: dict[str, float], seeds: list[int]) -> list[Run]:
    """Beside them the report uses the runs of the comparison."""
    return [
        Run(name, "captioner", "mixture", changes, seed, rate_of(name, rates))
        for seed in seeds
        for name, changes in ABLATIONS.items()
    ]


def long_tail_runs(recipe: Recipe) -> list[Run]:
    """With the recipe's own learning rate: it is searched on other data."""
    arms = ("IG captioner", "captioner")
    return [Run(arm, "captioner", "long_tail", ARMS[arm], seed) for arm in arms for seed in recipe.seeds]


def design_runs(recipe: Recipe, cpu_seconds: dict[str, float], seeds: list[int]) -> list[Run]:
    """Every design with `design_samples`, and the cheapest also with as many as take the present design's CPU time.

    Args:
        cpu_seconds: of a training step of each design.
    """
    samples = dict.fromkeys(DESIGNS, recipe.design_samples)
    ratio = cpu_seconds[PRESENT_DESIGN] / cpu_seconds[CHEAPEST_DESIGN]
    samples[CHEAPEST_DESIGN + SAME_TIME] = round(recipe.design_samples * ratio)
    return [
        Run(arm, "captioner", "mixture", {**DESIGNS[arm.removesuffix(SAME_TIME)], "max_samples": number}, seed)
        for seed in seeds
        for arm, number in samples.items()
    ]


def make_run(arm: str, seed: int, rate_factor: float) -> Run:
    return Run(arm, "contrastive" if arm == "CLIP" else "captioner", "mixture", ARMS[arm], seed, rate_factor)


def rate_of(arm: str, rates: dict[str, float]) -> float:
    """What the search has found, as a factor; the captioners share the IG captioner's."""
    return rates["CLIP" if arm == "CLIP" else "IG captioner"]


def training_config(run: Run, recipe: Recipe, folder: Path, tokenizer: Path, long_tail: Path, data_root: str):
    """The run's training configuration, validated."""
    values = copy.deepcopy(recipe.train)
    for key, value in run.changes.items():
        set_nested(values, key, value)
    for name in ("lr", "adamw_lr"):
        if (rate := values["optimizer"].get(name)) is not None:
            values["optimizer"][name] = rate * run.rate_factor
    values |= {"seed": run.seed, "output_dir": str(folder), "tokenizer": str(tokenizer), "data_root": data_root}
    if run.data == "long_tail":
        source = {**values["data"]["sources"]["cifar10"], "shards": [str(long_tail)], "weight": 1.0}
        values["data"]["sources"] = {"cifar10": {**source, "holdout_fraction": 0.0}}
        values["max_samples"] = recipe.long_tail_samples
    config = from_dict(TrainConfig, values)
    validate(config)
    return config
