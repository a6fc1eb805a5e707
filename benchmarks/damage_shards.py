"""Damages a shard in many random ways and reads it: is every sample that is lost or changed reported by shard?

    python -m benchmarks.damage_shards [--flips 200] [--truncations 50] [--seed 0] [--samples 40]

A shard of random photos and captions is written plain and gzipped. Then, on a fresh copy each time, one bit is flipped,
or the file is cut short. What comes out must be the very samples of the intact shard, or there must be a `Skipped` that
names the shard. In a plain tar, bits inside the content of a file have no checksum: a sample may differ there, in that
file alone ("inside a file" below; with gzip there is no such place).
"""

import argparse
import io
import json
import logging
import random
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from ig_captioner.data.shards import RawSample, Skipped, read_shard


NAMES = ("shard.tar", "shard.tar.gz")


def write_shard(path: Path, samples: int) -> None:
    """Writes photos with captions and JSON, as webdataset does."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for number in range(samples):
            photo = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(photo, "JPEG")
            files = {"jpg": photo.getvalue(), "json": b'{"class_id": 1}', "txt": f"photo {number}".encode()}
            for extension, content in files.items():
                header = tarfile.TarInfo(f"{number:05d}.{extension}")
                header.size = len(content)  # which takes a second header, as webdataset's does
                header.mtime = 1e9 + 0.5
                archive.addfile(header, io.BytesIO(content))


def spans_of_files(path: Path) -> list[tuple[int, int]]:
    """Where the contents of a plain tar are, in bytes."""
    with tarfile.open(path) as archive:
        return [(member.offset_data, member.offset_data + member.size) for member in archive]


def outcome_of(path: Path, intact: list[RawSample], is_inside_a_file: bool) -> str:
    """Reads a damaged shard; returns "reported", "without effect", "inside a file", or what went unnoticed."""
    items = list(read_shard(str(path)))
    samples = [item for item in items if not isinstance(item, Skipped)]
    if any(isinstance(item, Skipped) and item.key.startswith(f"{path.name}:") for item in items):
        return "reported"
    if len(items) > len(samples):
        return "UNNAMED"
    if samples == intact:
        return "without effect"
    same_names = [(key, list(files)) for key, files in samples] == [(key, list(files)) for key, files in intact]
    changed = sum(
        content != whole
        for (_, files), (_, wholes) in zip(samples, intact, strict=False)
        for content, whole in zip(files.values(), wholes.values(), strict=False)
    )
    return "inside a file" if is_inside_a_file and same_names and changed == 1 else "UNNOTICED"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=200, help="single bits flipped, one at a time, in each shard")
    parser.add_argument("--truncations", type=int, default=50, help="cuts, one at a time, of each shard")
    parser.add_argument("--samples", type=int, default=40, help="in the shard")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    rng = random.Random(options.seed)
    outcomes: Counter[tuple[str, str, str]] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            path = Path(folder, name)
            write_shard(path, options.samples)
            whole = path.read_bytes()
            intact = list(read_shard(str(path)))
            spans = spans_of_files(path) if name.endswith(".tar") else []
            for number in range(options.flips + options.truncations):
                place = rng.randrange(len(whole))
                if number < options.flips:
                    damage = "flip"
                    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
                else:
                    damage = "truncation"
                    path.write_bytes(whole[:place])
                is_inside = damage == "flip" and any(start <= place < end for start, end in spans)
                outcomes[name, damage, outcome_of(path, intact, is_inside)] += 1
    for (name, damage, outcome), times in sorted(outcomes.items()):
        print(json.dumps({"shard": name, "damage": damage, "outcome": outcome, "times": times}))
    if any(outcome.startswith("UN") for _, _, outcome in outcomes):
        raise SystemExit("FAILED: a sample was lost or changed without a report that names the shard")


if __name__ == "__main__":
    logging.getLogger("ig_captioner.data").setLevel(logging.ERROR)
    main()
