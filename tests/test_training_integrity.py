"""Damaged checkpoints and logs: reported by file name, never trained on, nothing lost without a word."""

import errno
import json
import os
import shutil

import pytest
from safetensors.torch import load_file
from training_runs import run_config

from benchmarks import damage_checkpoint
from training.checkpoint import (
    CheckpointError,
    find_problem,
    list_checkpoints,
    load_state,
    newest_intact,
    save_checkpoint,
    write_text_atomically,
)
from training.metrics import read_rows
from training.state import SavedRun
from training.train import train


def save_model(folder):
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(range(256)))


def zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


def flipped_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut_short(path):
    os.truncate(path, path.stat().st_size - 1)


def removed(path):
    path.unlink()


FILES = ["state.pt", "model/model.safetensors", "files.json"]
DAMAGE = [zeros, flipped_bit, cut_short, removed]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_with_the_name_of_the_file(tmp_path, caplog, damage, file):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"value": step}, save_model, keep=5)
    damage(tmp_path / "checkpoint-00000002" / file)
    assert newest_intact(tmp_path).name == "checkpoint-00000001"
    (message,) = caplog.messages
    assert "passed over" in message and str(tmp_path / "checkpoint-00000002") in message
    # a bit of the manifest may belong to the digest of any file
    assert (damage is flipped_bit and file == "files.json") or str(tmp_path / "checkpoint-00000002" / file) in message


def test_a_file_that_is_no_part_of_a_checkpoint_is_reported(tmp_path):
    """transformers would read an adapter_config.json, and load other weights."""
    folder = save_checkpoint(tmp_path, 1, {}, save_model, keep=1)
    assert find_problem(folder) == ""
    (folder / "model" / "adapter_config.json").write_text("{}")
    assert find_problem(folder) == f"{folder / 'model' / 'adapter_config.json'}: not part of the checkpoint"


def test_a_state_that_cannot_be_read_is_named_without_advice_to_load_it_unsafely(tmp_path):
    (tmp_path / "state.pt").write_bytes(bytes(1000))
    with pytest.raises(CheckpointError, match="state.pt cannot be read") as raised:
        load_state(tmp_path)
    assert "weights_only" not in str(raised.value)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_run_without_an_intact_checkpoint_does_not_start_over(workspace, tmp_path, damage):
    config = run_config(workspace, tmp_path, max_steps=2)
    train(config)
    log = (tmp_path / "log.jsonl").read_bytes()
    damage(tmp_path / "checkpoint-00000002" / "state.pt")
    config.resume = True
    with pytest.raises(CheckpointError, match=r"checkpoint-00000002/state.pt.*remove them or choose another"):
        train(config)
    assert (tmp_path / "log.jsonl").read_bytes() == log


def test_a_run_goes_back_to_the_older_checkpoint_and_ends_the_same(workspace, tmp_path, caplog):
    config = run_config(workspace, tmp_path, max_steps=4, checkpoint_steps=2)
    final = train(config)
    weights = load_file(final / "model.safetensors")
    shutil.rmtree(final)
    flipped_bit(tmp_path / "checkpoint-00000004" / "model" / "model.safetensors")
    config.resume = True
    again = load_file(train(config) / "model.safetensors")
    assert all((weights[name] == again[name]).all() for name in weights)
    assert "going back to" in caplog.text and newest_intact(tmp_path).name == "checkpoint-00000004"


def test_a_checkpoint_under_the_name_of_another_step_is_refused(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"progress": {"step": step}}, save_model, keep=5)
    assert SavedRun(newest_intact(tmp_path)).step == 2
    (tmp_path / "checkpoint-00000001").rename(tmp_path / "checkpoint-00000003")
    with pytest.raises(CheckpointError, match="checkpoint-00000003 holds step 1"):
        SavedRun(newest_intact(tmp_path))


