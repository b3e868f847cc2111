"""The format of `mixture_scores.pt`: a zip that `torch.load` reads as a list, and to which entries are appended.

    header     two records that torch asks for: the version of its format, and the order of bytes
    records    one an entry, with its responsibilities as data, row by row
    tail       a marker, the pickle of the list, the directory of the zip

The name of a record holds all about the entry, and where in the file the record stands, so that it is known for one
wherever it is met. So the records are all that is ever read (see `scan`). The tail can be made anew from them; a flush
puts it there, and the next entry takes its place.
"""

import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mixture_torch.torchzip import (
    ALIGNMENT,
    CRC_AT,
    FIXED_SIZE,
    LOCAL_SIZE,
    Template,
    directory_end,
    listing,
    local_header,
)

Array = npt.NDArray[np.float32]

FOLDER = b"mixture_scores/"  # in the zip
DATA = FOLDER + b"data/"
PICKLE = FOLDER + b"data.pkl"
FIXED = {FOLDER + b"version": b"3\n", FOLDER + b"byteorder": b"little"}
HEADER = b"".join(
    local_header(name, len(data), zlib.crc32(data)) + data.ljust(ALIGNMENT, b"\0") for name, data in FIXED.items()
)
MARKER = b"mixture_scores: every flush makes anew what follows".ljust(ALIGNMENT)

ENTRY = struct.Struct(">3q3I")  # big-endian: in hex it is the key, up to the checksum
ENTRIES = np.dtype([("offset", ">i8"), ("epoch", ">i8"), ("step", ">i8"), ("N", ">u4"), ("K", ">u4"), ("crc", ">u4")])
PACKED_KEY = ENTRY.size - 4
KEY = ("key", f"S{2 * PACKED_KEY}")
NAME = slice(FIXED_SIZE + len(DATA), FIXED_SIZE + len(DATA) + 2 * PACKED_KEY)  # of a record: the key in its header
AT_ONCE = 1 << 10  # entries turned into bytes


class Entry(NamedTuple):
    """What there is to know of an entry, but its responsibilities (N, K)."""

    offset: int  # of the record
    epoch: int
    step: int
    N: int
    K: int
    crc: int  # CRC-32 of the data

    @property
    def size(self) -> int:
        """Bytes of the data."""
        return 4 * self.N * self.K

    @property
    def end(self) -> int:
        """Where the next record begins."""
        return self.offset + LOCAL_SIZE + self.size + -self.size % ALIGNMENT

    @property
    def packed(self) -> bytes:
        """What stands for it in an index."""
        return ENTRY.pack(*self)

    @property
    def header(self) -> bytes:
        """What stands before the data in its record."""
        return local_header(DATA + self.packed[:PACKED_KEY].hex().encode(), self.size, self.crc)


def parse(header: bytes) -> Entry | None:
    """Returns the entry whose record begins so; None where no record does."""
    try:
        key = bytes.fromhex(header[NAME].decode())
        entry = Entry(*ENTRY.unpack(key + header[CRC_AT][::-1]))
    except (ValueError, struct.error):
        return None
    return entry if entry.header == header else None


def record(offset: int, step: int, epoch: int, R: Array) -> tuple[Entry, bytes]:
    """Returns an entry, and its record for this place in the file."""
    data = R.astype("<f4", copy=False).tobytes()
    N, K = R.shape
    entry = Entry(offset, epoch, step, N, K, zlib.crc32(data))
    return entry, b"".join([entry.header, data, bytes(-len(data) % ALIGNMENT)])


def archive(entries: Iterable[tuple[int, int, Array]]) -> Iterator[bytes]:
    """Returns a whole file of entries (step, epoch, R), in pieces."""
    index, end = bytearray(), len(HEADER)
    yield HEADER
    for step, epoch, R in entries:
        entry, data = record(end, step, epoch, R)
        yield data
        index += entry.packed
        end = entry.end
    yield from tail(index, end)


