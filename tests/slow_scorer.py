"""A scoring actor that can be interrupted: for tests of runs on a Ray cluster."""

import os
import time
from pathlib import Path

from ig_captioner.data.ray import scoring


def slow_scorer(notes: Path, seconds: float = 0.1) -> type:
    """The class of an actor that writes down the keys of each batch when it begins, and takes its time.

    Args:
        notes: a folder; the name of a note begins with the number of the actor's process.
    """

    class SlowScorer(scoring.BatchScorer):
        def __call__(self, batch):
            note = notes / f"{os.getpid()}-{time.monotonic_ns()}"
            note.write_text("\n".join(batch.column("key").to_pylist()))
            time.sleep(seconds)
            return super().__call__(batch)

    return SlowScorer
