"""The format of `mixture_scores.pt`: a zip that `torch.load` reads as a list, and that grows by one record per entry.

    version, byteorder          what torch asks for
    data/OFFSET,EPOCH,STEP,NxK  the responsibilities of one entry, row by row
    MARKER, data.pkl, directory the tail: each flush writes it, and the next entry overwrites it

The name of a record says all about its entry, so the tail can always be made from the records.
"""

import io
import pickle
import re
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2  # by which torch.save pickles a tensor

from mixture_torch.files.shards import ScoreEntry

FOLDER = "mixture_scores/"  # in the zip
FIXED = {"version": b"3\n", "byteorder": b"little"}
NAME = re.compile(FOLDER.encode() + rb"data/(\d+),(\d+),(\d+),(\d+)x(\d+)FB")  # up to the extra field
MARKER = b"mixture_scores: every flush makes anew what follows".ljust(64)
SIGNATURE = b"PK\3\4"  # of a record
ALIGNMENT = 64  # of records and of their data
HEADER_SIZE = 192  # bytes of the header before a record's data
PIECE = 1 << 20  # bytes searched at once
INDEX = struct.Struct("<5qI")  # a record in memory


class Record(NamedTuple):
    """An entry, except for its responsibilities (N, K)."""

    offset: int
    epoch: int
    step: int
    N: int
    K: int
    crc: int  # CRC-32 of the data

    @property
    def key(self) -> str:
        """The name of its storage in the pickle."""
        return f"{self.offset},{self.epoch},{self.step},{self.N}x{self.K}"

    @property
    def info(self) -> zipfile.ZipInfo:
        """Its line in the directory of the zip."""
        return _info(f"data/{self.key}", 4 * self.N * self.K, self.crc, self.offset)

    @property
    def header(self) -> bytes:
        """The header before its data."""
        return _header(self.info)

    @property
    def end(self) -> int:
        """Where the next record begins."""
        size = 4 * self.N * self.K
        return self.offset + HEADER_SIZE + size + -size % ALIGNMENT


