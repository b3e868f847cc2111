"""`mixture.csv`: one row per logged step.

Rows that a resumed run logs again, and torn rows, are moved to `mixture.superseded-1.csv`, `-2` and so on.
"""

import os
import stat
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mixture_torch.files.disk import GrowingFile, write_atomically

LOG_FILE = "mixture.csv"
SUPERSEDED_LOG = "mixture.superseded-{}.csv"
COLUMNS = {
    "step": np.int64,
    "epoch": np.int64,
    "K": np.int64,
    "pi_min": np.float64,
    "pi_max": np.float64,
    "trace_B": np.float64,
    "opnorm_B": np.float64,
}
HEADER = ",".join(COLUMNS).encode("ascii")

Position = tuple[int, int]  # (epoch, step)


class Lines(NamedTuple):
    """The content of a log."""

    end: bytes  # how each line ends: b"\n", or b"\r\n" if the header does
    rows: list[bytes]  # with their line ends
    torn: bytes  # a last row without a line end
    size: int  # bytes of header and rows; 0 without a whole header

    @property
    def header(self) -> bytes:
        """The first line."""
        return HEADER + self.end


NOTHING = Lines(b"\n", [], b"", 0)


class LogFile(GrowingFile):
    """Appends rows to `mixture.csv`, with the line ends that the file has.

    Args:
        folder: The run folder.
        say: Called with each warning.
    """

    def __init__(self, folder: Path, *, say: Callable[[str], None]) -> None:
        super().__init__(folder / LOG_FILE, header=HEADER + b"\n", say=say)
        self.last: Position | None = None  # of the last row of the open file
        self._line_end = b"\n"

    def check(self) -> None:
        """Raises a ValueError if the file has another format; changes nothing."""
        if self.path.exists():
            read_lines(self.path)

    def look(self) -> int:
        """Returns how many bytes are header and rows; sets a torn row aside."""
        lines = read_lines(self.path) if self.path.exists() else NOTHING
        self._line_end, self.last = lines.end, _position_of(lines.rows[-1]) if lines.rows else None
        extra = self.path.stat().st_size - lines.size if self.path.exists() else 0
        if lines.torn and lines.size != self._undone:
            paths = (self.path.with_name(SUPERSEDED_LOG.format(n)) for n in count(1))
            aside = next(path for path in paths if not path.exists())
            write_atomically(aside, lines.header + lines.torn, durable=True)
            self._say(
                f"The last row of `{self.path}` has no line end and may be cut short; it was moved to `{aside.name}`."
            )
        elif extra:
            self._say(f"An unfinished write of {extra} bytes at the end of `{self.path}` was dropped.")
        return lines.size

    def append_row(self, step: int, epoch: int, K: int, figures: tuple[float, float, float, float]) -> None:
        """Writes one row to the open file: step, epoch, K; pi_min, pi_max, trace_B and opnorm_B."""
        row = f"{step:d},{epoch:d},{K:d},{','.join(f'{figure:.9g}' for figure in figures)}".encode("ascii")
        self.put(row + self._line_end)
        self.last = epoch, step

    def steps_from(self, position: Position) -> set[int]:
        """Returns the steps of all rows at or after a position."""
        self.open()
        found = map(_position_of, read_lines(self.path).rows)
        return {place[1] for place in found if place is not None and place >= position}

    def supersede(self, position: Position, number: int) -> int:
        """Moves all rows at or after a position to `mixture.superseded-<number>.csv`, wherever they stand.

        Returns how many there were. If something cannot be written, rows may be in both files.
        """
        self.open()
        lines = read_lines(self.path)
        kept = [row for row in lines.rows if not _is_from(position, row)]
        moved = [row for row in lines.rows if _is_from(position, row)]
        if moved:
            target = self.path.with_name(SUPERSEDED_LOG.format(number))
            write_atomically(target, lines.header + b"".join(moved), durable=True)
            remainder = lines.header + b"".join(kept)
            if lines.rows[: len(kept)] == kept:
                self.cut(len(remainder))
                self.last = _position_of(kept[-1]) if kept else None
            else:
                write_atomically(self.path, remainder, durable=True)
                self.close()
                self.open()
        return len(moved)


def read_log(log_dir: str | Path) -> dict[str, npt.NDArray[Any]]:
    """Returns `mixture.csv` as one array per column, with one element per logged step.

    A last row without a newline, as after a crash, is left out. Reading changes no file and may be done while the
    run still writes.

    Args:
        log_dir: The run folder, as given to the estimator.

    Returns:
        `step`, `epoch` and `K` as int64; `pi_min`, `pi_max`, `trace_B` and `opnorm_B` as float64.

    Raises:
        FileNotFoundError: The folder has no `mixture.csv`.
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
    path = Path(log_dir) / LOG_FILE
    if not path.exists():
        raise FileNotFoundError(f"`{log_dir}` has no `{LOG_FILE}`; was a step logged?")
    rows = [row.decode("ascii", errors="replace") for row in read_lines(path).rows]
    dtype = np.dtype(list(COLUMNS.items()))
    try:  # loadtxt warns about an empty table
        table = np.loadtxt(rows, dtype, delimiter=",", comments=None, ndmin=1) if rows else np.empty(0, dtype)
    except ValueError as error:
        raise ValueError(f"`{path}` has a row that is not {len(COLUMNS)} numbers: {error}.") from error
    return {name: table[name].copy() for name in COLUMNS}


def read_lines(path: Path) -> Lines:
    """Returns the content of a log.

    A last line without a line end is no row: even if it has seven numbers, the last one may be cut short. Zeros at the
    end are what a loss of power leaves. Raises ValueError if the file has another header.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"`{path}` is not a file; move it away or choose another `log_dir`.")
    data = path.read_bytes().rstrip(b"\0")
    end = b"\r\n" if data.startswith(HEADER + b"\r") else b"\n"
    begin = HEADER + end
    if begin.startswith(data) and data != begin:  # nothing, or a torn header
        return NOTHING
    if not data.startswith(begin):
        first = data.split(b"\n", 1)[0][:80].decode("ascii", errors="backslashreplace")
        raise ValueError(
            f"`{path}` begins with `{first}` instead of `{HEADER.decode()}`; "
            "move the file away or choose another `log_dir`."
        )
    *rows, last = [line + b"\n" for line in data[len(begin) :].split(b"\n")]
    return Lines(end, rows, last[:-1], len(data) - len(last) + 1)


def _position_of(row: bytes) -> Position | None:
    """Returns the (epoch, step) of a row, or None if it is damaged."""
    try:
        step, epoch, _ = row.split(b",", 2)
        return int(epoch), int(step)
    except ValueError:
        return None


def _is_from(position: Position, row: bytes) -> bool:
    found = _position_of(row)
    return found is not None and found >= position
