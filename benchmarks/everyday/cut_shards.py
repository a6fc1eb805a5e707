"""The first samples of every shard, as shards of the same names: data for a dry run of what reads them.

    python -m benchmarks.everyday.cut_shards DATA OUTPUT [--samples 100]

Other files below DATA, such as class names, are copied.
"""

import argparse
import shutil
import tarfile
from pathlib import Path


def cut_shard(source: Path, target: Path, samples: int) -> None:
    """Copies the members of the first samples; those of one sample have the same name up to its first dot."""
    keys: set[str] = set()
    compression = "gz" if source.name.endswith("gz") else ""
    with tarfile.open(source, "r|*") as old, tarfile.open(target, f"w:{compression}") as new:
        for member in old:
            keys.add(member.name.partition(".")[0])
            if len(keys) > samples:
                break
            new.addfile(member, old.extractfile(member))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--samples", type=int, default=100, help="of each shard (default: %(default)s)")
    options = parser.parse_args(arguments)
    for path in sorted(path for path in options.data.rglob("*") if path.is_file()):
        target = options.output / path.relative_to(options.data)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.name.endswith((".tar", ".tar.gz")):
            cut_shard(path, target, options.samples)
        else:
            shutil.copy(path, target)


if __name__ == "__main__":
    main()
