"""Trains an IG captioner: one linear script on Accelerate.

    accelerate launch -m training.train --config training/configs/tiny.yaml [--key value] [--section.key value]

(`python -m training.train` is the same with one process.) Writes to `output_dir`:
`log.jsonl` (one row of metrics per `log_every_steps`), `checkpoint-*/`, `config.yaml`, and at the end `final/`, a model
folder with tokenizer and processor. The number to watch is the information gain per token, the unconditional minus the
captioning loss in nats: a run where it stays near 0 learns nothing from its images.
"""

import dataclasses
import logging
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object, set_seed
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from ig_captioner.configuration_ig_captioner import as_height_width

from .augmentation import ImageSettings
from .build import build_model, build_processor
from .checkpoint import list_checkpoints, load_state, save_checkpoint, step_of
from .config import TrainConfig, load_config
from .data import load_training_data, split_by_length
from .evaluation import evaluate_held_out
from .metrics import MetricsLog, summary, weight_in_mean
from .optim import MovingAverage, learning_rate_factor, make_optimizers, set_learning_rate


logger = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """Too many steps in a row without a finite loss and gradient."""


def train(config: TrainConfig) -> Path:
    """Runs the training that `config` describes; returns the folder of the final model."""
    # Without cpu=True, processes that torchrun starts on a machine without a GPU would not find each other.
    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=not torch.accelerator.is_available())
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise RuntimeError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but Accelerate has {accelerator.num_processes}")
    if config.batch_size % accelerator.num_processes:
        raise ValueError(f"batch_size {config.batch_size} is not a multiple of {accelerator.num_processes} processes")
    output_dir = Path(config.output_dir)
    set_seed(config.seed)

    # Model and data. The first draw follows from the step, so a resumed run reads on where it stopped.
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
    checkpoints = list_checkpoints(output_dir) if config.resume else []
    checkpoint = checkpoints[-1] if checkpoints else None
    first_step = step_of(checkpoint) if checkpoint else 0
    model = build_model(config, tokenizer, checkpoint)
    processor = build_processor(model.config, tokenizer)
    size = as_height_width(model.config.vision_config.image_size, "image_size")
    settings = ImageSettings(size, processor.image_processor.resample)
    data = load_training_data(
        config.data,
        tokenizer,
        settings,
        data_root=config.data_root,
        batch_size=config.batch_size // accelerator.num_processes,
        seed=config.seed,
        first_draw=first_step * config.batch_size,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
        max_held_out=config.evaluation.max_images if config.evaluation.every_steps else 0,
    )
    accelerator.print(describe(model, data.sizes, Counter(skipped.reason for skipped in data.skipped)))

    # Optimisation
    if config.compile:
        model.compile()
    average = (
        MovingAverage(model.to(accelerator.device), config.optimizer.ema_decay) if config.optimizer.ema_decay else None
    )
    optimizers = make_optimizers(model, config.optimizer)
    wrapped, *optimizers = accelerator.prepare(model, *optimizers)
    progress = RunProgress(step=first_step, skipped_samples=len(data.skipped))
    batches = iter(data.loader)  # draws a random number, so it comes before the random state is set
    torch.manual_seed(config.seed + accelerator.process_index)  # dropout and parallel prediction
    if checkpoint:
        restore(load_state(checkpoint), optimizers, average, progress, accelerator)
        accelerator.print(f"resumed from {checkpoint}")
    log = MetricsLog(output_dir, progress.step, accelerator, config)

    def save_model(folder: Path, averaged: bool = False) -> None:
        with average.applied(model) if average and averaged else nullcontext():
            model.save_pretrained(folder)
        processor.save_pretrained(folder)

    def save(seconds: float) -> None:
        progress.seconds = seconds
        state = collect_state(optimizers, average, progress)  # on every process: it gathers
        if accelerator.is_main_process:
            save_checkpoint(output_dir, progress.step, state, save_model, config.keep_checkpoints)
        accelerator.wait_for_everyone()

    # The loop. Process 0's clock and its SIGTERM decide for all.
    wrapped.train()
    clock = time.perf_counter() - progress.seconds
    last_save = progress.seconds
    with catch_sigterm() as terminated, progress_bar(accelerator) as bar:
        while True:
            seconds, stop = agree([time.perf_counter() - clock, float(terminated())], accelerator)
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
                log.add_part(outputs, share)
                if due(progress.step + 1, config.log_every_steps):
                    log.add_sources(model, outputs, part["labels"], part["source"])
            grad_norm = accelerator.clip_grad_norm_(
                wrapped.parameters(), config.optimizer.max_grad_norm or float("inf")
            )
            log.add_step(grad_norm, len(batch["labels"]))
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
            progress.skipped_samples += len(batch["skipped"])
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
        return output_dir
    if config.evaluation.every_steps:
        log.append(
            {
                "step": progress.step,
                "evaluation": evaluate(model, average, data.held_out, settings, accelerator),
            }
        )
    if accelerator.is_main_process:
        if average:
            average.copy_to(model)
        accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
        model.to(getattr(torch, config.save_dtype))
        save_model(output_dir / "final")
        accelerator.print(f"saved {output_dir / 'final'}")
    accelerator.end_training()
    return output_dir / "final"


