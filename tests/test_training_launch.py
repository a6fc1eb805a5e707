"""Launchers: Accelerate's configurations, and torchrun with restarts and signals. Two CPU processes each."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.test_training_resume import ENVIRONMENT, ROOT, assert_same_weights
from training.check_resume import make_workspace
from training.checkpoint import list_checkpoints, load_state
from training.metrics import read_rows


CONFIGURATIONS = sorted((ROOT / "training" / "configs" / "accelerate").glob("*.yaml"))
pytestmark = pytest.mark.slow


def launch(command, log):
    # Without the variable, processes that torchrun starts again look for the ports of those before (pytorch#135712).
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with open(log, "wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", *command], cwd=ROOT, env=environment, stdout=output, stderr=output
        )


def finish(process, log, timeout=300):
    assert process.wait(timeout) == 0, Path(log).read_text()[-3000:]


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_accelerate_configuration_starts_and_resumes(tmp_path, path):
    config = make_workspace(tmp_path, "cached", 4, 0)
    sharded = yaml.safe_load(path.read_text())["distributed_type"] == "FSDP"
    command = ["accelerate.commands.launch", "--config_file", str(path), "--num_processes", "2"]
    command += ["-m", "training.train", "--config", str(config), "--output_dir", str(tmp_path / "run")]
    command += ["--resume_with_changes"]  # of the number of steps
    for steps in (3, 4):
        finish(launch([*command, "--max_steps", str(steps)], tmp_path / "log"), tmp_path / "log")
    assert len(load_state(list_checkpoints(tmp_path / "run")[-1])["random_states"]) == 2, "processes"
    assert [row["step"] for row in read_rows(tmp_path / "run" / "log.jsonl")] == [3, 4]
    assert ("FSDPIGCaptioner" in (tmp_path / "log").read_text()) == sharded, "torch warns of its classes by name"


KILLED_ONCE = """
import os, signal, sys
import training.train
from training import check_resume
finite = training.train.all_finite
steps = []
def killing(*arguments):
    steps.append(1)
    if len(steps) == 5 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return finite(*arguments)
training.train.all_finite = killing
training.train.main(sys.argv[1:])
"""


def torchrun(tmp_path, output_dir, *script):
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max_restarts", "1", *script]
    return [*command, "--config", str(tmp_path / "config.yaml"), "--output_dir", str(output_dir), "--resume"]


def test_torchrun_restarts_a_killed_process_and_the_run_is_the_same(tmp_path):
    make_workspace(tmp_path, "streamed", 8, 0)
    (tmp_path / "killed_once.py").write_text(KILLED_ONCE)
    for name, script in (("whole", ("-m", "training.train")), ("killed", (str(tmp_path / "killed_once.py"),))):
        log = tmp_path / f"{name}.log"
        finish(launch(torchrun(tmp_path, tmp_path / name, *script), log), log)
    assert "resumed from" in (tmp_path / "killed.log").read_text()
    assert_same_weights(tmp_path / "whole" / "final", tmp_path / "killed" / "final")


def test_sigterm_to_torchrun_saves(tmp_path):
    """As Slurm sends it before the end of a job."""
    make_workspace(tmp_path, "cached", 100_000, 0)
    command = torchrun(tmp_path, tmp_path / "run", "-m", "training.train")
    process = launch([*command, "--checkpoint_steps", "0"], tmp_path / "log")
    deadline = time.monotonic() + 200
    while not read_rows(tmp_path / "run" / "log.jsonl") and time.monotonic() < deadline:
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGTERM)
    process.wait(100)
    assert list_checkpoints(tmp_path / "run"), (tmp_path / "log").read_text()[-3000:]
