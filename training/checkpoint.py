"""Checkpoints of a run: written atomically, found again, pruned.

`OUTPUT/checkpoint-00001234/` holds `model/` (a complete model folder, which loads on its own) and `state.pt`
(optimisers, moving average, random states, counters). It appears under its name only when it is complete.
"""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


NAME = re.compile(r"checkpoint-(\d+)")


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if NAME.fullmatch(path.name)]
    return sorted((path for path in folders if (path / "state.pt").is_file()), key=lambda path: step_of(path))


def step_of(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def save_checkpoint(
    output_dir: str | Path, step: int, state: dict[str, Any], save_model: Callable[[Path], None], keep: int
) -> Path:
    """Writes a checkpoint beside the others, then removes the oldest beyond `keep`.

    Raises:
        OSError: nothing could be written (disk full, ...); earlier checkpoints are untouched.
    """
    folder = Path(output_dir) / f"checkpoint-{step:08d}"
    temporary = Path(output_dir) / f".{folder.name}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        save_model(temporary / "model")
        with open(temporary / "state.pt", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"could not write {folder}: {error}") from error
    for old in list_checkpoints(output_dir)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def load_state(folder: Path) -> dict[str, Any]:
    """The contents of `state.pt`, on the CPU; plain tensors, numbers and text only."""
    return torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
