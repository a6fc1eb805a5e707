"""Fixtures that several test files use. A file that needs another thing by the same name defines its own."""

import gc
import json
import sys

import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from command_line import without_note, write_photo
from evaluation_room import (
    CAPTIONS,
    HELD_OUT,
    NAMES,
    PHOTOS,
    TEMPLATES,
    make_images,
    make_room,
    make_sets,
    pair_by_pair,
)
from small_checkpoint import save_checkpoint

from ig_captioner import (
    IGCaptionerForZeroShotImageClassification,
    IGCaptionerImageProcessor,
    IGCaptionerProcessor,
    cli,
)
from ig_captioner.cli import release as cli_release
from ig_captioner.evaluation.ranking import PRIOR_WEIGHTS
from ig_captioner.evaluation.report import table_lines
from tiny import VARIANTS, assert_clear_order, tiny_config
from training.train_tokenizer import train_tokenizer


def pytest_collection_finish() -> None:
    """Spares full garbage collections the hundreds of thousands of objects of imported modules.

    Accelerate, for one, collects at the end of every training.
    """
    gc.collect()
    gc.freeze()


# The command line


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A random checkpoint in float16."""
    return str(save_checkpoint(tmp_path_factory.mktemp("cli") / "tiny", dtype=torch.float16))


@pytest.fixture
def here(tmp_path, monkeypatch, checkpoint):
    """A folder with three photos and a broken one, and a small model as the default."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["ig_captioner.cli.main"], "DEFAULT_CHECKPOINT", checkpoint)
    monkeypatch.setattr(cli_release, "DEFAULT_CHECKPOINT", checkpoint)
    for seed in range(3):
        write_photo(tmp_path / f"{seed}.png", seed)
    (tmp_path / "broken.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    return tmp_path


@pytest.fixture
def run(capsys):
    """Runs a command. Gives the exit code, and the lines of stdout and of stderr, without that note."""

    def command(*arguments: str) -> tuple[int, list[str], list[str]]:
        capsys.readouterr()  # what the test itself has caused
        code = cli.main(list(arguments))
        out, err = capsys.readouterr()
        return code, out.splitlines(), without_note(err)

    return command


@pytest.fixture(scope="module")
def photos() -> list[PIL.Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (11, 4, 6, 3), dtype=np.uint8)
    return [PIL.Image.fromarray(pixels).resize((30, 20)) for pixels in noise]


# Evaluation


@pytest.fixture(scope="module")
def processor():
    """Of 16 pixels, with a tokenizer trained on all texts of `evaluation_room.py`."""
    texts = [*NAMES, *TEMPLATES, *(caption for own in CAPTIONS for caption in own)]
    return IGCaptionerProcessor(
        IGCaptionerImageProcessor(size={"height": 16, "width": 16}), train_tokenizer(texts, vocab_size=400)
    )


@pytest.fixture(scope="module")
def model(processor):
    """A tiny random classifier for that processor."""
    torch.manual_seed(0)
    sizes = {"vocab_size": len(processor.tokenizer), "max_position_embeddings": 40}
    return IGCaptionerForZeroShotImageClassification.from_config(tiny_config({**VARIANTS["prefix"], **sizes})).eval()


@pytest.fixture(scope="module")
def room(model, processor, tmp_path_factory):
    """A model, a CLIP model, and the same photos as shards and as a folder per class."""
    root = tmp_path_factory.mktemp("room")
    make_room(root, model, processor)
    return root


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """SugarCrepe, ARO and Winoground, and a shard of the photos."""
    root = tmp_path_factory.mktemp("sets")
    make_sets(root)
    return root


@pytest.fixture
def evaluate(run, room, tmp_path):
    """Runs a task. Gives `results.json`, checked to be consistent with the other files."""

    def command(task, *arguments, output="out"):
        options = [
            "--model",
            str(room / "model"),
            "--held-out-fraction",
            str(HELD_OUT),
            "--output",
            str(tmp_path / output),
        ]
        code, lines, errors = run("evaluate", task, *map(str, arguments), *options)
        assert code == 0 and len(errors) <= 1
        assert all("were skipped: 1 x empty image file (1: 'broken')" in line for line in errors)
        results = json.loads((tmp_path / output / "results.json").read_text())
        markdown = (tmp_path / output / "results.md").read_text()
        assert lines[: len(markdown.splitlines())] == markdown.splitlines()
        for rows in results["tables"].values():
            assert all(line in markdown for line in table_lines(rows))
            for row in rows:
                for name, estimate in row["metrics"].items():
                    assert (name == "distinct_top1") == (list(estimate) == ["value"])
                    assert name == "distinct_top1" or estimate["low"] <= estimate["value"] <= estimate["high"]
        index = yaml.safe_load((tmp_path / output / "model-index.yml").read_text())["model-index"]
        metrics = [metric for result in index[0]["results"] for metric in result["metrics"]]
        ours = [row for rows in results["tables"].values() for row in rows if not row["baseline"]]
        assert len(metrics) == sum(len(row["metrics"]) for row in ours) > 0
        return results

    return command


@pytest.fixture(scope="module")
def class_scores(model, processor):
    """log P(T|I) [B, C] and log P(T) [C], means over templates."""
    parts = [pair_by_pair(model, processor, make_images(PHOTOS), [t.format(n) for n in NAMES]) for t in TEMPLATES]
    caption, prior = (sum(values) / len(TEMPLATES) for values in zip(*parts, strict=True))
    assert_clear_order(torch.stack([caption - weight * prior for weight in PRIOR_WEIGHTS]))
    assert_clear_order(prior)
    return caption, prior


# Training


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A shard of coloured squares, and a tokenizer. Runs draw no curves, which takes longer than their steps."""
    import training_runs  # here, since it takes seconds, which other tests need not wait for

    root = tmp_path_factory.mktemp("training")
    training_runs.make_workspace(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.train.draw_curves", lambda log, picture: False)
        yield root


@pytest.fixture(scope="module")
def tokenizer():
    """Trained on the captions of `training_runs.py`."""
    import training_runs

    return train_tokenizer(training_runs.CAPTIONS, vocab_size=300)
