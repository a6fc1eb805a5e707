"""Kills a run of several processes with SIGKILL again and again, resumes it, and compares it with one never killed.

    OMP_NUM_THREADS=1 python -m training.check_resume --kills 20 [--data streamed] [--torchrun]

A tiny model on shards made here, on the CPU. Each kill hits one process at a random step: in the middle of the step,
while it writes a checkpoint, or with SIGTERM, which has to save first. Fails unless weights and losses are
bit-identical, every step saw the same samples, and every epoch has each sample once.
"""

import argparse
import io
import itertools
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from safetensors.torch import load_file

import training.train

from .checkpoint import list_checkpoints, step_of
from .config import load_config
from .metrics import read_rows
from .train_tokenizer import train_tokenizer


SHARD_SIZES = (7, 12, 3, 9)  # uneven, and 31 samples are no multiple of any batch
COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
KILL_VARIABLE = "IG_CAPTIONER_CHECK_KILL"  # "rank step place", for the processes started here
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # as configs/accelerate/fsdp2.yaml does
SIGNALS = {"step": signal.SIGKILL, "term": signal.SIGTERM}
TIMING = ("minutes", "images_per_second", "tokens_per_second", "mfu", "data_wait", "peak_memory_gib")


def make_workspace(folder: Path, data: str, steps: int, workers: int, optimizer: str = "muon") -> Path:
    """Shards, a tokenizer and a configuration; returns the configuration's path."""
    numbers = itertools.count()
    for shard, size in enumerate(SHARD_SIZES):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for number in itertools.islice(numbers, size):
                color = list(COLORS)[number % 4]
                image = io.BytesIO()
                Image.new("RGB", (8, 8), COLORS[color]).save(image, "PNG")
                for suffix, content in (("png", image.getvalue()), ("txt", f"a {color} square {number}.".encode())):
                    info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
            info = tarfile.TarInfo(f"broken{shard}.png")  # empty: skipped
            archive.addfile(info, io.BytesIO())
    train_tokenizer([f"a {color} square." for color in COLORS], 300).save_pretrained(folder / "tokenizer")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = {
        "tokenizer": str(folder / "tokenizer"),
        "data_root": str(folder),
        "model": {
            "parallel_prediction_prob": 0.3,
            "vision_config": {**small, "image_size": 16, "patch_size": 8},
            "text_config": {**small, "num_text_only_layers": 1, "max_position_embeddings": 16, "dropout": 0.1},
        },
        "data": {
            "max_length": 16,
            "cache_in_memory": data == "cached",
            "shuffle_buffer": 5,
            "num_workers": workers,
            "sources": {"squares": {"shards": ["*.tar"], "augmentation": {"shift": 0.1, "flip_probability": 0.5}}},
        },
        "optimizer": {"name": optimizer, "lr": 0.01, "ema_decay": 0.9},
        "batch_size": 8,
        "micro_batches": 2,
        "max_steps": steps,
        "mixed_precision": "no",
        "log_every_steps": 4,
        "checkpoint_minutes": 0,
        "checkpoint_steps": 3,  # no divisor of log_every_steps: the log's sums have to survive too
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


# In the processes that train


def train_process(arguments: list[str]) -> None:
    """Trains, writes the keys of every step to `trace-RANK.jsonl`, and kills itself where the variable says."""
    config = load_config(arguments[0], arguments[1:])
    rank = int(os.environ["RANK"])
    kill_rank, kill_step, place = os.environ.get(KILL_VARIABLE, "-1 0 none").split()
    checkpoints = list_checkpoints(config.output_dir)
    step = itertools.count(step_of(checkpoints[-1]) + 1 if checkpoints else 1)
    trace = open(Path(config.output_dir).with_suffix(f".trace-{rank}.jsonl"), "a", encoding="utf-8")  # noqa: SIM115
    split = training.train.split_by_length
    save = training.train.save_checkpoint
    current = 0

    def traced_split(batch: dict[str, Any], *arguments: Any) -> Any:
        nonlocal current
        current = next(step)
        row = {"step": current, "keys": batch["keys"], "epochs": batch["epochs"], "streams": sorted(batch["states"])}
        trace.write(json.dumps(row) + "\n")
        trace.flush()
        if place in SIGNALS and int(kill_rank) == rank and current >= int(kill_step):
            os.kill(os.getpid(), SIGNALS[place])
        return split(batch, *arguments)

    def killing_save(output_dir: Any, number: int, state: Any, save_model: Any, keep: int) -> Any:
        def save_half(folder: Path) -> None:
            save_model(folder)
            if place == "save" and current >= int(kill_step):
                os.kill(os.getpid(), signal.SIGKILL)

        return save(output_dir, number, state, save_half, keep)

    training.train.split_by_length = traced_split
    training.train.save_checkpoint = killing_save
    training.train.train(config)


def forked(rank: int, processes: int, port: int, kill: str, arguments: list[str]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), KILL_VARIABLE: kill}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with open(output_file(arguments), "ab") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    train_process(arguments)


# In the process that starts them


def output_file(arguments: list[str]) -> Path:
    """File that the output of the processes goes to; `arguments` begin with the configuration's path."""
    return Path(arguments[0]).with_name("output.txt")


