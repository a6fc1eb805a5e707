"""Files behind URLs, read once from front to back; a connection that breaks is made again where it broke, and two
versions of a file are never mixed.

`http` and `https` need nothing; other URLs (`hf://`, `s3://`, `gs://`, ...) go through `fsspec` and what it asks for.
"""

import hashlib
import http.client
import io
import logging
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from typing import Any
from urllib.parse import urlsplit


logger = logging.getLogger(__name__)

RETRIES = 5  # in a row, without a byte in between
FIRST_WAIT = 1.0  # seconds before the first of them; each further one waits twice as long
TIMEOUT = 60.0  # seconds without a byte, and over which the rate is taken
LEAST_RATE = 1_000  # bytes per second; a server that drips would hold a training for days
BUFFER_SIZE = 2**20
VALIDATORS = ("ETag", "Last-Modified")  # HTTP headers that tell versions of a file apart
MARKS = (*VALIDATORS, "key")  # the same of all kinds of URLs: "key" is fsspec's
BUSY = (408, 425, 429)  # HTTP errors of the client that may pass; 500 and above may, too

# Files given up in a row, by server. Each takes away a retry: a server that is down must not cost time for every file.
_given_up: Counter[str] = Counter()


class UnreachableError(OSError):
    """A file, or the rest of it, that could not be read over the network."""


class ChangedError(OSError):
    """A file that is another one than at the first request, so that its parts do not belong together."""


def is_url(path: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path) is not None


def check_url(url: str) -> None:
    """Raises ImportError or ValueError if nothing is installed that reads such URLs."""
    scheme = urlsplit(url).scheme
    if scheme not in ("http", "https"):
        import fsspec

        fsspec.get_filesystem_class(scheme)


def open_url(url: str) -> io.BufferedReader:
    """A stream of the file's bytes; all its errors are `UnreachableError`."""
    return io.BufferedReader(RemoteFile(url), BUFFER_SIZE)


def ask_version(url: str) -> tuple[int | None, str | None]:
    """The size of a file in bytes, and what tells it from its other versions, such as "ETag: ...", without its content.

    None for what the server does not say; both if it cannot be reached, which is logged.
    """
    with RemoteFile(url) as file:
        try:
            file.stream = file._open()
        except Exception as error:  # of the many libraries behind fsspec
            logger.warning("%s: %s", url, error)
            return None, None
        version = file.version or {}
        marks = (f"{name}: {version[name]}" for name in MARKS if version.get(name))
        return file.size, next(marks, None)


