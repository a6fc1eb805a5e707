"""The scripts around the shipped checkpoint: cut shards, what the GPU run starts, and the table of its seeds."""

import ast
import importlib.util
import io
import json
import tarfile
from pathlib import Path

import pytest


pytest.importorskip("accelerate")

from benchmarks.evaluate_checkpoint import TASKS
from benchmarks.everyday import cut_shards, gpu, seeds


def started_modules():
    """The second argument of every `self.run(name, module, ...)` of the GPU run."""
    for node in ast.walk(ast.parse(Path(gpu.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "self.run":
            yield ast.literal_eval(node.args[1])


def test_the_gpu_run_starts_modules_that_do_something():
    """`python -m` of a module without a main part does nothing, and succeeds."""
    modules = set(started_modules())
    assert {"training.train", "ig_captioner.cli"} <= modules
    for module in modules:
        spec = importlib.util.find_spec(module)
        if spec.submodule_search_locations is not None:
            assert importlib.util.find_spec(f"{module}.__main__") is not None, module
        else:
            assert 'if __name__ == "__main__":' in Path(spec.origin).read_text(encoding="utf-8"), module


def test_a_dual_encoder_is_measured_on_the_samples_of_the_captioner():
    captioner = ["evaluate", *TASKS["cifar10"].split()]
    words = gpu.for_tower(captioner, Path("tower"))
    assert words[:4] == ["evaluate", "lit", "--tower", Path("tower")]
    assert words[words.index("--labelled") + 1] == captioner[captioner.index("--data") + 1] and "--data" not in words
    assert words[words.index("--held-out-fraction") :] == captioner[captioner.index("--held-out-fraction") :]
    assert "--data" in gpu.for_tower(["evaluate", *TASKS["flickr8k"].split()], Path("tower"))


def test_differences_of_seeds_are_taken_seed_by_seed(tmp_path):
    def write(run, shares):
        folder = tmp_path / "results" / run / "cifar10"
        folder.mkdir(parents=True)
        rows = [{"prior_weight": weight, "metrics": {"top1": {"value": share}}} for weight, share in shares.items()]
        (folder / "results.json").write_text(json.dumps({"tables": {"10 classes": rows, "True classes": []}}))

    for seed in range(3):
        write(f"run-{seed}", {0.0: 0.3, 1.0: 0.5 + seed / 10})
        write(f"dual-encoder-{seed}", {None: 0.4 + seed / 10})
    figure = seeds.Figure("CIFAR-10", "cifar10", "top1")
    line = seeds.line(tmp_path, [f"run-{seed}" for seed in range(3)], figure)
    assert line == ("| CIFAR-10 | 30.0 (30.0 - 30.0) | 60.0 (35.2 - 84.8) | 50.0 (25.2 - 74.8) | 10.0 (10.0 - 10.0) |")


def test_cut_shards_keep_the_first_samples_whole(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "names.json").write_text("[]")
    for name, mode in (("a.tar", "w"), ("b.tar.gz", "w:gz")):
        with tarfile.open(data / name, mode) as archive:
            for member in ("x.png", "x.json", "y.json", "y.png", "z.png"):
                header = tarfile.TarInfo(member)
                header.size = len(member)
                archive.addfile(header, io.BytesIO(member.encode()))
    cut_shards.main([str(data), str(tmp_path / "cut"), "--samples", "2"])
    for name in ("a.tar", "b.tar.gz"):
        with tarfile.open(tmp_path / "cut" / name) as archive:
            assert archive.getnames() == ["x.png", "x.json", "y.json", "y.png"]
            assert archive.extractfile("y.png").read() == b"y.png"
    assert (tmp_path / "cut" / "names.json").read_text() == "[]"
