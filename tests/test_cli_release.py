"""`ig-captioner info`, `compile-labels`, `release`, `push`, `demo` and `completion`."""

import csv
import io
import json
import re
import subprocess
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_checkpoint import save_checkpoint
from test_card import write_measured

from ig_captioner import CompiledLabels, IGCaptionerForConditionalGeneration, cli, release
from ig_captioner.release import RELEASE_FILES


pytestmark = pytest.mark.usefixtures("here")


# info


def test_info(run, checkpoint):
    code, lines, errors = run("info", "--format", "jsonl")
    assert (code, errors) == (0, [])
    described = json.loads(lines[0])
    config = IGCaptionerForConditionalGeneration.from_pretrained(checkpoint).config
    assert described["checkpoint"] == checkpoint and described["licence"] == "unknown"
    model = IGCaptionerForConditionalGeneration.from_pretrained(checkpoint)
    assert (described["parameters"], described["dtype"]) == (model.num_parameters(), "float16")
    assert described["image_size"] == config.vision_config.image_size
    assert described["text_width"] == config.text_config.hidden_size
    assert (described["prior_weight"], described["prior_source"]) == (0.75, "unconditional")
    assert (described["score_temperature"], described["abstain_threshold"]) == (1, "none")
    assert described["longest_text"] == 12  # of the tokenizer; the model has more positions
    (row,) = csv.DictReader(io.StringIO("\n".join(run("info", "--format", "csv")[1])))
    assert row == {name: str(value) for name, value in described.items()}
    table = run("info")[1]
    assert f"{model.num_parameters():,}" in next(line for line in table if line.startswith("parameters:"))
    assert {line.split(":")[0].replace(" ", "_") for line in table} == set(described)
    assert len({len(line) - len(line.split(":", 1)[1].lstrip()) for line in table}) == 1  # aligned


