"""Photos to try the web demo with: those inside scikit-image's wheel that anyone may use. Without it there are none."""

from importlib.util import find_spec

from PIL import Image


# NASA's portrait is in the public domain, the others are CC0 (skimage/data/README.txt).
NAMES = ("chelsea", "astronaut", "coffee", "rocket", "stereo_motorcycle")


def example_photos() -> list[Image.Image]:
    """The photos, in the order of `NAMES`."""
    if find_spec("skimage") is None:
        return []
    from skimage import data

    loaded = [getattr(data, name)() for name in NAMES]
    return [Image.fromarray(photo[0] if isinstance(photo, tuple) else photo) for photo in loaded]
