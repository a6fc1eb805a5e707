"""Trains an IG captioner: one linear script on Accelerate.

    accelerate launch -m training.train --config training/configs/tiny.yaml [--key value] [--section.key value]

(`python -m training.train` is the same with one process.) Writes to `output_dir`:
`log.jsonl` (one row of metrics per `log_every_steps`), `checkpoint-*/`, `config.yaml`, and at the end `final/`, a model
folder with tokenizer and processor, and with matplotlib `curves.png`. The number to watch is the information gain per
token, the unconditional minus the captioning loss in nats: a run where it stays near 0 learns nothing from its images.
"""

import logging
import os
import sys
import time
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from .build import build_model, build_processor, image_settings
from .checkpoint import list_checkpoints, save_checkpoint, step_of
from .config import TrainConfig, load_config
from .curves import draw_curves
from .data import load_training_data, split_by_length
from .evaluation import evaluate
from .metrics import MetricsLog, summary, weight_in_mean
from .optim import MovingAverage, learning_rate_factor, make_optimizers, set_learning_rate
from .sharding import gathered, is_sharding_wanted, model_weights, shard
from .state import RunProgress, SavedRun, agree, all_finite, catch_sigterm, collect_state


logger = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """Too many steps in a row without a finite loss and gradient."""


def train(config: TrainConfig) -> Path:
    """Runs the training that `config` describes; returns the folder of the final model."""
    # Without cpu=True, processes that torchrun starts on a machine without a GPU would not find each other.
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        cpu=not torch.accelerator.is_available(),
        log_with=config.trackers or None,
        project_dir=config.output_dir,
    )
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise RuntimeError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but Accelerate has {accelerator.num_processes}")
    if config.batch_size % accelerator.num_processes:
        raise ValueError(f"batch_size {config.batch_size} is not a multiple of {accelerator.num_processes} processes")
    output_dir = Path(config.output_dir)
    set_seed(config.seed)

    # Model and data. A resumed run reads on where the checkpoint was taken.
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
    checkpoint = find_checkpoint(output_dir, config.resume)
    saved = SavedRun(checkpoint, list(config.data.sources))
    model = build_model(config, tokenizer, checkpoint)
    processor = build_processor(config, model.config, tokenizer)
    settings = image_settings(processor.image_processor)
    data = load_training_data(
        config.data,
        tokenizer,
        settings,
        data_root=config.data_root,
        batch_size=config.batch_size // accelerator.num_processes,
        seed=config.seed,
        first_draw=saved.samples,
        streams=saved.streams,
        states=saved.stream_states,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
        max_held_out=config.evaluation.max_images if config.evaluation.every_steps else 0,
    )
    accelerator.print(describe(model, data.sizes, Counter(skipped.reason for skipped in data.skipped)))

    # Optimisation
    if sharded := is_sharding_wanted(accelerator):
        shard(model, config.mixed_precision)
    if config.compile:
        model.compile()
    optimizers = make_optimizers(model, config.optimizer)
    wrapped, *optimizers = (model, *optimizers) if sharded else accelerator.prepare(model, *optimizers)
    average = MovingAverage(model, config.optimizer.ema_decay) if config.optimizer.ema_decay else None
    progress = RunProgress(step=step_of(checkpoint) if checkpoint else 0)
    if accelerator.is_main_process:  # every process fills the same cache
        progress.skipped.update(skipped.reason for skipped in data.skipped)
    batches = iter(data.loader)  # draws a random number, so it comes before the random state is set
    torch.manual_seed(config.seed + accelerator.process_index)  # dropout and parallel prediction
    log = MetricsLog(output_dir, progress.step, accelerator, config, model)
    saved.restore(optimizers, average, progress, log, accelerator)
    saved_step = progress.step
    if checkpoint:
        accelerator.print(f"resumed from {checkpoint}")

    def save_model(weights: dict[str, torch.Tensor], folder: Path) -> None:
        model.save_pretrained(folder, state_dict=weights)
        processor.save_pretrained(folder)

    def save(seconds: float) -> None:
        nonlocal saved_step
        if saved_step != progress.step:
            progress.seconds = seconds
            # On every process: it gathers.
            state = collect_state(optimizers, average, progress, data, log, list(config.data.sources), accelerator)
            write_model = partial(save_model, model_weights(model, accelerator.is_main_process))
            if accelerator.is_main_process:
                save_checkpoint(output_dir, progress.step, state, write_model, config.keep_checkpoints)
            accelerator.wait_for_everyone()
            saved_step = progress.step

    # The loop. Process 0's clock decides for all, and a SIGTERM to any process stops all.
    wrapped.train()
    clock = time.perf_counter() - progress.seconds
    last_save = progress.seconds
    with catch_sigterm() as terminated, progress_bar(accelerator) as bar:
        while True:
            seconds, stop = agree(time.perf_counter() - clock, terminated(), accelerator)
            fraction = run_fraction(config, progress.step, seconds)
            if fraction >= 1.0 or stop:
                break
            waited = time.perf_counter()
            batch = next(batches)
            log.data_seconds += time.perf_counter() - waited

            # Half a step on: neither the first nor the last step of the schedule has a learning rate of 0.
            set_learning_rate(
                optimizers, factor := learning_rate_factor(fraction + half_step(config), config.optimizer)
            )
            reduction = model.config.loss_reduction
            whole = weight_in_mean(batch["labels"], reduction).to(accelerator.device)
            whole, loss = accelerator.reduce(whole, reduction="mean"), 0.0
            parts = split_by_length(batch, config.micro_batches, config.data.pad_to_multiple_of)
            for number, part in enumerate(parts, start=1):
                last = number == len(parts)
                part = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in part.items()}
                share = weight_in_mean(part["labels"], reduction) / whole  # of the batch of all processes
                with nullcontext() if last else accelerator.no_sync(wrapped):
                    outputs = wrapped(pixel_values=part["pixel_values"], labels=part["labels"])
                    loss = loss + share * outputs.loss.detach()
                    accelerator.backward(share * outputs.loss)
                log.add_part(outputs, share, part["labels"])
                if due(progress.step + 1, config.log_every_steps):
                    log.add_sources(model, outputs, part["labels"], part["source"])
            max_grad_norm = config.optimizer.max_grad_norm or float("inf")
            grad_norm = gathered(accelerator.clip_grad_norm_(wrapped.parameters(), max_grad_norm))
            log.add_step(grad_norm, batch["labels"])
            if all_finite(loss, grad_norm, accelerator):
                for optimizer in optimizers:
                    optimizer.step()
                if average:
                    average.update(model)
                progress.nonfinite_in_a_row = 0
            else:
                progress.nonfinite_steps += 1
                progress.nonfinite_in_a_row += 1
                accelerator.print(f"step {progress.step}: loss or gradient not finite, skipped")
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            progress.step += 1
            progress.samples += config.batch_size
            progress.skipped.update(skipped.reason for skipped in batch["skipped"])
            data.states.update(batch["states"])
            if progress.nonfinite_in_a_row > config.max_nonfinite_steps:
                raise NonFiniteError(
                    f"{progress.nonfinite_in_a_row} steps in a row without a finite loss and gradient, up to step "
                    f"{progress.step}; lower optimizer.lr, or look at the data"
                )

            if due(progress.step, config.log_every_steps):
                row = log.write(progress, seconds, fraction, factor)
                bar.set_postfix_str(summary(row))
            bar.update(fraction - bar.n)
            if due(progress.step, config.evaluation.every_steps):
                log.append(
                    {
                        "step": progress.step,
                        "evaluation": evaluate(model, average, data.held_out, settings, accelerator),
                    }
                )
            if due(progress.step, config.checkpoint_steps) or 0 < config.checkpoint_minutes * 60 < seconds - last_save:
                save(seconds)
                last_save = seconds

    save(seconds)
    if stop:
        accelerator.print(f"SIGTERM: saved step {progress.step}, continue with --resume")
    elif config.evaluation.every_steps:
        log.append(
            {
                "step": progress.step,
                "evaluation": evaluate(model, average, data.held_out, settings, accelerator),
            }
        )
    if not stop:
        if average:
            average.copy_to(model)
        accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
        model.to(getattr(torch, config.save_dtype))
        weights = model_weights(model, accelerator.is_main_process)
        if accelerator.is_main_process:
            save_model(weights, output_dir / "final")
            draw_curves(log.path, output_dir / "curves.png")
        accelerator.print(f"saved {output_dir / 'final'}")
    accelerator.wait_for_everyone()
    # DDP's reducer must not be the last to hold gloo's process group: it would delete it with Python's lock held, while
    # gloo's thread may wait for that lock to free a tensor (a process hung so at its end once in 60 runs, torch 2.13).
    (wrapped,) = accelerator.free_memory(wrapped)
    accelerator.end_training()
    return output_dir if stop else output_dir / "final"


