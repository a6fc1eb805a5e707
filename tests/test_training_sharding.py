"""FSDP2 on two CPU processes against plain data parallelism: the same losses, norms, evaluations and weights."""

import pytest
from safetensors.torch import load_file

from ig_captioner import IGCaptionerForConditionalGeneration
from tests.test_training_resume import run_python
from training.metrics import read_rows


# One interpreter forks all processes: importing torch takes most of the time. In the third step one process's loss is
# nan, so that a step is skipped.
SCRIPT = """
import itertools, os, pathlib, sys
import training.train
from training import check_resume
folder, optimizer, *runs = sys.argv[1:]
config = check_resume.make_workspace(pathlib.Path(folder), "cached", 8, 0, optimizer)
options = {
    "model.text_config.dropout": 0, "model.parallel_prediction_prob": 0, "checkpoint_steps": 100, "log_every_steps": 1,
    "data.sources.squares.holdout_fraction": 0.3, "evaluation.every_steps": 2, "freeze": "model.*.self_attn_norm.*",
}
options = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
weight, calls = training.train.weight_in_mean, itertools.count()
def broken_weight(labels, reduction):
    broken = next(calls) == 7 and os.environ["RANK"] == "0" and part == parts[0]  # three calls per step
    return weight(labels, reduction) * (float("nan") if broken else 1)
training.train.weight_in_mean = broken_weight
for run in runs:
    name, *parts = run.split(":")
    for part in parts:
        processes, sharded, kill = int(part[0]), "s" in part, "0 5 term" if "k" in part else "0 0 none"
        environment = check_resume.SHARDED if sharded else {}
        os.environ.update(environment)
        arguments = [str(config), "--output_dir", f"{folder}/{name}", *options, "--resume"]
        if "b" in part:
            arguments += ["--mixed_precision", "bf16"]
        if "c" in part:
            arguments += ["--gradient_checkpointing"]
        assert check_resume.launch(arguments, processes, False, kill), check_resume.output_file(arguments).read_text()
        for key in environment:
            del os.environ[key]
"""


def rows_of(folder):
    return [row for row in read_rows(folder / "log.jsonl") if "loss" in row]


def assert_same_run(first, second, largest_difference=1e-3):
    """`largest_difference` is between weights; losses agree to 1e-3 in any case."""
    expected, rows = rows_of(first), rows_of(second)
    assert [row["step"] for row in rows] == [row["step"] for row in expected] == list(range(1, 9))
    assert rows[-1]["nonfinite_steps"] == expected[-1]["nonfinite_steps"] == 1
    for row, other in zip(rows, expected, strict=True):
        for name in ("loss", "captioning_loss", "unconditional_loss", "grad_norm"):
            assert row[name] == pytest.approx(other[name], rel=1e-3, nan_ok=True), (row["step"], name)
    evaluations = [
        [row for row in read_rows(folder / "log.jsonl") if "evaluation" in row] for folder in (first, second)
    ]
    assert evaluations[0] == evaluations[1] and len(evaluations[0]) == 4
    weights, other = (load_file(folder / "final" / "model.safetensors") for folder in (first, second))
    assert weights.keys() == other.keys()
    for name, tensor in weights.items():
        if "k_proj.bias" not in name:  # has no gradient but rounding, which Adafactor makes large
            assert (tensor - other[name]).abs().max() < largest_difference, name


def test_sharded_run_is_the_same_run(tmp_path):
    run_python("-c", SCRIPT, str(tmp_path), "adamw", "plain:2", "sharded:2s")
    assert_same_run(tmp_path / "plain", tmp_path / "sharded")
    model = IGCaptionerForConditionalGeneration.from_pretrained(tmp_path / "sharded" / "final")
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["muon", "adafactor", "adamw"])
def test_run_may_be_resumed_with_or_without_sharding(tmp_path, optimizer):
    """After step 5; also on another number of processes."""
    begun = {"sharded_throughout": "2sk:2s", "then_plain": "2sk:1", "then_sharded": "1k:2s", "one_process": "1sc"}
    runs = [f"{name}:{parts}" for name, parts in begun.items()]
    run_python("-c", SCRIPT, str(tmp_path), optimizer, "plain:2", *runs)
    for name in begun:
        # Muon makes rounding large: one and two plain processes already differ by more than 1e-3
        assert_same_run(tmp_path / "plain", tmp_path / name, 1e-2 if optimizer == "muon" else 1e-3)


@pytest.mark.slow
def test_sharded_run_in_bfloat16_stays_close(tmp_path):
    """Norms are computed in bfloat16 too, unlike under autocast."""
    run_python("-c", SCRIPT, str(tmp_path), "adamw", "plain:2b", "sharded:2sb")
    losses = [[row["captioning_loss"] for row in rows_of(tmp_path / name)] for name in ("plain", "sharded")]
    assert losses[1][0] == pytest.approx(losses[0][0], abs=0.02)
    assert losses[1][-1] == pytest.approx(losses[0][-1], abs=0.1) and losses[1][-1] < losses[1][0]
