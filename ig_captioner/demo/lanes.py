"""Turns at the model: one long request and one short one at a time, so that neither kind holds up the other.

A request that waits holds a thread and a photo's pixels, nothing else: the server needs the memory of two requests.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock


SHORT_TEXTS = 100  # a request with at most so many texts is short


class Lanes:
    """Two queues for one model."""

    def __init__(self) -> None:
        self._short = Lock()
        self._long = Lock()

    @contextmanager
    def enter(self, texts: int = 1) -> Iterator[None]:
        """Waits until the model is free for a request with so many texts."""
        with self._short if texts <= SHORT_TEXTS else self._long:
            yield