# Progress


def describe(model: torch.nn.Module, sizes: dict[str, int], skipped: Counter[str]) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    samples = ", ".join(f"{name} {size}" for name, size in sizes.items()) or "streamed"
    return f"{parameters / 1e6:.2f} M parameters; samples: {samples}; skipped: {dict(skipped) or 'none'}"


def find_checkpoint(output_dir: Path, resume: bool) -> Path | None:
    """The newest complete checkpoint; a run that starts from nothing must not mix its own with older ones."""
    checkpoints = list_checkpoints(output_dir)
    if checkpoints and not resume:
        raise FileExistsError(f"{checkpoints[-1]} is of an earlier run: pass --resume, or another --output_dir")
    for path in sorted(output_dir.glob("checkpoint-*")):
        if path not in checkpoints:
            logger.warning("ignored %s: it is incomplete", path)
    return checkpoints[-1] if checkpoints else None


def run_fraction(config: TrainConfig, step: int, seconds: float) -> float:
    """How much of the run is done: the larger of the share of steps and the share of minutes."""
    by_steps = step / config.steps if config.steps else 0.0
    by_clock = seconds / (60 * config.max_minutes) if config.max_minutes else 0.0
    return max(by_steps, by_clock)


def half_step(config: TrainConfig) -> float:
    return 0.5 / config.steps if config.steps else 0.0


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def progress_bar(accelerator: Accelerator) -> tqdm:
    layout = "{percentage:5.1f}%|{bar:16}| {elapsed}<{remaining} {postfix}"
    return tqdm(total=1.0, bar_format=layout, mininterval=1.0, disable=not accelerator.is_main_process)


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] != "--config" or len(arguments) < 2 or arguments[1].startswith("--"):
        raise SystemExit("usage: python -m training.train --config FILE.yaml [--key value] [--section.key value]")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    train(load_config(arguments[1], arguments[2:]))


if __name__ == "__main__":
    main()