def test_info_of_mixed_weights_and_of_a_card(run, here, checkpoint):
    folder = save_checkpoint(here / "mixed")
    weights = load_file(folder / "model.safetensors")
    name = max(weights, key=lambda name: weights[name].numel())
    save_file({**weights, name: weights[name].bfloat16()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# mixed\n")
    described = json.loads(run("info", "mixed", "--format", "jsonl")[1][0])
    assert described["dtype"] == "float32, bfloat16" and described["licence"] == "mit"


def test_info_of_what_is_no_checkpoint(run, here):
    for name, message in (("./missing", "no such model folder"), ("0.png", "not a file"), (".", "has no config.json")):
        code, lines, errors = run("info", name)
        assert (code, lines, len(errors)) == (1, [], 1) and message in errors[0]
    folder = save_checkpoint(here / "bare")
    (folder / "model.safetensors").unlink()
    code, lines, errors = run("info", "bare")
    assert (code, lines, len(errors)) == (1, [], 1) and "model.safetensors" in errors[0]


# compile-labels


def test_compiled_labels_classify_like_labels(run, here):
    given = ["--labels", "cat", "dog", "--template", "{}", "a photo of a {}."]
    code, lines, errors = run("compile-labels", "out/labels", *given)
    assert (code, errors) == (0, []) and lines == [f"{here / 'out' / 'labels'}: 2 labels in 2 templates"]
    assert CompiledLabels.load("out/labels").labels == ("cat", "dog")
    photos = ["0.png", "1.png", "--prior-weight", "0.5"]
    expected = run("classify", *photos, *given)
    assert expected[0] == 0
    for option in ("--compiled-labels", "--labels-file"):
        assert run("classify", *photos, option, "out/labels") == expected


def test_compiled_labels_replace_nothing_else(run, here):
    assert run("compile-labels", "labels", "--labels", "cat")[0] == 0
    code, lines, errors = run("compile-labels", "labels", "--labels", "dog")
    assert (code, lines, len(errors)) == (1, [], 1) and "--overwrite" in errors[0]
    assert run("compile-labels", "labels", "--labels", "dog", "--overwrite")[0] == 0
    assert CompiledLabels.load("labels").labels == ("dog",)
    (here / "labels" / "notes.txt").touch()
    for folder, message in (("labels", "notes.txt"), ("0.png", "is a file")):
        code, lines, errors = run("compile-labels", folder, "--labels", "cat", "--overwrite")
        assert (code, lines, len(errors)) == (1, [], 1) and message in errors[0]
    assert CompiledLabels.load("labels").labels == ("dog",)


def test_labels_compiled_for_other_weights_are_refused(run, here):
    save_checkpoint(here / "other", dtype=torch.float32)
    weights = load_file(here / "other" / "model.safetensors")
    save_file({name: weight * 1.5 for name, weight in weights.items()}, here / "other" / "model.safetensors")
    assert run("compile-labels", "labels", "--labels", "cat", "--model", "other")[0] == 0
    code, lines, errors = run("classify", "0.png", "--compiled-labels", "labels")
    assert (code, lines, len(errors)) == (1, [], 1) and "compile them again" in errors[0]


# release and push


def test_release(run, here):
    code, lines, errors = run("release", "out", "--repo-id", "acme/tiny", "--license", "mit")
    assert (code, errors) == (0, [])
    names = {path.name for path in (here / "out").iterdir()}
    assert names == {*RELEASE_FILES, "card.yaml", "model.safetensors"} == {line.split()[1] for line in lines[2:]}
    assert str(here / "out") in lines[0]
    card = (here / "out" / "README.md").read_text()
    assert "# acme/tiny" in card and "license: mit" in card
    code, lines, errors = run("release", "out")
    assert (code, lines, len(errors)) == (1, [], 1) and "--overwrite" in errors[0]
    assert run("release", "out", "--model", "out", "--overwrite")[0] == 0
    assert run("classify", "0.png", "--labels", "cat", "--model", "out")[0] == 0


def test_release_with_results(run, here, checkpoint):
    of_zero_shot = write_measured(here / "zero-shot", checkpoint, classes=[0.25, 0.5])
    of_probe = write_measured(here / "probe", checkpoint, task="linear-probe", classes=[0.125, 0.375])
    code, lines, errors = run("release", "out", "--results", str(of_zero_shot), str(of_probe))
    assert (code, errors) == (0, [])
    listed = {name: int(size.replace(",", "")) for size, name in map(str.split, lines[2:])}
    assert {"results/zero-shot.json", "results/probe.json"} < set(listed)
    files = [path for path in (here / "out").rglob("*") if path.is_file()]
    assert listed == {path.relative_to(here / "out").as_posix(): path.stat().st_size for path in files}
    card = (here / "out" / "README.md").read_text()
    assert all(f"Title of {task}" in card for task in ("zero-shot", "linear-probe"))
    code, lines, errors = run("release", "other", "--results", "missing.json")
    assert (code, lines, len(errors)) == (1, [], 1) and "missing.json" in errors[0]
    assert not (here / "other").exists()


def test_push(run, monkeypatch):
    calls = []

    def push_release(folder, repo_id, **options):
        calls.append((folder, repo_id, options))
        return f"https://hub/{repo_id}"

    monkeypatch.setattr(release, "push_release", push_release, raising=False)
    assert run("push", "folder", "me/tiny") == (0, ["https://hub/me/tiny"], [])
    options = ["--private", "--revision", "v2", "--message", "Trained for longer"]
    assert run("push", "folder", "me/tiny", *options) == (0, ["https://hub/me/tiny"], [])
    expected = {"private": None, "revision": None, "commit_message": None}
    assert calls[0] == ("folder", "me/tiny", expected)
    assert calls[1][2] == {"private": True, "revision": "v2", "commit_message": "Trained for longer"}

    def refuse(*args, **options):
        raise OSError("401: log in\nfirst")

    monkeypatch.setattr(release, "push_release", refuse, raising=False)
    assert run("push", "folder", "me/tiny") == (1, [], ["ig-captioner: error: 401: log in first"])


# demo


def test_demo(run, monkeypatch, checkpoint):
    calls = []
    stand_in = types.SimpleNamespace(launch=lambda *args, **options: calls.append((args, options)))
    monkeypatch.setitem(sys.modules, "ig_captioner.demo.app", stand_in)
    assert run("demo") == (0, [], [])
    assert run("demo", "--model", "m", "--port", "8000", "--host", "0.0.0.0", "--device", "cpu", "--open") == (
        0,
        [],
        [],
    )
    defaults = {"host": "127.0.0.1", "port": None, "device": "auto", "open_browser": False}
    given = {"host": "0.0.0.0", "port": 8000, "device": "cpu", "open_browser": True}
    assert calls == [((checkpoint,), defaults), (("m",), given)]


@pytest.mark.parametrize(("module", "message"), [("gradio.themes", r"pip install 'ig_captioner\[app\]'"), ("os", "os")])
def test_demo_without_gradio(run, monkeypatch, module, message):
    def launch(*args, **options):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setitem(sys.modules, "ig_captioner.demo.app", types.SimpleNamespace(launch=launch))
    code, lines, (error,) = run("demo")
    assert (code, lines) == (1, []) and re.search(message, error) and ("gradio" in error) == (module != "os")


# completion


def complete(script: str, words: list[str]) -> list[str]:
    """What bash offers for the last word."""
    ask = f"""
        source {script}
        COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${{#COMP_LINE}}
        _shtab_ig_captioner ig-captioner "${{@: -1}}" "${{@: -2:1}}"
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    answer = subprocess.run(["bash", "-c", ask, "bash", *words], capture_output=True, text=True, check=True)
    return sorted(line.strip() for line in answer.stdout.splitlines() if line.strip())


def test_completion_in_bash(run, here):
    pytest.importorskip("shtab")
    code, lines, errors = run("completion", "bash")
    assert (code, errors) == (0, [])
    (here / "completion.sh").write_text("\n".join(lines))
    script = str(here / "completion.sh")
    assert complete(script, ["ig-captioner", "c"]) == ["caption", "classify", "compile-labels", "completion"]
    assert complete(script, ["ig-captioner", "evaluate", "z"]) == ["zero-shot"]
    assert complete(script, ["ig-captioner", "score", "--te"]) == ["--texts", "--texts-file"]
    assert complete(script, ["ig-captioner", "score", "--format", ""]) == ["csv", "jsonl", "table"]
    assert complete(script, ["ig-captioner", "caption", "0"]) == ["0.png"]
    assert complete(script, ["ig-captioner", "classify", "--labels-file", "br"]) == ["broken.png"]


@pytest.mark.parametrize("shell", cli.SHELLS)
def test_completion_scripts_name_all_commands(run, shell):
    pytest.importorskip("shtab")
    code, lines, errors = run("completion", shell)
    assert (code, errors) == (0, [])
    script = "\n".join(lines)
    assert all(name in script for name in ("classify", "retrieve", "compile-labels", "prior-weight"))


def test_completion_without_shtab(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    code, lines, errors = run("completion", "bash")
    assert (code, lines) == (1, []) and errors == [
        "ig-captioner: error: completion needs shtab: pip install 'ig_captioner[cli]'"
    ]
