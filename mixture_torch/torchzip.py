"""The parts of a zip as `torch.load` reads it: uncompressed records, a directory of them, and the end of the directory.

After "APPNOTE.TXT - .ZIP File Format Specification" 6.3.10 (PKWARE, 2022), sections 4.3 and 4.5. All numbers are in the
fields of 64 bits, however small, so that every part of a kind is as long as the others.
"""

import struct
import zlib

import numpy as np
import numpy.typing as npt

ALIGNMENT = 64  # of records, and of their data
LOCAL_SIZE = 192  # of what stands before the data of a record, padding included
FIXED_SIZE = 30  # of that, before the name
CRC_AT = slice(14, 18)

VERSION = 45  # the first with fields of 64 bits
DATE = 0x21  # 1980-01-01: the same entries are the same bytes
ELSEWHERE = 2**32 - 1  # stands where a number would be that is in a field of 64 bits


class Template:
    """Bytes with named fields in them, which are filled in for many rows at once.

    Args:
        parts: Bytes as they are, and fields (name, NumPy type).
    """

    def __init__(self, *parts: bytes | tuple[str, str]) -> None:
        fields = [("", f"S{len(part)}") if isinstance(part, bytes) else part for part in parts]
        self._row = np.dtype(fields)
        self._blank = b"".join(part if isinstance(part, bytes) else bytes(np.dtype(part[1]).itemsize) for part in parts)

    def filled(self, count: int, **columns: npt.ArrayLike) -> bytes:
        """Returns so many rows."""
        data = bytearray(self._blank * count)
        rows = np.ndarray(count, self._row, data)
        for name, column in columns.items():
            rows[name] = column
        return bytes(data)


def local_header(name: bytes, size: int, crc: int) -> bytes:
    """Returns what stands before the data of a record, with a checksum of its own, which zip files do not have."""
    head = struct.pack("<4s5H3I", b"PK\3\4", VERSION, 0, 0, 0, DATE, crc, ELSEWHERE, ELSEWHERE)
    lengths = struct.pack("<2H", len(name), LOCAL_SIZE - FIXED_SIZE - len(name))
    header = b"".join([head, lengths, name, struct.pack("<2H2Q", 1, 16, size, size)])
    padding = LOCAL_SIZE - len(header) - 4
    header += struct.pack("<2sH", b"FB", padding) + b"Z" * (padding - 4)
    return header + struct.pack("<I", zlib.crc32(header))


def listing(*name: bytes | tuple[str, str]) -> Template:
    """Returns a record's part of the directory, with the fields crc, size, size_again, offset and those of the name."""
    length = sum(len(part) if isinstance(part, bytes) else np.dtype(part[1]).itemsize for part in name)
    return Template(
        struct.pack("<4s6H", b"PK\1\2", VERSION, VERSION, 0, 0, 0, DATE),
        ("crc", "<u4"),
        struct.pack("<2I5H2I", ELSEWHERE, ELSEWHERE, length, 28, 0, 0, 0, 0, ELSEWHERE),
        *name,
        struct.pack("<2H", 1, 24),
        ("size", "<u8"),
        ("size_again", "<u8"),  # uncompressed and compressed
        ("offset", "<u8"),
    )


def end_of_zip(data: bytes, position: int) -> int | None:
    """Returns where in some bytes the zip ends that they are the end of, None where it is not complete.

    Args:
        data: With all of the directory.
        position: Where in the file they are.
    """
    place = -1
    while (place := data.find(b"PK\6\6", place + 1)) >= 0:
        count, size, offset = (int.from_bytes(data[place + at : place + at + 8], "little") for at in (24, 40, 48))
        if offset + size == position + place:  # before it is tried: other numbers may be beyond any file
            end = directory_end(offset, size, count)
            if data.startswith(end, place):
                return place + len(end)
    return None


def directory_end(offset: int, size: int, count: int) -> bytes:
    """Returns what follows a directory of so many records, which begins at an offset."""
    end64 = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, VERSION, VERSION, 0, 0, count, count, size, offset)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, offset + size, 1)
    return end64 + locator + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, *[2**16 - 1] * 2, ELSEWHERE, ELSEWHERE, 0)
