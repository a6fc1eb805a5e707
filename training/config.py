"""The configuration of a training run: dataclasses, read from YAML, overridden from the command line.

`load_config("tiny.yaml", ["--max_minutes", "90", "--optimizer.lr=2e-3"])` returns a validated `TrainConfig`.
Unknown keys and values of the wrong type raise a `ValueError` that names the key and the value.
"""

import dataclasses
import os
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml


DATA_ROOT_VARIABLE = "IG_CAPTIONER_DATA"

T = TypeVar("T")


@dataclass
class AugmentationConfig:
    """Random crop, shift and flip of one image; the defaults change nothing."""

    flip_probability: float = 0.0
    """Probability of a horizontal flip."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Range of the crop's area, as a fraction of the image's area."""
    ratio: tuple[float, float] = (1.0, 1.0)
    """Range of the crop's aspect ratio (width / height, relative to the image's own), drawn log-uniformly."""
    shift: float = 0.0
    """Largest shift in either direction, as a fraction of the side; the border is filled by reflection."""
    color_jitter: float = 0.0
    """Largest relative change of contrast, and largest change of each channel's brightness (of 1.0)."""


@dataclass
class SourceConfig:
    """One set of WebDataset shards."""

    shards: list[str] = field(default_factory=list)
    """Paths or globs of `.tar` / `.tar.gz` files, `{0000..0004}` and `{a,b}` expanded, relative to `data_root`; or URLs
    (http, https, and with what fsspec asks for hf, s3, gs), with braces but without globs."""
    weight: float = 1.0
    """Share of the samples drawn from this source, relative to the other weights."""
    holdout_fraction: float = 0.0
    """Share of the keys that is never trained on; the evaluation hook uses it (rule: `shards.is_held_out`)."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)


@dataclass
class DataConfig:
    """What is read and how a batch is made of it."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    max_length: int = 32
    """Longest caption in tokens, EOS included; longer ones are cut and keep their EOS."""
    pad_to_multiple_of: int = 1
    cache_in_memory: bool = True
    """Decode every image once, keep it as uint8 (perfect shuffling, exact resume). False: stream the shards."""
    cache_size: int = 96
    """Images with a longer side than this (pixels) are squashed to a square of it in the cache; where the image
    processor cuts out the centre (`crop_pct`), those with a longer shorter side are shrunk to it."""
    shuffle_buffer: int = 2000
    """Samples that are shuffled together, when streaming; each stream holds one such block, undecoded, per source."""
    streams: int = 0
    """Parts that the shards are dealt out to, when streaming; 0: one per loader process. A run keeps the number it
    started with, so that it can be resumed with any number of processes and workers up to it."""
    max_image_pixels: int = 50_000_000
    """Images with more pixels are skipped before they are decoded (decompression bombs)."""
    num_workers: int = 0
    """Loader processes per training process; 0 loads in the training process."""


@dataclass
class OptimizerConfig:
    """Optimiser, learning-rate schedule and weight averaging."""

    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    """`adafactor`: big_vision's (see `adafactor.py`); `muon`: Muon for the hidden matrices, AdamW for the rest."""
    lr: float = 1e-3
    """Peak learning rate (of Muon, when it is used)."""
    adamw_lr: float | None = None
    """Peak learning rate of AdamW's share under `muon`; null: the same as `lr`."""
    weight_decay: float = 0.05
    """Decoupled weight decay of matrices; norms, biases, embeddings and positions have none. A step takes it times the
    learning rate, but under `adafactor` times the schedule alone, without `lr` (big_vision's 1e-4 is such a value)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW."""
    eps: float = 1e-8
    adafactor_momentum: float = 0.9
    adafactor_beta2_cap: float = 0.999
    muon_momentum: float = 0.95
    muon_ns_steps: int = 5
    """Newton-Schulz iterations."""
    muon_adjust_lr: Literal["original", "match_rms_adamw"] = "match_rms_adamw"
    schedule: Literal["constant", "linear", "cosine", "rsqrt"] = "cosine"
    warmup_fraction: float = 0.03
    """Share of the run over which the learning rate rises linearly from 0."""
    cooldown_fraction: float = 0.0
    """Share of the run, at its end, over which it falls linearly to 0 (for constant and rsqrt)."""
    min_lr_ratio: float = 0.0
    """Lowest learning rate of linear and cosine, as a fraction of the peak."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm; 0 disables."""
    ema_decay: float = 0.0
    """Decay of the exponential moving average of the weights, per step; 0 disables."""


