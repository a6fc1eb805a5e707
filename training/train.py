"""Trains an IG captioner on Accelerate.

    accelerate launch -m training.train --config training/configs/tiny.yaml [--key value] [--section.key value]

(`python -m training.train` is the same with one process; `--help` lists the settings.) Writes to `output_dir`:
`log.jsonl` (rows of metrics), `checkpoint-*/`, `config.yaml`, and at the end `final/`, a model folder with tokenizer
and processor, and with matplotlib `curves.png`. The number to watch is the information gain per token, the
unconditional minus the captioning loss in nats: a run where it stays near 0 learns nothing from its images.
"""

import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from ig_captioner.data.shards import EmptySourceError

from .checkpoint import save_checkpoint
from .config import TrainConfig, UsageError, load_config, to_dict
from .config_help import USAGE, full_help
from .curves import draw_curves
from .data import IMAGE_INPUTS, split_by_length
from .evaluation import evaluate
from .metrics import TRACKER_FOLDER, summary, weight_in_mean
from .optim import learning_rate_factor, set_learning_rate
from .run import Run, start_run
from .sharding import gathered, model_weights
from .state import RunProgress, agree, all_finite, catch_sigterm, collect_state


ROWS_OF_TIMED_RUN = 20  # a run that the clock ends may take few steps


class NonFiniteError(RuntimeError):
    """Too many steps in a row without a finite loss and gradient."""


def train(config: TrainConfig) -> Path:
    """Runs the training that `config` describes; returns the folder of the final model (after SIGTERM `output_dir`)."""
    run = start_run(config)
    with catch_sigterm() as terminated, progress_bar(run.accelerator) as bar:
        stopped = take_steps(run, terminated, bar)
    save(run)
    if stopped:
        run.accelerator.print(f"SIGTERM: saved step {run.progress.step}, continue with --resume")
    else:
        finish(run)
    close(run)
    return Path(config.output_dir) if stopped else Path(config.output_dir) / "final"


# The loop


def take_steps(run: Run, terminated: Callable[[], bool], bar: tqdm) -> bool:
    """Trains until the run reaches its limit or any process gets SIGTERM; returns whether it was SIGTERM.

    Process 0's clock decides for all.
    """
    config = run.config
    progress = run.progress
    run.wrapped.train()
    clock = time.perf_counter() - progress.seconds
    last_save = progress.seconds
    factor = 0.0
    next_row = 0.0  # share of the run at which a row is due, if the clock ends it
    while True:
        progress.seconds, stop = agree(time.perf_counter() - clock, terminated(), run.accelerator)
        fraction = run_fraction(config, progress)
        if fraction >= 1.0 or stop:
            break
        # Half a step on: neither the first nor the last step of the schedule has a learning rate of 0.
        factor = learning_rate_factor(fraction + half_step(config), config.optimizer)
        set_learning_rate(run.optimizers, factor)
        row_due = due(progress.step + 1, config.log_every_steps) or (config.steps is None and fraction >= next_row)
        batch = next_batch(run)
        loss, grad_norm = compute_gradients(run, batch, with_sources=row_due)
        update_weights(run, loss, grad_norm)
        count(run, batch)
        if row_due:
            bar.set_postfix_str(summary(run.log.write(progress, fraction, factor)))
            next_row = fraction + 1 / ROWS_OF_TIMED_RUN
        bar.update(fraction - bar.n)
        if due(progress.step, config.evaluation.every_steps):
            evaluate_held_out(run)
        by_clock = 0 < config.checkpoint_minutes * 60 < progress.seconds - last_save
        if by_clock or due(progress.step, config.checkpoint_steps):
            save(run)
            last_save = progress.seconds
    if not stop and run.log.images:
        run.log.write(progress, fraction, factor)
    return stop


def next_batch(run: Run) -> dict[str, Any]:
    waited = time.perf_counter()
    batch = next(run.batches)
    run.log.data_seconds += time.perf_counter() - waited
    return batch


def compute_gradients(run: Run, batch: dict[str, Any], with_sources: bool) -> tuple[Tensor, Tensor | float]:
    """Forward and backward passes over the parts of a batch; returns its loss and the norm of the clipped gradient.

    Args:
        with_sources: whether the log is to have the losses of each source.
    """
    config = run.config
    accelerator = run.accelerator
    reduction = run.model.config.loss_reduction
    own_weight = weight_in_mean(batch["labels"], reduction).to(accelerator.device)
    whole = accelerator.reduce(own_weight, reduction="mean")
    loss = torch.zeros((), device=accelerator.device)
    parts = split_by_length(batch, config.micro_batches, config.data.pad_to_multiple_of)
    for number, part in enumerate(parts, start=1):
        part = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in part.items()}
        share = weight_in_mean(part["labels"], reduction) / whole  # of the batch of all processes
        # Processes exchange their gradients once per batch, with its last part.
        with nullcontext() if number == len(parts) else accelerator.no_sync(run.wrapped):
            images = {name: part[name] for name in IMAGE_INPUTS if name in part}
            outputs = run.wrapped(**images, labels=part["labels"])
            loss = loss + share * outputs.loss.detach()
            accelerator.backward(share * outputs.loss)
        run.log.add_part(outputs, share, part["labels"])
        if with_sources:
            run.log.add_sources(run.model, outputs, part["labels"], part["source"])
    max_grad_norm = config.optimizer.max_grad_norm or float("inf")
    grad_norm = gathered(accelerator.clip_grad_norm_(run.wrapped.parameters(), max_grad_norm))
    run.log.add_step(grad_norm, batch["labels"])
    return loss, grad_norm


