"""What shards were when a run read them, so that a run that goes on notices when they are others."""

import hashlib
import io
import os
from collections.abc import Iterable
from typing import Any, NamedTuple

from .remote import is_url


class Fingerprint(NamedTuple):
    """A shard: its name, and as far as they are known its size in bytes and the SHA-256 of its content."""

    name: str
    size: int | None = None
    sha256: str | None = None


class HashingFile(io.RawIOBase):
    """The bytes of a file, counted and hashed as they are read."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.size = 0
        self.hash = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self.file.readinto(buffer)
        self.hash.update(memoryview(buffer)[:count])
        self.size += count
        return count

    def fingerprint(self, path: str) -> Fingerprint:
        """Reads what is left, and gives the whole."""
        while self.read(2**20):
            pass
        return Fingerprint(name_of(path), self.size, self.hash.hexdigest())


def name_of(path: str) -> str:
    """Gives the name by which a shard is known again: neither its folder nor the signature of a URL need stay."""
    return os.path.basename(path.partition("?")[0] if is_url(path) else path)


def list_fingerprints(paths: Iterable[str]) -> list[Fingerprint]:
    """Lists shards without reading them: names, and sizes of local files."""
    return [Fingerprint(name_of(path), None if is_url(path) else os.path.getsize(path)) for path in paths]


def compare_shards(before: list[Fingerprint], now: list[Fingerprint]) -> list[str]:
    """Says what differs between two lists of shards, a line each.

    A size or hash that was not known before, or is not asked for now, is no difference; a shard whose hash was known
    and that could not be read at all now is one.
    """
    old = [shard.name for shard in before]
    new = [shard.name for shard in now]
    differences = [f"{name} is gone" for name in old if name not in new]
    differences += [f"{name} is new" for name in new if name not in old]
    if not differences and old != new:
        return [f"the shards were {', '.join(old)}, in this order, and are {', '.join(new)}"]
    found = {shard.name: shard for shard in now}
    for shard in before:
        other = found.get(shard.name, shard)
        if None not in (shard.size, other.size) and shard.size != other.size:
            differences.append(f"{shard.name} had {shard.size:,} bytes and has {other.size:,}")
        elif None not in (shard.sha256, other.sha256) and shard.sha256 != other.sha256:
            differences.append(f"{shard.name} has other content")
        elif shard.sha256 is not None and other.size is None:
            differences.append(f"{shard.name} could not be read")
    return differences