@dataclass
class EvaluationConfig:
    """Zero-shot ranking on held-out samples (`holdout_fraction`) during training."""

    every_steps: int = 0
    """0 disables it; otherwise it also runs once at the end."""
    max_images: int = 200
    """Held-out images per source."""


@dataclass
class TrainConfig:
    """A run. At least one of `max_steps`, `max_samples`, `max_minutes` must be set; the first reached ends it."""

    output_dir: str = "runs/tiny"
    tokenizer: str = ""
    """Folder or Hub name of a tokenizer whose plain call gives the text's tokens and EOS."""
    data_root: str = ""
    """Folder of relative shard paths; empty: the environment variable IG_CAPTIONER_DATA, else `data`."""
    init_from: str | None = None
    """Folder or Hub name of a checkpoint whose weights the run starts from; null: random weights."""
    encoder_from: str | None = None
    """Folder or Hub name of a vision model of transformers whose weights a new model's encoder starts from; its
    configuration becomes `model.vision_config`, its image processor's statistics, size and crop the model's."""
    model: dict[str, Any] = field(default_factory=dict)
    """Arguments of `IGCaptionerConfig` (`vision_config`, `text_config`, loss weights, ...)."""
    freeze: list[str] = field(default_factory=list)
    """Patterns (`*` for anything) of names of parameters that are not trained, as `model.vision_model.*` (LiT)."""
    attn_implementation: str = "eager"
    """Attention in training: `eager` (fastest for 64 tokens on CPU), `sdpa`, `flash_attention_2`."""
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    batch_size: int = 128
    """Samples per optimiser step, over all processes."""
    micro_batches: int = 1
    """Parts a batch is computed in, one after the other: less memory. Parts are formed by caption length, so that
    two or more also save the padding of short captions. The gradient is that of the whole batch."""
    max_steps: int | None = None
    max_samples: int | None = None
    max_minutes: float | None = None
    """Wall-clock budget; the schedule follows it, so that the learning rate has decayed when it ends."""
    trackers: list[str] = field(default_factory=list)
    """Where Accelerate sends the rows of the log besides, as `tensorboard` (in `output_dir/tracked`), `wandb`."""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    compile: bool = False
    gradient_checkpointing: bool = False
    seed: int = 0
    log_every_steps: int = 20
    checkpoint_steps: int = 0
    """Steps between checkpoints; 0 disables."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints; 0 disables."""
    keep_checkpoints: int = 2
    resume: bool = False
    """Continue from the newest checkpoint in `output_dir`, if there is one."""
    max_nonfinite_steps: int = 20
    """Skipped steps in a row (loss or gradient not finite) after which the run stops with an error."""
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Number format of the final folder's weights."""

    @property
    def steps(self) -> int | None:
        """Number of optimiser steps; None when only the clock ends the run."""
        limits = [self.max_steps, -(-self.max_samples // self.batch_size) if self.max_samples else None]
        return min((limit for limit in limits if limit is not None), default=None)


def load_config(path: str | Path | None, overrides: list[str] | None = None) -> TrainConfig:
    """Reads a YAML file and applies overrides such as `["--optimizer.lr", "2e-3", "--resume"]`."""
    text = Path(path).read_text(encoding="utf-8") if path else ""
    values = yaml.safe_load(text) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of keys, got {type(values).__name__}")
    for key, value in parse_overrides(overrides or []):
        set_nested(values, key, value)
    config = from_dict(TrainConfig, values)
    config.data_root = config.data_root or os.environ.get(DATA_ROOT_VARIABLE, "data")
    validate(config)
    return config


def parse_overrides(arguments: list[str]) -> list[tuple[str, Any]]:
    """Turns `--key value`, `--key=value` and a bare `--flag` into (dotted key, YAML value) pairs."""
    pairs: list[tuple[str, Any]] = []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        position += 1
        if not argument.startswith("--") or argument == "--":
            raise ValueError(f"expected --key value, got {argument!r}")
        key, equals, text = argument[2:].partition("=")
        if not equals:
            bare = position == len(arguments) or arguments[position].startswith("--")
            text = "true" if bare else arguments[position]
            position += 0 if bare else 1
        pairs.append((key, yaml.safe_load(text)))
    return pairs


def set_nested(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets `values["a"]["b"]` for the key `a.b`; the check of the names comes later, in `from_dict`."""
    *parents, name = key.split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise ValueError(f"--{key}: {parent!r} is a value ({values!r}), not a section")
    values[name] = value


def from_dict(cls: type[T], values: dict[str, Any], prefix: str = "") -> T:
    """Builds a configuration dataclass; `prefix` is the dotted path of `values`, for messages."""
    if not isinstance(values, dict):
        raise ValueError(f"{prefix or 'configuration'} must be a section with keys, got {values!r}")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"unknown key {prefix}{unknown[0]!s}; known here: {', '.join(hints)}")
    return cls(**{key: convert(hints[key], value, prefix + key) for key, value in values.items()})


def convert(hint: Any, value: Any, name: str) -> Any:
    """Checks `value` against the type annotation `hint`; numbers in text form (YAML reads 2e-3 as text) pass."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        others = [argument for argument in arguments if argument is not type(None)]
        return None if value is None else convert(others[0], value, name)
    if origin is Literal:
        # YAML 1.1 reads a bare `no` as false, and "no" is a legal mixed_precision.
        value = "no" if value is False and "no" in arguments else value
        if value not in arguments:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, arguments))}, got {value!r}")
        return value
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, name + ".")
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be a section with keys, got {value!r}")
        return {key: convert(arguments[1], item, f"{name}.{key}") for key, item in value.items()}
    if origin is list:
        items = [value] if isinstance(value, str) else value
        return [convert(arguments[0], item, name) for item in expect_sequence(items, name)]
    if origin is tuple:
        items = expect_sequence(value, name)
        if len(items) != len(arguments):
            raise ValueError(f"{name} must have {len(arguments)} values, got {value!r}")
        return tuple(convert(argument, item, name) for argument, item in zip(arguments, items, strict=True))
    return convert_scalar(hint, value, name)