class RemoteFile(io.RawIOBase):
    """The bytes of `url`, of one version of it; `position` is how many have been read.

    A connection that breaks, or gives less than `LEAST_RATE`, is made again. The new one must be of the same version:
    by ETag, time of change and length, or by the hash of what was read before, where a server gives neither of the
    first two.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.position = 0
        self.size: int | None = None
        self.stream: Any = None
        self.server = "{0.scheme}://{0.netloc}".format(urlsplit(url))
        self.version: dict[str, Any] | None = None  # what tells the file from others, once it is known
        self.hash = hashlib.sha256()  # of what was read, as long as nothing else tells versions apart
        self.retries = 0  # in a row
        self.slow_spells = 0
        self.rate = Rate()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            try:
                content = self._read(len(buffer))
                break
            except Exception as error:  # of the many libraries behind fsspec
                self._drop()
                self._wait_or_give_up(error)
        self.retries = 0
        _given_up.pop(self.server, None)
        buffer[: len(content)] = content
        self.position += len(content)
        if not self._has_validator():
            self.hash.update(content)
        return len(content)

    def _read(self, size: int) -> bytes:
        if self.stream is None:
            self.stream = self._open()
        # `read` of an HTTP answer would wait for all of it, however slowly that comes
        read = getattr(self.stream, "read1", self.stream.read)
        start = time.monotonic()
        content = read(size)
        self.rate.add(len(content), time.monotonic() - start)
        if not content and self.size is not None and self.position < self.size:
            # http.client takes a lost connection for the end of the file
            raise ConnectionError(f"cut off after {self.position} of {self.size} bytes")
        return content

    def _wait_or_give_up(self, error: Exception) -> None:
        """Waits before the next try, or raises UnreachableError where that is of no use, or was tried often enough."""
        if isinstance(error, SlowServerError):
            self.slow_spells += 1
        tried = max(self.retries, self.slow_spells - 1)
        if is_final(error):
            raise UnreachableError(f"{self.url}: {type(error).__name__}: {error}") from error
        if tried >= RETRIES - _given_up[self.server]:
            _given_up[self.server] += 1
            raise UnreachableError(f"{self.url}: {type(error).__name__}: {error}") from error
        wait = FIRST_WAIT * 2**self.retries
        self.retries += 1
        logger.warning("%s: %s; trying again in %g s", self.url, error, wait)
        time.sleep(wait)

    def _open(self) -> Any:
        """A stream that begins at `position`."""
        self.rate = Rate()
        if urlsplit(self.url).scheme in ("http", "https"):
            return self._open_http()
        import fsspec

        opened = fsspec.open(self.url, "rb")
        stream = opened.open()
        # `ukey` is what fsspec says of a file to tell whether it has changed
        self._check_version({"length": stream.size, "key": opened.fs.ukey(opened.path)})
        stream.seek(self.position)
        self.size = stream.size
        return stream

    def _open_http(self) -> Any:
        start = self.position if self._has_validator() else 0
        headers = {"User-Agent": "ig-captioner", "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
            validator = self.version.get("ETag") or self.version.get("Last-Modified")
            if not validator.startswith("W/"):  # a weak one is of no use there, and is compared below
                headers["If-Range"] = validator
        stream = urllib.request.urlopen(urllib.request.Request(self.url, headers=headers), timeout=TIMEOUT)
        try:
            if stream.status != http.HTTPStatus.PARTIAL_CONTENT:
                start = 0
            self.size = self._length(stream, start)
            self._check_version({"length": self.size} | {name: stream.headers.get(name) for name in VALIDATORS})
            self._skip(stream, self.position - start)
        except Exception:
            stream.close()
            raise
        return stream

    def _length(self, stream: Any, start: int) -> int | None:
        """The length of the whole file, as far as an answer says it, which must begin at byte `start`."""
        length = stream.headers.get("Content-Length")
        if stream.status != http.HTTPStatus.PARTIAL_CONTENT:
            return None if length is None else int(length)
        given = stream.headers.get("Content-Range", "")
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", given.strip())
        if match is None or int(match[1]) != start:
            raise WrongRangeError(f"asked for bytes from {start} on, the server gave {given or 'no Content-Range'!r}")
        if match[3] != "*" and int(match[2]) + 1 == int(match[3]):
            return int(match[3])
        raise WrongRangeError(f"asked for all bytes from {start} on, the server gave {given!r}")

    def _check_version(self, version: dict[str, Any]) -> None:
        """Raises ChangedError where both this answer and the first say something, and not the same."""
        if self.version is None:
            self.version = version
        known = {name: old for name, old in self.version.items() if None not in (old, version[name])}
        changed = {name: (old, version[name]) for name, old in known.items() if version[name] != old}
        if changed:
            raise ChangedError(f"changed while it was read: {changed}")

    def _has_validator(self) -> bool:
        """Tells whether this version can be told from others without reading it again."""
        return self.version is not None and any(self.version.get(name) for name in MARKS)

    def _skip(self, stream: Any, missing: int) -> None:
        """Reads over what was read before, from a server that knows no ranges, or has nothing to tell versions by."""
        again = hashlib.sha256()
        while missing and (skipped := stream.read(min(missing, BUFFER_SIZE))):
            missing -= len(skipped)
            again.update(skipped)
        if missing:
            raise ConnectionError(f"cut off before byte {self.position}")
        if self.position and not self._has_validator() and again.digest() != self.hash.digest():
            raise ChangedError(f"changed while it was read: its first {self.position} bytes are others")

    def _drop(self) -> None:
        stream = self.stream
        self.stream = None
        if stream is not None:
            stream.close()

    def close(self) -> None:
        self._drop()
        super().close()


class SlowServerError(ConnectionError):
    """Raised for a connection that gives less than `LEAST_RATE`."""


class WrongRangeError(OSError):
    """Raised for an answer with other bytes than those that were asked for."""


class Rate:
    """Bytes per second while waiting for a server; the time between reads is not its fault."""

    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0

    def add(self, count: int, seconds: float) -> None:
        """Counts a read. Raises SlowServerError where `TIMEOUT` seconds have given too little."""
        self.count = self.count + count
        self.seconds = self.seconds + seconds
        if self.seconds < TIMEOUT:
            return
        rate = self.count / self.seconds
        self.count, self.seconds = 0, 0.0
        if rate < LEAST_RATE:
            raise SlowServerError(f"{rate:,.0f} bytes per second are less than {LEAST_RATE:,}")


def is_final(error: Exception) -> bool:
    """Tells errors after which trying again is of no use."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code < 500 and error.code not in BUSY
    return isinstance(error, FileNotFoundError | PermissionError | ImportError | ChangedError | WrongRangeError)
