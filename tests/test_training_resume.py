"""Runs that are killed, interrupted, short of disk, or given more processes than before."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import run_config

import training.train
from training.checkpoint import list_checkpoints, save_checkpoint
from training.metrics import read_rows
from training.train import train


ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def run_python(*arguments, timeout=300):
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def assert_same_weights(first, second):
    first, second = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# Several processes. Each test is one interpreter that forks its processes: importing torch takes most of the time.


@pytest.mark.parametrize("data", ["cached", "streamed"])
def test_killed_run_of_two_processes_ends_bit_identical(data):
    *kills, result = run_python(
        *("-m", "training.check_resume", "--kills", "3", "--steps", "21", "--data", data, "--seed", "41")
    )
    assert {kill["kill"].split()[2] for kill in kills} == {"step", "save", "term"}
    assert result.pop("whole_epochs_without_loss_or_repetition") >= 4
    assert result == {
        "processes": 2,
        "data": data,
        "kills": 3,
        "largest_weight_difference": 0.0,
        "log_rows": 6,  # five of four steps each, and one of the last step
        "equal_log_rows": 6,
        "same_samples_at_every_step": True,
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    ["--kills 20 --data cached", "--kills 20 --data streamed", "--kills 6 --data streamed --workers 2 --torchrun"],
)
def test_run_killed_at_many_steps_ends_bit_identical(options):
    run_python("-m", "training.check_resume", *options.split(), timeout=900)


OTHER_NUMBERS = """
import argparse, json, pathlib, sys
from training import check_resume
folder = pathlib.Path(sys.argv[1])
plain = ["--model.text_config.dropout", "0", "--model.parallel_prediction_prob", "0", "--checkpoint_steps", "5"]
for data in ("cached", "streamed"):
    (folder / data).mkdir()
    config = check_resume.make_workspace(folder / data, data, 12, 0)
    for first, then in ((1, 1), (2, 2), (2, 1), (1, 2)) if data == "cached" else ((2, 1), (1, 2)):
        output = folder / data / f"{first}{then}"
        arguments = [str(config), "--output_dir", str(output), *plain, "--data.streams", "2"]
        assert check_resume.launch(arguments, first, False, "0 5 term")
        assert check_resume.launch([*arguments, "--resume"], then, False, "0 0 none")
        trace = check_resume.read_trace(output, 2)
        rows = {}
        for row in trace:
            rows.setdefault(row["step"], []).extend(row["keys"])
        check_resume.check_epochs(trace) if data == "cached" or first == then == 2 else None
        log = [[row["loss"], row["information_gain"]] for row in check_resume.read_rows(output / "log.jsonl")]
        keys = [key for step in sorted(rows) for key in rows[step]]
        print(json.dumps({"data": data, "run": f"{first}{then}", "log": log, "keys": keys}))
"""


def test_number_of_processes_changes_neither_losses_nor_samples(tmp_path):
    """From the start, and on resuming after step 5."""
    runs = {(row["data"], row["run"]): row for row in run_python("-c", OTHER_NUMBERS, str(tmp_path))}
    for run in ("22", "21", "12"):
        cached = runs["cached", run]
        assert cached["keys"] == runs["cached", "11"]["keys"]
        assert torch.allclose(torch.tensor(cached["log"]), torch.tensor(runs["cached", "11"]["log"]), atol=2e-4)
    for run in ("21", "12"):
        keys = runs["streamed", run]["keys"]
        assert len(keys) == 96 and all(2 <= keys.count(key) <= 4 for key in keys), "31 samples, about three epochs"


# One process


@pytest.mark.parametrize("workers", [0, 2])
def test_sigterm_saves_and_the_run_continues(workspace, tmp_path, monkeypatch, workers):
    """As a cluster sends it: to the loader's workers too."""
    whole = train(run_config(workspace, tmp_path / "whole"))
    finite = training.train.all_finite
    of_other_tests = set(multiprocessing.active_children())  # workers of loaders that nothing has collected yet

    def terminated(*arguments):
        own_workers = [child for child in multiprocessing.active_children() if child not in of_other_tests]
        assert len(own_workers) == workers
        for process in (os.getpid(), *(child.pid for child in own_workers)):
            os.kill(process, signal.SIGTERM)
        time.sleep(0.2)
        return finite(*arguments)

    config = run_config(workspace, tmp_path / "parts", **{"data.num_workers": workers})
    with monkeypatch.context() as patch:
        patch.setattr("training.train.all_finite", terminated)
        train(config)
    assert [path.name for path in list_checkpoints(tmp_path / "parts")] == ["checkpoint-00000001"]
    assert not (tmp_path / "parts" / "final").exists()
    config.resume = True
    assert_same_weights(whole, train(config))


def test_full_disk_is_a_clear_error_and_leaves_the_last_checkpoint(workspace, tmp_path, monkeypatch):
    write = torch.save

    def full_disk(state, file):
        write(state, file)
        if state["progress"]["step"] == 4:
            file.truncate(1000)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    whole = train(run_config(workspace, tmp_path / "whole", max_steps=5))
    config = run_config(workspace, tmp_path / "parts", max_steps=5, checkpoint_steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        with pytest.raises(OSError, match=r"checkpoint-00000004: .*No space left.*newest checkpoint is .*-00000002"):
            train(config)
    left = [path.name for path in (tmp_path / "parts").iterdir() if "checkpoint" in path.name]
    assert left == ["checkpoint-00000002"]
    config.resume = True
    assert_same_weights(whole, train(config))


@pytest.mark.parametrize("file", ["state.pt", "model/model.safetensors", "files.json"])
def test_checkpoint_cut_short_is_ignored(tmp_path, file):
    def save_model(folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")

    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"value": step}, save_model, keep=5)
    path = tmp_path / "checkpoint-00000002" / file
    os.truncate(path, path.stat().st_size - 1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-00000001"]
    save_checkpoint(tmp_path, 2, {"value": 2}, save_model, keep=5)
    assert len(list_checkpoints(tmp_path)) == 2


def test_new_run_does_not_mix_with_an_old_one(workspace, tmp_path):
    config = run_config(workspace, tmp_path, max_steps=1)
    train(config)
    with pytest.raises(FileExistsError, match=r"checkpoint-00000001 .*--resume"):
        train(config)


def test_resuming_with_other_sources_is_an_error(workspace, tmp_path):
    train(run_config(workspace, tmp_path, max_steps=1))
    other = run_config(workspace, tmp_path, resume=True, **{"data.sources.other.shards": "colors.tar"})
    with pytest.raises(ValueError, match=r"data.sources: \['colors'\] -> \['colors', 'other'\]"):
        train(other)


def test_log_line_written_in_part_is_dropped(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_rows(tmp_path / "log.jsonl") == [{"step": 1}]
