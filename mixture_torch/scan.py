"""What of an archive of responsibilities can be read: every whole record, whatever else is in it or is missing."""

import os
import zlib
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import numpy as np

from mixture_torch.archive import HEADER, MARKER, Array, Entry, parse
from mixture_torch.torchzip import ALIGNMENT, LOCAL_SIZE, end_of_zip

PIECE = 1 << 20  # bytes read at once
STARTS = [int.from_bytes(start[:4], "little") for start in (HEADER, MARKER)]  # all records start as the header does


class Scan:
    """Goes through the entries of a file, (entry, R), and then says how it ends and what it had to skip.

    It is safe beside a writer: what is appended meanwhile may be left out, and nothing is taken for damage before it
    has been looked at twice without a change of the file.

    Args:
        path: The file.
        start: Where a record ends, in a file that is known to be an archive.
    """

    def __init__(self, path: Path, *, start: int = 0) -> None:
        self.size = 0  # bytes up to the tail, or to what is torn
        self.torn = 0  # bytes that an unfinished write left
        self.foreign: bytes = b""  # what somebody put behind the tail
        self.damage: list[str] = []  # what was skipped, in words
        self.has_header = True
        self.is_ours = True
        self._path = path
        self._start = start

    def __iter__(self) -> Iterator[tuple[Entry, Array]]:
        """Begins at the start; the attributes hold when it has come to the end."""
        if not self._path.is_file():  # nor may a pipe be opened, which would wait for a writer
            self.is_ours = False
            return
        with open(self._path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            self.has_header = self._start > 0 or _bytes_at(file, 0, len(HEADER)) == HEADER
            self.size = self._start or len(HEADER) * self.has_header
            while self.size < size:
                found = _read(file, self.size)
                if found is None:
                    found = self._look_closer(file)
                if found is None:
                    break
                yield found
                self.size = found[0].end

    def _look_closer(self, file: FileIO) -> tuple[Entry, Array] | None:
        """Returns the next entry, skipping what is damaged; None at the end, of which it makes the attributes."""
        while True:
            before = _change_of(file)
            if (found := _read(file, self.size)) is not None:
                return found
            foreign = _behind_tail(file, self.size, before[0])
            whole = foreign is not None  # what stands behind a whole tail is no part of the file
            behind = None if whole else _next_start(file, max(self.size + ALIGNMENT, len(HEADER)))
            has_changed = _change_of(file) != before
            if behind is None:
                self.foreign = foreign if foreign and not has_changed else b""
                self._end(file, before[0], is_tail=has_changed or _is_tail(file, self.size))
                return None
            if has_changed:  # a writer was in the middle of it, maybe
                continue
            self.damage.append(f"`{self._path}` is damaged: skipped {behind - self.size} bytes at {self.size}.")
            self.size = behind

    def _end(self, file: FileIO, size: int, *, is_tail: bool) -> None:
        if not self.size:
            self.is_ours = _is_begun(file, size)
        if not is_tail:
            self.torn = size - self.size


def holds(path: Path, entry: Entry) -> bool:
    """Whether a file has this entry where it should be."""
    if not path.is_file():
        return False
    with open(path, "rb", buffering=0) as file:
        return _bytes_at(file, entry.offset, LOCAL_SIZE) == entry.header


def mended(path: Path) -> Iterator[bytes]:
    """Returns a whole file with the header as it should be, in pieces."""
    yield HEADER
    with open(path, "rb") as file:
        file.seek(len(HEADER))
        while piece := file.read(PIECE):
            yield piece


def _change_of(file: FileIO) -> tuple[int, int]:
    """Returns the size of a file and something else that a write changes."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _read(file: FileIO, position: int) -> tuple[Entry, Array] | None:
    """Returns the entry at a position, None unless all of it is there and its checksum is right."""
    entry = _entry_at(file, position)
    if entry is None or entry.end > os.fstat(file.fileno()).st_size:
        return None
    R = np.empty((entry.N, entry.K), "<f4")
    data = R.reshape(-1).view(np.uint8).data
    _fill(file, position + LOCAL_SIZE, data)
    return (entry, R) if zlib.crc32(data) == entry.crc else None


def _entry_at(file: FileIO, position: int) -> Entry | None:
    """Returns the entry whose record begins at a position, None where no record does, or one that belongs elsewhere."""
    entry = parse(_bytes_at(file, position, LOCAL_SIZE))
    return entry if entry is not None and entry.offset == position else None


def _next_start(file: FileIO, position: int) -> int | None:
    """Returns where, from a multiple of ALIGNMENT on, the next record or the tail begins, None where nothing does."""
    for place in range(position, os.fstat(file.fileno()).st_size, PIECE):
        data = _bytes_at(file, place, PIECE)
        words = np.frombuffer(data, "<u4", count=len(data) // ALIGNMENT * ALIGNMENT // 4)
        for block in np.flatnonzero(np.isin(words[:: ALIGNMENT // 4], STARTS)):
            start = place + ALIGNMENT * int(block)
            if _bytes_at(file, start, len(MARKER)) == MARKER or _entry_at(file, start) is not None:
                return start
    return None


def _is_tail(file: FileIO, position: int) -> bool:
    """Whether the tail begins at a position, or the file ends there or in the middle of its marker."""
    return MARKER.startswith(_bytes_at(file, position, len(MARKER)))


def _behind_tail(file: FileIO, position: int, size: int) -> bytes | None:
    """Returns what stands behind a whole tail that begins at a position, None where none does."""
    if _bytes_at(file, position, len(MARKER)) != MARKER:
        return None
    rest = _bytes_at(file, position, size - position)
    end = end_of_zip(rest, position)
    if end is None:
        return None
    return rest[end:] if any(rest[end:]) else b""  # zeros are what a power cut leaves


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
