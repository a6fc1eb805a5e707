"""CIFAR-10 with classes of very different frequency: the same photos and captions, fewer of the later classes."""

import io
import tarfile
from collections import defaultdict
from pathlib import Path

from ig_captioner.data.shards import RawSample, Skipped, first_by_hash, is_held_out, read_metadata, read_shard


def class_counts(classes: int, most: int, ratio: float) -> list[int]:
    """Images of each class, falling geometrically from `most` to `most / ratio`."""
    return [round(most * ratio ** (-index / (classes - 1))) for index in range(classes)]


def write_long_tail(paths: list[str], target: Path, class_names: list[str], ratio: float, holdout: float) -> list[int]:
    """Writes a shard with a fixed choice, by hash, of each class; held-out keys stay out. Returns the counts."""
    samples: dict[str, list[RawSample]] = defaultdict(list)
    for path in paths:
        for item in read_shard(path):
            if not isinstance(item, Skipped) and not is_held_out(item[0], holdout):
                samples[read_metadata(item[1])["class_name"]].append(item)
    counts = class_counts(len(class_names), min(len(samples[name]) for name in class_names), ratio)
    partial = target.with_suffix(".partial")
    with tarfile.open(partial, "w") as archive:
        for name, count in zip(class_names, counts, strict=True):
            chosen = first_by_hash((key for key, _ in samples[name]), count)
            for key, files in samples[name]:
                if key in chosen:
                    for extension, content in files.items():
                        member = tarfile.TarInfo(f"{key}.{extension}")
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
    partial.rename(target)
    return counts
