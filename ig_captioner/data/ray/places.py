"""Files and folders on any file system of pyarrow or fsspec, as workers of a cluster can reach them, too."""

import io
import os
from dataclasses import dataclass
from typing import Any

import pyarrow
from pyarrow import fs

from ..remote import is_url, open_url


@dataclass(frozen=True)
class Place:
    """A path on a file system; can be sent to other processes."""

    filesystem: fs.FileSystem
    path: str

    @classmethod
    def find(cls, location: str | os.PathLike, filesystem: Any = None) -> "Place":
        """The place of a path or URL.

        Args:
            location: a path on this machine, or a URL of a scheme that pyarrow or fsspec knows.
            filesystem: of pyarrow or fsspec, on which `location` is a path.

        Raises:
            ValueError, ImportError: naming the scheme, if nothing is installed that reads such URLs.
        """
        name = os.fspath(location)
        if isinstance(filesystem, fs.FileSystem):
            return cls(filesystem, name)
        if filesystem is not None:
            return cls(fs.PyFileSystem(fs.FSSpecHandler(filesystem)), name)
        if not is_url(name):
            return cls(fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(name)))
        try:
            return cls(*fs.FileSystem.from_uri(name))
        except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError):  # not one of pyarrow's own schemes
            import fsspec

            known, path = fsspec.core.url_to_fs(name)
            return cls(fs.PyFileSystem(fs.FSSpecHandler(known)), path)

    @property
    def is_local(self) -> bool:
        """Whether this is a path of the machine's own file system."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def __truediv__(self, name: str) -> "Place":
        return Place(self.filesystem, f"{self.path.rstrip('/')}/{name}")

    def is_folder(self) -> bool:
        """Whether there is a folder here."""
        return self.filesystem.get_file_info(self.path).type == fs.FileType.Directory

    def is_file(self) -> bool:
        """Whether there is a file here."""
        return self.filesystem.get_file_info(self.path).type == fs.FileType.File

    def files(self, recursive: bool = False) -> list[str]:
        """Lists the files below a folder by their paths relative to it, sorted; none if there is no folder."""
        selector = fs.FileSelector(self.path, recursive=recursive, allow_not_found=True)
        found = [info.path for info in self.filesystem.get_file_info(selector) if info.type == fs.FileType.File]
        start = len(self.path.strip("/"))
        return sorted(path.strip("/")[start:].lstrip("/") for path in found)

    def read(self, limit: int) -> bytes:
        """Reads a file, but no more than `limit` bytes. Raises OSError where it is larger or cannot be read."""
        with self.open() as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise OSError(f"it has more than {limit:,} bytes")
        return content

    def open(self) -> io.BufferedReader:
        """Opens a file to be read from front to back."""
        if self.is_local:  # Python's own also opens names that are not UTF-8
            return open(self.path, "rb")
        return io.BufferedReader(self.filesystem.open_input_stream(self.path), 2**20)


def read_location(location: str, folder: Place, limit: int) -> bytes:
    """Reads the file at a URL, or at a path which is relative to `folder` unless it is absolute.

    Raises:
        OSError, ValueError, ImportError: where it is larger than `limit` bytes or cannot be read.
    """
    if location.startswith(("http://", "https://")):
        with open_url(location) as stream:
            content = stream.read(limit + 1)
        if len(content) > limit:
            raise OSError(f"it has more than {limit:,} bytes")
        return content
    if is_url(location):
        return Place.find(location).read(limit)
    return (Place(folder.filesystem, location) if location.startswith("/") else folder / location).read(limit)
