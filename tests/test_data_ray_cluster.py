"""Photos on a small Ray cluster of this machine: actors that are killed, runs that are stopped, and the command."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from broken_samples import EXPECTED, GOOD, write_dirty_shards
from captioner_folders import photo, save_folder
from small_checkpoint import save_checkpoint

from ig_captioner import CaptionScorer, zero_shot_pipeline
from ig_captioner.cli.main import main


pytest.importorskip("ray.data", reason="Ray is not installed: pip install 'ig_captioner[cluster]'")

import pyarrow as pa
import ray
from pyarrow import parquet
from slow_scorer import slow_scorer

from ig_captioner.data.ray import classify_dataset, classify_photos, read_photos, scoring


LABELS = ["cat", "dog", "a photo", "of"]
PHOTO_ERRORS = ("undecodable image", "empty image file", "not an image", "too many pixels", "broken shard")
BATCH, PHOTOS = 8, 240
ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_worker_niceness": "0",  # else workers of a busy machine hardly start
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="module")
def cluster():
    """Four logical CPUs, whatever the machine has; gives the address."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        sizes = {"num_cpus": 4, "object_store_memory": 200_000_000}
        context = ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR", **sizes)
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield context.address_info["gcs_address"]
        ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_checkpoint(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> str:
    """A Parquet file of photos."""
    root = tmp_path_factory.mktemp("table")
    folder = root / "photos"
    folder.mkdir()
    for number in range(PHOTOS):
        photo(number).save(folder / f"{number:03d}.png")
    contents = {path.stem: path.read_bytes() for path in sorted(folder.iterdir())}
    parquet.write_table(pa.table({"key": list(contents), "image": list(contents.values())}), root / "photos.parquet")
    return str(root / "photos.parquet")


@pytest.fixture(scope="module")
def expected(model, table) -> dict[str, dict[str, float]]:
    """Information gains of each photo by label, from one process."""
    photos = {path.stem: str(path) for path in sorted(Path(table).with_name("photos").iterdir())}
    options = {"candidate_labels": LABELS, "return_log_likelihoods": True, "batch_size": 16}
    predictions = zero_shot_pipeline(CaptionScorer.from_pretrained(model))(list(photos.values()), **options)
    return {
        key: {entry["label"]: entry["information_gain"] for entry in entries}
        for key, entries in zip(photos, predictions, strict=True)
    }


def check_results(output, expected) -> None:
    """Every key once, with the scores of one process."""
    rows = parquet.read_table(output).to_pylist()
    assert Counter(row["key"] for row in rows) == dict.fromkeys(expected, 1)
    for row in rows:
        gains = dict(zip(row["labels"], row["information_gain"], strict=True))
        assert gains == pytest.approx(expected[row["key"]], abs=1e-4)


# Actors that are killed


def noted(folder: Path) -> dict[str, list[str]]:
    """Keys of batches that were begun, by the name of a note, which begins with the number of the process."""
    return {path.name: path.read_text().splitlines() for path in sorted(folder.iterdir())}


def kill_actors(notes: Path, times: int) -> list[int]:
    """Kills the process that has begun a batch last, at random moments; returns which."""
    killed: list[int] = []
    chance = random.Random(0)
    deadline = time.monotonic() + 120
    while len(killed) < times and time.monotonic() < deadline:
        time.sleep(chance.uniform(0.05, 0.4))
        names = [path.name for path in notes.iterdir()]
        running = {int(name.partition("-")[0]): name for name in names}.keys() - set(killed)
        if running:
            victim = chance.choice(sorted(running))
            os.kill(victim, signal.SIGKILL)
            killed.append(victim)
    return killed


def test_actors_that_are_killed_lose_and_repeat_nothing(cluster, model, table, expected, tmp_path, monkeypatch):
    notes = tmp_path / "notes"
    notes.mkdir()
    monkeypatch.setattr(scoring, "BatchScorer", slow_scorer(notes))
    killed: list[int] = []
    killer = threading.Thread(target=lambda: killed.extend(kill_actors(notes, 1)))
    killer.start()
    sizes = {"concurrency": 2, "batch_size": BATCH}
    summary = classify_photos(table, str(tmp_path / "out"), model, LABELS, **sizes)
    killer.join()
    assert len(killed) == 1 and len({name.partition("-")[0] for name in noted(notes)}) >= 3  # actors decode nothing
    assert (summary.photos, summary.before, summary.errors) == (PHOTOS, 0, 0)
    check_results(tmp_path / "out", expected)


DRIVER = """
import sys
from pathlib import Path
from slow_scorer import slow_scorer
from ig_captioner.cli.main import main
from ig_captioner.data.ray import scoring

scoring.BatchScorer = slow_scorer(Path(sys.argv[1]))
main(sys.argv[2:])
"""


def test_a_killed_driver_is_resumed(cluster, model, table, expected, tmp_path, monkeypatch, capsys):
    """The keys of at most one batch of each actor are computed twice."""
    notes, output = tmp_path / "notes", tmp_path / "out"
    notes.mkdir()
    command = ["batch", "--input", table, "--output", str(output), "--model", model, "--labels", *LABELS]
    command += ["--address", cluster, "--concurrency", "2", "--batch-size", str(BATCH)]
    with subprocess.Popen([sys.executable, "-c", DRIVER, str(notes), *command]) as driver:
        while len(list(notes.iterdir())) < 7:
            assert driver.poll() is None
            time.sleep(0.05)
        driver.kill()
    monkeypatch.setattr(scoring, "BatchScorer", slow_scorer(notes))
    assert main(command) == 1
    assert "holds" in capsys.readouterr().err
    assert main([*command, "--top-k", "2", "--resume"]) == 1
    assert "made with top_k None, not 2" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert "were there before" in capsys.readouterr().out
    check_results(output, expected)
    begun = Counter(key for keys in noted(notes).values() for key in keys)
    assert set(begun) == set(expected)
    assert sum(times - 1 for times in begun.values()) <= 2 * BATCH


# Broken photos, other captioners, other data


def test_eight_kinds_of_broken_inputs_are_counted(cluster, model, tmp_path, capsys):
    """Captions are not read, so that photos with broken ones have scores."""
    (tmp_path / "shards").mkdir()
    write_dirty_shards(tmp_path / "shards")
    command = ["batch", "--input", str(tmp_path / "shards"), "--output", str(tmp_path / "out"), "--model", model]
    assert main([*command, "--labels", *LABELS, "--top-k", "2", "--address", cluster]) == 1
    printed = capsys.readouterr().out
    rows = parquet.read_table(tmp_path / "out").to_pylist()
    reasons = Counter(row["error"].partition(":")[0] for row in rows if row["error"] is not None)
    assert reasons == {reason: EXPECTED[reason] for reason in PHOTO_ERRORS}
    assert len(rows) == len({row["key"] for row in rows}) == GOOD - 1 + 20
    assert all((row["labels"] is None) == (row["error"] is not None) for row in rows)
    assert {len(row["scores"]) for row in rows if row["scores"] is not None} == {2}
    assert "399 photos in" in printed and "without scores: 13 (" in printed
    assert all(f"{EXPECTED[reason]} x {reason}" in printed for reason in PHOTO_ERRORS)


def test_a_captioner_of_the_hub_on_a_data_set_of_bytes(cluster, table, tmp_path):
    blip = save_folder("blip", tmp_path)
    scorer = CaptionScorer.from_pretrained(blip)
    rows = classify_dataset(read_photos(table).limit(5), blip, ["cat", "dog"], "a {}", batch_size=2).take_all()
    images = [photo(int(row["key"])) for row in rows]
    expected = scorer.score(images, scorer.compile_labels(["cat", "dog"], "a {}")).information_gain
    for row, gains in zip(rows, expected.tolist(), strict=True):
        found = dict(zip(row["labels"], row["information_gain"], strict=True))
        assert found == pytest.approx(dict(zip(["cat", "dog"], gains, strict=True)), abs=1e-4)


def test_actors_that_would_leave_no_cpu_are_refused_before_anything_runs(cluster, model, table, tmp_path, capsys):
    command = ["batch", "--input", table, "--output", str(tmp_path / "out"), "--model", model, "--labels", "cat"]
    assert main([*command, "--address", cluster, "--concurrency", "4", "--num-cpus", "1"]) == 1
    error = capsys.readouterr().err
    assert "4 actors x 1 CPU, and 0.25 CPU to read and decode, are 4.25 CPUs" in error
    assert not (tmp_path / "out").exists()


def test_errors_of_labels_and_models_are_those_of_one_process(cluster, model, table, tmp_path, capsys):
    command = ["batch", "--input", table, "--output", str(tmp_path / "out"), "--labels", "cat", "--address", cluster]
    assert main([*command, "--model", str(tmp_path / "nothing")]) == 1
    assert "no such model folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