def test_leftovers_of_killed_runs_are_removed(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {}, save_model, keep=2)
    (tmp_path / "checkpoint-00000001" / "state.pt").unlink()  # killed while it was pruned
    (tmp_path / ".checkpoint-00000009.partial").mkdir()  # killed while it was written
    save_checkpoint(tmp_path, 3, {}, save_model, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-00000002", "checkpoint-00000003"]


def test_a_damaged_checkpoint_of_a_later_step_does_not_push_out_good_ones(tmp_path):
    for step in (1, 4):
        save_checkpoint(tmp_path, step, {}, save_model, keep=2)
    flipped_bit(tmp_path / "checkpoint-00000004" / "state.pt")
    save_checkpoint(tmp_path, 2, {}, save_model, keep=2)
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["1", "2", "4"]
    save_checkpoint(tmp_path, 4, {}, save_model, keep=2)
    assert newest_intact(tmp_path).name == "checkpoint-00000004"


def test_random_damage_is_reported_by_file_name(capsys):
    """The script that does it 250 times, on few."""
    damage_checkpoint.main(["--flips", "40", "--truncations", "20", "--runs", "1"])
    outcomes = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sum(row["times"] for row in outcomes) == 60
    assert {row["outcome"] for row in outcomes} <= {"reported", "without effect"}


# The log


def test_lines_that_are_no_rows_are_left_out_with_a_word(tmp_path, caplog):
    lines = [
        b'{"step": 1}',
        b'{"step": 2, "loss": "\xff\xfe"}',
        b"7",
        b'{"loss": 1}',
        b'{"step": 3}',
        b'{"step": 4, "lo',
    ]
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(lines))
    assert read_rows(tmp_path / "log.jsonl") == [{"step": 1}, {"step": 3}]
    assert f"{tmp_path / 'log.jsonl'}: left out what is no row: line 2, 3, 4, 6" in caplog.text


def test_a_log_with_a_broken_line_does_not_keep_a_run_from_resuming(workspace, tmp_path):
    config = run_config(workspace, tmp_path, max_steps=2)
    train(config)
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(b'\xff\xfe{"step": 2')
    config.resume = True
    train(config)
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [2]


def test_a_log_is_replaced_and_never_rewritten_in_place(workspace, tmp_path, monkeypatch):
    config = run_config(workspace, tmp_path, max_steps=2, log_every_steps=1)
    train(config)
    before = (tmp_path / "log.jsonl").read_bytes()
    config.resume = True

    def killed(source, target):
        if str(target).endswith("log.jsonl"):
            raise KeyboardInterrupt

    monkeypatch.setattr("training.checkpoint.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert (tmp_path / "log.jsonl").read_bytes() == before


def test_text_is_replaced_whole(tmp_path):
    write_text_atomically(tmp_path / "file", "old")
    write_text_atomically(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_a_resumed_finished_run_does_not_repeat_rows(workspace, tmp_path):
    extra = {"data.sources.colors.holdout_fraction": 0.3, "evaluation.every_steps": 2, "log_every_steps": 2}
    config = run_config(workspace, tmp_path, max_steps=3, **extra)
    train(config)
    rows = [(row["step"], "evaluation" in row) for row in read_rows(tmp_path / "log.jsonl")]
    assert rows == [(2, False), (2, True), (3, False), (3, True)]
    config.resume = True
    for _ in range(2):
        train(config)
    assert [(row["step"], "evaluation" in row) for row in read_rows(tmp_path / "log.jsonl")] == rows


def test_a_full_disk_names_the_log(workspace, tmp_path, monkeypatch):
    real = open

    def full(path, mode="r", *arguments, **options):
        if mode == "a":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, mode, *arguments, **options)

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(OSError, match=r"row of step 2.*No space left.*log\.jsonl"):
        train(run_config(workspace, tmp_path))


def test_the_log_of_an_earlier_run_is_moved_aside(workspace, tmp_path, caplog):
    (tmp_path / "log.jsonl").write_text('{"step": 9}\n')
    train(run_config(workspace, tmp_path, max_steps=2))
    assert read_rows(tmp_path / "log.jsonl.1") == [{"step": 9}]
    assert [row["step"] for row in read_rows(tmp_path / "log.jsonl")] == [2]
    assert "is of an earlier run; moved to" in caplog.text