def _info(name: str, size: int, crc: int, offset: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(FOLDER + name)
    info.create_system = 3  # the same bytes on every system
    info.file_size, info.compress_size, info.CRC, info.header_offset = size, size, crc, offset
    return info


def _header(info: zipfile.ZipInfo) -> bytes:
    """The header of a record; its last 4 bytes are a checksum of the header, which other zips do not have."""
    padding = HEADER_SIZE - len(info.FileHeader()) - 4
    info.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    header = info.FileHeader()[:-4]
    return header + struct.pack("<I", zlib.crc32(header))


def _begin() -> tuple[bytes, list[zipfile.ZipInfo]]:
    header, listed = b"", []
    for name, data in FIXED.items():
        listed.append(_info(name, len(data), zlib.crc32(data), len(header)))
        header += _header(listed[-1]) + data.ljust(ALIGNMENT, b"\0")
    return header, listed


HEADER, LISTED = _begin()


def pack(offset: int, step: int, epoch: int, R: Tensor) -> tuple[Record, bytes]:
    """Returns the record of an entry, and its bytes for this place in the file."""
    data = R.detach().to("cpu", torch.float32).resolve_neg().numpy().astype("<f4", copy=False).tobytes()
    record = Record(offset, epoch, step, len(R), R.shape[1], zlib.crc32(data))
    return record, record.header + data + bytes(-len(data) % ALIGNMENT)


def unpacked(index: bytes | bytearray) -> Iterator[Record]:
    """Yields the records of an index, which holds each in the form of INDEX."""
    return map(Record._make, INDEX.iter_unpack(index))


def archive(entries: Iterable[ScoreEntry]) -> Iterator[bytes | memoryview]:
    """Yields a whole file, in pieces."""
    index, end = bytearray(), len(HEADER)
    yield HEADER
    for entry in entries:
        record, data = pack(end, entry["step"], entry["epoch"], entry["responsibilities"])
        index += INDEX.pack(*record)
        end = record.end
        yield data
    yield tail(index, end)


class _Storage(NamedTuple):
    record: Record


class _Pickler(pickle.Pickler):
    """Pickles a record as the tensor that `torch.load` is to make of it."""

    hooks: ClassVar[OrderedDict[str, Any]] = OrderedDict()

    def persistent_id(self, value: object) -> object:
        if type(value) is not _Storage:
            return None
        return "storage", torch.FloatStorage, value.record.key, "cpu", value.record.N * value.record.K

    def reducer_override(self, value: object) -> Any:
        if type(value) is not Record:
            return NotImplemented
        return _rebuild_tensor_v2, (_Storage(value), 0, (value.N, value.K), (max(value.K, 1), 1), False, self.hooks)


def _pickled(records: Iterable[Record]) -> bytes:
    """The opcodes that append these entries to a list on the stack."""
    buffer = io.BytesIO()
    entries = [{"step": record.step, "epoch": record.epoch, "responsibilities": record} for record in records]
    _Pickler(buffer, protocol=2).dump(entries)
    return buffer.getvalue().removeprefix(b"\x80\2]q\0").removesuffix(b".")


class _Part(io.BytesIO):
    """The bytes of a file from an offset on."""

    offset = 0

    def tell(self) -> int:
        return self.offset + super().tell()

    def seek(self, place: int, whence: int = 0) -> int:
        return self.offset + super().seek(place if whence else place - self.offset, whence)


class _Listing(list[zipfile.ZipInfo]):
    """What the directory lists: the records of an index, each made when it is written; then what is appended."""

    def __init__(self, index: bytes | bytearray) -> None:
        self._index = index

    def __iter__(self) -> Iterator[zipfile.ZipInfo]:
        yield from LISTED
        yield from (record.info for record in unpacked(self._index))
        yield from super().__iter__()

    def __len__(self) -> int:
        return len(LISTED) + len(self._index) // INDEX.size + super().__len__()


def tail(index: bytes | bytearray, end: int) -> memoryview:
    """Returns the tail at `end` that turns the records into a list for `torch.load`."""
    part, step = _Part(), 1000 * INDEX.size
    part.offset = end
    part.write(MARKER)
    with zipfile.ZipFile(part, "w") as zipped:
        zipped.filelist = _Listing(index)
        with zipped.open(_info("data.pkl", 0, 0, 0), "w") as file:
            file.write(b"\x80\2]")
            for first in range(0, len(index), step):
                file.write(_pickled(unpacked(index[first : first + step])))
            file.write(b".")
    return part.getbuffer()


def scan(path: Path, say: Callable[[str], None], *, start: int = len(HEADER)) -> Iterator[tuple[Record, Tensor]]:
    """Yields the whole records from a place on, and says what is damaged between them.

    Args:
        path: The file. It may grow meanwhile.
        say: Called with each warning.
        start: Where a record ends.
    """
    with open(path, "rb") as file:
        while (found := read_record(file, start) or _search(file, start)) is not None:
            record, data = found
            if record.offset > start and read_record(file, start) is None:  # a writer may just have completed it
                say(f"`{path}` is damaged: skipped {record.offset - start} bytes at {start}.")
            R = torch.frombuffer(data, dtype=torch.float32) if data else torch.empty(0, device="cpu")
            yield record, R.view(record.N, record.K)
            start = record.end


def read_record(file: BinaryIO, place: int) -> tuple[Record, bytearray] | None:
    """Returns the record at a place and its data, if it is whole and undamaged."""
    file.seek(place)
    head = file.read(HEADER_SIZE)
    if not (head.startswith(SIGNATURE) and (name := NAME.match(head, 30))):
        return None
    record = Record._make([*map(int, name.groups()), int.from_bytes(head[14:18], "little")])
    if record.offset != place or head != record.header or file.seek(0, io.SEEK_END) < record.end:
        return None
    file.seek(place + HEADER_SIZE)
    data = bytearray(file.read(4 * record.N * record.K))
    return (record, data) if zlib.crc32(data) == record.crc else None


def _search(file: BinaryIO, start: int) -> tuple[Record, bytearray] | None:
    """The first record after a place."""
    for place in range(start, file.seek(0, io.SEEK_END), PIECE):
        file.seek(place)
        for match in re.finditer(SIGNATURE, file.read(PIECE)):
            if (found := read_record(file, place + match.start())) is not None:
                return found
    return None


def torn(path: Path, end: int) -> int:
    """Returns how many bytes of an unfinished write follow the last record; a tail is none."""
    with open(path, "rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(end)
        return 0 if MARKER.startswith(file.read(len(MARKER))) else size - end


def beginning(path: Path) -> bytes | None:
    """Returns as many bytes as HEADER has; None for a pipe or a device, which could block."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return file.read(len(HEADER))
