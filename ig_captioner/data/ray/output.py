"""A folder of Parquet files that appear whole or not at all, each with the results of one batch.

A file is written under a hidden name, which readers of Parquet pass over, and then renamed. On a local disk, NFS and
HDFS that is one step. Object stores (S3, GCS, Azure) have no renaming: a finished object is copied to its name, where
it appears whole, and the first is deleted.

The name of a file comes from the run and the keys in it: a batch that is done again, after an actor has died, replaces
its file. One run at a time writes into a folder; actors that outlive an earlier one, whose driver was killed, find its
mark replaced and write no more.
"""

import hashlib
import json
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from .photos import digests
from .places import Place


SETTINGS_FILE, RUN_FILE = "_settings.json", "_run.txt"  # readers of Parquet pass over names that begin with _ or .
PREFIX, SUFFIX, PARTIAL = "part-", ".parquet", ".partial"


@dataclass(frozen=True)
class ParquetFolder:
    """A folder of results, on any file system that all nodes reach; can be sent to other processes.

    Args:
        run: the mark of the run that writes.
    """

    place: Place
    run: str

    @classmethod
    def find(cls, location: str, filesystem: Any = None) -> "ParquetFolder":
        """The folder at a path or URL, see `Place.find`."""
        return cls(Place.find(location, filesystem), uuid.uuid4().hex[:12])

    def write(self, table: pa.Table, sources: Sequence[str | None]) -> str:
        """Writes a table with a column `key`; returns the name of the file.

        Args:
            sources: where the photo of each row is from, so that batches with equal keys of different files differ.

        Raises:
            RuntimeError: another run has begun to write into this folder.
        """
        if (current := (self.place / RUN_FILE).read(100).decode()) != self.run:
            raise RuntimeError(f"run {current} writes into {self.place.path} now, so that run {self.run} stops")
        rows = zip(table.column("key").to_pylist(), sources, strict=True)
        name = f"{self._own_prefix}{hashlib.sha256(json.dumps(list(rows)).encode()).hexdigest()[:32]}{SUFFIX}"
        buffer = pa.BufferOutputStream()
        parquet.write_table(table, buffer)
        self._put(name, buffer.getvalue())
        return name

    def _put(self, name: str, content: Any) -> None:
        partial = self.place / f".{name}.{uuid.uuid4().hex}{PARTIAL}"
        with self.place.filesystem.open_output_stream(partial.path) as file:
            file.write(content)
        self.place.filesystem.move(partial.path, (self.place / name).path)

    @property
    def _own_prefix(self) -> str:
        return f"{PREFIX}{self.run}-"

    def names(self) -> list[str]:
        """Names of the files of results."""
        return [name for name in self.place.files() if name.startswith(PREFIX) and name.endswith(SUFFIX)]

    def begin(self, settings: dict[str, Any], resume: bool) -> "Finished":
        """Makes the folder ready for a run.

        Args:
            settings: what results depend on; JSON. They must be those of the results that are there.
            resume: whether there may be results.

        Raises:
            FileExistsError: if there are, but they may not.
            ValueError: naming the settings that differ.
        """
        self.place.filesystem.create_dir(self.place.path, recursive=True)
        names = self.names()
        if names and not resume:
            raise FileExistsError(
                f"{self.place.path} holds {len(names):,} files of results: resume (--resume) adds what is missing"
            )
        before = self._read_settings() if names else None
        if before is not None and before != settings:
            different = sorted(name for name in {*before, *settings} if before.get(name) != settings.get(name))
            shown = [f"{name} {before.get(name)!r}, not {settings.get(name)!r}" for name in different]
            raise ValueError(f"the results in {self.place.path} were made with {'; '.join(shown)}")
        self._put(RUN_FILE, self.run.encode())
        self._put(SETTINGS_FILE, json.dumps(settings, indent=2).encode())
        self._remove(name for name in self.place.files() if name.endswith(PARTIAL) and name.startswith("."))
        return self._read_finished(self.names())

    def _read_settings(self) -> dict[str, Any] | None:
        place = self.place / SETTINGS_FILE
        return json.loads(place.read(2**20)) if place.is_file() else None

    def _read_finished(self, names: Sequence[str]) -> "Finished":
        """The keys in files of results, and the reasons of their errors."""
        found, reasons, photos = [digests([])], Counter[str](), 0
        for name in names:
            with self.place.filesystem.open_input_file((self.place / name).path) as file:
                table = parquet.read_table(file, columns=["key", "error"])
            found.append(digests(table.column("key").to_pylist()))
            reasons.update(error.partition(":")[0] for error in table.column("error").to_pylist() if error is not None)
            photos += len(table)
        return Finished(np.sort(np.concatenate(found)), photos, reasons)

    def end(self, names: set[str]) -> None:
        """Compares the files of this run with those that its actors have reported.

        A file that nobody has reported is from a batch that was done again in another division, after a node was lost
        with what it had read: it is deleted.

        Raises:
            OSError: for files that are missing.
        """
        there = {name for name in self.names() if name.startswith(self._own_prefix)}
        if missing := names - there:
            raise OSError(
                f"{len(missing)} of {len(names)} files of results are not in {self.place.path}: workers on other nodes "
                "have written them elsewhere; --output must be a folder that all nodes share, or a URL"
            )
        self._remove(there - names)

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            self.place.filesystem.delete_file((self.place / name).path)


@dataclass(frozen=True)
class Finished:
    """Results that are there before a run: digests of keys, number of photos, and how many errors by reason."""

    keys: np.ndarray
    photos: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
