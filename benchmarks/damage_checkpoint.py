"""Damages a training checkpoint in many random ways and resumes: is every damage reported by the name of a file?

    OMP_NUM_THREADS=1 python -m benchmarks.damage_checkpoint [--flips 200] [--truncations 50] [--runs 5] [--seed 0]

A tiny model is trained for a few steps. Then, on a fresh copy each time, one bit of one file is flipped, or one file is
cut short; each file is hit equally often, however small it is. `--resume` must refuse with the name of a file of the
checkpoint. What it accepts must be provably without effect: every file byte for byte as before, and a manifest that
says the same (as after a flip in its white space). The first `--runs` damages go through a whole training command, the
others through the function by which it chooses its checkpoint.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from training.check_resume import make_workspace
from training.checkpoint import MANIFEST, CheckpointError, files_of, list_checkpoints, newest_intact


STEPS = 3


def flip_bit(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    position = rng.randrange(len(content))
    bit = rng.randrange(8)
    content[position] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {position}"


def truncate(path: Path, rng: random.Random) -> str:
    size = rng.randrange(path.stat().st_size)
    with open(path, "r+b") as file:
        file.truncate(size)
    return f"cut to {size} bytes"


def command_line(config: Path, output_dir: Path) -> list[str]:
    arguments = ["--config", str(config), "--output_dir", str(output_dir), "--max_steps", str(STEPS), "--resume"]
    return [sys.executable, "-m", "training.train", *arguments]


def report_of(output_dir: Path) -> str:
    """What is said of the only checkpoint in a folder; empty if it is accepted."""
    try:
        newest_intact(output_dir)
    except CheckpointError as error:
        return str(error)
    return ""


def report_of_run(config: Path, output_dir: Path) -> str:
    """The same, by the training command: it must end with status 2 and leave the log as it was."""
    log = (output_dir / "log.jsonl").read_bytes()
    done = subprocess.run(command_line(config, output_dir), capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    kept = (output_dir / "log.jsonl").read_bytes() == log
    return done.stderr if done.returncode == 2 and kept and "Traceback" not in done.stderr else ""


def is_without_effect(checkpoint: Path, intact: Path) -> bool:
    """Whether a damaged checkpoint says in every respect what the intact one says."""
    manifests = [json.loads((folder / MANIFEST).read_text()) for folder in (checkpoint, intact)]
    pairs = [(path, intact / path.relative_to(checkpoint)) for path in files_of(checkpoint)]
    same = all(path.read_bytes() == original.read_bytes() for path, original in pairs)
    return same and manifests[0] == manifests[1]


def try_damage(folder: Path, intact: Path, damage, file: Path, rng: random.Random, config: Path | None) -> str:
    """Damages a copy of a run; returns "reported", "without effect", or what happened unnoticed."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(intact.parent, folder)
    checkpoint = folder / intact.name
    done = damage(checkpoint / file, rng)
    report = report_of_run(config, folder) if config else report_of(folder)
    if f"{checkpoint}/" in report:  # with the name of a file, which damage to the list of files may have changed
        return "reported"
    return "without effect" if not report and is_without_effect(checkpoint, intact) else f"UNNOTICED: {done} of {file}"


def relative_files(checkpoint: Path) -> list[Path]:
    return [path.relative_to(checkpoint) for path in files_of(checkpoint)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=200, help="single bits flipped, one at a time")
    parser.add_argument("--truncations", type=int, default=50, help="files cut short, one at a time")
    parser.add_argument("--runs", type=int, default=5, help="damages that are tried on the whole training command")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = make_workspace(folder, "cached", STEPS, 0)
        subprocess.run(command_line(config, folder / "run"), check=True, capture_output=True)
        (intact,) = list_checkpoints(folder / "run")
        files = [*relative_files(intact), Path(MANIFEST)]
        outcomes: Counter[tuple[str, str, str]] = Counter()
        for number in range(options.flips + options.truncations):
            damage = flip_bit if number < options.flips else truncate
            file = files[number % len(files)]
            whole = number % max(1, (options.flips + options.truncations) // max(1, options.runs)) == 0
            outcome = try_damage(
                folder / "damaged", intact, damage, file, rng, config if whole and options.runs else None
            )
            outcomes[damage.__name__, file.as_posix(), outcome] += 1
    for (damage_name, file_name, outcome), count in sorted(outcomes.items()):
        print(json.dumps({"damage": damage_name, "file": file_name, "outcome": outcome, "times": count}))
    if any(outcome.startswith("UNNOTICED") for _, _, outcome in outcomes):
        raise SystemExit("FAILED: damage went unnoticed")


if __name__ == "__main__":
    main()
