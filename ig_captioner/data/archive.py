"""Tar archives, plain or compressed, read once from front to back. Damage is an error, never the end of an archive.

`tarfile` takes much that is broken for the end: a header whose checksum is wrong, a file that stops between two
members, zeros. Here an archive ends where its end-of-archive (two blocks of zeros) is, with no more zeros than fill
the last record. Checksums of gzip, bzip2 and xz are checked to the last byte. A plain tar has checksums of its headers
only: a bit that flips inside a member's content is beyond the format.
"""

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple


BLOCK, RECORD = 512, 10_240  # bytes; archives are filled up with zeros to whole records
MAX_BYTES = 2**28  # of a member; none is read into memory beyond that
DECOMPRESSORS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
}

SPARSE, TOO_LARGE, NOT_A_FILE = "sparse file", "file too large", "link or device in place of a file"
WITHOUT_CONTENT = (tarfile.DIRTYPE, b"D", b"V")  # folders, GNU's lists of them, labels of volumes


class Member(NamedTuple):
    """A file of an archive, whose content is read before the next one's, or why that is refused."""

    name: str
    size: int
    refused: str
    read: Callable[[], bytes]


class CheckedTarInfo(tarfile.TarInfo):
    """Headers whose damage is an error; tarfile takes it for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Any:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # a block of zeros
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error or 'bad header'} at byte {archive.offset}") from error


class ForwardFile:
    """Gives `tarfile` what it needs of a seekable file, over one that can only be read from front to back."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.position = 0

    def tell(self) -> int:
        return self.position

    def seek(self, target: int) -> None:
        """Reads on to `target`, or to the end of the file."""
        if target < self.position:
            raise tarfile.ReadError(f"a header leads back from byte {self.position} to {target}")
        while self.position < target and (content := self.file.read(min(2**20, target - self.position))):
            self.position += len(content)

    def read(self, size: int) -> bytes:
        """Reads `size` bytes, less at the end of the file."""
        if not 0 <= size <= MAX_BYTES + BLOCK:
            raise tarfile.ReadError(f"a header asks for {size} bytes at byte {self.position}")
        content = self.file.read(size)
        self.position += len(content)
        return content


class Archive:
    """A tar archive in a file, whose compression shows from its first bytes.

    Damage raises exceptions of many kinds, of `tarfile` and the decompressors.
    """

    def __init__(self, file: io.BufferedReader) -> None:
        start = file.peek(6)
        decompress = next((opener for magic, opener in DECOMPRESSORS.items() if start.startswith(magic)), None)
        self.file = ForwardFile(file if decompress is None else decompress(file))

    def members(self) -> Iterator[Member]:
        """Yields the files in order, up to the end-of-archive; links and devices as files that are refused."""
        archive = tarfile.TarFile(fileobj=self.file, tarinfo=CheckedTarInfo)  # type: ignore[arg-type]
        while (header := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # tarfile would keep all headers
            if header.type not in WITHOUT_CONTENT:
                yield Member(header.name, header.size, _refusal(header), partial(self._read, header))

    def _read(self, header: tarfile.TarInfo) -> bytes:
        content = self.file.read(header.size)
        if len(content) < header.size:
            raise tarfile.ReadError(f"{header.name!r} is cut short at byte {self.file.position}")
        return content

    def check_end(self) -> None:
        """Raises unless the block of zeros just read begins a whole end-of-archive, and nothing follows that."""
        end = self.file.position
        limit = -(-(end + BLOCK) // RECORD) * RECORD
        rest = self.file.file.read(limit - end + 1)  # to the end of the file, where checksums of compression are
        if len(rest) < BLOCK:
            raise tarfile.ReadError(f"the end-of-archive at byte {end - BLOCK} is cut short")
        if any(rest):
            raise tarfile.ReadError(f"data after the end-of-archive at byte {end - BLOCK}")
        if len(rest) > limit - end:
            raise tarfile.ReadError(f"more zeros than an end-of-archive has from byte {end - BLOCK} on")


def _refusal(header: tarfile.TarInfo) -> str:
    """Why a file is not read into memory, if it is not."""
    if header.issparse():  # small in the archive, as large as its maker likes in memory
        return SPARSE
    if not header.isfile():
        return NOT_A_FILE
    return TOO_LARGE if header.size > MAX_BYTES else ""
