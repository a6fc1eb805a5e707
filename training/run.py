"""A run before its first step: from a configuration, and perhaps a checkpoint, to all that its steps need."""

import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, set_seed
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ig_captioner.precision import bfloat16_time_ratio, fastest_dtype
from ig_captioner.processing_ig_captioner import IGCaptionerProcessor

from .augmentation import ImageSettings
from .build import build_model, build_processor, image_settings, load_tokenizer
from .checkpoint import list_checkpoints, newest_intact
from .config import TrainConfig, UsageError
from .data import DataPosition, Share, TrainingData, load_training_data, mark_sources
from .feature_cache import FeatureStore, ensure_features
from .metrics import MetricsLog
from .optim import MovingAverage, make_optimizers
from .resume import Change, check_changes, check_shards, check_sources, find_changes, write_settings
from .sharding import is_sharding_wanted, shard
from .state import RunProgress, SavedRun


logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Run:
    """All that the steps of a training need, on one process."""

    config: TrainConfig
    accelerator: Accelerator
    model: PreTrainedModel
    """The plain model."""
    wrapped: torch.nn.Module
    """The same for the forward pass in training: with DistributedDataParallel, where there are several processes."""
    processor: IGCaptionerProcessor
    settings: ImageSettings
    data: TrainingData
    batches: Iterator[dict[str, Any]]
    optimizers: list[Any]
    average: MovingAverage | None
    log: MetricsLog
    progress: RunProgress
    changes: list[dict[str, Any]]
    """Of settings, since the run began (see `resume`)."""
    saved_step: int
    """Step of the newest checkpoint that this process knows of; 0 without one."""


def start_run(config: TrainConfig) -> Run:
    """Builds a run, or takes it up where its checkpoint was written."""
    # Without cpu=True, processes that torchrun starts on a machine without a GPU would not find each other.
    processes = PartialState(cpu=not torch.accelerator.is_available())
    check_processes(processes, config)
    saved = SavedRun(on_main_process(processes, choose_checkpoint, config))
    config = with_precision(config, saved, processes)
    changes = accept_changes(config, saved)
    # A process that has trained before, or has used transformers' Trainer, would keep that precision; Accelerate has no
    # public way to forget it, and Trainer does the same.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        cpu=not torch.accelerator.is_available(),
        log_with=config.trackers or None,
        project_dir=config.output_dir,
    )
    set_seed(config.seed)
    tokenizer = load_tokenizer(config, saved.checkpoint)
    model = build_model(config, tokenizer, saved.checkpoint, [change.key for change in changes])
    processor = build_processor(config, model.config, tokenizer, saved.checkpoint)
    settings = image_settings(processor.image_processor)
    features = ensure_features(config, model, settings, accelerator.device) if config.data.feature_cache else None
    data = load_data(config, tokenizer, settings, saved, accelerator, features)
    if data.streams:
        data.shards = on_main_process(processes, mark_sources, config.data, config.data_root)
    for difference in check_shards(saved.shards, data.shards, config.resume_with_changes):
        logger.warning("from step %d: %s", saved.step, difference)
        changes.append(Change("shards", "as they were", difference))
    accelerator.print(describe(model, data))
    wrapped, optimizers = prepare(model, config, accelerator)
    history = saved.changes + [change.row(saved.step) for change in changes]
    if accelerator.is_main_process:
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
        write_settings(Path(config.output_dir) / "config.yaml", config, history)
    run = Run(
        config=config,
        accelerator=accelerator,
        model=model,
        wrapped=wrapped,
        processor=processor,
        settings=settings,
        data=data,
        batches=iter(data.loader),  # draws a random number, so it comes before the random state is set
        optimizers=optimizers,
        average=MovingAverage(model, config.optimizer.ema_decay) if config.optimizer.ema_decay else None,
        log=MetricsLog(Path(config.output_dir), saved.step, accelerator, config, model),
        progress=RunProgress(),
        changes=history,
        saved_step=saved.step,
    )
    restore(run, saved, changes)
    return run


# Which run it is


def check_processes(processes: PartialState, config: TrainConfig) -> None:
    """Raises where the processes have not found each other, or cannot share a batch."""
    if processes.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise RuntimeError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but Accelerate has {processes.num_processes}")
    if config.batch_size % processes.num_processes:
        raise UsageError(f"batch_size {config.batch_size} is not a multiple of {processes.num_processes} processes")


def on_main_process(processes: PartialState, function: Any, *arguments: Any) -> Any:
    """Calls a function on the main process; every process gets its result, or its error."""
    outcome: list[Any] = [None, None]
    if processes.is_main_process:
        try:
            outcome[0] = function(*arguments)
        except (UsageError, FileExistsError) as error:
            outcome[1] = error
    result, error = broadcast_object_list(outcome)
    if error:
        raise error
    return result


