"""Metrics of a run: losses, information gain, speed, memory; one JSON object per row of `log.jsonl`.

Shapes: B texts, L tokens. Losses are in nats per token. `mfu`, model FLOPs utilisation, is the share of the measured
peak of matrix products that the model's own products take (see `flops`).
"""

import itertools
import json
import logging
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from transformers import PreTrainedModel

from ig_captioner.information_gain import IGNORE_INDEX

from .checkpoint import write_text_atomically
from .config import TrainConfig, flatten
from .flops import encoder_passes, head_flops, measure_peak_flops, training_flops


logger = logging.getLogger(__name__)

TRACKER_FOLDER = "tracked"
LOSSES = ("loss", "captioning_loss", "unconditional_loss", "parallel_loss")


def summary(row: dict[str, Any]) -> str:
    shown = {
        "captioning_loss": "cap {:.3f}",
        "unconditional_loss": "uncond {:.3f}",
        "information_gain": "IG/token {:.4f}",
    }
    losses = " ".join(text.format(row[name]) for name, text in shown.items() if name in row)
    return (
        f"step {row['step']} {losses} {row['images_per_second']:.0f} img/s "
        f"{row['tokens_per_second']:.0f} tok/s MFU {row['mfu']:.0%} {row['peak_memory_gib']:.1f} GiB "
        f"waited {row['data_wait']:.0%}"
    )


def peak_memory_gib(device: torch.device) -> float:
    """The most that this process has held so far: allocated on a GPU; on a CPU resident, libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def weight_in_mean(labels: Tensor, reduction: str) -> Tensor:
    """Weight of the mean loss of texts [B, L] in a mean over more texts: their tokens, or with "sequence" texts."""
    labelled = labels != IGNORE_INDEX
    return (labelled.any(dim=1) if reduction == "sequence" else labelled).sum().float()


@torch.no_grad()
def sums_by_source(caption: Tensor, prior: Tensor, labels: Tensor, source: Tensor, sources: int) -> Tensor:
    """[S, 3]: per source the summed captioning loss and unconditional loss, and the number of tokens.

    `caption` and `prior` are log P(T|I) and log P(T) [B].
    """
    columns = torch.stack([-caption, -prior, (labels != IGNORE_INDEX).sum(dim=1).float()], dim=1)
    return columns.new_zeros(sources, 3).index_add_(0, source.to(labels.device), columns)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a log. Lines that are none (a killed run wrote part of one, damage) are left out with a warning."""
    rows = []
    others = []
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.exists() else [], start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
            if not isinstance(row["step"], int):
                raise TypeError("a row has its step")
            rows.append(row)
        except (ValueError, TypeError, KeyError):
            others.append(str(number))
    if others:
        logger.warning("%s: left out what is no row: line %s", path, ", ".join(others))
    return rows


def move_aside(path: Path) -> None:
    """Renames a log that is of an earlier run to `log.jsonl.1`, or the next number that is free."""
    if path.exists() and path.stat().st_size:
        number = next(number for number in itertools.count(1) if not Path(f"{path}.{number}").exists())
        path.rename(f"{path}.{number}")
        logger.warning("%s is of an earlier run; moved to %s.%d", path, path, number)


