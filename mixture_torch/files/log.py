"""`mixture.csv`: one row per logged step; and, for any such file, how it is written, continued and read.

Rows that a resumed run logs again, and torn rows, are moved to `mixture.superseded-1.csv`, `-2` and so on.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mixture_torch.files.disk import GrowingFile, set_aside, superseded, write_atomically

LOG_FILE = "mixture.csv"
FIGURES = ("pi_min", "pi_max", "trace_B", "opnorm_B")
COLUMNS = dict.fromkeys(("step", "epoch", "K"), np.int64) | dict.fromkeys(FIGURES, np.float64)
HEADER = ",".join(COLUMNS).encode("ascii")

Mode = Literal["append", "per_step"]
Existing = Literal["append", "aside", "refuse"]
Position = tuple[int, int]  # (epoch, step)
NOWHERE = (-1, -1)  # before all others


@dataclass(eq=False)
class Row:
    """A logged step with all its numbers, and how much of it has been written."""

    step: int
    epoch: int
    K: int
    pi_min: float
    pi_max: float
    trace_B: float
    opnorm_B: float
    R: Tensor | None = None  # (N, K) responsibilities to store; None once they are
    resumes: bool = False  # whether it supersedes earlier rows at this (epoch, step) or later
    extra: tuple[float, ...] | None = None  # its row of `mixture_extra.csv` after step and epoch; None for no row
    # What follows is for the run folder.
    scores_mode: Mode | None = None
    kept_bytes: int = 0  # of a copy of R
    ends: dict[GrowingFile, int] = field(default_factory=dict)  # where files ended before the row

    def lacks(self, file: GrowingFile) -> bool:
        """Returns whether the row is not in an open file yet; an interrupt may have come right after the write."""
        before = self.ends[file] = min(self.ends.get(file, file.end), file.end)
        return file.end == before

    def keep(self, R: Tensor) -> int:
        """Copies the responsibilities, as their owner may change them, and returns the bytes of the copy."""
        self.R = R.detach().to("cpu", torch.float32, copy=True)
        self.kept_bytes = self.R.nbytes
        return self.kept_bytes


class Lines(NamedTuple):
    """The content of a file of rows."""

    header: bytes  # with its line end, b"\n" or b"\r\n", which all rows have; empty if it is not whole
    rows: list[bytes]  # with their line ends
    rest: bytes  # after the last line end


class RowsFile(GrowingFile):
    """Appends rows, which begin with step and epoch, to a CSV file, with the line ends that it has.

    `header` holds the names of the columns, with commas.
    """

    def __init__(self, path: Path, header: bytes, *, say: Callable[[str], None]) -> None:
        super().__init__(path, header=header + b"\n", say=say)
        self.last = b""  # row of the open file
        self._line_end = b"\n"

    def read(self) -> Lines:
        """Returns the content, as far as it is written; raises a ValueError if the file has another format."""
        return read_lines(self.path, self._header[:-1])

    def look(self) -> int:
        """Returns how many bytes are header and rows; sets a torn row aside."""
        header, rows, rest = self.read()
        self._line_end = b"\r\n" if header.endswith(b"\r\n") else b"\n"
        self.last = rows[-1] if rows else b""
        size, torn = len(header) + sum(map(len, rows)), rest.rstrip(b"\0")
        if header and torn and size != self.end:  # where this object stopped, it is of a row that is still kept
            aside = self.unused()
            write_atomically(aside, header + torn, durable=True)
            self._say(
                f"The last row of `{self.path}` has no line end and may be cut short; it was moved to `{aside.name}`."
            )
        elif rest:
            self._say(f"An unfinished write of {len(rest)} bytes at the end of `{self.path}` was dropped.")
        return size

    def unused(self) -> Path:
        """Returns the first `mixture.superseded-N.csv` that does not exist yet."""
        asides = (superseded(self.path, number) for number in count(1))
        return next(path for path in asides if not path.exists())

    def append_row(self, step: int, epoch: int, *others: float) -> None:
        """Writes one row to the open file: integers in full, other numbers with nine digits."""
        numbers = (step, epoch, *others)
        form = ",".join(["%d" if isinstance(number, int) else "%.9g" for number in numbers])
        row = (form % numbers).encode("ascii") + self._line_end
        self.put(row)
        self.last = row

    def steps_from(self, position: Position) -> set[int]:
        """Returns the steps of all rows at or after a position."""
        return {step for epoch, step in map(position_of, self.read().rows) if (epoch, step) >= position}

    def supersede(self, position: Position, number: int) -> int:
        """Moves all rows at or after a position to `mixture.superseded-<number>.csv`, wherever they stand.

        Returns how many there were. If something cannot be written, rows may be in both files.
        """
        if not self.path.exists():
            return 0
        self.open()
        header, rows, _ = self.read()
        moved = [row for row in rows if position_of(row) >= position]
        if moved:
            aside, kept = superseded(self.path, number), [row for row in rows if position_of(row) < position]
            if kept:
                write_atomically(aside, header + b"".join(moved), durable=True)
                write_atomically(self.path, header + b"".join(kept), durable=True)
            else:
                self.sync()
                self.close()
                set_aside(self.path, aside)
        return len(moved)


def read_log(log_dir: str | os.PathLike[str]) -> dict[str, npt.NDArray[Any]]:
    """Returns `mixture.csv` as one array per column, with one element per logged step.

    A last row without a newline, as after a crash, is left out. Reading changes no file and may be done while the
    run still writes.

    Args:
        log_dir: The run folder, as given to the estimator, or the file itself.

    Returns:
        `step`, `epoch` and `K` as int64; `pi_min`, `pi_max`, `trace_B` and `opnorm_B` as float64.

    Raises:
        FileNotFoundError: There is no such folder, or it has no `mixture.csv`.
        ValueError: The file is another program's, or a row is not seven numbers.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from mixture_torch import MixtureStats, read_log
        >>> folder = tempfile.mkdtemp()
        >>> with MixtureStats(K=2, enabled=True, log_dir=folder) as estimator:
        ...     for step in range(3):
        ...         _ = estimator.update(torch.randn(64, 8))
        ...         estimator.log_step(step=step, epoch=0)
        >>> read_log(folder)["step"]
        array([0, 1, 2])
    """
    return read_table(found(log_dir, LOG_FILE, "a step logged"), HEADER, list(COLUMNS.items()))


def found(place: str | os.PathLike[str], name: str, what: str) -> Path:
    """Returns the path of a file of a run, of which `place` is the folder or the file itself."""
    path = Path(place)
    if path.is_file():
        return path
    if not path.exists():
        raise FileNotFoundError(f"There is no `{place}`.")
    if not (path / name).exists():
        raise FileNotFoundError(f"`{place}` has no `{name}`; was {what}?")
    return path / name


def read_table(path: Path, header: bytes, columns: list[Any]) -> dict[str, npt.NDArray[Any]]:
    """Returns a file of rows as one array for each column, or for each group of columns, as `np.dtype` takes them."""
    rows = [row.decode("ascii", errors="replace") for row in read_lines(path, header).rows if row.strip()]
    dtype = np.dtype(columns)
    try:  # loadtxt warns about an empty table
        table = np.loadtxt(rows, dtype, delimiter=",", comments=None, ndmin=1) if rows else np.empty(0, dtype)
    except ValueError as error:
        raise ValueError(f"`{path}` has a row that is not {header.count(b',') + 1} numbers: {error}.") from error
    return {name: table[name].copy() for name in dtype.names or ()}


def read_lines(path: Path, header: bytes) -> Lines:
    """Returns the content of a file of rows, which is empty if there is no file.

    A last line without a line end is no row: even if it has all numbers, the last one may be cut short. Zeros at the
    end are what a loss of power leaves. Raises ValueError if the file has another header.
    """
    if not path.exists():
        return Lines(b"", [], b"")
    if not path.is_file():
        raise ValueError(f"`{path}` is not a file; move it away or choose another `log_dir`.")
    data = path.read_bytes()
    written = data.rstrip(b"\0")
    begin = header + (b"\r\n" if written.startswith(header + b"\r") else b"\n")
    if begin.startswith(written) and written != begin:  # nothing, or a torn header
        return Lines(b"", [], data)
    if not written.startswith(begin):
        first = written.split(b"\n", 1)[0][:80].decode("latin-1").encode("unicode_escape").decode()
        raise ValueError(
            f"`{path}` begins with `{first}` instead of `{header.decode()}`; "
            "move the file away or choose another `log_dir`."
        )
    *rows, rest = data[len(begin) :].split(b"\n")
    return Lines(begin, [row + b"\n" for row in rows], rest)


def position_of(row: bytes) -> Position:
    """Returns the (epoch, step) of a row; NOWHERE if it is damaged."""
    try:
        step, epoch, _ = row.split(b",", 2)
        return int(epoch), int(step)
    except ValueError:
        return NOWHERE