def tail(index: bytes | bytearray, end: int) -> Iterator[bytes]:
    """Returns the tail of a file, in pieces.

    Args:
        index: The entries, packed.
        end: Where the tail begins.
    """
    size, crc = 0, 0
    for piece in _pickle(index):  # twice: size and checksum stand before it
        size, crc = size + len(piece), zlib.crc32(piece, crc)
    yield MARKER + local_header(PICKLE, size, crc)
    yield from _pickle(index)
    offset = end + len(MARKER)
    directory, length = offset + LOCAL_SIZE + size, 0
    for piece in _directory(index, _listed(PICKLE, offset, size, crc)):
        yield piece
        length += len(piece)
    yield directory_end(directory, length, len(index) // ENTRY.size + len(FIXED) + 1)


def rows(index: bytes | bytearray) -> npt.NDArray[np.void]:
    """Returns an index as an array of ENTRIES, which does not hold on to it."""
    return np.frombuffer(bytes(index), ENTRIES)


def _some_rows(index: bytes | bytearray) -> Iterator[npt.NDArray[np.void]]:
    step = AT_ONCE * ENTRY.size
    return (rows(index[start : start + step]) for start in range(0, len(index), step))


def _keys(entries: npt.NDArray[np.void]) -> npt.NDArray[np.bytes_]:
    packed = np.frombuffer(entries.tobytes(), np.uint8).reshape(-1, ENTRY.size)
    return np.frombuffer(packed[:, :PACKED_KEY].tobytes().hex().encode(), KEY[1])


def _listed(name: bytes, offset: int, size: int, crc: int) -> bytes:
    return listing(name).filled(1, offset=offset, size=size, size_again=size, crc=crc)


def _directory(index: bytes | bytearray, pickle: bytes) -> Iterator[bytes]:
    for place, (name, data) in enumerate(FIXED.items()):
        yield _listed(name, place * (LOCAL_SIZE + ALIGNMENT), len(data), zlib.crc32(data))
    template = listing(DATA, KEY)
    for some in _some_rows(index):
        size = 4 * some["N"].astype(np.int64) * some["K"]
        yield template.filled(
            len(some), key=_keys(some), offset=some["offset"], size=size, size_again=size, crc=some["crc"]
        )
    yield pickle


# What all entries of the pickle have in common. The first has it in full, and puts it down for the others to refer to.
COMMON = (
    b"X\4\0\0\0step",
    b"X\5\0\0\0epoch",
    b"X\x10\0\0\0responsibilities",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"X\7\0\0\0storage",
    b"ctorch\nFloatStorage\n",
    b"X\3\0\0\0cpu",
    b"ccollections\nOrderedDict\n",
)


def _pickled(step: bytes, epoch: bytes, R: bytes, rebuild: bytes, *storage: bytes) -> Template:
    """The opcodes that append {step: step, epoch: epoch, R: rebuild(storage, 0, (N, K), (stride, 1), False, {})}."""
    kind, dtype, device, hooks = storage
    number = b"\x8a\x08"  # in 8 bytes
    return Template(
        *(b"}(" + step + number, ("step", "<i8"), epoch + number, ("epoch", "<i8"), R + rebuild),
        *(b"((" + kind + dtype + b"X" + struct.pack("<I", 2 * PACKED_KEY), KEY, device + number, ("numel", "<i8")),
        *(b"tQK\0" + number, ("N", "<i8"), number, ("K", "<i8"), b"\x86" + number, ("stride", "<i8")),
        b"K\1\x86\x89" + hooks + b")RtRua",
    )


FIRST = _pickled(*(part + b"q" + bytes([place]) for place, part in enumerate(COMMON)))
OTHERS = _pickled(*(b"h" + bytes([place]) for place in range(len(COMMON))))


def _pickle(index: bytes | bytearray) -> Iterator[bytes]:
    yield b"\x80\2]"
    yield _filled(FIRST, rows(index[: ENTRY.size]))
    for place, some in enumerate(_some_rows(index)):
        yield _filled(OTHERS, some if place else some[1:])
    yield b"."


def _filled(template: Template, some: npt.NDArray[np.void]) -> bytes:
    N, K = some["N"].astype(np.int64), some["K"].astype(np.int64)
    stride = np.maximum(K, 1)  # as torch's
    return template.filled(
        len(some), step=some["step"], epoch=some["epoch"], key=_keys(some), numel=N * K, N=N, K=K, stride=stride
    )
