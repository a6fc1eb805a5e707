"""Speed and memory of training, as ratios inside one run.

    python -m benchmarks.training [--quick] [--data_root DATA] --output FILE.json

- IG step (a * CE(T|I) + b * CE(T)) against a captioning-only step of the same model;
- the loss with vocabulary 32,000 and 64 x 64 tokens: peak memory and time against full logits;
- images/s against transformers' VisionEncoderDecoderModel (ViT and GPT-2 with cross-attention) of the same sizes in a
  plain loop;
- data loading per core against `webdataset` with PIL, and the share of a run that waits for data;
- the share of the measured matmul peak that a step reaches;
- what the checksums of a checkpoint cost.

Batches are the same for all contenders, precision is bf16 autocast, and a step includes clipping and AdamW. With a GPU
the models are B/16 at batch 256, without one S/16. `--data_root` holds `flickr8k-train-*.tar`; without it, JPEG shards
are generated. `--only SECTION` runs one section. On a busy machine take OMP_NUM_THREADS=1: then CPU time is measured.
"""

import argparse
import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ig_captioner.data.shards import find_shards
from ig_captioner.information_gain import linear_loss
from training.checkpoint import find_problem, list_checkpoints, save_checkpoint
from training.config import OptimizerConfig, TrainConfig, load_config
from training.optim import make_optimizers

from . import training_data, training_steps
from .measure import (
    DEVICE,
    Measurement,
    circumstances,
    median_ratio,
    peak_memory,
    row,
    take_turns,
    time_rows,
    write_report,
)
from .training_steps import BASE, LENGTH, SMALL, VOCABULARY, Size, captioner, captioner_step


TINY_RECIPE = Path(__file__).parent.parent / "training" / "configs" / "tiny.yaml"


# The step


def step_rows(size: Size, rounds: int) -> list[Measurement]:
    """Steps of a model whose upper three decoder layers of six read the image."""
    batch = training_steps.random_batch(size.batch, 16, 32)
    model = f"{size.name}, batch {size.batch}, captions of 16 to 32 tokens"
    captioning = f"captioning step, {model}"
    gain = f"IG step, {model}"
    steps = {
        captioning: captioner_step(captioner(size, 3, unconditional_weight=0.0), batch),
        gain: captioner_step(captioner(size, 3), batch),
    }
    times = take_turns(steps, rounds)
    return [*time_rows(times, {gain: captioning}, "s"), *mfu_rows(gain, steps[gain], times[gain])]


def tiny_rows(rounds: int) -> list[Measurement]:
    """The shipped recipe, where text is a larger share of the step: 64 x 64 pixels, width 192, vocabulary 3,000."""
    config = load_config(TINY_RECIPE)
    batch = training_steps.random_batch(config.batch_size, 5, 24, side=64, vocabulary=3000)
    captioning, gain = (f"{kind} step, {TINY_RECIPE.name}, captions of 5 to 24 tokens" for kind in ("captioning", "IG"))
    steps = {}
    for name, weight in ((captioning, 0.0), (gain, config.model["unconditional_weight"])):
        text = {**config.model["text_config"], "vocab_size": 3000}
        values = {**config.model, "text_config": text, "unconditional_weight": weight}
        model = training_steps.build(values)
        steps[name] = captioner_step(model, batch, config.optimizer)
    return time_rows(take_turns(steps, rounds), {gain: captioning}, "s")


def mfu_rows(name: str, step: Callable[[], None], times: list[float]) -> list[Measurement]:
    """Matrix multiplications and attention only, counted as they run; the peak is a large bf16 product's."""
    with FlopCounterMode(display=False) as counter:
        step()
    side = 8192 if DEVICE.type == "cuda" else 2048
    left, right = torch.randn(2, side, side, device=DEVICE, dtype=torch.bfloat16)
    product = statistics.median(take_turns({"product": lambda: left @ right}, 5)["product"])
    peak = 2 * side**3 / product
    reached = counter.get_total_flops() / statistics.median(times)
    product_name = f"product of two {side} x {side} matrices, bf16"
    return [
        row(product_name, peak / 1e12, "TFLOP/s"),
        row(f"MFU, {name}", reached / 1e12, "TFLOP/s", product_name, reached / peak),
    ]


