"""The installed package: its version, and the checkpoint that comes with it."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


try:
    __version__ = version("ig_captioner")
except PackageNotFoundError:  # a checkout on the path, not installed
    __version__ = "0+unknown"

# The checkpoint that ships with the package, usable wherever a model name or folder is.
DEFAULT_CHECKPOINT = str(Path(__file__).parent / "checkpoints" / "everyday")
