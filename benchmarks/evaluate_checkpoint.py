"""Runs all tasks of `ig-captioner evaluate` on the data root, one folder of results each.

    python -m benchmarks.evaluate_checkpoint [--model DIR] [--data_root DATA] [--only TASK...] [--dtype TYPE]

The folders are named below. Their results say which command would repeat them alone, with paths as they are given here.
The files `results.json` are kept once, in the folder of the checkpoint:

    python -m ig_captioner.card ig_captioner/checkpoints/everyday benchmarks/results/evaluation/*/results.json
"""

import argparse
import os
import sys
from pathlib import Path

from ig_captioner.cli import main as ig_captioner


ONE_TEMPLATE = "--templates benchmarks/results/evaluation/one-template.txt"
CALTECH_NAMES = "--class-names benchmarks/results/evaluation/caltech-names.txt"
FEW_HELD_OUT = "--held-out-fraction 0.05"  # of 10,000 photos: enough to tune on, and nearly all of them are tested
TASKS = {  # paths below the data root end in one of `PATHS`
    "tiny-imagenet": "zero-shot --data tiny-imagenet-val-0000.tar.gz --class-names json/tinyimagenet.json "
    f"{ONE_TEMPLATE} {FEW_HELD_OUT}",
    "imagenet-photos": "zero-shot --data imagenet202-photos-test-0000.tar.gz --class-names json/tinyimagenet.json "
    f"{ONE_TEMPLATE}",
    "caltech101": f"zero-shot --data caltech101-val-0000.tar.gz {CALTECH_NAMES} {ONE_TEMPLATE}",
    "cifar10": f"zero-shot --data cifar10-test-0000.tar.gz --class-names cifar10 {FEW_HELD_OUT}",
    "flickr8k": "retrieval --data flickr8k-val-0000.tar --captions 1",
    "captioning": "captioning --data flickr8k-val-0000.tar",
    "linear-probe": "linear-probe --train tiny-imagenet-train-*.tar.gz --data tiny-imagenet-val-0000.tar.gz "
    f"--class-names json/tinyimagenet.json --shots 50 {FEW_HELD_OUT}",
    "linear-probe-caltech101": "linear-probe --train caltech101-train-0000.tar.gz --data caltech101-val-0000.tar.gz "
    f"{CALTECH_NAMES} --shots 50",
    "sugarcrepe": "compositional --format sugarcrepe --pairs json/sugarcrepe --data smoke-coco-ccby.tar",
}
PATHS = (".tar", ".tar.gz", ".json", "json/sugarcrepe")


def command_of(name: str, options: argparse.Namespace) -> list[str]:
    """The arguments of `ig-captioner`."""
    words = TASKS[name].split()
    words = [os.path.join(options.data_root, word) if word.endswith(PATHS) else word for word in words]
    given = {f"--{option}": getattr(options, option) for option in ("model", "limit", "dtype")}
    given["--output"] = options.output_dir / name
    return ["evaluate", *words, *(str(part) for pair in given.items() if pair[1] is not None for part in pair)]


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub name; default: the shipped checkpoint")
    parser.add_argument(
        "--data_root", default=os.environ.get("IG_CAPTIONER_DATA", "data"), help="default: $IG_CAPTIONER_DATA, or data"
    )
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--limit", type=int, metavar="N", help="a fixed choice of N samples or items per task")
    parser.add_argument("--dtype", help="number format of the model, as `ig-captioner evaluate` takes it")
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks/results/evaluation"))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Runs the tasks one after another. Returns the highest of their exit codes."""
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    return max(ig_captioner(command_of(name, options)) for name in options.only)


if __name__ == "__main__":
    sys.exit(main())