def launch(arguments: list[str], processes: int, torchrun: bool, kill: str) -> bool:
    """Runs the processes until all end, or one is killed; True if all ended well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if torchrun:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        command += ["--master_port", str(port), "-m", "training.check_resume", "--process", *arguments]
        with open(output_file(arguments), "ab") as output:
            environment = {**os.environ, KILL_VARIABLE: kill}
            return subprocess.run(command, env=environment, stdout=output, stderr=output).returncode == 0
    context = multiprocessing.get_context("fork")  # importing torch takes longer than the training
    started = [
        context.Process(target=forked, args=(rank, processes, port, kill, arguments)) for rank in range(processes)
    ]
    for process in started:
        process.start()
    while any(process.is_alive() for process in started):
        if any(process.exitcode for process in started):
            for process in started:
                process.kill()
        time.sleep(0.02)
    return not any(process.exitcode for process in started)


def read_trace(output_dir: Path, processes: int) -> list[dict[str, Any]]:
    """Per step and process the keys and the streams they came from; a step done again counts once, as done last."""
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    for rank in range(processes):
        rows |= {(row["step"], rank): row for row in read_rows(output_dir.with_suffix(f".trace-{rank}.jsonl"))}
    return [rows[key] for key in sorted(rows)]


def check_epochs(trace: list[dict[str, Any]]) -> int:
    """No sample twice in an epoch, and all in an epoch that every stream has passed; returns how many of those."""
    drawn: dict[int, list[str]] = {}
    newest: dict[tuple[int, ...], int] = {}
    for row in trace:
        for key, epoch in zip(row["keys"], row["epochs"], strict=True):
            drawn.setdefault(epoch, []).append(key)
            newest[tuple(row["streams"])] = epoch
    for epoch, keys in drawn.items():
        assert len(set(keys)) == len(keys), f"a sample came twice in epoch {epoch}: {sorted(keys)}"
        assert epoch >= min(newest.values()) or len(keys) == sum(SHARD_SIZES), f"epoch {epoch} lost samples: {keys}"
    return min(newest.values())


def compare(whole: Path, killed: Path, processes: int) -> dict[str, Any]:
    weights, resumed = (load_file(folder / "final" / "model.safetensors") for folder in (whole, killed))
    differences = {name: (tensor - resumed[name]).abs().max().item() for name, tensor in weights.items()}
    logs = [
        [{name: value for name, value in row.items() if name not in TIMING} for row in read_rows(folder / "log.jsonl")]
        for folder in (whole, killed)
    ]
    traces = [read_trace(folder, processes) for folder in (whole, killed)]
    return {
        "largest_weight_difference": max(differences.values()),
        "log_rows": len(logs[0]),
        "equal_log_rows": sum(row == other for row, other in zip(*logs, strict=True)),
        "same_samples_at_every_step": traces[0] == traces[1],
        "whole_epochs_without_loss_or_repetition": check_epochs(traces[1]),
    }


def check(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    config = make_workspace(folder, options.data, options.steps, options.workers, options.optimizer)
    rng = random.Random(options.seed)
    arguments = [str(config), "--output_dir"]
    whole = folder / "whole"
    killed = folder / "killed"
    if not launch([*arguments, str(whole)], options.processes, options.torchrun, "-1 0 none"):
        raise SystemExit(f"the uninterrupted run failed:\n{output_file(arguments).read_text()[-5000:]}")
    kills = []
    for step in sorted(rng.sample(range(1, options.steps), options.kills)):
        place = rng.choice(["step", "step", "save", "term"])
        kill = f"{rng.randrange(options.processes)} {step} {place}"
        ended_well = launch([*arguments, str(killed), "--resume"], options.processes, options.torchrun, kill)
        reached = max(row["step"] for row in read_trace(killed, options.processes))
        newest = step_of(list_checkpoints(killed)[-1]) if list_checkpoints(killed) else 0
        kills.append({"kill": kill, "reached": reached, "newest_checkpoint": newest})
        print(json.dumps(kills[-1]), flush=True)
        if place == "term" and not (ended_well and newest == reached):
            raise SystemExit(f"SIGTERM did not save:\n{output_file(arguments).read_text()[-5000:]}")
    if not (killed / "final").exists() and not launch(
        [*arguments, str(killed), "--resume"], options.processes, options.torchrun, "-1 0 none"
    ):
        raise SystemExit(f"the resumed run failed:\n{output_file(arguments).read_text()[-5000:]}")
    return {"processes": options.processes, "data": options.data, "kills": len(kills)} | compare(
        whole, killed, options.processes
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--workers", type=int, default=0, help="loader processes per training process")
    parser.add_argument("--data", choices=("cached", "streamed"), default="cached")
    parser.add_argument("--optimizer", choices=("adamw", "adafactor", "muon"), default="muon")
    parser.add_argument("--sharded", action="store_true", help="FSDP2")
    parser.add_argument("--torchrun", action="store_true", help="start the processes with torchrun; slower")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    if options.sharded:
        os.environ |= SHARDED
    with tempfile.TemporaryDirectory() as folder:
        result = check(Path(folder), options)
    print(json.dumps(result))
    identical = result["largest_weight_difference"] == 0 and result["equal_log_rows"] == result["log_rows"]
    if not (identical and result["same_samples_at_every_step"]):
        raise SystemExit("FAILED: the killed run differs")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--process"]:
        train_process(sys.argv[2:])
    else:
        main()