def expect_sequence(value: Any, name: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} must be a list, got {value!r}")
    return list(value)


def convert_scalar(kind: type, value: Any, name: str) -> Any:
    """bool, int, float or str, without silent changes of value."""
    if (kind is bool and isinstance(value, bool)) or (kind is str and isinstance(value, (str, int, float))):
        return kind(value)
    if kind in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = None
        if number is not None and (kind is float or number == int(number)):
            return kind(number)
    raise ValueError(f"{name} must be {kind.__name__}, got {value!r}")


def validate(config: TrainConfig) -> None:
    """Raises ValueError for values that cannot work, with the key and the value in the message."""
    if config.steps is None and config.max_minutes is None:
        raise ValueError("set at least one of max_steps, max_samples, max_minutes")
    if not config.data.sources:
        raise ValueError("data.sources is empty: name at least one set of shards")
    for name, source in config.data.sources.items():
        where = f"data.sources.{name}"
        check(bool(source.shards), f"{where}.shards", source.shards, "name at least one shard")
        check(source.weight > 0, f"{where}.weight", source.weight, "positive")
        check(
            0 <= source.holdout_fraction < 1,
            f"{where}.holdout_fraction",
            source.holdout_fraction,
            "in [0, 1)",
        )
        augmentation = source.augmentation
        low, high = augmentation.scale
        check(0 < low <= high <= 1, f"{where}.augmentation.scale", augmentation.scale, "0 < low <= high <= 1")
        low, high = augmentation.ratio
        check(0 < low <= high, f"{where}.augmentation.ratio", augmentation.ratio, "0 < low <= high")
        check(0 <= augmentation.shift < 0.5, f"{where}.augmentation.shift", augmentation.shift, "in [0, 0.5)")
    for name, value in {
        "batch_size": config.batch_size,
        "micro_batches": config.micro_batches,
        "data.max_length": config.data.max_length - 1,
        "data.pad_to_multiple_of": config.data.pad_to_multiple_of,
        "data.cache_size": config.data.cache_size,
        "data.shuffle_buffer": config.data.shuffle_buffer,
        "optimizer.lr": config.optimizer.lr,
        "log_every_steps": config.log_every_steps,
        "keep_checkpoints": config.keep_checkpoints,
        "max_steps": 1 if config.max_steps is None else config.max_steps,
        "max_samples": 1 if config.max_samples is None else config.max_samples,
        "max_minutes": 1 if config.max_minutes is None else config.max_minutes,
    }.items():
        check(value > 0, name, value, "positive (data.max_length: at least 2)")
    check(config.data.streams >= 0, "data.streams", config.data.streams, "at least 0")
    optimizer = config.optimizer
    check(0 <= optimizer.ema_decay < 1, "optimizer.ema_decay", optimizer.ema_decay, "in [0, 1)")
    fractions = optimizer.warmup_fraction + optimizer.cooldown_fraction
    check(0 <= fractions <= 1, "optimizer.warmup_fraction + cooldown_fraction", fractions, "in [0, 1]")

    check(config.micro_batches <= config.batch_size, "micro_batches", config.micro_batches, "at most batch_size")


def check(condition: bool, name: str, value: Any, rule: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {rule}, got {value!r}")
