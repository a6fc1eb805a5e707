"""What tests of the commands share; their fixtures are in `conftest.py`."""

import numpy as np
import PIL.Image


FIELDS = ["label", "score", "caption_log_likelihood", "prior_log_likelihood", "information_gain"]
LABELS = ["cat", "dog", "a photo", "of"]


def write_photo(path, seed: int) -> None:
    """A small photo of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).resize((30, 20)).save(path)


def without_note(err: str) -> list[str]:
    """The lines of stderr but the first where it says which model was taken because none was named."""
    lines = err.splitlines()
    return lines[1:] if lines and lines[0].startswith("ig-captioner: no --model given") else lines