def peer_rows(size: Size, rounds: int) -> list[Measurement]:
    """The same work: captioning only, every decoder layer with cross-attention."""
    batch = training_steps.random_batch(size.batch, 8, 24)
    model = f"{size.name}, captions of 8 to 24 tokens"
    ours = f"captioning, {model}"
    gain = f"IG, {model}"
    padded = f"VisionEncoderDecoder, {model}, padded to {LENGTH}"
    fitted = f"VisionEncoderDecoder, {model}, padded to the longest"
    peer = training_steps.encoder_decoder(size)
    steps = {
        padded: training_steps.plain_step(peer, batch, LENGTH),
        fitted: training_steps.plain_step(peer, batch),
        ours: captioner_step(captioner(size, unconditional_weight=0.0), batch),
        gain: captioner_step(captioner(size), batch),
    }
    times = take_turns(steps, rounds)
    rows = time_rows(times, {fitted: padded, ours: padded, gain: padded}, "images/s", size.batch)
    ratio = median_ratio(times[fitted], times[ours])
    return [*rows, row(ours, rows[2]["value"], "images/s", fitted, ratio)]


# The loss


def full_logits(states: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    return F.cross_entropy(head(states).float().flatten(0, 1), labels.flatten())


def chunked_gradients(states: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    weights = torch.full(labels.shape, 1 / labels.numel(), device=labels.device)
    return linear_loss(states, head.weight, head.bias, labels, weights)[0]


def torch_chunked(states: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    options = nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(states.flatten(0, 1), head.weight, labels.flatten(), options=options)


def loss_contenders() -> dict[str, Callable[..., Tensor]]:
    contenders = {"full logits": full_logits, "linear_loss": chunked_gradients}
    if hasattr(nn, "LinearCrossEntropyOptions"):  # torch 2.13
        contenders["torch's linear_cross_entropy"] = torch_chunked
    return contenders


def prepare_loss(loss: Callable[..., Tensor], width: int, low: bool) -> Callable[[], None]:
    """Forward and backward of 64 x 64 tokens, in float32 or with `low` in bf16 autocast."""
    torch.manual_seed(0)
    head = nn.Linear(width, VOCABULARY, bias=False).to(DEVICE)
    states = torch.randn(64, 64, width, device=DEVICE, requires_grad=True)
    labels = torch.randint(VOCABULARY, (64, 64), device=DEVICE)

    def run() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=low):
            value = loss(states, head, labels)
        value.backward()
        head.weight.grad = states.grad = None

    return run


def loss_rows(width: int, rounds: int, low: bool) -> list[Measurement]:
    contenders = loss_contenders()
    if low:  # torch's knows no autocast
        contenders = dict(list(contenders.items())[:2])
    where = f"64 x 64 tokens, width {width}, {'bf16 autocast' if low else 'float32'}"
    names = {name: f"loss by {name}, {where}" for name in contenders}
    reference = names["full logits"]
    memory = {names[name]: peak_memory(prepare_loss, loss, width, low) for name, loss in contenders.items()}
    times = take_turns({names[name]: prepare_loss(loss, width, low) for name, loss in contenders.items()}, rounds)
    to = {name: reference for name in memory if name != reference}
    memory_rows = [
        row(name, value, "MB", to.get(name), value / memory[reference] if name in to else None)
        for name, value in memory.items()
    ]
    return [*memory_rows, *time_rows(times, to, "s")]


# Data


def loading_rows(paths: list[str], folder: Path, rounds: int, batches: int = 16) -> list[Measurement]:
    """Samples per second of one process."""

    def reader(stream: Iterator[Any]) -> Callable[[], None]:
        return lambda: [None for _ in islice(stream, batches)]

    ours, plain = "loading by training.data", "loading by webdataset and PIL"
    contenders = {ours: reader(training_data.our_batches(paths, folder / "tokenizer"))}
    if importlib.util.find_spec("webdataset"):
        contenders = {plain: reader(training_data.webdataset_batches(paths, folder / "tokenizer"))} | contenders
    else:
        print("webdataset is not installed (pip install webdataset): no comparison of the loaders", file=sys.stderr)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # per core
    times = take_turns(contenders, rounds)
    torch.set_num_threads(threads)
    references = {ours: plain} if plain in contenders else {}
    return time_rows(times, references, "samples/s", batches * training_data.BATCH)


def data_rows(data_root: str | None, rounds: int, steps: int) -> list[Measurement]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        training_data.write_tokenizer(folder / "tokenizer")
        paths = training_data.write_shards(folder)
        if data_root:
            paths = find_shards(["flickr8k-train-*.tar"], data_root)
        rows = loading_rows(paths, folder, rounds)
        share, speed = training_data.data_wait(TINY_RECIPE, paths, folder, steps)
        step = f"step of {TINY_RECIPE.name}, streamed, 1 loader process"
        return [
            *rows,
            row(step, speed, "images/s"),
            row(f"data wait, {step}", share, "of the time"),
        ]


# Checkpoints


def checkpoint_rows(size: Size, rounds: int) -> list[Measurement]:
    """What the SHA-256 of a checkpoint's files costs: of writing it, and of a run with the default interval."""
    model = captioner(size, 3)
    (optimizer,) = make_optimizers(model, OptimizerConfig())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = {"optimizers": [optimizer.state_dict()]}
    with tempfile.TemporaryDirectory() as folder:
        steps = iter(range(10**6))

        def write() -> None:
            save_checkpoint(folder, next(steps), state, model.save_pretrained, keep=1)

        def verify() -> None:
            assert not find_problem(list_checkpoints(folder)[-1])

        write()
        written = f"writing a checkpoint of {size.name} with AdamW"
        verified = "SHA-256 of its files"
        times = take_turns({written: write, verified: verify}, rounds)
    seconds = statistics.median(times[verified])
    interval = 60 * TrainConfig().checkpoint_minutes
    share = row(f"SHA-256, of a run with a checkpoint per {interval:.0f} s", 100 * seconds / interval, "%")
    return [*time_rows(times, {verified: written}, "s"), share]


# Command


SECTIONS: dict[str, Callable[[argparse.Namespace], list[Measurement]]] = {
    "step": lambda options: step_rows(options.size, options.rounds),
    "tiny": lambda options: tiny_rows(options.rounds),
    "peer": lambda options: peer_rows(options.size, options.rounds),
    "loss": lambda options: (
        loss_rows(options.width, options.rounds, low=False) + loss_rows(options.width, options.rounds, low=True)
    ),
    "checkpoint": lambda options: checkpoint_rows(options.size, options.rounds),
    "data": lambda options: data_rows(options.data_root, options.rounds, 4 * options.rounds),
}


def main(arguments: list[str] | None = None) -> list[Measurement]:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON; a Markdown table is written beside it")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller sizes: under 3 minutes on 2 cores")
    parser.add_argument("--data_root", help="folder with flickr8k-train-*.tar; default: generated shards")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="run this section; may be repeated")
    options = parser.parse_args(arguments)
    options.rounds = 3 if options.quick else 7
    options.width = 384 if options.quick else 768
    options.size = BASE if DEVICE.type == "cuda" else SMALL
    if options.quick:
        options.size = options.size._replace(batch=options.size.batch // 2)
    rows = [each for name in options.only or SECTIONS for each in SECTIONS[name](options)]
    run = circumstances(" ".join(["python -m benchmarks.training", *arguments]), rounds=options.rounds)
    print(write_report(options.output, rows, run))
    return rows


if __name__ == "__main__":
    main()
