"""Photos on a local Ray cluster: same results as one process, with actors and drivers killed; speed and memory.

    python -m benchmarks.cluster --shard cifar10-test-0000.tar.gz --folder-shard tiny-imagenet-val-0000.tar.gz
        --output FILE.json [--photos 10000] [--model small] [--parts ...]

- equality: the photos of a shard, and photos in a folder, by `ig-captioner batch` with two actors and by `ig-captioner
  classify` in one process: the largest difference of an information gain, and keys that are missing or there twice.
- kills: three actors are killed with SIGKILL at random moments.
- resume: the driver is killed, and the run resumed: photos whose batch was begun twice.
- memory: private memory of driver and actors, sampled while the shard is scored; after the first fifth, the largest
  divided by the median.
- costs: milliseconds of CPU for a photo, of reading and decoding and of scoring, in this process without Ray.
- throughput: photos per second once both actors run, two actors of one thread each against one, in turns.

The model is the shipped checkpoint, or with `--model small` one with random weights that costs next to nothing.
"""

import argparse
import io
import json
import os
import random
import shlex
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import ray
import torch
from pyarrow import parquet

from ig_captioner import DEFAULT_CHECKPOINT, IGCaptionerConfig, IGCaptionerForZeroShotImageClassification
from ig_captioner.checkpoint import load_processor
from ig_captioner.data.ray import Summary, classify_photos
from ig_captioner.data.ray.photos import Photo, as_table
from ig_captioner.data.ray.scoring import BatchScorer, Captioner, Ranking, decode
from ig_captioner.data.shards import IMAGE_EXTENSIONS, Skipped, read_shard

from .measure import Measurement, circumstances, row, write_report


LABELS = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
PARTS = ("costs", "equality", "kills", "resume", "memory", "throughput")
BATCH = 64
SAMPLE_SECONDS = 0.25
DRIVER = "import sys; from ig_captioner.cli.main import main; sys.exit(main(sys.argv[1:]))"

Gains = dict[str, dict[str, float]]
"""Information gain by key and label, in nats."""


# ---------------------------------------------------------------------------------------------------------------------
# What is scored


