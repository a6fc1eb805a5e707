"""The command `batch`: `classify` for very many photos, on a Ray cluster or on all CPUs and GPUs of a machine."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR, getLogger
from typing import Any

from .arguments import (
    LARGEST_BATCH,
    MODEL_HELP,
    add_captioner,
    add_command,
    add_labels,
    add_prior,
    add_prior_weight,
    check_candidates,
    integer_up_to,
    number,
    positive_integer,
    read_candidates,
    threshold,
)
from .output import printable


EXAMPLES = """\
examples:
  ig-captioner batch --input photos/ --labels-file places.txt --output labels/ --concurrency 4
  ig-captioner batch --input s3://bucket/shards --labels-file imagenet --output s3://bucket/labels --address auto \\
      --concurrency 8 --num-gpus 1 --batch-size 256 --top-k 5
  ig-captioner batch --input photos/ --labels-file places.txt --output labels/ --resume     # what is missing

Needs Ray: pip install 'ig_captioner[cluster]'. docs/cluster.md says how to start a cluster, and what is in the files.
"""
LARGEST_SHARE = 1024

share = number(f"a number above 0, at most {LARGEST_SHARE}", lambda value: 0 < value <= LARGEST_SHARE)


def add_batch(commands) -> None:
    summary = "Classify very many photos on a Ray cluster, into Parquet files."
    usage = "--input PLACE (--labels LABEL... | --labels-file FILE_OR_NAME) --output PLACE"
    parser = add_command(commands, batch, usage, summary, EXAMPLES, MODEL_HELP, check_candidates)
    source = "folder of images, shards or Parquet files, here or at a URL (s3://...); or a quoted pattern of shards"
    parser.add_argument("--input", required=True, metavar="PLACE", help=source)
    target = "folder for Parquet files, here or at a URL; all nodes must reach it"
    parser.add_argument("--output", required=True, metavar="PLACE", help=target)
    again = "leave out photos whose keys are in --output already, from a run with the same settings"
    parser.add_argument("--resume", action="store_true", help=again)
    add_labels(parser)
    add_prior_weight(parser)
    add_prior(parser)
    parser.add_argument("--top-k", type=positive_integer, metavar="K", help="keep the best K labels (default: all)")
    several = "score each label on its own, by the sigmoid of its information gain: several may fit"
    parser.add_argument("--multi-label", action="store_true", help=several)
    below = '"none of these" comes first where no label gains this much (default: the checkpoint\'s; =-inf: never)'
    parser.add_argument("--abstain-below", type=threshold, metavar="NATS", help=below)
    keys = "column of keys in Parquet files; rows are numbered where there is none (default: %(default)s)"
    parser.add_argument("--key-column", default="key", metavar="NAME", help=keys)
    images = "column of photos in Parquet files: bytes, or URLs (default: %(default)s)"
    parser.add_argument("--image-column", default="image", metavar="NAME", help=images)
    before = "how likely each label is before the photo is seen: weights above 0, or log-probabilities, in their order"
    parser.add_argument("--label-prior", type=float, nargs="+", metavar="W", help=before)
    _add_cluster(parser)
    add_captioner(parser)


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    """Arguments that change speed and memory, not results."""
    where = "of a running Ray cluster, or auto to find it (default: RAY_ADDRESS, or start one on this machine)"
    parser.add_argument("--address", metavar="ADDRESS", help=where)
    actors = "processes that score, each with a model of its own (default: %(default)s)"
    parser.add_argument("--concurrency", type=positive_integer, default=1, metavar="N", help=actors)
    gpus = "GPUs of each of them; a fraction shares one (default: none, on CPUs)"
    parser.add_argument("--num-gpus", type=share, default=0.0, metavar="G", help=gpus)
    cpus = "logical CPUs that each reserves, and threads (default: 1, or less if none would be left for reading)"
    parser.add_argument("--num-cpus", type=share, metavar="C", help=cpus)
    photos = "photos that are scored at once, and in one file of results (default: %(default)s)"
    parser.add_argument("--batch-size", type=integer_up_to(LARGEST_BATCH), default=64, metavar="N", help=photos)


def batch(arguments: argparse.Namespace) -> int:
    """Classifies all photos at a place, and prints how many. Returns 1 if any of them has no scores."""
    from ..captioners.arguments import read_prior
    from ..data.samples import describe_skipped

    labels, templates = read_candidates(arguments)
    options = {"prompt": arguments.prompt, "trust_remote_code": arguments.trust_remote_code}
    names = ["resume", "key_column", "image_column", "concurrency", "num_gpus", "num_cpus"]
    names += ["batch_size", "prior_weight", "label_prior", "top_k", "multi_label"]
    with _ray(arguments.address) as ray_data, _bar() as on_progress:
        summary = ray_data.classify_photos(
            arguments.input,
            arguments.output,
            arguments.model,
            labels,
            templates,
            **{name: getattr(arguments, name) for name in names},
            abstain_threshold=arguments.abstain_below,
            prior=read_prior(arguments),
            model_options=options,
            on_progress=on_progress,
        )
    before = f", {summary.before:,} were there before" if summary.before else ""
    print(f"{printable(arguments.output)}: {summary.photos:,} photos in {summary.files:,} files{before}")
    if summary.errors:
        print(f"without scores: {summary.errors:,} ({describe_skipped(summary.reasons)})")
    return 1 if summary.errors else 0


@contextmanager
def _ray(address: str | None) -> Iterator[Any]:
    """The functions for Ray, connected to a cluster; one that is started here ends with the command.

    Raises:
        ValueError: Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster of this command reports nothing
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # on stderr; Python raises what concerns the command
    try:
        from ..data import ray as ray_data
    except ImportError as error:
        if error.name != "ray":
            raise
        raise ValueError(str(error)) from error
    import ray

    getLogger("ray.data").setLevel(ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    was_there = ray.is_initialized()
    is_elsewhere = address is not None or "RAY_ADDRESS" in os.environ
    local = {} if is_elsewhere else {"include_dashboard": False}
    ray.init(address, log_to_driver=False, logging_level=ERROR, ignore_reinit_error=True, **local)
    try:
        yield ray_data
    finally:
        if not was_there:
            ray.shutdown()


@contextmanager
def _bar() -> Iterator[Any]:
    """A progress bar on stderr, if that is a terminal; gives what moves it."""
    from tqdm import tqdm

    with tqdm(unit="photo", dynamic_ncols=True, disable=None) as bar:
        yield lambda summary: bar.update(summary.photos - bar.n)