def choose_checkpoint(config: TrainConfig) -> Path | None:
    """The newest intact checkpoint; a run that starts from nothing must not mix its own with older ones."""
    if config.resume or config.resume_with_changes:
        return newest_intact(config.output_dir)
    if checkpoints := list_checkpoints(config.output_dir):
        raise FileExistsError(f"{checkpoints[-1]} is of an earlier run: pass --resume, or another --output_dir")
    return None


def with_precision(config: TrainConfig, saved: SavedRun, processes: PartialState) -> TrainConfig:
    """The configuration with `mixed_precision: auto` decided; a resumed run keeps what it has decided before."""
    return dataclasses.replace(
        config, mixed_precision=on_main_process(processes, choose_precision, config, saved, processes)
    )


def choose_precision(config: TrainConfig, saved: SavedRun, processes: PartialState) -> str:
    """Decides "auto" and says why; warns where an explicit "bf16" is slow."""
    if config.mixed_precision == "auto" and not saved.settings:
        dtype, reason = fastest_dtype(processes.device)
        choice = "bf16" if dtype == torch.bfloat16 else "no"
        processes.print(f"mixed_precision: {choice}, chosen by auto: {reason}")
        return choice
    automatic = config.mixed_precision == "auto"
    choice = saved.settings["mixed_precision"] if automatic else config.mixed_precision
    if choice == "bf16" and processes.device.type == "cpu" and (ratio := bfloat16_time_ratio()) > 1:
        logger.warning(
            "mixed_precision is bf16, but on this processor a product of matrices in bfloat16 takes %.2g times as long "
            "as in float32; --mixed_precision no is faster",
            ratio,
        )
    return choice


def accept_changes(config: TrainConfig, saved: SavedRun) -> list[Change]:
    """The settings that differ from the checkpoint's. Raises UsageError for those that must not."""
    if not saved.settings:
        return []
    changes = find_changes(saved.settings, config)
    check_sources(list(saved.settings["data"]["sources"]), list(config.data.sources))
    check_changes(changes, config.resume_with_changes)
    for change in changes:
        logger.warning("from step %d: %s", saved.step, change)
    return changes


# What it is made of


def load_data(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    settings: ImageSettings,
    saved: SavedRun,
    accelerator: Accelerator,
    features: dict[str, FeatureStore] | None,
) -> TrainingData:
    """Opens the shards, or the features of their images; a resumed run reads on where the checkpoint was written."""
    processes = accelerator.num_processes
    return load_training_data(
        config.data,
        tokenizer,
        settings,
        Share(config.batch_size // processes, accelerator.process_index, processes),
        data_root=config.data_root,
        seed=config.seed,
        position=DataPosition(saved.samples, saved.streams, saved.stream_states),
        max_held_out=config.evaluation.max_images if config.evaluation.every_steps else 0,
        features=features,
    )


def describe(model: torch.nn.Module, data: TrainingData) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    samples = ", ".join(f"{name} {size}" for name, size in data.sizes.items()) or "streamed"
    skipped = dict(Counter(skipped.reason for skipped in data.skipped)) or "none"
    return f"{parameters / 1e6:.2f} M parameters; samples: {samples}; skipped: {skipped}"


def prepare(model: PreTrainedModel, config: TrainConfig, accelerator: Accelerator) -> tuple[torch.nn.Module, list[Any]]:
    """The model as it is trained, with DDP, FSDP2 or neither, and its optimisers."""
    sharded = is_sharding_wanted(accelerator)
    if sharded:
        shard(model, config.mixed_precision)
    if config.compile:
        model.compile()
    muon_dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    optimizers = make_optimizers(model, config.optimizer, muon_dtype)
    if sharded:
        return model, list(optimizers)
    wrapped, *prepared = accelerator.prepare(model, *optimizers)
    return wrapped, prepared


def restore(run: Run, saved: SavedRun, changes: list[Change]) -> None:
    """Sets counters and random states: to those of the checkpoint, or to the first ones."""
    if run.accelerator.is_main_process:  # every process fills the same cache
        run.progress.skipped.update(skipped.reason for skipped in run.data.skipped)
    torch.manual_seed(run.config.seed + run.accelerator.process_index)  # dropout and parallel prediction
    reseeded = any(change.key == "seed" for change in changes)
    saved.restore(run.optimizers, run.average, run.progress, run.log, run.accelerator, reseeded)
    if saved.checkpoint:
        run.accelerator.print(f"resumed from {saved.checkpoint}")
