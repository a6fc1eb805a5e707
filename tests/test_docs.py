"""Every Python snippet of the README runs as it stands, one after the other, with the shipped checkpoint."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


SNIPPETS = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parent.parent / "README.md").read_text("utf-8"), re.DOTALL
)


@pytest.fixture(scope="module")
def names() -> dict:
    """What the snippets so far have defined."""
    return {}


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippet(snippet, names, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save("photo.jpg")
    exec(compile(snippet, "README.md", "exec"), names)
    assert capsys.readouterr().out.strip()
