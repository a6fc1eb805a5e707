"""Results of `ig-captioner evaluate` do not depend on how the work is cut: by batch size, by number of processes."""

import json

import pytest
from evaluation_room import HELD_OUT
from two_processes import in_two_processes

from ig_captioner import cli
from ig_captioner.evaluation.processes import is_first, map_batches, place, sharing


def run_commands(commands: list[list[str]]) -> None:
    """Runs them in one group for all tasks: a second one would find the traces of the first."""
    with sharing():
        for arguments in commands:
            code = cli.main(arguments)
            assert code == 0, (code, arguments)


def test_batches_come_in_order_and_each_item_once():
    assert map_batches(sum, range(7), 3) == [3, 12, 6]
    assert map_batches(sum, [], 3) == []
    with sharing():  # alone
        assert map_batches(list, iter("abc"), 2) == [["a", "b"], ["c"]]
        assert place() == (0, 1) and is_first()
    with pytest.raises(ValueError, match="batch_size 0"):
        map_batches(sum, [1], 0)


@pytest.fixture(scope="module")
def commands(room, sets):
    """The arguments of every task, without batch size and output."""
    shards, classes = ["--data", room / "shards"], ["--class-names", room / "prompts.json"]
    tuning = ["--held-out-fraction", HELD_OUT, "--clip", room / "clip"]
    pairs = ["--format", "sugarcrepe", "--pairs", sets / "sugarcrepe", "--data", sets / "photos.tar"]
    tasks = {
        "zero-shot": [*shards, *classes, *tuning],
        "retrieval": [*shards, *tuning],
        "compositional": [*pairs, *tuning],
        "captioning": [*shards, "--max-new-tokens", 6],
        "linear-probe": [*shards, *classes, "--train", room / "folder", "--shots", 4, *tuning],
        "lit": ["--train", room / "shards", *shards, "--steps", 3, "--width", 32, "--held-out-fraction", HELD_OUT],
    }
    model = ["--model", room / "model", "--device", "cpu"]
    return {task: ["evaluate", task, *map(str, [*arguments, *model])] for task, arguments in tasks.items()}


@pytest.fixture(scope="module")
def by_two_processes(commands, tmp_path_factory):
    """The folder with the results of every task, in batches of 3."""
    root = tmp_path_factory.mktemp("two")
    every = [[*command, "--batch-size", "3", "--output", str(root / task)] for task, command in commands.items()]
    first, second = in_two_processes(run_commands, every)
    assert first.count("## Run") == len(commands) and second == ""
    return root


def assert_same(one, other):
    """Equal, but for the rounding of sums in another order, which a fitted temperature shows in its sixth digit."""
    if isinstance(other, dict):
        assert one.keys() == other.keys()
        for name in other:
            assert_same(one[name], other[name])
    elif isinstance(other, list):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    else:
        assert one == (pytest.approx(other, rel=1e-4, abs=1e-6, nan_ok=True) if isinstance(other, float) else other)


@pytest.mark.parametrize("task", ["zero-shot", "retrieval", "compositional", "captioning", "linear-probe", "lit"])
def test_results_do_not_depend_on_batches_and_processes(run, commands, by_two_processes, task, tmp_path):
    shared = json.loads((by_two_processes / task / "results.json").read_text())
    assert shared["run"]["command"].startswith(f"torchrun --nproc_per_node 2 -m ig_captioner.cli evaluate {task} ")
    assert shared["run"]["hardware"]["processes"] == 2
    for size in ("1", "3", "16") if task != "lit" else ("3",):  # there it is one of training, and changes results
        code, _, errors = run(*commands[task], "--batch-size", size, "--output", str(tmp_path / size))
        assert code == 0
        assert all("were skipped: 1 x empty image file" in line for line in errors), errors
        alone = json.loads((tmp_path / size / "results.json").read_text())
        assert_same(alone["tables"], shared["tables"])
        assert alone["data"] == shared["data"]
        files = {path.name for path in (tmp_path / size).iterdir()}
        assert files == {path.name for path in (by_two_processes / task).iterdir()}
        if task == "captioning":
            captions = (folder / "captions.jsonl" for folder in (tmp_path / size, by_two_processes / task))
            assert next(captions).read_text() == next(captions).read_text()
