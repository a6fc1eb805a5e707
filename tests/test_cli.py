"""The command line in this process: output, exit codes, and errors of one line."""

import io
import json
import re
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from test_hub import save_checkpoint

import ig_captioner
from ig_captioner import (
    IGCaptionerForConditionalGeneration,
    IGZeroShotImageClassificationPipeline,
    cli,
    cli_arguments,
    label_cache,
)
from ig_captioner.cli_output import columns
from ig_captioner.hub import RELEASE_FILES, load_model, load_processor
from ig_captioner.processing_ig_captioner import load_rgb_image


FIELDS = ["label", "score", "caption_log_likelihood", "prior_log_likelihood", "information_gain"]
LABELS = ["cat", "dog", "a photo", "of"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return str(save_checkpoint(tmp_path_factory.mktemp("cli") / "tiny", dtype=torch.float16))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, checkpoint):
    """A folder with three photos and a broken one, and a small model as the default."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli_arguments, "TINY_CHECKPOINT", checkpoint)
    monkeypatch.setattr(label_cache, "HF_HOME", str(tmp_path / "cache"))
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3), dtype=np.uint8)):
        PIL.Image.fromarray(pixels).resize((30, 20)).save(f"{i}.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])


@pytest.fixture
def run(capsys):
    """Runs a command. Gives the exit code, and the lines of stdout and of stderr."""

    def command(*arguments: str) -> tuple[int, list[str], list[str]]:
        code = cli.main(list(arguments))
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return command


# classify


def test_json_is_what_the_pipeline_says(run, checkpoint):
    options = ["--top-k", "3", "--prior-weight", "0.5", "--template", "{}", "a photo of a {}."]
    code, lines, errors = run("classify", "0.png", "1.png", "--json", "--labels", *LABELS, *options)
    assert (code, errors) == (0, [])
    processor = load_processor(checkpoint)
    classifier = IGZeroShotImageClassificationPipeline(
        model=load_model(IGCaptionerForConditionalGeneration, checkpoint, dtype="float32"),
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
        device="cpu",
    )
    settings = {"top_k": 3, "prior_weight": 0.5, "hypothesis_template": ["{}", "a photo of a {}."]}
    expected = classifier(["0.png", "1.png"], LABELS, return_log_likelihoods=True, **settings)
    for name, line, entries in zip(["0.png", "1.png"], lines, expected, strict=True):
        result = json.loads(line)
        assert list(result) == ["image", "predictions"] and result["image"] == name
        for prediction, entry in zip(result["predictions"], entries, strict=True):
            assert list(prediction) == FIELDS
            assert prediction == pytest.approx(entry, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "weight"), [([], "(IG = log P(T|I) - 0.75 * log P(T))"), (["--prior-weight", "1"], "")]
)
def test_tables(run, options, weight):
    code, lines, errors = run("classify", "0.png", "1.png", "--labels", *LABELS, *options)
    assert (code, errors) == (0, [])
    assert len(lines) == 2 * (2 + len(LABELS) + 1) and lines[6] == lines[-1] == ""
    for title, table in ((lines[0], lines[1:6]), (lines[7], lines[8:13])):
        assert title.startswith(("0.png", "1.png")) and title.endswith(weight or "png")
        assert table[0].split("  ")[1].strip() == "label" and table[0].count("[nats]") == 3
        assert len({len(row) for row in table}) == 1  # aligned
        figures = [[float(cell) for cell in row.split()[-4:]] for row in table[1:]]
        gains = [row[2] for row in figures]
        assert gains == sorted(gains, reverse=True) and sum(row[3] for row in figures) == pytest.approx(1, abs=0.01)
        for caption, prior, gain, _ in figures:
            assert gain == pytest.approx(caption - (0.75 if weight else 1) * prior, abs=0.02)


def test_batches_change_nothing(run):
    results = [run("classify", "0.png", "1.png", "2.png", "--labels", *LABELS, "--batch-size", n) for n in "124"]
    assert results[0][0] == 0 and results[0] == results[1] == results[2]


def test_labels_from_a_file_come_after_those_of_the_command_line(run, tmp_path):
    (tmp_path / "labels.txt").write_bytes("\ufeffdog\r\n\n  a photo \nof".encode())
    code, lines, _ = run("classify", "0.png", "--json", "--labels", "cat", "--labels-file", "labels.txt")
    assert code == 0 and lines == run("classify", "0.png", "--json", "--labels", "cat", "dog", "a photo", "of")[1]
    assert run("classify", "0.png", "--json", "--labels", "cat", "dog", "--labels", "a photo", "of")[1] == lines


def test_wide_and_unprintable_text_stays_aligned(run):
    labels = ["猫", "a\x1b[31m\nb", "🐱🐱", "cafe\u0301", "cat"]
    code, lines, _ = run("classify", "0.png", "--labels", *labels)
    assert code == 0 and len(lines) == 2 + len(labels) + 1
    assert {columns(line) for line in lines[1:-1]} == {columns(lines[1])}
    assert not any("\x1b" in line for line in lines) and any(r"a\x1b[31m\nb" in line for line in lines)
    result = json.loads(run("classify", "0.png", "--json", "--labels", *labels)[1][0])
    assert {entry["label"] for entry in result["predictions"]} == set(labels)


def test_output_survives_an_encoding_that_lacks_the_characters(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.main(["classify", "0.png", "--labels", "猫"]) == 0
    out.flush()
    assert b"\\u732b" in out.buffer.getvalue()


def test_a_photo_that_cannot_be_read_costs_only_itself(run):
    arguments = ["--json", "--labels", *LABELS]
    good = run("classify", "0.png", "1.png", *arguments)[1]
    for command, rest in (("classify", arguments), ("caption", ["--json"])):
        photos = ["missing.png", "0.png", "broken.png", ".", "1.png"]
        code, lines, errors = run(command, *photos, *rest, "--batch-size", "2")
        assert code == 1 and [json.loads(line)["image"] for line in lines] == ["0.png", "1.png"]
        assert command == "caption" or lines == good
        for error, name in zip(errors, ["missing.png", "broken.png", "."], strict=True):
            assert error.startswith(f"ig-captioner: error: cannot read the image '{name}'")
    code, lines, errors = run("classify", "missing.png", *arguments)
    assert (code, lines, len(errors)) == (1, [], 1)


# caption


def test_captions_and_their_scores(run, checkpoint):
    code, lines, errors = run("caption", "0.png", "1.png", "--json", "--max-new-tokens", "4", "--num-beams", "2")
    assert (code, errors) == (0, [])
    model = load_model(IGCaptionerForConditionalGeneration, checkpoint, dtype="float32")
    processor = load_processor(checkpoint)
    for name, line in zip(["0.png", "1.png"], lines, strict=True):
        result = json.loads(line)
        assert list(result) == ["image", "caption", *FIELDS[2:]] and result["image"] == name
        pixels = processor(images=load_rgb_image(name), return_tensors="pt")["pixel_values"]
        tokens = model.generate(pixel_values=pixels, max_new_tokens=4, num_beams=2)
        assert result["caption"] == processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()
        with torch.no_grad():
            scores = model.score(pixels, **processor(text=[result["caption"]], return_tensors="pt"))
        for field in FIELDS[2:]:
            assert result[field] == pytest.approx(scores[field].item(), abs=1e-4)
    code, table, _ = run("caption", "0.png", "--max-new-tokens", "4", "--num-beams", "2")
    first = json.loads(lines[0])
    assert code == 0 and table[0] == f"0.png: {first['caption']}"
    assert f"log P(T|I) {first['caption_log_likelihood']:.2f}" in table[1] and table[1].endswith("nats")


def test_captions_fit_the_model(run):
    assert run("caption", "0.png")[0] == 0  # 30 tokens by default, but this model has 12 positions
    assert run("caption", "0.png", "--max-new-tokens", "11")[0] == 0
    code, lines, errors = run("caption", "0.png", "--max-new-tokens", "12")
    assert (code, lines, len(errors)) == (1, [], 1) and "12" in errors[0] and "11 tokens at most" in errors[0]


# release


def test_release(run, tmp_path):
    code, lines, errors = run("release", "out", "--repo-id", "acme/tiny", "--license", "mit")
    assert (code, errors) == (0, [])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {*RELEASE_FILES, "model.safetensors"} == {line.split()[0] for line in lines[2:]}
    assert str(tmp_path / "out") in lines[0]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# acme/tiny" in card and "license: mit" in card
    code, lines, errors = run("release", "out")
    assert (code, lines, len(errors)) == (1, [], 1) and "--overwrite" in errors[0]
    assert run("release", "out", "--model", "out", "--overwrite")[0] == 0
    assert run("classify", "0.png", "--labels", "cat", "--model", "out")[0] == 0


# usage


def test_help_and_version(run):
    code, lines, errors = run("--version")
    assert (code, lines, errors) == (0, [f"ig-captioner {ig_captioner.__version__}"], [])
    assert run("--help")[0] == 0
    for command in ("classify", "caption", "release"):
        code, lines, errors = run(command, "--help")
        assert (code, errors) == (0, [])
        assert "examples:" in lines and any(line.startswith(f"  ig-captioner {command} ") for line in lines)


WRONG_USAGE = [
    ([], "COMMAND"),
    (["frobnicate"], "frobnicate"),
    (["classify", "--labels", "cat", "0.png"], "photos come before the options"),
    (["classify", "0.png", "--labels", "cat", "--top-k", "1", "1.png"], "1.png.*photos come before"),
    (["classify", "0.png", "--labels", "cat", "1.png"], "1.png.*photos come before"),
    (["classify", "0.png"], "--labels or --labels-file"),
    (["classify", "0.png", "--label", "cat"], "--label"),
    (["classify", "0.png", "--labels"], "--labels"),
    (["classify", "0.png", "--labels", "cat", "--top-k", "0"], "top-k.*'0'"),
    (["classify", "0.png", "--labels", "cat", "--batch-size", "two"], "batch-size.*'two'"),
    (["classify", "0.png", "--labels", "cat", "--prior-weight", "-1"], "prior-weight.*'-1'"),
    (["classify", "0.png", "--labels", "cat", "--prior-weight", "nan"], "prior-weight.*'nan'"),
    (["classify", "0.png", "--labels", "cat", "--device", "tpu"], "tpu"),
    (["caption"], "PHOTO"),
    (["release"], "DIR"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_USAGE)
def test_wrong_usage(run, arguments, message):
    code, lines, errors = run(*arguments)
    assert (code, lines, len(errors)) == (2, [], 1)
    assert errors[0].startswith("ig-captioner") and "error: " in errors[0]
    assert re.search(message, errors[0])


WRONG_INPUT = [
    (["--labels", "cat", "--template", "a photo"], "hypothesis_template.*'a photo'"),
    (["--labels-file", "missing.txt"], "missing.txt"),
    (["--labels-file", "0.png"], "0.png is not UTF-8"),
    (["--labels-file", "empty.txt"], "no labels in empty.txt"),
    (["--labels", "cat", "--model", "./missing"], "no such model folder: './missing'"),
    (["--labels", "cat", "--model", "folder"], "no model in the folder 'folder'"),
    (["--labels", "cat", "--model", "0.png"], "not a file: '0.png'"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_INPUT)
def test_wrong_input(run, tmp_path, arguments, message):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "folder").mkdir()
    code, lines, errors = run("classify", "1.png", *arguments)
    assert (code, lines, len(errors)) == (1, [], 1) and errors[0].startswith("ig-captioner: error: ")
    assert re.search(message, errors[0])


def test_devices(monkeypatch):
    for available in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert cli_arguments.choose_device("auto").type == ("cuda" if available else "cpu")
        assert cli_arguments.choose_device("cpu").type == "cpu"
    assert cli_arguments.choose_device("cuda").type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no GPU"):
        cli_arguments.choose_device("cuda")


def test_unexpected_errors_are_one_line_too(run, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of\n  memory")

    monkeypatch.setattr("ig_captioner.hub.load_model", fail)
    code, lines, errors = run("classify", "0.png", "--labels", "cat")
    assert (code, lines, errors) == (1, [], ["ig-captioner: error: RuntimeError: out of memory"])
    errors = run("classify", "0.png", "--labels", "cat", "--traceback")[2]
    assert errors[0].startswith("Traceback") and errors[-1] == "ig-captioner: error: RuntimeError: out of memory"

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("ig_captioner.hub.load_model", interrupt)
    assert run("classify", "0.png", "--labels", "cat") == (130, [], [])
