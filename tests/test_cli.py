"""`ig-captioner classify` and `caption` in this process: output, exit codes, and errors of one line."""

import csv
import io
import json
import re
import shlex
import sys
import time
import weakref

import PIL.Image
import pytest
import torch
from command_line import FIELDS, LABELS, write_photo

import ig_captioner
from ig_captioner import (
    IGCaptionerForConditionalGeneration,
    IGZeroShotImageClassificationPipeline,
    cli,
    compiled_labels,
)
from ig_captioner.checkpoint import choose_device, load_model, load_processor
from ig_captioner.cli import output as cli_output
from ig_captioner.cli.output import columns
from ig_captioner.data.prompts import load_prompts
from ig_captioner.input_rules import clean_text, read_image
from ig_captioner.processing_ig_captioner import load_rgb_image


pytestmark = pytest.mark.usefixtures("here")


# classify


@pytest.mark.core
def test_json_is_what_the_pipeline_says(run, checkpoint):
    options = ["--top-k", "3", "--prior-weight", "0.5", "--template", "{}", "a photo of a {}."]
    code, lines, errors = run("classify", "0.png", "1.png", "--format", "jsonl", "--labels", *LABELS, *options)
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


@pytest.mark.parametrize(("options", "weight"), [([], 0.75), (["--prior-weight", "1"], 1)])
def test_tables(run, options, weight):
    code, lines, errors = run("classify", "0.png", "1.png", "--labels", *LABELS, *options)
    assert (code, errors) == (0, [])
    formula = "IG = log P(T|I) - 0.75 * log P(T)" if weight < 1 else "IG = log P(T|I) - log P(T)"
    assert lines[:2] == [f"{formula}, in nats; score: softmax of IG over the labels", ""]
    assert [lines[2], lines[8], lines[9]] == ["0.png", "", "1.png"] and len(lines) == 15
    for table in (lines[3:8], lines[10:15]):
        assert table[0].split("  ")[-1] == "label"
        ends = {re.search(r"( +[\d.-]+){4}  ", row).end() for row in table[1:]}  # aligned
        assert ends == {table[0].index("label")}
        figures = [[float(cell) for cell in row.split()[:4]] for row in table[1:]]
        gains = [row[3] for row in figures]
        assert gains == sorted(gains, reverse=True) and sum(row[0] for row in figures) == pytest.approx(1, abs=0.01)
        for _, caption, prior, gain in figures:
            assert gain == pytest.approx(caption - weight * prior, abs=0.02)


def test_csv_has_the_figures_of_json(run):
    photos, labels = ["0.png", "1.png"], ["--labels", "cat", 'a "dog",\nhot', "--top-k", "1"]
    objects = [json.loads(line) for line in run("classify", *photos, *labels, "--format", "jsonl")[1]]
    code, lines, errors = run("classify", *photos, *labels, "--format", "csv")
    assert code == 0 and all("note: " in line for line in errors)
    rows = list(csv.DictReader(io.StringIO("\n".join(lines))))
    assert list(rows[0]) == ["image", *FIELDS] and [row["image"] for row in rows] == photos
    for row, result in zip(rows, objects, strict=True):
        (prediction,) = result["predictions"]
        assert row["label"] == prediction["label"]
        assert [float(row[name]) for name in FIELDS[1:]] == [prediction[name] for name in FIELDS[1:]]


def test_batches_change_nothing(run):
    results = [run("classify", "0.png", "1.png", "2.png", "--labels", *LABELS, "--batch-size", n) for n in "124"]
    assert results[0][0] == 0 and results[0] == results[1] == results[2]


def test_labels_from_a_file_come_after_those_of_the_command_line(run, tmp_path):
    (tmp_path / "labels.txt").write_bytes("\ufeffdog\r\n\n  a photo \nof".encode())
    code, lines, _ = run("classify", "0.png", "--format", "jsonl", "--labels", "cat", "--labels-file", "labels.txt")
    assert (
        code == 0
        and lines == run("classify", "0.png", "--format", "jsonl", "--labels", "cat", "dog", "a photo", "of")[1]
    )
    assert (
        run("classify", "0.png", "--format", "jsonl", "--labels", "cat", "dog", "--labels", "a photo", "of")[1] == lines
    )