# Progress and state


def describe(model: torch.nn.Module, sizes: dict[str, int], skipped: Counter[str]) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    samples = ", ".join(f"{name} {size}" for name, size in sizes.items()) or "streamed"
    return f"{parameters / 1e6:.2f} M parameters; samples: {samples}; skipped: {dict(skipped) or 'none'}"


@dataclasses.dataclass
class RunProgress:
    """What a run has done so far; part of each checkpoint."""

    step: int = 0
    seconds: float = 0.0
    skipped_samples: int = 0
    nonfinite_steps: int = 0
    nonfinite_in_a_row: int = 0


def run_fraction(config: TrainConfig, step: int, seconds: float) -> float:
    """How much of the run is done: the larger of the share of steps and the share of minutes."""
    by_steps = step / config.steps if config.steps else 0.0
    by_clock = seconds / (60 * config.max_minutes) if config.max_minutes else 0.0
    return max(by_steps, by_clock)


def half_step(config: TrainConfig) -> float:
    return 0.5 / config.steps if config.steps else 0.0


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def agree(values: list[float], accelerator: Accelerator) -> list[float]:
    """Process 0's values, on every process."""
    if accelerator.num_processes == 1:
        return values
    return broadcast(torch.tensor(values, dtype=torch.float64, device=accelerator.device)).tolist()


def all_finite(loss: Tensor, grad_norm: Tensor | float, accelerator: Accelerator) -> bool:
    """Whether loss and gradient norm are finite on every process."""
    total = loss.detach().float() + torch.as_tensor(grad_norm, device=loss.device).float()
    return bool(torch.isfinite(accelerator.reduce(total)))


def random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def collect_state(optimizers: list[Any], average: MovingAverage | None, progress: RunProgress) -> dict[str, Any]:
    """Everything but the weights. The data have no state: the step says which samples come next."""
    return {
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "average": average.state_dict() if average else None,
        "progress": dataclasses.asdict(progress),
        "random_states": gather_object([random_states()]),
    }


def restore(
    state: dict[str, Any],
    optimizers: list[Any],
    average: MovingAverage | None,
    progress: RunProgress,
    accelerator: Accelerator,
) -> None:
    """The inverse of `collect_state`, in place."""
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    if average:
        if state["average"] is None:
            raise ValueError("optimizer.ema_decay is set, but the checkpoint has no moving average")
        average.load_state_dict(state["average"])
    for name, value in state["progress"].items():
        setattr(progress, name, value)
    if accelerator.process_index < len(state["random_states"]):  # with more processes than before: fresh ones
        states = state["random_states"][accelerator.process_index]
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])


@contextmanager
def catch_sigterm() -> Iterator[Any]:
    """Yields a function that says whether SIGTERM has come; the signal itself no longer ends the process."""
    received: list[int] = []
    try:
        previous = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    except ValueError:  # not in the main thread, where Python cannot set handlers
        yield lambda: False
        return
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGTERM, previous)


def evaluate(
    model: Any,
    average: MovingAverage | None,
    held_out: dict[str, list],
    settings: ImageSettings,
    accelerator: Accelerator,
) -> dict[str, dict[str, float]]:
    """Held-out ranking per source, with the moving average where there is one; all processes do the same."""
    model.eval()
    pad_token_id = model.config.text_config.pad_token_id or 0
    with average.applied(model) if average else nullcontext(), accelerator.autocast():
        result = {
            name: evaluate_held_out(model, samples, settings, pad_token_id, accelerator.device)
            for name, samples in held_out.items()
            if samples
        }
    model.train()
    return result


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
