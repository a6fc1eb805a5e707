"""What is imported when: the command line starts without torch, and the package registers with the Auto classes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ig_captioner


ROOT = Path(ig_captioner.__file__).parents[1]


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    """Runs `code` in a new process; `arguments` become `sys.argv`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    code = f"import sys; sys.argv = {list(arguments)!r}\n{code}"
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)


COMMANDS = """
import contextlib, io
from ig_captioner.cli.main import main

SLOW = {"torch", "transformers", "huggingface_hub", "tokenizers", "numpy", "PIL"}
for arguments, expected in {
    ("--help",): 0,
    ("--version",): 0,
    ("classify", "--help"): 0,
    ("completion", "bash"): 0,
    ("frobnicate",): 2,
    ("classify", "photo.jpg"): 2,
    ("classify", "photo.jpg", "--compiled-labels", "folder", "--labels", "cat"): 2,
    ("score", "photo.jpg"): 2,
    ("compile-labels", "folder"): 2,
}.items():
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        code = main(list(arguments))
    assert code == expected, (arguments, code, errors.getvalue())
    assert not SLOW & set(sys.modules), (arguments, SLOW & set(sys.modules))
"""
OURS = "import ig_captioner\n"
THEIRS = "from transformers import AutoConfig, AutoModelForZeroShotImageClassification, AutoProcessor\n"
AUTO_CLASSES = """
config = AutoConfig.from_pretrained(ig_captioner.DEFAULT_CHECKPOINT)
assert type(config) is ig_captioner.IGCaptionerConfig
model = AutoModelForZeroShotImageClassification.from_config(config)
assert type(model) is ig_captioner.IGCaptionerForZeroShotImageClassification
assert type(AutoProcessor.from_pretrained(ig_captioner.DEFAULT_CHECKPOINT)) is ig_captioner.IGCaptionerProcessor
"""
ALL_NAMES = """
values = {name: getattr(ig_captioner, name) for name in ig_captioner.__all__}
assert callable(values["information_gain"]) and callable(ig_captioner.information_gain)
"""


def test_what_needs_no_model_imports_nothing_slow_and_the_rest_comes_when_asked_for():
    """In the process of a command: the Auto classes, ours imported first, know the package, and every name is there."""
    pytest.importorskip("shtab")
    result = run_python(COMMANDS + OURS + THEIRS + AUTO_CLASSES + ALL_NAMES, "/usr/bin/ig-captioner")
    assert (result.returncode, result.stderr) == (0, "")


def test_the_auto_classes_know_a_package_that_is_imported_after_them():
    result = run_python(THEIRS + OURS + AUTO_CLASSES, "script.py")
    assert result.returncode == 0, result.stderr


def test_a_module_run_as_the_command_line_imports_nothing_slow():
    """Python tells what it imports."""
    command = [sys.executable, "-X", "importtime", "-m", "ig_captioner.cli", "--version"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert result.returncode == 0 and "ig_captioner.cli.main" in imported
    assert not {"torch", "transformers"} & imported