def save_small_model(folder: Path) -> str:
    """Writes a captioner with random weights of 32 x 32 pixels, with the tokenizer of the shipped one."""
    torch.manual_seed(0)
    processor = load_processor(DEFAULT_CHECKPOINT)
    processor.image_processor.size = {"height": 32, "width": 32}
    small = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 128}
    text = IGCaptionerConfig.from_pretrained(DEFAULT_CHECKPOINT).text_config
    names = ("vocab_size", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id")
    config = IGCaptionerConfig(
        vision_config={**small, "image_size": 32, "patch_size": 8, "initializer_range": 0.2},
        text_config={**small, **{name: getattr(text, name) for name in names}, "initializer_range": 0.2},
    )
    IGCaptionerForZeroShotImageClassification(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def images_of(shard: Path, count: int) -> Iterator[tuple[str, str, bytes]]:
    """Key, extension and content of the first photos of a shard."""
    samples = (item for item in read_shard(str(shard)) if not isinstance(item, Skipped))
    for key, files in islice(samples, count):
        extension = next(extension for extension in IMAGE_EXTENSIONS if extension in files)
        yield key, extension, files[extension]


def write_shard_and_folder(shard: Path, count: int, root: Path) -> tuple[Path, Path]:
    """The first photos of a shard, as a shard and as files, in folders of their own."""
    folder = root / "photos"
    folder.mkdir(parents=True)
    (root / "shards").mkdir()
    with tarfile.open(root / "shards" / "0.tar", "w") as archive:
        for key, extension, content in images_of(shard, count):
            name = f"{key.replace('/', '_')}.{extension}"
            (folder / name).write_bytes(content)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return root / "shards", folder


def classified_by_one_process(folder: Path, model: str) -> Gains:
    """What `ig-captioner classify` prints, by the names of files without their extension."""
    command = [
        "classify",
        str(folder),
        "--labels",
        *LABELS,
        "--format",
        "jsonl",
        "--model",
        model,
        "--batch-size",
        "16",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, *command], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    lines = map(json.loads, done.stdout.splitlines())
    return {Path(line["image"]).stem: gains_of(line["predictions"]) for line in lines}


def gains_of(predictions: list[dict[str, Any]]) -> dict[str, float]:
    return {each["label"]: each["information_gain"] for each in predictions}


def classified_by_cluster(output: Path) -> tuple[Gains, int]:
    """What is in a folder of results, by the names of photos; and how many keys are there twice."""
    rows = parquet.read_table(output).to_pylist()
    if errors := [f"{each['key']}: {each['error']}" for each in rows if each["error"] is not None]:
        raise RuntimeError(f"{len(errors)} photos without scores, the first: {errors[0]}")
    keys = Counter(each["key"] for each in rows)
    found = {
        Path(each["key"].rpartition(":")[2]).stem: dict(zip(each["labels"], each["information_gain"], strict=True))
        for each in rows
    }
    return found, sum(keys.values()) - len(keys)


def compare(name: str, output: Path, expected: Gains) -> list[Measurement]:
    """Rows about keys and scores."""
    found, twice = classified_by_cluster(output)
    missing = len(expected.keys() - found.keys())
    differences = [
        abs(found[key][label] - gain) for key in expected.keys() & found.keys() for label, gain in expected[key].items()
    ]
    return [
        row(f"{name}: keys missing, twice or unknown", missing + twice + len(found.keys() - expected.keys()), "keys"),
        row(f"{name}: largest difference from one process, {len(found):,} photos", max(differences), "nats"),
    ]


def run(location: Path, output: Path, model: str, actors: int, **options: Any) -> Summary:
    sizes = {"concurrency": actors, "batch_size": BATCH}
    return classify_photos(str(location), str(output), model, LABELS, **{**sizes, **options})


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def actor_processes() -> list[int]:
    """Numbers of the processes of scoring actors of this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"ray::MapWorker" in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # it has just ended
            continue
    return found


def private_memory(pid: int) -> float | None:
    """MB of a process that are no files and not shared, as the object store is."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    return int(status.partition("RssAnon:")[2].split()[0]) / 1e3 if "RssAnon:" in status else None


class Beside:
    """Runs a function in a thread, again and again until the end of a `with` block or until it returns True."""

    def __init__(self, step: Callable[[], bool | None]) -> None:
        self.step = step
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self.over.is_set() and not self.step():
            pass

    def __enter__(self) -> "Beside":
        self.thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.over.set()
        self.thread.join()


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def measure_costs(kind: str, folder: Path, model: str) -> list[Measurement]:
    """CPU time of tasks and actors for a photo of a folder, on one thread."""
    captioner = Captioner.named(model, None, 0)
    scorer = captioner.load(threads=1)
    labels = scorer.compile_labels(LABELS)
    actor = BatchScorer(captioner, labels, 1, Ranking({"top_k": 5}), {}, None)
    photos = [Photo(path.name, "", path.read_bytes()) for path in sorted(folder.iterdir())[: 4 * BATCH]]
    batches = [as_table(photos[start : start + BATCH]) for start in range(0, len(photos), BATCH)]
    preparer = scorer.preparer()
    prepared = [decode(batch, preparer) for batch in batches[:1]]
    actor(prepared[0])  # once without being measured
    start = time.process_time()
    prepared = [decode(batch, preparer) for batch in batches]
    middle = time.process_time()
    for batch in prepared:
        actor(batch)
    end = time.process_time()
    milliseconds = [1e3 * each / len(photos) for each in (middle - start, end - middle)]
    return [
        row(f"costs: decode and resize, {kind}", milliseconds[0], "ms of CPU a photo"),
        row(f"costs: score {len(LABELS)} labels, {kind}", milliseconds[1], "ms of CPU a photo"),
    ]


def measure_kills(shards: Path, root: Path, model: str, expected: Gains) -> list[Measurement]:
    """Kills an actor three times, each time some moments after results have come."""
    chance = random.Random(0)
    killed: list[int] = []
    counted: list[int] = []

    def kill() -> bool:
        before = len(counted)
        time.sleep(chance.uniform(0.2, 1.5))
        actors = [pid for pid in actor_processes() if pid not in killed]
        if actors and len(counted) > before:
            killed.append(chance.choice(actors))
            os.kill(killed[-1], signal.SIGKILL)
        return len(killed) == 3

    with Beside(kill):
        run(shards, root / "out", model, 2, on_progress=lambda summary: counted.append(summary.photos))
    return [
        row("kills: actors killed with SIGKILL", len(killed), "actors"),
        *compare("kills", root / "out", expected),
    ]


def measure_resume(shards: Path, root: Path, model: str, expected: Gains, address: str) -> list[Measurement]:
    """Kills the driver when a quarter of the photos is done, and resumes."""
    output = root / "out"
    command = ["batch", "--input", str(shards), "--output", str(output), "--labels", *LABELS, "--model", model]
    command += ["--address", address, "--concurrency", "2", "--batch-size", str(BATCH)]
    with subprocess.Popen([sys.executable, "-c", DRIVER, *command]) as driver:
        while len(list(output.glob("part-*"))) < len(expected) / BATCH / 4:
            if driver.poll() is not None:
                raise RuntimeError(f"the driver ended with {driver.returncode}")
            time.sleep(0.02)
        driver.kill()
    summary = run(shards, output, model, 2, resume=True)
    return [
        row("resume: photos done when the driver was killed", summary.before, "photos"),
        row("resume: photos done afterwards", summary.photos, "photos"),
        *compare("resume", output, expected),
    ]


def measure_memory(location: Path, root: Path, model: str) -> tuple[list[Measurement], float]:
    """Rows about memory while two actors score; and how many photos a second they do, beginning included."""
    samples: dict[str, list[tuple[float, float]]] = {}
    started: list[float] = []

    def sample() -> None:
        time.sleep(SAMPLE_SECONDS)
        for name, pid in [("driver", os.getpid()), *((f"actor {pid}", pid) for pid in actor_processes())]:
            if started and (memory := private_memory(pid)) is not None:
                samples.setdefault(name, []).append((time.monotonic(), memory))

    begin = time.monotonic()
    with Beside(sample):
        summary = run(location, root / "out", model, 2, on_progress=lambda summary: started.append(time.monotonic()))
    rate = summary.photos / (time.monotonic() - begin)
    rows = []
    for number, (name, values) in enumerate(sorted(samples.items(), key=lambda item: item[0] != "driver")):
        warm = [memory for moment, memory in values if moment > started[0] + (started[-1] - started[0]) / 5]
        if warm:
            shown = name if name == "driver" else f"actor {number}"
            median = statistics.median(warm)
            rows.append(row(f"memory: {shown}, median after warm-up", median, "MB"))
            rows.append(row(f"memory: {shown}, largest", max(warm), "MB", f"memory: {shown}", max(warm) / median))
    return rows, rate


def photos_per_second(location: Path, output: Path, model: str, actors: int) -> float:
    """From the moment when all actors have given results until the first of them has no more to do."""
    moments: list[tuple[float, int]] = []
    run(location, output, model, actors, on_progress=lambda summary: moments.append((time.monotonic(), summary.photos)))
    last = moments[-1][1]
    steady = [moment for moment in moments if 0.25 * last <= moment[1] <= 0.9 * last]
    (first_time, first_count), (last_time, last_count) = steady[0], steady[-1]
    return (last_count - first_count) / (last_time - first_time)


def measure_throughput(location: Path, root: Path, model: str, rounds: int) -> list[Measurement]:
    rates: dict[int, list[float]] = {1: [], 2: []}
    for number in range(rounds):
        for actors, found in rates.items():
            found.append(photos_per_second(location, root / f"out-{number}-{actors}", model, actors))
    ratio = statistics.median(two / one for one, two in zip(rates[1], rates[2], strict=True))
    one, two = (statistics.median(rates[actors]) for actors in (1, 2))
    return [
        row("throughput: one actor of one thread", one, "photos/s"),
        row("throughput: two actors of one thread", two, "photos/s", "one actor", ratio),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# All of it


def start_cluster(cpus: int) -> str:
    """Starts a cluster with `cpus` logical CPUs, and gives its address."""
    os.environ.update(RAY_USAGE_STATS_ENABLED="0")
    sizes = {"num_cpus": cpus, "object_store_memory": 500_000_000}
    context = ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR", **sizes)
    ray.data.DataContext.get_current().enable_progress_bars = False
    return context.address_info["gcs_address"]


def measure(options: argparse.Namespace, root: Path) -> list[Measurement]:
    model = save_small_model(root / "model") if options.model == "small" else options.model
    shards, photos = write_shard_and_folder(options.shard, options.photos, root / "shard")
    address = start_cluster(options.cpus)
    expected: Gains = {}
    if {"equality", "kills", "resume"} & set(options.parts):
        expected = classified_by_one_process(photos, model)
    rows: list[Measurement] = []
    for name in options.parts:
        place = root / name
        place.mkdir()
        if name == "costs":
            rows += measure_costs(f"photos of {options.shard.name}", photos, model)
            _, folder = write_shard_and_folder(options.folder_shard, 4 * BATCH, place)
            rows += measure_costs(f"photos of {options.folder_shard.name}", folder, model)
        elif name == "equality":
            run(shards, place / "out", model, 2)
            rows += compare("shard", place / "out", expected)
            _, folder = write_shard_and_folder(options.folder_shard, options.folder_photos, place)
            run(folder, place / "folder-out", model, 2)
            rows += compare("folder", place / "folder-out", classified_by_one_process(folder, model))
        elif name == "kills":
            rows += measure_kills(shards, place, model, expected)
        elif name == "resume":
            rows += measure_resume(shards, place, model, expected, address)
        elif name == "memory":
            found, rate = measure_memory(shards, place, model)
            rows += [*found, row("two actors, all included", rate, "photos/s")]
        else:
            rows += measure_throughput(shards, place, model, options.rounds)
        print(*(f"{each['name']}: {each['value']:g} {each['unit']}" for each in rows), sep="\n", flush=True)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shard", type=Path, required=True, help="photos that are scored from a shard")
    parser.add_argument("--folder-shard", type=Path, required=True, help="photos that are scored from a folder")
    parser.add_argument("--photos", type=int, default=10_000, help="of --shard (default: %(default)s)")
    parser.add_argument("--folder-photos", type=int, default=1_000, help="of --folder-shard (default: %(default)s)")
    parser.add_argument("--model", default=DEFAULT_CHECKPOINT, help="folder or repository, or small")
    parser.add_argument("--cpus", type=int, default=os.cpu_count(), help="logical CPUs of the cluster")
    parser.add_argument("--rounds", type=int, default=1, help="of throughput (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options, Path(folder))
        ray.shutdown()
    described = shlex.join(["python", "-m", "benchmarks.cluster", *arguments])
    about = {"ray": ray.__version__, "logical CPUs": options.cpus, "labels": len(LABELS), "photos in a batch": BATCH}
    write_report(options.output, rows, circumstances(described, **about))


if __name__ == "__main__":
    main()
