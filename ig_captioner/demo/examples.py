"""Photos that anyone may use, to try the demos with. `photos/README.md` names their authors and terms."""

from pathlib import Path

from PIL import Image

from ..input_rules import read_image_file


FOLDER = Path(__file__).parent / "photos"
LABEL_OF = {
    "cat": "cat",
    "dog": "dog",
    "koala": "koala",
    "panda": "panda",
    "bison": "bison",
    "bee": "bee",
    "bridge": "suspension bridge",
    "coffee": "cup of coffee",
    "rocket": "rocket",
    "astronaut": "woman",
}
"""What each photo shows, by its name."""
NO_CLASS = frozenset({"astronaut"})
"""Photos of what the shipped checkpoint knows from captions alone: no class of its training is a person."""


def load_photo(name: str) -> Image.Image:
    """One of the photos, RGB."""
    return read_image_file(FOLDER / f"{name}.jpg")


def example_photos() -> list[Image.Image]:
    """All photos, in the order of `LABEL_OF`."""
    return [load_photo(name) for name in LABEL_OF]