class MetricsLog:
    """Means over the steps since the last row; rows go to `log.jsonl`, rows after a resumed step are dropped."""

    def __init__(
        self, output_dir: Path, step: int, accelerator: Accelerator, config: TrainConfig, model: PreTrainedModel
    ) -> None:
        self.names = list(config.data.sources)
        self.model_config = model.config
        encoder = model.base_model.vision_model
        frozen = not any(parameter.requires_grad for parameter in encoder.parameters())
        self.encoder_passes = encoder_passes(frozen, config)
        dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
        self.peak_flops = measure_peak_flops(accelerator.device, dtype)
        self.path = output_dir / "log.jsonl"
        self.accelerator = accelerator
        kept = self.keep_rows(step) if accelerator.is_main_process else []
        self.evaluated_step = max((row["step"] for row in kept if "evaluation" in row), default=-1)
        (self.evaluated_step,) = broadcast_object_list([self.evaluated_step])  # all processes evaluate, or none
        accelerator.init_trackers(TRACKER_FOLDER)  # for `trackers`; without any, nothing happens
        self.reset()

    def keep_rows(self, step: int) -> list[dict[str, Any]]:
        """Drops the rows after `step` and returns the others; a run that starts anew moves an older log aside."""
        if step == 0:
            move_aside(self.path)
            return []
        kept = [row for row in read_rows(self.path) if row["step"] <= step]
        write_text_atomically(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        return kept

    def reset(self) -> None:
        self.means: dict[str, Tensor] = {}  # of each, the weighted sum and the sum of the weights [2]
        self.sources: Tensor | None = None
        self.images, self.tokens, self.flops = 0, 0, 0
        self.data_seconds = 0.0
        self.started = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """Returns what has been added since the last row, on this process."""
        means = {name: total.cpu() for name, total in self.means.items()}
        seconds = [self.data_seconds, time.perf_counter() - self.started]
        counts = [self.images, self.tokens, self.flops]
        return {"means": means, "counts": counts, "seconds": seconds}

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """From the states of all processes, of which there may have been another number."""
        processes = self.accelerator.num_processes
        index = self.accelerator.process_index
        same = len(states) == processes
        for name in states[0]["means"]:
            mean = states[index]["means"][name] if same else sum(state["means"][name] for state in states) / len(states)
            self.means[name] = mean.to(self.accelerator.device)
        totals = [sum(counts) // processes for counts in zip(*(state["counts"] for state in states), strict=True)]
        self.images, self.tokens, self.flops = states[index]["counts"] if same else totals
        self.data_seconds, elapsed = states[0]["seconds"]
        self.started = time.perf_counter() - elapsed

    def add_part(self, outputs: Any, share: Tensor, labels: Tensor) -> None:
        """Losses of a part of a batch. Sums stay on the device, so that adding costs no synchronisation."""
        # the head's share depends on the labels, which are on the device here: add_step adds it
        self.flops += training_flops(self.model_config, *labels.shape, 0, self.encoder_passes)
        for name in LOSSES:
            value = getattr(outputs, name)
            if value is not None:
                self.add_mean(name, value, share)

    def add_mean(self, name: str, value: Tensor, weight: Tensor) -> None:
        added = torch.stack([value.detach().float() * weight, weight])
        if name in ("captioning_loss", "parallel_loss"):  # nan where the draw left no text of that kind
            added = added.where(~value.isnan(), torch.zeros_like(added))
        self.means[name] = self.means.get(name, 0.0) + added

    def add_step(self, grad_norm: Tensor | float, labels: Tensor) -> None:
        """`labels` [B, L] of the whole batch, on the CPU."""
        device = self.accelerator.device
        self.add_mean("grad_norm", torch.as_tensor(grad_norm, device=device), torch.ones((), device=device))
        self.images += len(labels)
        tokens = int((labels != IGNORE_INDEX).sum())
        self.tokens += tokens
        self.flops += 3 * head_flops(self.model_config, tokens)

    def add_sources(self, model: Any, outputs: Any, labels: Tensor, source: Tensor) -> None:
        """Losses per source, before the weights change; left out where some texts were predicted in parallel."""
        if outputs.parallel_loss is None:
            prior = outputs.prior_log_likelihood
            if prior is None:  # captioning only
                with torch.no_grad():
                    prior = model(labels=labels).prior_log_likelihood
            sums = sums_by_source(outputs.caption_log_likelihood, prior, labels, source, len(self.names))
            self.sources = sums if self.sources is None else self.sources + sums

    def source_rows(self) -> dict[str, dict[str, float]]:
        if self.sources is None:
            return {}
        rows = {}
        for name, (captioning, unconditional, tokens) in zip(
            self.names, self.accelerator.reduce(self.sources).tolist(), strict=True
        ):
            if tokens:
                rows[name] = {
                    "captioning_loss": round(captioning / tokens, 4),
                    "unconditional_loss": round(unconditional / tokens, 4),
                    "information_gain": round((unconditional - captioning) / tokens, 4),
                }
        return rows

    def speeds(self) -> dict[str, float]:
        """Images and tokens (padding left out) per second, and `mfu`, over all processes."""
        elapsed = time.perf_counter() - self.started
        own = torch.tensor([self.images, self.tokens, self.flops, self.peak_flops], dtype=torch.float64)
        images, tokens, flops, peak = self.accelerator.reduce(own.to(self.accelerator.device)).tolist()
        return {
            "images_per_second": round(images / elapsed, 1),
            "tokens_per_second": round(tokens / elapsed, 1),
            "mfu": round(flops / elapsed / peak, 4),
            "data_wait": round(self.data_seconds / elapsed, 4),
            "peak_memory_gib": round(peak_memory_gib(self.accelerator.device), 3),
        }

    def write(self, progress: Any, fraction: float, factor: float) -> dict[str, Any]:
        means = {name: torch.div(*self.accelerator.reduce(sums)).item() for name, sums in self.means.items()}
        if {"captioning_loss", "unconditional_loss"} <= means.keys():  # one is missing where its weight is 0
            means["information_gain"] = means["unconditional_loss"] - means["captioning_loss"]
        skipped = sum((Counter(counts) for counts in gather_object([dict(progress.skipped)])), Counter[str]())
        row = {
            "step": progress.step,
            "samples": progress.samples,
            "minutes": round(progress.seconds / 60, 3),
            "progress": round(fraction, 5),
            "learning_rate_factor": round(factor, 5),
            **{name: round(value, 5) for name, value in means.items()},
            **self.speeds(),
            "skipped_samples": skipped.total(),
            "skipped": dict(sorted(skipped.items())),
            "nonfinite_steps": progress.nonfinite_steps,
            "sources": self.source_rows(),
        }
        self.append(row)
        self.reset()
        return row

    def append(self, row: dict[str, Any]) -> None:
        self.accelerator.log(flatten(row, separator="/"), step=row["step"])
        if "evaluation" in row:
            self.evaluated_step = row["step"]
        if self.accelerator.is_main_process:
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as error:
                reason = f"could not write the row of step {row['step']}: {error.strerror}"
                raise OSError(error.errno, reason, str(self.path)) from error
