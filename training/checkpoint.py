"""Checkpoints of a run: written atomically, verified when they are read, pruned.

`OUTPUT/checkpoint-00001234/` holds `model/` (a complete model folder, which loads on its own), `state.pt` (optimisers,
moving average, random states, counters, position in the data, settings) and `files.json`, the size and SHA-256 of each
file. It appears under its name only when all of it is on the disk. What is being written or removed is called
`.checkpoint-00001234.partial`; such leftovers of a killed run are removed with the next checkpoint.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .config import UsageError


logger = logging.getLogger(__name__)

NAME = re.compile(r"checkpoint-(\d+)")
MANIFEST = "files.json"
STATE = "state.pt"


class CheckpointError(UsageError):
    """A run that cannot be resumed: its checkpoints are damaged or incomplete."""


# Finding and verifying


def checkpoint_folders(output_dir: str | Path) -> list[Path]:
    """Folders that have a checkpoint's name, complete or not, oldest first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if NAME.fullmatch(path.name)]
    return sorted(folders, key=step_of)


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Checkpoints whose files are all there with the right sizes, oldest first; their contents are not verified."""
    return [folder for folder in checkpoint_folders(output_dir) if not find_problem(folder, contents=False)]


def newest_intact(output_dir: str | Path) -> Path | None:
    """Returns the newest checkpoint that is as it was written, or None where there is none at all.

    Damaged and incomplete ones are passed over with a warning that names the file.

    Raises:
        CheckpointError: there are checkpoints, but none is intact.
    """
    problems = []
    for folder in reversed(checkpoint_folders(output_dir)):
        problem = find_problem(folder)
        if not problem:
            for passed in problems:
                logger.warning("passed over %s; going back to %s", passed, folder)
            return folder
        problems.append(problem)
    if problems:
        raise CheckpointError(
            f"no checkpoint in {output_dir} can be used ({'; '.join(problems)}); to train from the start, remove them "
            "or choose another output_dir"
        )
    return None


def find_problem(folder: Path, contents: bool = True) -> str:
    """Names the first file that is not as it was written, and what is wrong with it; empty if all are right.

    Args:
        contents: whether to read every file and compare its SHA-256, beside names and sizes.
    """
    try:
        recorded = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        recorded = {name: (entry["bytes"], entry["sha256"]) for name, entry in recorded.items()}
        return compare_files(folder, recorded, contents)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{folder / MANIFEST}: damaged, or of an earlier version"


def compare_files(folder: Path, recorded: dict[str, tuple[int, str]], contents: bool) -> str:
    """Compares a folder with the sizes and digests of its manifest; arguments and result as in `find_problem`."""
    found = {path.relative_to(folder).as_posix(): path for path in files_of(folder)}
    for name in sorted(recorded.keys() | found.keys()):
        path = folder / name
        if name not in found:
            return f"{path}: missing"
        if name not in recorded:
            return f"{path}: not part of the checkpoint"
        size, digest = recorded[name]
        if path.stat().st_size != size:
            return f"{path}: {path.stat().st_size} bytes instead of {size}"
        if contents and sha256_of(path) != digest:
            return f"{path}: damaged (its SHA-256 is not that of {MANIFEST})"
    return ""


def files_of(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST]


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def step_of(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def load_state(folder: Path) -> dict[str, Any]:
    """The contents of `state.pt`, on the CPU; plain tensors, numbers and text only."""
    try:
        return torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds; torch's own message advises to load unsafely
        raise CheckpointError(f"{folder / STATE} cannot be read ({type(error).__name__})") from error


# Writing


def save_checkpoint(
    output_dir: str | Path, step: int, state: dict[str, Any], save_model: Callable[[Path], None], keep: int
) -> Path:
    """Writes a checkpoint beside the others, then removes the oldest beyond `keep`.

    Raises:
        OSError: it could not be written (disk full, ...); earlier checkpoints are untouched.
    """
    folder = Path(output_dir) / f"checkpoint-{step:08d}"
    remove_leftovers(Path(output_dir), step)
    temporary = partial_name(folder)
    try:
        temporary.mkdir(parents=True)
        save_model(temporary / "model")
        with open(temporary / STATE, "wb") as file:  # given a path, torch.save hides the reason of a failure
            torch.save(state, file)
        manifest = {
            path.relative_to(temporary).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in files_of(temporary)
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        if folder.exists():  # a damaged one: nothing writes the same step twice
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
    # Of later steps are only checkpoints that were passed over as damaged; they must not push out good ones.
    written = [path for path in list_checkpoints(output_dir) if step_of(path) <= step]
    for old in written[:-keep]:
        remove(old)
    return folder


def partial_name(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def remove_leftovers(output_dir: Path, step: int) -> None:
    """Removes what a killed run was writing or removing, and incomplete checkpoints of steps before `step`."""
    for path in output_dir.glob(".checkpoint-*.partial"):
        shutil.rmtree(path, ignore_errors=True)
    for folder in checkpoint_folders(output_dir):
        if step_of(folder) < step and (problem := find_problem(folder, contents=False)):
            logger.warning("removed an incomplete checkpoint (%s)", problem)
            remove(folder)


def remove(folder: Path) -> None:
    """Removes a checkpoint so that no half of it is ever seen under its name."""
    os.replace(folder, partial_name(folder))
    shutil.rmtree(partial_name(folder), ignore_errors=True)


def sync(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text_atomically(path: Path, text: str) -> None:
    """Replaces a file by a new one: whoever reads it, after a kill too, sees the old or the new text."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)
