"""What `pip install` installs: the wheel of a clean clone, in an environment of its own. `make wheel-check` is the same
with the dependencies from the index, too.
"""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import pipeline

from ig_captioner import DEFAULT_CHECKPOINT, IGZeroShotImageClassificationPipeline


ROOT = Path(__file__).parents[1]
LABELS = ["cat", "dog", "a photo of the sea"]


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_of_a_clean_clone_classifies(tmp_path):
    pytest.importorskip("setuptools", minversion="77", reason="building the wheel needs it")
    if not (ROOT / ".git").exists():
        pytest.skip("the wheel is built from a clean clone, and this tree is in no git repository to clone")
    run("git", "clone", "--quiet", ROOT, "clone", cwd=tmp_path)
    pip = ("-m", "pip", "--quiet", "--disable-pip-version-check")
    run(sys.executable, *pip, "wheel", "--no-deps", "--no-build-isolation", "-w", "dist", "./clone", cwd=tmp_path)
    (wheel,) = (tmp_path / "dist").iterdir()
    installed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert installed == set(run("git", "ls-files", "ig_captioner", cwd=tmp_path / "clone").splitlines())

    run(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    # the dependencies alone: what is installed there for development is found by other means than the path
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    run(sys.executable, *pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    where = run(python, "-c", "import ig_captioner; print(ig_captioner.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(packages)

    noise = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((90, 60)).save(tmp_path / "photo.png")
    output = run(
        python.parent / "ig-captioner", "classify", "photo.png", "--format", "jsonl", "--labels", *LABELS, cwd=tmp_path
    )
    scores = {row["label"]: row["score"] for row in json.loads(output)["predictions"]}
    classify = pipeline(model=DEFAULT_CHECKPOINT, pipeline_class=IGZeroShotImageClassificationPipeline)
    expected = classify(str(tmp_path / "photo.png"), candidate_labels=LABELS)
    assert scores == pytest.approx({row["label"]: row["score"] for row in expected}, abs=1e-5)
