"""The configuration of a training run: dataclasses, read from YAML, overridden from the command line.

`load_config("tiny.yaml", ["--max_minutes", "90", "--optimizer.lr=2e-3"])` returns a validated `TrainConfig`. pydantic
checks names, types and ranges from the annotations and reads the meaning of each field from the docstring below it;
`python -m training.train --help` prints them. What cannot be used raises a `UsageError` that names key and value.
"""

import math
import os
import re
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass


DATA_ROOT_VARIABLE = "IG_CAPTIONER_DATA"
CHANGES_KEY = "changes"  # of config.yaml: what `resume_with_changes` has changed; no setting itself
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True, use_attribute_docstrings=True)

T = TypeVar("T")


class UsageError(ValueError):
    """A run that cannot be what was asked for; the message is for whoever started it."""


def refuse_flag(value: Any) -> Any:
    """Python takes True for 1, and `--batch_size --resume` gives True."""
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


NUMBER = BeforeValidator(refuse_flag)
PositiveInt = Annotated[int, Field(gt=0), NUMBER]
NonNegativeInt = Annotated[int, Field(ge=0), NUMBER]
PositiveFloat = Annotated[float, Field(gt=0), NUMBER]
NonNegativeFloat = Annotated[float, Field(ge=0), NUMBER]
Fraction = Annotated[float, Field(ge=0, le=1), NUMBER]
FractionBelowOne = Annotated[float, Field(ge=0, lt=1), NUMBER]
Texts = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
# YAML 1.1 reads a bare `no` as false.
Precision = Annotated[Literal["auto", "no", "bf16"], BeforeValidator(lambda value: "no" if value is False else value)]


@dataclass(config=STRICT)
class AugmentationConfig:
    """Random crop, shift and flip of one image; the defaults change nothing."""

    flip_probability: Fraction = 0.0
    """Probability of a horizontal flip."""
    scale: tuple[PositiveFloat, Fraction] = (1.0, 1.0)
    """Range of the crop's area, as a fraction of the image's area."""
    ratio: tuple[PositiveFloat, PositiveFloat] = (1.0, 1.0)
    """Range of the crop's aspect ratio (width / height, relative to the image's own), drawn log-uniformly."""
    shift: Annotated[float, Field(ge=0, lt=0.5), NUMBER] = 0.0
    """Largest shift in either direction, as a fraction of the side; the border is filled by reflection."""
    color_jitter: NonNegativeFloat = 0.0
    """Largest relative change of contrast, and largest change of each channel's brightness (of 1.0)."""
    detail: tuple[PositiveFloat, Fraction] = (1.0, 1.0)
    """Range of the share of the crop's pixels, along a side, that are kept before it is brought to the model's size:
    shows the model how larger photos look that were made small. Drawn log-uniformly."""
    sharpness: tuple[NonNegativeFloat, NonNegativeFloat] = (1.0, 1.0)
    """Range of Pillow's sharpness of the crop, at the pixels it has: 0 smoothed, 1 as it is, 2 sharpened."""

    @property
    def changes_detail(self) -> bool:
        return self.detail != (1.0, 1.0) or self.sharpness != (1.0, 1.0)


@dataclass(config=STRICT)
class SourceConfig:
    """One set of WebDataset shards."""

    shards: Texts = field(default_factory=list)
    """Paths or globs of `.tar` / `.tar.gz` files, `{0000..0004}` and `{a,b}` expanded, relative to `data_root`; or URLs
    (http, https, and with what fsspec asks for hf, s3, gs), with braces but without globs."""
    weight: PositiveFloat = 1.0
    """Share of the samples drawn from this source, relative to the other weights."""
    holdout_fraction: FractionBelowOne = 0.0
    """Share of the keys that is never trained on; the evaluation during training uses it."""
    holdout_names_fraction: FractionBelowOne = 0.0
    """Share of the class names (`class_name` of the JSON, same rule) none of whose samples are trained on. Needs
    `feature_cache`, as `templates` do: only that keeps the JSON of samples."""
    templates: Texts = field(default_factory=list)
    """Further texts of samples with a class name: sentences with `{}` in them, or names of prompts (`imagenet`, a
    file) for all of their templates."""
    template_fields: Texts = field(default_factory=lambda: ["class_name"])
    """Fields of the JSON that hold a name for `templates`, or a list of names."""
    template_share: Fraction = 0.5
    """Share of the draws of a sample's text that come from `templates`, where it has names for them."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    views: PositiveInt | None = None
    """Views of each image in the feature cache; null: `feature_cache.views`."""


@dataclass(config=STRICT)
class FeatureCacheConfig:
    """Features of a frozen encoder, computed once and read from disk in training (see `feature_cache`)."""

    folder: str
    """Where they are kept, for this and later runs."""
    views: PositiveInt = 1
    """Views of each image: the first as the image processor sees it, the others augmented."""
    dtype: Literal["float16", "float32"] = "float16"
    """Number format on the disk."""
    batch_size: PositiveInt = 64
    """Views per pass of the encoder."""
    num_workers: NonNegativeInt = 0
    """Processes that decode and augment; 0: the training process does."""
    seed: int = 0
    """Of the augmented views; apart from the run's, so that runs of other seeds share them."""


