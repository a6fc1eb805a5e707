"""`ig-captioner classify` on exported graphs: what it prints for the checkpoint, without torch."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from small_checkpoint import save_checkpoint

from ig_captioner import export
from ig_captioner.exported import TEXTS_PER_RUN, ExportedClassifier, is_exported


pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
PHOTOS = ["0.png", "1.png", "2.png"]
LABELS = ["cat", "dog", "a photo", "of"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[str, str]:
    """A checkpoint, and its graphs."""
    folder = tmp_path_factory.mktemp("exported")
    checkpoint = str(save_checkpoint(folder / "checkpoint", score_temperature=2.0, abstain_threshold=-1.0))
    assert export.main([checkpoint, str(folder / "graphs")]) == 0
    return checkpoint, str(folder / "graphs")


def assert_close(found: list[str], expected: list[str]) -> None:
    """Lines of JSON with the same photos and labels, and figures that are equal to 1e-4."""
    assert len(found) == len(expected) > 0
    for pair in zip(found, expected, strict=True):
        ours, theirs = map(json.loads, pair)
        assert ours["image"] == theirs["image"]
        assert len(ours["predictions"]) == len(theirs["predictions"])
        for entry, other in zip(ours["predictions"], theirs["predictions"], strict=True):
            assert list(entry) == list(other) and entry["label"] == other["label"]
            figures = {name: value for name, value in other.items() if name != "label"}
            assert {name: entry[name] for name in figures} == pytest.approx(figures, abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--template", "a photo of a {}.", "{}", "--prior-weight", "0.5"),
        ("--multi-label", "--abstain-below", "0.5", "--top-k", "2"),
        ("--abstain-below=-inf", "--batch-size", "2", "--device", "cpu"),
    ],
)
def test_graphs_say_what_the_checkpoint_says(run, here, models, options):
    outputs = []
    for model in models:
        code, lines, errors = run(
            "classify", *PHOTOS, "--labels", *LABELS, "--format", "jsonl", "--model", model, *options
        )
        assert (code, errors) == (0, [])
        outputs.append(lines)
    assert_close(outputs[1], outputs[0])
    tables = [run("classify", "0.png", "--labels", *LABELS, "--model", model, *options)[1] for model in models]
    words = [[re.sub(r"-?[\d.]+", "", line).split() for line in table] for table in tables]
    assert words[0] == words[1] and ["score", "log", "P(T|I)", "log", "P(T)", "IG", "label"] in words[0]


def test_many_labels_are_scored_in_several_runs(run, here, models):
    labels = [f"{first} {second}" for first in LABELS for second in ("cat", "dog", "a", "of", "photo") * 4]
    assert len(labels) > TEXTS_PER_RUN
    arguments = ("classify", "0.png", "--labels", *labels, "--format", "jsonl")
    found, expected = (run(*arguments, "--model", model)[1] for model in reversed(models))
    assert_close(found, expected)


def test_texts_that_are_cut_and_photos_that_are_broken_are_told(run, here, models):
    arguments = ("classify", "broken.png", "0.png", "--labels", "cat " * 20, "dog", "--format", "jsonl", "--model")
    (_, expected, errors), (code, found, told) = (run(*arguments, model) for model in models)
    assert code == 1
    assert_close(found, expected)
    assert sorted(told) == sorted(errors) and any("were cut" in line for line in told)


def test_neither_torch_nor_transformers_is_imported(here, models):
    code = (
        "import sys; from ig_captioner.cli import main; code = main(sys.argv[1:]); "
        "assert not {'torch', 'transformers', 'huggingface_hub', 'onnx'} & set(sys.modules); sys.exit(code)"
    )
    arguments = ["classify", "0.png", "--labels", "cat", "dog", "--model", models[1]]
    environment = {**os.environ, "PYTHONPATH": str(export.Path(export.__file__).parents[1])}
    program = ["ig-captioner", *arguments]  # as the package sees that it is the command line
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv = {program!r}; {code}"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "cat" in result.stdout and "dog" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("classify", "0.png", "--labels", "cat", "--prompt", "what?"), "--prompt"),
        (("classify", "0.png", "--labels", "cat", "--device", "cuda"), "--device cuda"),
        (("classify", "0.png", "--labels-file", "."), "--labels-file ."),
        (("classify", "0.png", "--labels", "cat", "--trust-remote-code"), "--trust-remote-code"),
        (("classify", "0.png", "--labels", "cat", "--label-prior", "1"), "--label-prior"),
        (("classify", "0.png", "--labels", "cat", "--reference-images", "1.png"), "--reference-images"),
        (("classify", "0.png", "--labels", "cat", "--prior-source", "unconditional"), "--prior-source"),
        (("classify", "0.png", "--compiled-labels", "folder"), "--compiled-labels"),
        (("caption", "0.png"), "only classify"),
        (("score", "0.png", "--texts", "cat"), "only classify"),
        (("compile-labels", "folder", "--labels", "cat"), "only classify"),
    ],
)
def test_what_graphs_do_not_know_is_refused(run, here, models, arguments, named):
    code, lines, errors = run(*arguments, "--model", models[1])
    assert (code, lines) == (2, []) and len(errors) == 1
    assert named in errors[0] and "exported graphs" in errors[0]


def test_without_onnxruntime_the_extra_is_named(run, here, models, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, lines, errors = run("classify", "0.png", "--labels", "cat", "--model", models[1])
    assert (code, lines) == (1, []) and "pip install 'ig_captioner[export]'" in errors[-1]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("settings.json", b"{", "settings.json"),
        ("settings.json", b"{}", "it has no prior_weight"),
        ("settings.json", b"\xff", "settings.json"),
        ("tokenizer.json", b"{}", "tokenizer.json"),
        ("tokenizer.json", None, "tokenizer.json"),
        ("image_encoder.onnx", b"onnx", "image_encoder.onnx"),
        ("text_prior.onnx", None, "text_prior.onnx"),
        ("weights.bin", None, "image_encoder.onnx"),
    ],
)
def test_damaged_folders_are_named(run, here, models, tmp_path, file, content, message):
    folder = shutil.copytree(models[1], tmp_path / "damaged")
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    code, lines, errors = run("classify", "0.png", "--labels", "cat", "--model", str(folder))
    assert (code, lines, len(errors)) == (1, [], 1)
    assert "cannot read the exported graphs" in errors[0] and str(folder) in errors[0] and message in errors[0]


def test_labels_are_a_list(models):
    with pytest.raises(ValueError, match="candidate_labels must be a non-empty list of strings, got 'cat'"):
        ExportedClassifier(models[1], "cat")


def test_graphs_beside_a_checkpoint_leave_it_one(run, here, models, tmp_path):
    both = shutil.copytree(models[0], tmp_path / "both")
    shutil.copytree(models[1], both, dirs_exist_ok=True)
    assert not is_exported(both)
    assert run("caption", "0.png", "--model", str(both))[0] == 0


def test_a_folder_of_an_older_export_takes_the_default_template(models, tmp_path):
    checkpoint, graphs = models
    assert is_exported(graphs) and not is_exported(checkpoint) and not is_exported(None)
    for path in export.Path(graphs).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings.pop("prompt_templates") == ["a photo of a {}."]
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    assert ExportedClassifier(tmp_path, ["cat"]).templates == ["a photo of a {}."]
