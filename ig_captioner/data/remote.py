"""Files behind URLs, read once from front to back; a connection that breaks is made again where it broke.

`http` and `https` need nothing; other URLs (`hf://`, `s3://`, `gs://`, ...) go through `fsspec` and what it asks for.
"""

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
TIMEOUT = 60.0  # seconds without a byte
BUFFER_SIZE = 2**20
BUSY = (408, 425, 429)  # HTTP errors of the client that may pass; 500 and above may, too

# Files given up in a row, by server. Each takes away a retry: a server that is down must not cost time for every file.
_given_up: Counter[str] = Counter()


class UnreachableError(OSError):
    """A file, or the rest of it, that could not be read over the network."""


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


class RemoteFile(io.RawIOBase):
    """The bytes of `url`; `position` is how many have been read."""

    def __init__(self, url: str) -> None:
        self.url, self.position = url, 0
        self.size: int | None = None
        self.stream: Any = None
        self.server = "{0.scheme}://{0.netloc}".format(urlsplit(url))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        retries = 0
        while True:
            try:
                if self.stream is None:
                    self.stream = self._open()
                content = self.stream.read(len(buffer))
                if not content and self.size is not None and self.position < self.size:
                    # http.client takes a lost connection for the end of the file
                    raise ConnectionError(f"cut off after {self.position} of {self.size} bytes")
                break
            except Exception as error:  # of the many libraries behind fsspec
                self._drop()
                if is_final(error) or retries >= RETRIES - _given_up[self.server]:
                    _given_up[self.server] += not is_final(error)
                    raise UnreachableError(f"{self.url}: {type(error).__name__}: {error}") from error
                wait, retries = FIRST_WAIT * 2**retries, retries + 1
                logger.warning("%s: %s; trying again in %g s", self.url, error, wait)
                time.sleep(wait)
        _given_up.pop(self.server, None)
        buffer[: len(content)] = content
        self.position += len(content)
        return len(content)

    def _open(self) -> Any:
        """A stream that begins at `position`."""
        if urlsplit(self.url).scheme not in ("http", "https"):
            import fsspec

            stream = fsspec.open(self.url, "rb").open()
            stream.seek(self.position)
            self.size = stream.size
            return stream
        headers = {"User-Agent": "ig-captioner"} | ({"Range": f"bytes={self.position}-"} if self.position else {})
        stream = urllib.request.urlopen(urllib.request.Request(self.url, headers=headers), timeout=TIMEOUT)
        length = stream.headers.get("Content-Length")
        start = self.position if stream.status == http.HTTPStatus.PARTIAL_CONTENT else 0
        self.size = None if length is None else start + int(length)
        missing = self.position - start  # the server knows no ranges
        while missing and (skipped := stream.read(min(missing, BUFFER_SIZE))):
            missing -= len(skipped)
        if missing:
            stream.close()
            raise ConnectionError(f"cut off before byte {self.position}")
        return stream

    def _drop(self) -> None:
        stream, self.stream = self.stream, None
        if stream is not None:
            stream.close()

    def close(self) -> None:
        self._drop()
        super().close()


def is_final(error: Exception) -> bool:
    """Whether trying again is of no use."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code < 500 and error.code not in BUSY
    return isinstance(error, FileNotFoundError | PermissionError | ImportError)