def update_weights(run: Run, loss: Tensor, grad_norm: Tensor | float) -> None:
    """Takes the optimisers' step, or none where loss or gradient is not finite on any process."""
    progress = run.progress
    if all_finite(loss, grad_norm, run.accelerator):
        for optimizer in run.optimizers:
            optimizer.step()
        if run.average:
            run.average.update(run.model)
        progress.nonfinite_in_a_row = 0
    else:
        progress.nonfinite_steps += 1
        progress.nonfinite_in_a_row += 1
        run.accelerator.print(f"step {progress.step}: loss or gradient not finite, skipped")
    for optimizer in run.optimizers:
        optimizer.zero_grad(set_to_none=True)


def count(run: Run, batch: dict[str, Any]) -> None:
    """Moves the counters past a step. Raises NonFiniteError after too many skipped steps in a row."""
    progress = run.progress
    progress.step += 1
    progress.samples += run.config.batch_size
    progress.skipped.update(skipped.reason for skipped in batch["skipped"])
    run.data.states.update(batch["states"])
    if progress.nonfinite_in_a_row > run.config.max_nonfinite_steps:
        raise NonFiniteError(
            f"{progress.nonfinite_in_a_row} steps in a row without a finite loss and gradient, up to step "
            f"{progress.step}; look at the data, or lower optimizer.lr and pass --resume_with_changes"
        )


def evaluate_held_out(run: Run) -> None:
    rows = evaluate(run.model, run.average, run.data.held_out, run.settings, run.accelerator)
    run.log.append({"step": run.progress.step, "evaluation": rows})


# Saving and the end


def save(run: Run) -> None:
    """Writes a checkpoint, unless there is one of this step."""
    if run.saved_step == run.progress.step:
        return
    settings = {"values": to_dict(run.config), "changes": run.changes}
    # On every process: it gathers.
    state = collect_state(run.optimizers, run.average, run.progress, run.data, run.log, settings, run.accelerator)
    write_model = partial(save_model, run, model_weights(run.model, run.accelerator.is_main_process))
    if run.accelerator.is_main_process:
        keep = run.config.keep_checkpoints
        save_checkpoint(run.config.output_dir, run.progress.step, state, write_model, keep)
    run.accelerator.wait_for_everyone()
    run.saved_step = run.progress.step


def save_model(run: Run, weights: dict[str, Tensor], folder: Path) -> None:
    run.model.save_pretrained(folder, state_dict=weights)
    run.processor.save_pretrained(folder)


def finish(run: Run) -> None:
    """Evaluates, writes the final model and the curves, and says where they are."""
    output_dir = Path(run.config.output_dir)
    accelerator = run.accelerator
    if run.config.evaluation.every_steps and run.log.evaluated_step != run.progress.step:
        evaluate_held_out(run)
    if run.average:
        run.average.copy_to(run.model)
    accelerator.unwrap_model(run.wrapped, keep_fp32_wrapper=False)
    run.model.to(getattr(torch, run.config.save_dtype))
    weights = model_weights(run.model, accelerator.is_main_process)
    if accelerator.is_main_process:
        save_model(run, weights, output_dir / "final")
        has_curves = draw_curves(run.log.path, output_dir / "curves.png")
        print(f"final model: {output_dir / 'final'}")
        print(f"log: {run.log.path}; curves: {output_dir / 'curves.png' if has_curves else 'need matplotlib'}")
        if "tensorboard" in run.config.trackers:
            print(f"TensorBoard: tensorboard --logdir {output_dir / TRACKER_FOLDER}")


def close(run: Run) -> None:
    run.accelerator.wait_for_everyone()
    # DDP's reducer must not be the last to hold gloo's process group: it would delete it with Python's lock held, while
    # gloo's thread may wait for that lock to free a tensor (a process hung so at its end once in 60 runs, torch 2.13).
    (run.wrapped,) = run.accelerator.free_memory(run.wrapped)
    run.accelerator.end_training()


# Progress


def run_fraction(config: TrainConfig, progress: RunProgress) -> float:
    """Returns the share of the run that is done: the largest share of its steps, its samples and its minutes."""
    by_steps = progress.step / config.max_steps if config.max_steps else 0.0
    by_clock = progress.seconds / (60 * config.max_minutes) if config.max_minutes else 0.0
    by_samples = 0.0
    if config.max_samples:  # not by steps: a resumed run may have changed its batch size
        whole_batches = -(-config.max_samples // config.batch_size)
        by_samples = progress.samples / (whole_batches * config.batch_size)
    return max(by_steps, by_samples, by_clock)


def half_step(config: TrainConfig) -> float:
    return 0.5 / config.steps if config.steps else 0.0


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def progress_bar(accelerator: Accelerator) -> tqdm:
    layout = "{percentage:5.1f}%|{bar:16}| {elapsed}<{remaining} {postfix}"
    return tqdm(total=1.0, bar_format=layout, mininterval=1.0, disable=not accelerator.is_main_process)


# Command line


def parse_arguments(arguments: list[str]) -> TrainConfig:
    """Reads `--config FILE` and the settings after it. Raises UsageError for what cannot be meant."""
    if not arguments or arguments[0].partition("=")[0] != "--config":
        raise UsageError(f"{USAGE} (--help lists the settings)")
    _, equals, path = arguments[0].partition("=")
    path, overrides = (path, arguments[1:]) if equals else ("".join(arguments[1:2]), arguments[2:])
    if not path or path.startswith("--"):
        raise UsageError(f"--config needs a file; {USAGE}")
    return load_config(path, overrides)


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"--help", "-h"} & set(arguments):
        print(full_help())
        return
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        train(parse_arguments(arguments))
    except (UsageError, EmptySourceError, FileExistsError, FileNotFoundError) as error:
        if os.environ.get("RANK", "0") == "0":  # the others fail for the same reason
            print(f"training.train: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
