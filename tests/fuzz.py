"""Odd inputs for hypothesis, the same in every run, and what holds for all of them."""

import io
import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from evaluation_room import make_images
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st


MEMORY = 512  # MiB by which all inputs of a file together may raise the peak of the process
PHOTO = make_images(1)[0]


def odd(examples: int = 60) -> settings:
    skipped = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(
        derandomize=True, database=None, deadline=None, max_examples=examples, suppress_health_check=skipped
    )


@contextmanager
def bounded_memory() -> Iterator[None]:
    """The peak of the process, in KiB on Linux, does not grow by more than `MEMORY`."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY * 1024


def check(entries: list[dict], labels: list[str], multi_label: bool = False) -> None:
    """A complete result: every label once for each time it was given, scores that are probabilities, best first."""
    assert sorted(entry["label"] for entry in entries) == sorted(labels)
    scores = [entry["score"] for entry in entries]
    assert all(0 <= score <= 1 for score in scores) and scores == sorted(scores, reverse=True)
    assert multi_label or math.fsum(scores) == pytest.approx(1)


# Texts

# control characters, right-to-left text and marks, combining marks, emoji of several code points, halves of them
ODD_TEXTS = [
    "",
    " ",
    "\t\n",
    "\0",
    "\x1b[31m",
    "\u202ecat",
    "قطة",
    "חתול",
    "e\u0301" * 30,
    "👩‍👩‍👧‍👦🏳️‍🌈",
    "{}",
    "{0}",
    "%s",
    "</s>",
    "<pad>",
]
LONG_TEXTS = ["x" * 10_000, "x" * 9_999, "\U0001f408" * 10_000]
texts = st.one_of(st.text(max_size=30), st.sampled_from(ODD_TEXTS))
surrogates = st.characters(categories=["Cs"])


# Files


def encoded(format: str) -> bytes:
    file = io.BytesIO()
    PHOTO.resize((24, 20)).save(file, format=format)
    return file.getvalue()


FILES = {format: encoded(format) for format in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")}


@st.composite
def mutated(draw, contents: list[bytes]) -> bytes:
    """One of the contents with bytes changed, put in or cut out."""
    content = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, len(content)))
        content[start : start + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))
    return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)


mutated_photos = mutated([FILES[format] for format in sorted(FILES)])
