"""Fingerprints of shards as a run read them, so that a resumed run notices when they have changed."""

import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from .remote import ask_version, is_url


# Of a large local file these are compared, so that another shard is noticed and none is read as a whole.
BLOCKS, BLOCK_SIZE = 16, 2**16
ASKED_AT_ONCE = 16  # shards


class Fingerprint(NamedTuple):
    """A shard: its name, and as far as they are known its size in bytes and the SHA-256 of its content."""

    name: str
    size: int | None = None
    sha256: str | None = None
    mark: str | None = None
    """Mark by which versions differ, without reading all of them: "blocks: DIGEST" of a local file, or what a server
    says of a URL, such as "ETag: ..."."""


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


def mark_shards(paths: Iterable[str]) -> Iterator[Fingerprint]:
    """Fingerprints with marks: some blocks of each local file are read, and of each URL the headers."""
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        yield from pool.map(_mark_shard, paths)


def _mark_shard(path: str) -> Fingerprint:
    if is_url(path):
        size, version = ask_version(path)
        return Fingerprint(name_of(path), size, mark=version)
    size = os.path.getsize(path)
    return Fingerprint(name_of(path), size, mark=f"blocks: {_digest_of_blocks(path, size)}")


def _digest_of_blocks(path: str, size: int) -> str:
    """SHA-256 of blocks at equal distances, the first and the last bytes among them; of a small file, of all of it."""
    digest = hashlib.sha256()
    last = max(0, size - BLOCK_SIZE)
    with open(path, "rb") as file:
        if size <= BLOCKS * BLOCK_SIZE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        for number in range(BLOCKS):
            file.seek(last * number // (BLOCKS - 1))
            digest.update(file.read(BLOCK_SIZE))
    return digest.hexdigest()


def _has_other_content(before: Fingerprint, now: Fingerprint) -> bool:
    """Tells whether hashes, or marks of one kind, are known of both and differ."""
    kinds = {(shard.mark or "").partition(":")[0] for shard in (before, now)}
    hashes = (before.sha256, now.sha256)
    return (None not in hashes and len(set(hashes)) == 2) or (len(kinds) == 1 and before.mark != now.mark)


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
        elif _has_other_content(shard, other):
            differences.append(f"{shard.name} has other content")
        elif shard.sha256 is not None and other.size is None:
            differences.append(f"{shard.name} could not be read")
    return differences