@dataclass(config=STRICT)
class DataConfig:
    """The data: what is read, and how a batch is made of it."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Sets of shards by name."""
    strict: bool = False
    """End the run at the first sample or shard that cannot be used, instead of skipping and counting it."""
    max_length: Annotated[int, Field(ge=2), NUMBER] = 32
    """Longest caption in tokens, end-of-sequence included; longer ones are cut and keep their end-of-sequence."""
    pad_to_multiple_of: PositiveInt = 1
    """Captions of a batch are padded to a multiple of this number of tokens."""
    cache_in_memory: bool = True
    """Decode every image once and keep it as uint8 (perfect shuffling, exact resume). False: stream the shards."""
    cache_size: PositiveInt = 96
    """Images with a longer side than this (pixels) are squashed to a square of it in the cache; where the image
    processor cuts out the centre (`crop_pct`), those with a longer shorter side are shrunk to it."""
    shuffle_buffer: PositiveInt = 2000
    """Samples that are shuffled together, when streaming; each stream holds one such block, undecoded, per source."""
    streams: NonNegativeInt = 0
    """Parts that the shards are dealt out to, when streaming; 0: one per loader process. A run keeps the number it
    started with, so that it can be resumed with any number of processes and workers up to it."""
    max_image_pixels: PositiveInt = 50_000_000
    """Images with more pixels are skipped before they are decoded (decompression bombs)."""
    num_workers: NonNegativeInt = 0
    """Loader processes per training process; 0 loads in the training process."""
    feature_cache: FeatureCacheConfig | None = None
    """Train on cached features of the encoder, which must be frozen; null: on images."""


@dataclass(config=STRICT)
class OptimizerConfig:
    """Optimiser, learning-rate schedule and weight averaging."""

    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    """`adafactor`: big_vision's (see `adafactor.py`); `muon`: Muon for the hidden matrices, AdamW for the rest."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate (of Muon, when it is used)."""
    adamw_lr: PositiveFloat | None = None
    """Peak learning rate of AdamW's share under `muon`; null: the same as `lr`."""
    weight_decay: NonNegativeFloat = 0.05
    """Decoupled weight decay of matrices; norms, biases, embeddings and positions have none. A step takes it times the
    learning rate, but under `adafactor` times the schedule only, without `lr` (big_vision's 1e-4 is such a value)."""
    betas: tuple[FractionBelowOne, FractionBelowOne] = (0.9, 0.95)
    """Decay rates of AdamW's running means of the gradient and of its square."""
    eps: NonNegativeFloat = 1e-8
    """AdamW adds it to the root of the mean squared gradient."""
    adafactor_momentum: FractionBelowOne = 0.9
    """Decay rate of Adafactor's running mean of the update."""
    adafactor_beta2_cap: Fraction = 0.999
    """Upper bound of Adafactor's decay rate of squared gradients."""
    muon_momentum: FractionBelowOne = 0.95
    """Decay rate of Muon's running mean of the gradient."""
    muon_ns_steps: Annotated[int, Field(ge=1, lt=100), NUMBER] = 5
    """Newton-Schulz iterations."""
    muon_adjust_lr: Literal["original", "match_rms_adamw"] = "match_rms_adamw"
    """Scaling of Muon's learning rate with a matrix's shape; `match_rms_adamw`: updates as large as AdamW's."""
    schedule: Literal["constant", "linear", "cosine", "rsqrt"] = "cosine"
    """Decay of the learning rate after the warm-up."""
    warmup_fraction: Fraction = 0.03
    """Share of the run over which the learning rate rises linearly from 0."""
    cooldown_fraction: Fraction = 0.0
    """Share of the run, at its end, over which it falls linearly to 0 (for constant and rsqrt)."""
    min_lr_ratio: Fraction = 0.0
    """Lowest learning rate of linear and cosine, as a fraction of the peak."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are clipped to this global norm; 0 disables."""
    ema_decay: FractionBelowOne = 0.0
    """Decay of the exponential moving average of the weights, per step; 0 disables."""


@dataclass(config=STRICT)
class EvaluationConfig:
    """Zero-shot ranking on held-out samples (`holdout_fraction`) during training."""

    every_steps: NonNegativeInt = 0
    """Steps between evaluations, which also run once at the end; 0 disables them."""
    max_images: PositiveInt = 200
    """Held-out images per source."""


