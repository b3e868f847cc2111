"""What writes the log of a run, and whole files. What is in the files is said in `readers`, how they get to the disk in
`disk`.

Writers make nothing, not even the folder, before the first `append`, and may be used again after `close`.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from mixture_torch.caller import warn_caller
from mixture_torch.disk import GrowingFile, Whole, write_atomically
from mixture_torch.readers import LOG_FILE, LOG_HEADER, SUPERSEDED_LOG, position_of, read_whole_lines


class CsvWriter:
    """Appends rows to `mixture.csv`.

    Args:
        log_dir: The run folder.
        say: Is told what there is to warn about.
    """

    def __init__(self, log_dir: str | Path, *, say: Callable[[str], None] = warn_caller) -> None:
        self._path = Path(log_dir).absolute() / LOG_FILE  # absolute: the working directory may change before a write
        self._file = GrowingFile(self._path, whole=self._whole, header=LOG_HEADER, say=say)
        self.last: tuple[int, int] | None = None  # (epoch, step) of the last row of the open file

    @property
    def end(self) -> int:
        """Bytes up to the end of the last row of the open file."""
        return self._file.end

    def check(self) -> None:
        """Raises a ValueError where the file is not ours, and changes nothing."""
        if self._path.exists():
            read_whole_lines(self._path)

    def open(self) -> None:
        """Opens the file, unless it is open.

        Raises:
            ValueError: The file has another header; it is left as it is.
            OSError: The file cannot be opened.
        """
        self._file.open()

    def append(self, step: int, epoch: int, K: int, figures: Sequence[float]) -> None:
        """Writes one row, which is in the file on return.

        Args:
            step: The training step.
            epoch: The epoch.
            K: The number of components.
            figures: pi_min, pi_max, trace_B and opnorm_B.

        Raises:
            ValueError: The file has another header; it is left as it is.
            OSError: The row could not be written; the file is as it was.
        """
        pi_min, pi_max, trace_B, opnorm_B = figures
        row = f"{step:d},{epoch:d},{K:d},{pi_min:.9g},{pi_max:.9g},{trace_B:.9g},{opnorm_B:.9g}\n"
        self._file.append(row.encode("ascii"))
        self.last = epoch, step

    def steps_from(self, position: tuple[int, int]) -> set[int]:
        """Returns the steps of all rows at or behind a position.

        Args:
            position: (epoch, step).
        """
        self._file.open()
        found = [position_of(line) for line in self._lines() if _is_from(position, line)]
        return {place[1] for place in found if place is not None}

    def supersede(self, position: tuple[int, int], number: int) -> int:
        """Moves all rows at or behind a position, wherever they stand, to `mixture.superseded-<number>.csv`.

        Args:
            position: (epoch, step).
            number: Of the file for them; without such rows it is not made.

        Returns:
            How many rows were moved.

        Raises:
            OSError: Something could not be written; rows may then be in both files.
        """
        self._file.open()
        lines = self._lines()
        kept = [line for line in lines if not _is_from(position, line)]
        moved = [line for line in lines if _is_from(position, line)]
        if moved:
            target = self._path.with_name(SUPERSEDED_LOG.format(number))
            write_atomically(target, LOG_HEADER + b"".join(moved), durable=True)
            remainder = LOG_HEADER + b"".join(kept)
            if lines[: len(kept)] == kept:
                self._file.cut(len(remainder))
            else:
                write_atomically(self._path, remainder, durable=True)
                self._file.close()
                self._file.open()
            self.last = _last_position(kept)
        return len(moved)

    def flush(self) -> None:
        """Brings the rows to the disk, past a loss of power."""
        self._file.sync()

    def close(self) -> None:
        """Flushes, and closes the file."""
        try:
            self._file.sync()
        finally:
            self._file.close()

    def _lines(self) -> list[bytes]:
        return read_whole_lines(self._path).splitlines(keepends=True)[1:]

    def _whole(self) -> Whole:
        lines = read_whole_lines(self._path)
        self.last = _last_position(lines[lines[:-1].rfind(b"\n") + 1 :].splitlines())
        return _whole(self._path, len(lines))


def save_atomically(path: Path, value: object, *, durable: bool = False) -> None:
    """Makes a file what `torch.load` reads `value` from, as `write_atomically` does.

    Args:
        path: The file; its folder is made if need be.
        value: Anything that `torch.save` takes.
        durable: Outlast a loss of power too.

    Raises:
        OSError: The file could not be written; it is as it was.
    """
    buffer = io.BytesIO()  # torch.save, told to write a file itself, hides an OSError in a RuntimeError
    torch.save(value, buffer)
    write_atomically(path, buffer.getbuffer(), durable=durable)


def _is_from(position: tuple[int, int], line: bytes) -> bool:
    found = position_of(line)
    return found is not None and found >= position


def _last_position(lines: list[bytes]) -> tuple[int, int] | None:
    return position_of(lines[-1]) if lines else None


def _whole(path: Path, size: int) -> Whole:
    return Whole(size, torn=path.stat().st_size - size)
