"""Checks of training that need a GPU, on one: FSDP2, compilation, and the share of the peak that B/16 reaches.

    python -m training.check_gpu [--output FILE.json] [--only tiny|b16]

`tiny`: a tiny model trains plainly, under FSDP2, interrupted and resumed under FSDP2, with compilation and with
gradient checkpointing: the losses must agree. `b16`: the model of configs/b16.yaml takes a few steps on noise, plain,
compiled and under FSDP2; `mfu`, speed and memory are those of its log. Without a GPU only the first part runs, on the
CPU.
"""

import argparse
import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .check_resume import make_workspace
from .metrics import read_rows
from .train_tokenizer import train_tokenizer


CONFIGS = Path(__file__).parent / "configs"
PLAIN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "1")
SHARDED = (
    "accelerate.commands.launch",
    "--config_file",
    str(CONFIGS / "accelerate" / "fsdp2.yaml"),
    "--num_processes=1",
)
EXACT: dict[str, Any] = {"mixed_precision": "no", "log_every_steps": 1, "checkpoint_steps": 100}
EXACT |= {"model__text_config__dropout": 0, "model__parallel_prediction_prob": 0, "optimizer__warmup_fraction": 0}
CONSTANT = {"optimizer__schedule": "constant"}  # does not depend on the number of steps, which a resumed run changes
TOLERANCE = 1e-3  # relative; kernels add in other orders
TRAINED = ("step", "loss", "information_gain", "images_per_second", "tokens_per_second", "mfu", "peak_memory_gib")


def run(launcher: tuple[str, ...], config: Path, output_dir: Path, **options: Any) -> list[dict[str, Any]]:
    """Trains in processes of its own; returns the rows of the log."""
    values = {"output_dir": output_dir, "resume_with_changes": True, **options}
    arguments = [f"--{name.replace('__', '.')}={json.dumps(value, default=str)}" for name, value in values.items()]
    command = [sys.executable, "-m", *launcher, "-m", "training.train", "--config", str(config), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"FAILED: {' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-5000:]}")
    return [row for row in read_rows(output_dir / "log.jsonl") if "loss" in row]


def check_tiny(folder: Path) -> Iterator[dict[str, Any]]:
    """Yields a row for each run that must have the losses of the plain one, step by step; several run at once."""
    config = make_workspace(folder, "cached", 8, 0, "adamw")
    variants: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
        "fsdp2": (SHARDED, {}),
        "fsdp2_resumed": (SHARDED, CONSTANT),
        "gradient_checkpointing": (PLAIN, {"gradient_checkpointing": True}),
        "fsdp2_gradient_checkpointing": (SHARDED, {"gradient_checkpointing": True}),
        "compile": (PLAIN, {"compile": True}),
    }

    def train(name: str) -> list[dict[str, Any]]:
        launcher, options = variants.get(name, (PLAIN, CONSTANT if name == "plain_constant" else {}))
        if name == "fsdp2_resumed":
            run(launcher, config, folder / name, **EXACT, **options, max_steps=4)
        return run(launcher, config, folder / name, **EXACT, **options)

    names = ["plain", "plain_constant", *variants]
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        logs = {name: pool.submit(train, name) for name in names}
        for name in variants:
            reference = logs["plain_constant" if name == "fsdp2_resumed" else "plain"].result()
            yield {"name": name, "same_losses": same_losses(logs[name].result(), reference)}


def same_losses(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> bool:
    pairs = [
        (row[name], other[name]) for row, other in zip(rows, expected, strict=True) for name in ("loss", "grad_norm")
    ]
    return bool(pairs) and all(abs(value - other) <= TOLERANCE * abs(other) for value, other in pairs)


def check_b16(folder: Path) -> Iterator[dict[str, Any]]:
    """Yields the last row of the log of B/16 on noise, batch size 256 in bfloat16, for each way to train."""
    rng = np.random.default_rng(0)
    words = ["red", "green", "blue", "square", "and"]
    train_tokenizer([" ".join(words)], 300).save_pretrained(folder / "words")
    with tarfile.open(folder / "noise.tar", "w") as archive:
        for number in range(512):
            image = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)).save(image, "JPEG")
            caption = " ".join(rng.choice(words, 16)).encode()
            for suffix, content in (("jpg", image.getvalue()), ("txt", caption)):
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    options = {"data_root": folder, "tokenizer": folder / "words", "batch_size": 256, "micro_batches": 1}
    options |= {"max_steps": 30, "log_every_steps": 10, "checkpoint_minutes": 0, "data__cache_in_memory": True}
    options |= {"data__cache_size": 224, "data__sources__laion__shards": "noise.tar", "data__pad_to_multiple_of": 64}
    options |= {"data__num_workers": 8}
    for name, launcher, more in (
        ("b16", PLAIN, {}),
        ("b16_fsdp2", SHARDED, {}),
        ("b16_compile", PLAIN, {"compile": True}),  # last: compiling took more than two minutes on an H100
    ):
        row = run(launcher, CONFIGS / "b16.yaml", folder / name, **options, **more)[-1]
        yield {"name": name} | {key: row[key] for key in TRAINED}


PARTS = {"tiny": check_tiny, "b16": check_b16}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", choices=PARTS, help="run one part")
    options = parser.parse_args(arguments)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    parts = [options.only] if options.only else [name for name in PARTS if name == "tiny" or device != "cpu"]
    if device == "cpu" and "b16" in parts:
        parser.error("--only b16 needs a GPU")
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for row in itertools.chain.from_iterable(PARTS[name](Path(folder)) for name in parts):
            results.append(row)
            print(json.dumps(row), flush=True)
            if options.output:  # at once, so that a run which is stopped keeps it
                report = {"device": device, "torch": torch.__version__, "rows": results}
                options.output.write_text(json.dumps(report, indent=1) + "\n")
    if not all(row.get("same_losses", True) for row in results):
        raise SystemExit("FAILED: losses differ")


if __name__ == "__main__":
    main()