@dataclass(config=STRICT)
class TrainConfig:
    """A run. At least one of `max_steps`, `max_samples`, `max_minutes` must be set; the first reached ends it."""

    output_dir: str = "runs/tiny"
    """Folder of checkpoints, log, curves and the final model."""
    tokenizer: str = ""
    """Folder or Hub name of a tokenizer whose plain call gives the text's tokens and end-of-sequence."""
    data_root: str = ""
    """Folder of relative shard paths; empty: the environment variable IG_CAPTIONER_DATA, else `data`."""
    init_from: str | None = None
    """Folder or Hub name of a checkpoint whose weights the run starts from; null: random weights."""
    encoder_from: str | None = None
    """Folder or Hub name of a vision model of transformers whose weights a new model's encoder starts from; its
    configuration becomes `model.vision_config`, its image processor's statistics, size and crop the model's."""
    model: dict[str, Any] = field(default_factory=dict)
    """Arguments of `IGCaptionerConfig`: `vision_config`, `text_config`, loss weights, ...; as in
    `--model.text_config.dropout 0.1`."""
    freeze: Texts = field(default_factory=list)
    """Patterns (`*` for anything) of names of parameters that are not trained, as `model.vision_model.*` (LiT)."""
    attn_implementation: str = "eager"
    """Attention in training: `eager` (fastest for 64 tokens on CPU), `sdpa`, `flash_attention_2`."""
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    batch_size: PositiveInt = 128
    """Samples per optimiser step, over all processes."""
    micro_batches: PositiveInt = 1
    """Parts a batch is computed in, one after the other: less memory. Parts are formed by caption length, so that
    two or more also save the padding of short captions. The gradient is that of the whole batch."""
    max_steps: PositiveInt | None = None
    """Optimiser steps; null: no limit."""
    max_samples: PositiveInt | None = None
    """Samples drawn, rounded up to whole steps; null: no limit."""
    max_minutes: PositiveFloat | None = None
    """Wall-clock budget in minutes; the schedule follows it, so that the learning rate has decayed when it ends."""
    trackers: Texts = field(default_factory=list)
    """Where Accelerate sends the rows of the log besides, as `tensorboard` (in `output_dir/tracked`), `wandb`."""
    mixed_precision: Precision = "auto"
    """`bf16`: matrix products in bfloat16; `no`: all in float32; `auto`: `bf16` where that is faster on this device.
    The weights are float32 in any case. Muon's Newton-Schulz iterations use the same format."""
    compile: bool = False
    """Compile the model with torch.compile."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, more time."""
    seed: NonNegativeInt = 0
    """Seed of the weights, of the order of the samples, of augmentation and dropout."""
    log_every_steps: PositiveInt = 20
    """Steps between rows of `log.jsonl`."""
    checkpoint_steps: NonNegativeInt = 0
    """Steps between checkpoints; 0 disables."""
    checkpoint_minutes: NonNegativeFloat = 10.0
    """Minutes between checkpoints; 0 disables."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints that are kept."""
    resume: bool = False
    """Continue from the newest checkpoint in `output_dir`, if there is one. Settings that differ from the run's are
    refused."""
    resume_with_changes: bool = False
    """Continue like `resume`, with the settings that are given now; `config.yaml` says from which step they hold."""
    max_nonfinite_steps: NonNegativeInt = 20
    """Skipped steps in a row (loss or gradient not finite) after which the run stops with an error."""
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Number format of the final folder's weights."""

    @property
    def steps(self) -> int | None:
        """Number of optimiser steps; None when only the clock ends the run."""
        limits = [self.max_steps, -(-self.max_samples // self.batch_size) if self.max_samples else None]
        return min((limit for limit in limits if limit is not None), default=None)


# Reading


class Loader(yaml.SafeLoader):
    """YAML 1.1, in which 2e-3 is a number as well."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str, name: str) -> Any:
    """Returns the value of a YAML text; `name` says in errors where it comes from."""
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise UsageError(f"{name} is not YAML: {' '.join(str(error).split())}") from error


def load_config(path: str | Path | None, overrides: list[str] | None = None) -> TrainConfig:
    """Reads a YAML file and applies overrides such as `["--optimizer.lr", "2e-3", "--resume"]`."""
    values = read_file(Path(path)) if path else {}
    for key, value in parse_overrides(overrides or []):
        set_nested(values, key, value)
    config = from_dict(TrainConfig, values)
    config.data_root = config.data_root or os.environ.get(DATA_ROOT_VARIABLE, "data")
    validate(config)
    return config


def read_file(path: Path) -> dict[str, Any]:
    """Reads the settings of a YAML file, such as a recipe or the `config.yaml` of a run."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the configuration {path}: {error}") from error
    values = parse_yaml(text, str(path)) or {}
    if not isinstance(values, dict):
        raise UsageError(f"{path} must hold a mapping of keys, got {type(values).__name__}")
    values.pop(CHANGES_KEY, None)
    return values


def parse_overrides(arguments: list[str]) -> list[tuple[str, Any]]:
    """Turns `--key value`, `--key=value` and a bare `--flag` into (dotted key, YAML value) pairs."""
    pairs: list[tuple[str, Any]] = []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        position += 1
        if not argument.startswith("--") or argument == "--":
            raise UsageError(f"expected --key value, got {argument!r}")
        key, equals, text = argument[2:].partition("=")
        if not equals:
            bare = position == len(arguments) or arguments[position].startswith("--")
            text = "true" if bare else arguments[position]
            position += 0 if bare else 1
        first, *rest = key.split(".")
        pairs.append((".".join([first.replace("-", "_"), *rest]), parse_yaml(text, f"--{key}")))
    return pairs


def set_nested(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets `values["a"]["b"]` for the key `a.b`; the check of the names comes later, in `from_dict`."""
    *parents, name = key.split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise UsageError(f"--{key}: {parent!r} is a value ({values!r}), not a section")
    values[name] = value


def from_dict(cls: type[T], values: Any) -> T:
    """Builds a configuration dataclass from nested dictionaries."""
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        raise UsageError("; ".join(describe_error(cls, details) for details in error.errors())) from None


def describe_error(cls: type, details: Any) -> str:
    """Says in one line which key has which value, and what it must be."""
    path = [str(part) for part in details["loc"] if part not in ("int", "float", "constrained-float")]
    key = ".".join(path) or "configuration"
    if details["type"] == "unexpected_keyword_argument":
        known = known_keys(cls, path[:-1])
        return f"unknown key {key}" + (f"; known here: {', '.join(known)}" if known else "")
    rule = details["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return f"{key}: {rule}, got {details['input']!r}"


def known_keys(cls: Any, path: list[str]) -> list[str]:
    """Names of the fields of the section at `path`."""
    schema = TypeAdapter(cls).json_schema()
    sections = schema.get("$defs", {})
    section = schema
    for name in path:
        inner = section.get("properties", {}).get(name)
        if inner is not None:  # else the name of a source, whose section this already is
            section = section_in(inner, sections) or {}
    return list(section.get("properties", {}))


def section_in(field: dict[str, Any], sections: dict[str, Any]) -> dict[str, Any] | None:
    """The JSON schema of the section that a field holds, itself or under names that the user chooses; else None."""
    for choice in (field, field.get("additionalProperties"), *field.get("anyOf", [])):
        if isinstance(choice, dict) and "$ref" in choice:
            return sections[choice["$ref"].rpartition("/")[2]]
    return None


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Returns the settings as plain dictionaries, lists, numbers and texts."""
    return TypeAdapter(TrainConfig).dump_python(config, mode="json")


def flatten(values: dict[str, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with keys such as `a.b`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        flat |= flatten(value, separator, key + separator) if isinstance(value, dict) else {key: value}
    return flat


def validate(config: TrainConfig) -> None:
    """Checks what no single field shows. Raises UsageError with the keys and values in the message."""
    if config.steps is None and config.max_minutes is None:
        raise UsageError("set at least one of max_steps, max_samples, max_minutes")
    if not config.data.sources:
        raise UsageError("data.sources is empty: name at least one set of shards")
    for name, source in config.data.sources.items():
        where = f"data.sources.{name}"
        check(bool(source.shards), f"{where}.shards", source.shards, "a list of at least one shard")
        for range_name in ("scale", "ratio", "detail", "sharpness"):
            low, high = limits = getattr(source.augmentation, range_name)
            check(low <= high, f"{where}.augmentation.{range_name}", limits, "[low, high] with low <= high")
        if config.data.feature_cache is None:
            for key, given in (
                ("templates", source.templates),
                ("holdout_names_fraction", source.holdout_names_fraction),
            ):
                check(not given, f"{where}.{key}", given, "left out without data.feature_cache")
    for key, value in flatten(config.model, prefix="model.").items():
        check(not isinstance(value, float) or math.isfinite(value), key, value, "a finite number")
    fractions = config.optimizer.warmup_fraction + config.optimizer.cooldown_fraction
    check(fractions <= 1, "optimizer.warmup_fraction + cooldown_fraction", fractions, "at most 1")
    check(config.micro_batches <= config.batch_size, "micro_batches", config.micro_batches, "at most batch_size")


def check(condition: bool, name: str, value: Any, rule: str) -> None:
    if not condition:
        raise UsageError(f"{name} must be {rule}, got {value!r}")