def test_wide_and_unprintable_text_puts_nothing_out_of_line(run):
    labels = ["猫", "a\x1b[31m\nb", "🐱🐱", "cafe\u0301", "cat"]
    code, lines, _ = run("classify", "0.png", "--labels", *labels)
    assert code == 0 and len(lines) == 4 + len(labels)
    assert not any("\x1b" in line for line in lines) and any(line.endswith(r"  a\x1b[31m b") for line in lines)
    result = json.loads(run("classify", "0.png", "--format", "jsonl", "--labels", *labels)[1][0])
    assert {entry["label"] for entry in result["predictions"]} == set(map(clean_text, labels))


def test_columns_of_a_terminal():
    assert [columns(text) for text in ("cat", "猫", "🐱🐱", "cafe\u0301")] == [3, 2, 4, 4]
    lines = cli_output.table([["猫", "a"], ["b", "猫"], ["1234", "c"]]).splitlines()
    assert lines == ["    猫  a", "     b  猫", "  1234  c"]


def test_output_survives_an_encoding_that_lacks_the_characters(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.main(["classify", "0.png", "--labels", "猫"]) == 0
    out.flush()
    assert b"\\u732b" in out.buffer.getvalue()


def test_a_photo_that_cannot_be_read_costs_only_itself(run):
    arguments = ["--format", "jsonl", "--labels", *LABELS]
    good = run("classify", "0.png", "1.png", *arguments)[1]
    for command, rest in (("classify", arguments), ("caption", arguments[:2])):
        photos = ["missing.png", "0.png", "broken.png", "1.png", "*.gif"]
        code, lines, errors = run(command, *photos, *rest, "--batch-size", "2")
        assert code == 1 and [json.loads(line)["image"] for line in lines] == ["0.png", "1.png"]
        assert command == "caption" or lines == good
        assert errors[0] == "ig-captioner: error: no images in the pattern '*.gif'"
        for error, name in zip(errors[1:], ["missing.png", "broken.png"], strict=True):
            assert error.startswith(f"ig-captioner: error: cannot read the image '{name}'")
    code, lines, errors = run("classify", "missing.png", *arguments)
    assert (code, lines, len(errors)) == (1, [], 1)


def test_folders_and_patterns(run, here):
    for index, name in enumerate(["b.JPG", "a/2.png", "a/10.webp", ".hidden.png", ".thumbs/1.png", "a/x[1].png"]):
        write_photo(here / "photos" / name, index)
    (here / "photos" / "notes.txt").write_text("no photo")
    (here / "photos" / "a" / "folder.png").mkdir()
    (here / "empty").mkdir()

    def read(*photos):
        code, lines, errors = run("classify", *photos, "--labels", "cat", "--format", "jsonl")
        return code, [json.loads(line)["image"] for line in lines], errors

    everything = ["photos/a/10.webp", "photos/a/2.png", "photos/a/x[1].png", "photos/b.JPG"]
    assert read("photos") == (0, everything, []) and read("photos/") == (0, everything, [])
    assert read("photos/**") == (0, everything, []) and read("photos/**/*.png") == (0, everything[1:3], [])
    assert read("photos/*") == (0, everything[3:], [])
    assert read("photos/a/x[1].png", "0.png") == (0, [everything[2], "0.png"], [])  # a name, no pattern
    code, names, errors = read("empty", "1.png")
    assert (code, names, errors) == (1, ["1.png"], ["ig-captioner: error: no images in the folder 'empty'"])


COMMA_LISTS = {  # what stands behind --labels: the labels
    ("cat,dog,ship",): {"cat", "dog", "ship"},
    ("cat, polar bear",): {"cat", "polar bear"},
    ("cat,", "polar", "bear,", "ship"): {"cat", "polar bear", "ship"},
    ("Washington, D.C.", "Rome"): {"Washington, D.C.", "Rome"},
    ("cat,dog", "ship"): {"cat,dog", "ship"},
}


@pytest.mark.parametrize("labels", COMMA_LISTS)
def test_labels_between_commas_are_split_or_said(run, labels):
    code, lines, errors = run("classify", "0.png", "--format", "jsonl", "--labels", *labels)
    predictions = json.loads(lines[0])["predictions"]
    assert code == 0 and {entry["label"] for entry in predictions} == COMMA_LISTS[labels]
    assert len(errors) == 1 and errors[0].startswith("ig-captioner: note: ") and "commas" in errors[0]
    code, lines, errors = run("classify", "0.png", "--strict", "--labels", *labels)
    assert (code, lines, len(errors)) == (1, [], 1) and "commas" in errors[0]


def test_white_space_and_byte_order_marks_change_no_score(run, here):
    def scores(*arguments):
        code, lines, errors = run("classify", "0.png", "--format", "jsonl", *arguments)
        assert code == 0
        return json.loads(lines[0])["predictions"], errors

    expected, silence = scores("--labels", "dog", "polar bear", "--template", "a {}")
    assert silence == []
    labels = ["\ufeffdog\n", "polar\u00a0 bear "]
    predictions, errors = scores("--labels", *labels, "--template", "a\t{} ")
    assert predictions == expected and any("'\\ufeffdog\\n'" in error for error in errors)
    for name, encoding in (("a.txt", "utf-8-sig"), ("b.txt", "utf-16"), ("c.txt", "utf-32-be")):
        text = ("\ufeff" if "be" in encoding else "") + "dog \r\n polar bear\r\n"
        (here / name).write_bytes(text.encode(encoding))
        assert scores("--labels-file", name, "--template", "a {}") == (expected, [])


def test_further_frames_and_other_files_of_a_folder_are_said_once(run, here):
    (here / "mixed").mkdir()
    for number in range(3):
        frames = [PIL.Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
        frames[0].save(here / "mixed" / f"{number}.gif", save_all=True, append_images=frames[1:])
        (here / "mixed" / f"{number}.tga").write_bytes(b"")
    code, lines, errors = run("classify", "mixed", "--labels", "cat", "dog", "--format", "csv")
    assert code == 0 and len(lines) == 7 and len(errors) == 2
    assert "passed over: 3 x .tga" in errors[0] and "first frame" in errors[1] and "(3: 'mixed/0.gif'" in errors[1]
    code, lines, errors = run("classify", "mixed", "--labels", "cat", "dog", "--strict")
    assert (code, lines) == (1, []) and "passed over" in errors[0]


@pytest.mark.parametrize("command", [["classify", "--labels", "cat"], ["caption"], ["score", "--texts", "a"]])
def test_a_batch_does_not_hold_its_photos(run, monkeypatch, command):
    still_open, most = set(), []
    load = read_image

    def load_and_count(name, *args, **kwargs):
        image = load(name, *args, **kwargs)
        if isinstance(name, str):
            weakref.finalize(image, still_open.discard, len(most))
            still_open.add(len(most))
            most.append(len(still_open))
        return image

    monkeypatch.setattr("ig_captioner.input_rules.read_image", load_and_count)
    assert run(command[0], *["0.png", "1.png", "2.png"] * 3, "--batch-size", "9", *command[1:])[0] == 0
    assert len(most) == 9 and max(most) <= 3  # what loops and frames still name


# compiled labels


def test_labels_of_a_file_are_tokenised_once(run, here, monkeypatch):
    (here / "labels.txt").write_text("\n".join(LABELS))
    encode, calls = compiled_labels.encode_texts, []
    monkeypatch.setattr(
        compiled_labels, "encode_texts", lambda *args, **kwargs: calls.append(args[1]) or encode(*args, **kwargs)
    )
    arguments = ["0.png", "1.png", "2.png", "--labels-file", "labels.txt", "--batch-size", "1"]
    assert run("classify", *arguments)[0] == 0
    assert calls == [[f"a photo of a {label}." for label in LABELS]]


def test_slow_work_is_announced_with_what_saves_it(run, monkeypatch, capsys):
    monkeypatch.setattr(cli_output, "SLOW", 0.0)
    with cli_output.note_if_slow("compiling; use this command"):
        said, until = "", time.monotonic() + 60
        while not said and time.monotonic() < until:
            said = capsys.readouterr().err
    assert said == "ig-captioner: compiling; use this command\n"


def test_labels_and_templates_of_a_data_set(run):
    options = ["--format", "jsonl", "--labels-file", "stl10", "--templates-file", "stl10"]
    code, lines, errors = run("classify", "0.png", *options)
    prompts = load_prompts("stl10")
    assert (code, errors) == (0, [])
    assert {row["label"] for row in json.loads(lines[0])["predictions"]} == set(prompts.class_names)
    given = run(
        "classify", "0.png", "--format", "jsonl", "--labels", *prompts.class_names, "--template", *prompts.templates
    )
    for row, other in zip(json.loads(lines[0])["predictions"], json.loads(given[1][0])["predictions"], strict=True):
        assert row == pytest.approx(other, abs=1e-4)


# caption


@pytest.mark.core
def test_captions_and_their_scores(run, checkpoint):
    code, lines, errors = run(
        "caption", "0.png", "1.png", "--format", "jsonl", "--max-new-tokens", "4", "--num-beams", "2"
    )
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
    code, table, _ = run("caption", "0.png", "1.png", "--max-new-tokens", "4", "--num-beams", "2")
    assert code == 0 and table[0] == "IG = log P(T|I) - 0.75 * log P(T), in nats"
    assert table[2].split("  ")[-1] == "image: caption" and len(table) == 5
    for line, written in zip(lines, table[3:], strict=True):
        result = json.loads(line)
        assert written.endswith(f"  {result['image']}: {result['caption']}")
        assert written.split()[:3] == [f"{result[name]:.2f}" for name in FIELDS[2:]]


def test_captions_fit_the_model(run):
    assert run("caption", "0.png")[0] == 0  # 30 tokens by default, but this model has 12 positions
    assert run("caption", "0.png", "--max-new-tokens", "11")[0] == 0
    code, lines, errors = run("caption", "0.png", "--max-new-tokens", "12")
    assert (code, lines, len(errors)) == (1, [], 1) and "12" in errors[0] and "11 tokens at most" in errors[0]


# usage


TASKS = ("zero-shot", "retrieval", "compositional", "captioning", "linear-probe")
COMMANDS = (
    *("classify", "caption", "score", "retrieve", "demo", "info", "compile-labels", "release", "push", "completion"),
    *(f"evaluate {task}" for task in TASKS),
)


def test_help_and_version(run):
    code, lines, errors = run("--version")
    assert (code, lines, errors) == (0, [f"ig-captioner {ig_captioner.__version__}"], [])
    assert run("--help")[0] == 0
    for command in COMMANDS:
        code, lines, errors = run(*command.split(), "--help")
        assert (code, errors) == (0, [])
        assert "examples:" in lines and any(line.startswith(f"  ig-captioner {command}") for line in lines)
        assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_of_the_help_parse(command):
    """Every line of examples that calls the command, as a shell splits it."""
    parser = cli.build_parser()
    for name in command.split():
        (commands,) = (action for action in parser._actions if isinstance(action.choices, dict))
        parser = commands.choices[name]
    lines = [line.split(" | ")[0].split(" > ")[0] for line in parser.epilog.splitlines()]
    called = [shlex.split(line, comments=True) for line in lines if line.startswith("  ig-captioner ")]
    assert called
    for words in called:
        assert (
            cli.build_parser().parse_args(words[1:]).run.__name__.replace("_", "-")
            == words[1 + (words[1] == "evaluate")]
        )


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
    (["classify", "0.png", "--labels", "cat", "--prior-weight", "1e300"], "prior-weight.*0 to 100.*'1e300'"),
    (["classify", "0.png", "--labels", "cat", "--batch-size", "9" * 5000], "batch-size.*at most 65536.*9"),
    (["classify", "0.png", "--labels", "cat", "--format", "xml"], "format.*xml"),
    (["classify", "0.png", "--labels=--"], "'--' is no value: --labels=--"),
    (["caption", "0.png", "--format=--"], "'--' is no value: --format=--"),
    (["classify", "0.png", "--compiled-labels", "x", "--labels", "cat"], "--compiled-labels brings.*--labels is given"),
    (["classify", "0.png", "--top-k", "1", "a\nb\x1b[31m"], r"arguments: a b\\x1b\[31m; photos"),
    (["caption"], "PHOTO"),
    (["caption", "0.png", "--num-beams", "65"], "num-beams.*at most 64"),
    (["score", "0.png", "1.png"], "no texts: give --texts or --texts-file"),
    (["score", "--texts", "a", "0.png"], "photos come before the options: PHOTO... --texts"),
    (["retrieve", "0.png"], "--query --texts-file"),
    (["retrieve", "0.png", "--query", "a", "--texts-file", "b"], "not allowed with"),
    (["retrieve", "0.png", "--query", "a", "1.png"], "1.png.*photos come before"),
    (["demo", "--port", "65536"], "port.*at most 65535"),
    (["compile-labels", "out"], "no labels"),
    (["push", "folder"], "REPO"),
    (["completion", "fish"], "fish"),
    (["release"], "DIR$|DIR "),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_USAGE)
def test_wrong_usage(run, arguments, message):
    code, lines, errors = run(*arguments)
    assert (code, lines, len(errors)) == (2, [], 1)
    assert errors[0].startswith("ig-captioner") and "error: " in errors[0] and len(errors[0]) < 1200
    assert re.search(message, errors[0])


def test_only_commands_with_photos_speak_of_them(run):
    for arguments in (["release", "a", "b"], ["info", "a", "b"], ["caption", "0.png", "--colour"]):
        code, _, (error,) = run(*arguments)
        assert code == 2 and "unrecognized" in error and "photos" not in error
        assert error.startswith(f"ig-captioner {arguments[0]}: error: ")


WRONG_INPUT = [
    (["--labels", "cat", "--template", "a photo"], "--template must be a string with .* got 'a photo'"),
    (["--labels", "", "dog"], "one of --labels is empty: ''"),
    (["--labels", "\u00a0\n", "dog"], "one of --labels is empty"),
    (["--labels-file", "missing.txt"], "missing.txt.*no such file.*imagenet"),
    (["--labels-file", "0.png"], "0.png is not UTF-8"),
    (["--labels-file", "empty.txt"], "no lines in empty.txt"),
    (["--labels", "\udc80"], r"--labels must be Unicode text \(UTF-8\), got '\\udc80'"),
    (["--compiled-labels", "folder"], "cannot read compiled labels from 'folder'"),
    (["--labels-file", "folder"], "cannot read compiled labels from 'folder'"),
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
        assert choose_device("auto").type == ("cuda" if available else "cpu")
        assert choose_device("cpu").type == "cpu"
    assert choose_device("cuda").type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no GPU"):
        choose_device("cuda")


def test_unexpected_errors_are_one_line_too(run, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of\n  memory")

    monkeypatch.setattr("ig_captioner.captioners.own.load_model", fail)
    code, lines, errors = run("classify", "0.png", "--labels", "cat")
    assert (code, lines, errors) == (1, [], ["ig-captioner: error: RuntimeError: out of memory"])
    errors = run("classify", "0.png", "--labels", "cat", "--traceback")[2]
    assert errors[0].startswith("Traceback") and errors[-1] == "ig-captioner: error: RuntimeError: out of memory"

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("ig_captioner.captioners.own.load_model", interrupt)
    assert run("classify", "0.png", "--labels", "cat") == (130, [], [])
