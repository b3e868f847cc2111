"""What of an archive of responsibilities can be read: every whole record, whatever else is in it or is missing."""

import os
import warnings
import zlib
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import numpy as np

from mixture_torch.archive import HEADER, MARKER, Array, Entry, parse
from mixture_torch.torchzip import ALIGNMENT, LOCAL_SIZE

PIECE = 1 << 20  # bytes read at once
STARTS = [int.from_bytes(start[:4], "little") for start in (HEADER, MARKER)]  # all records start as the header does


class Scan:
    """Goes through the entries of a file, (entry, R), with a warning where it skips damage, and then says how it ends.

    What is appended meanwhile is left out, so it is safe beside a writer.

    Args:
        path: The file.
        start: Where a record ends, in a file that is known to be an archive.
    """

    def __init__(self, path: Path, *, start: int = 0) -> None:
        self.size = 0  # bytes up to the tail, or to what is torn
        self.torn = 0  # bytes that an unfinished write left
        self.has_header = True
        self.is_ours = True
        self._path = path
        self._start = start

    def __iter__(self) -> Iterator[tuple[Entry, Array]]:
        """Begins at the start; the attributes hold when it has come to the end."""
        with open(self._path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            self.has_header = self._start > 0 or _bytes_at(file, 0, len(HEADER)) == HEADER
            self.size = self._start or len(HEADER) * self.has_header
            while self.size < size:
                found = _read(file, self.size, size)
                if found is None:
                    behind = _next_start(file, max(self.size + ALIGNMENT, len(HEADER)), size)
                    if behind is None:
                        self._end(file, size)
                        break
                    # Again: a writer was in the middle of it, maybe, but no longer if there is more behind it.
                    found = _read(file, self.size, size)
                    if found is None:
                        self._skip_to(behind)
                        continue
                yield found
                self.size = found[0].end

    def _end(self, file: FileIO, size: int) -> None:
        if not self.size:
            self.is_ours = _is_begun(file, size)
        if not _is_tail(file, self.size):
            self.torn = size - self.size

    def _skip_to(self, behind: int) -> None:
        message = f"`{self._path}` is damaged: skipped {behind - self.size} bytes at {self.size}."
        warnings.warn(message, stacklevel=3)
        self.size = behind


def holds(path: Path, entry: Entry) -> bool:
    """Whether a file has this entry where it should be."""
    with open(path, "rb", buffering=0) as file:
        return _bytes_at(file, entry.offset, LOCAL_SIZE) == entry.header


def mended(path: Path) -> Iterator[bytes]:
    """Returns a whole file with the header as it should be, in pieces."""
    yield HEADER
    with open(path, "rb") as file:
        file.seek(len(HEADER))
        while piece := file.read(PIECE):
            yield piece


def _read(file: FileIO, position: int, size: int) -> tuple[Entry, Array] | None:
    """Returns the entry at a position, None unless all of it is there and its checksum is right."""
    entry = _entry_at(file, position)
    if entry is None or entry.end > size:
        return None
    R = np.empty((entry.N, entry.K), "<f4")
    data = R.reshape(-1).view(np.uint8).data
    _fill(file, position + LOCAL_SIZE, data)
    return (entry, R) if zlib.crc32(data) == entry.crc else None


def _entry_at(file: FileIO, position: int) -> Entry | None:
    """Returns the entry whose record begins at a position, None where no record does, or one that belongs elsewhere."""
    entry = parse(_bytes_at(file, position, LOCAL_SIZE))
    return entry if entry is not None and entry.offset == position else None


def _next_start(file: FileIO, position: int, size: int) -> int | None:
    """Returns where, from a multiple of ALIGNMENT on, the next record or the tail begins, None where nothing does."""
    for place in range(position, size, PIECE):
        data = _bytes_at(file, place, min(PIECE, size - place))
        words = np.frombuffer(data, "<u4", count=len(data) // ALIGNMENT * ALIGNMENT // 4)
        for block in np.flatnonzero(np.isin(words[:: ALIGNMENT // 4], STARTS)):
            start = place + ALIGNMENT * int(block)
            if _is_tail(file, start) or _entry_at(file, start) is not None:
                return start
    return None


def _is_tail(file: FileIO, position: int) -> bool:
    """Whether the tail begins at a position, or as much of it as was written."""
    return MARKER.startswith(_bytes_at(file, position, len(MARKER)))


def _is_begun(file: FileIO, size: int) -> bool:
    """Whether a file may have been one of ours: a part of the header, or the zeros of a power cut."""
    if size < len(HEADER) and HEADER.startswith(_bytes_at(file, 0, size)):
        return True
    return not any(_bytes_at(file, place, PIECE).strip(b"\0") for place in range(0, size, PIECE))


def _bytes_at(file: FileIO, position: int, size: int) -> bytes:
    data = bytearray(size)
    return bytes(data[: _fill(file, position, memoryview(data))])


def _fill(file: FileIO, position: int, buffer: memoryview) -> int:
    """Reads until the buffer is full or the file ends, and returns how many bytes it was."""
    file.seek(position)
    filled = 0
    while count := file.readinto(buffer[filled:]):
        filled += count
    return filled
