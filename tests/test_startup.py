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
    code = main(list(arguments))
    assert code == expected, (arguments, code)
    assert not SLOW & set(sys.modules), (arguments, SLOW & set(sys.modules))
"""
ALL_NAMES = """
import ig_captioner
values = {name: getattr(ig_captioner, name) for name in ig_captioner.__all__}
assert callable(values["information_gain"]) and callable(ig_captioner.information_gain)
from transformers import AutoConfig
assert type(AutoConfig.from_pretrained(ig_captioner.DEFAULT_CHECKPOINT)) is ig_captioner.IGCaptionerConfig
"""


def test_what_needs_no_model_imports_nothing_slow():
    """And every public name is there in the process of a command when it is asked for."""
    pytest.importorskip("shtab")
    result = run_python(COMMANDS + ALL_NAMES, "/usr/bin/ig-captioner")
    assert result.returncode == 0, result.stderr


def test_a_module_run_as_the_command_line_imports_nothing_slow():
    """Python tells what it imports."""
    command = [sys.executable, "-X", "importtime", "-m", "ig_captioner.cli", "--version"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert result.returncode == 0 and "ig_captioner.cli.main" in imported
    assert not {"torch", "transformers"} & imported


AUTO_CLASSES = """
config = AutoConfig.from_pretrained(ig_captioner.DEFAULT_CHECKPOINT)
model = AutoModelForZeroShotImageClassification.from_config(config)
assert type(model) is ig_captioner.IGCaptionerForZeroShotImageClassification
assert type(AutoProcessor.from_pretrained(ig_captioner.DEFAULT_CHECKPOINT)) is ig_captioner.IGCaptionerProcessor
"""
OURS = "import ig_captioner\n"
THEIRS = "from transformers import AutoConfig, AutoModelForZeroShotImageClassification, AutoProcessor\n"


@pytest.mark.parametrize("imports", [OURS + THEIRS, THEIRS + OURS], ids=["ours first", "theirs first"])
def test_the_auto_classes_know_the_package_in_both_orders_of_import(imports):
    result = run_python(imports + AUTO_CLASSES, "script.py")
    assert result.returncode == 0, result.stderr
    if imports.startswith(OURS):  # else transformers has spoken for torchao, if that is installed
        assert result.stderr == ""
