"""Checkpoints of a run: written atomically, found again, pruned.

`OUTPUT/checkpoint-00001234/` holds `model/` (a complete model folder, which loads on its own), `state.pt` (optimisers,
moving average, random states, counters, position in the data) and `files.json`, the size of each file. It appears under
its name only when all of it is on the disk.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


NAME = re.compile(r"checkpoint-(\d+)")
SIZES = "files.json"


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if NAME.fullmatch(path.name)]
    return sorted((path for path in folders if is_complete(path)), key=step_of)


def is_complete(folder: Path) -> bool:
    """Whether every file has the size it was written with (a copy may have been cut short)."""
    try:
        sizes = json.loads((folder / SIZES).read_text(encoding="utf-8"))
        return sizes == file_sizes(folder)
    except (OSError, ValueError):
        return False


def file_sizes(folder: Path) -> dict[str, int]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != SIZES]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def step_of(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def save_checkpoint(
    output_dir: str | Path, step: int, state: dict[str, Any], save_model: Callable[[Path], None], keep: int
) -> Path:
    """Writes a checkpoint beside the others, then removes the oldest beyond `keep`.

    Raises:
        OSError: it could not be written (disk full, ...); earlier checkpoints are untouched.
    """
    folder = Path(output_dir) / f"checkpoint-{step:08d}"
    temporary = Path(output_dir) / f".{folder.name}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        save_model(temporary / "model")
        with open(temporary / "state.pt", "wb") as file:  # given a path, torch.save hides the reason of a failure
            torch.save(state, file)
        (temporary / SIZES).write_text(json.dumps(file_sizes(temporary), indent=1), encoding="utf-8")
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        if folder.exists():  # an incomplete one: nothing writes the same step twice
            shutil.rmtree(folder)
        os.replace(temporary, folder)
        sync(folder.parent)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        earlier = list_checkpoints(output_dir)
        raise OSError(
            f"could not write {folder}: {error} "
            f"({shutil.disk_usage(output_dir).free / 2**20:.0f} MiB free on the disk). "
            + (f"The newest checkpoint is {earlier[-1]}" if earlier else "There is no earlier checkpoint")
        ) from error
    for old in list_checkpoints(output_dir)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def sync(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_state(folder: Path) -> dict[str, Any]:
    """The contents of `state.pt`, on the CPU; plain tensors, numbers and text only."""
    return torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
