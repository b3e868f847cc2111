"""Every file that the wrapper writes. What is in the files is said in `readers`.

There are two ways to write, and neither leaves half of anything: files that grow take a row or a record whole and hand
it to the operating system before `append` returns; other files appear under their name when they are complete. Writers
make nothing, not even the folder, before the first `append`, and may be used again after `close`.
"""

import io
import os
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mixture_torch.readers import (
    JOURNAL_FILE,
    JOURNAL_HEADER,
    JOURNAL_MAGIC,
    JOURNAL_RECORD,
    LIST_FILE,
    LOG_FILE,
    LOG_HEADER,
    SHARD_FOLDER,
    SHARD_NAME,
    ScoreEntry,
    read_appended,
    read_journal,
    read_list,
    read_whole_lines,
)


class CsvWriter:
    """Appends rows to `mixture.csv`.

    Args:
        log_dir: The run folder.
    """

    def __init__(self, log_dir: str | Path) -> None:
        path = Path(log_dir).absolute() / LOG_FILE  # absolute: the working directory may change before a write
        self._file = _GrowingFile(path, whole=lambda: len(read_whole_lines(path)), header=lambda: LOG_HEADER)

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

    def flush(self) -> None:
        """Brings the rows to the disk, past a loss of power."""
        self._file.sync()

    def close(self) -> None:
        """Flushes, and closes the file."""
        self._file.sync()
        self._file.close()


class AppendScores:
    """Appends entries to `mixture_scores.pt`, through a journal so that no append depends on how many came before.

    Args:
        log_dir: The run folder.
    """

    def __init__(self, log_dir: str | Path) -> None:
        self._folder = Path(log_dir).absolute()
        self._listed: int | None = None  # entries in the list right after a flush, so that nobody has to look
        path = self._folder / JOURNAL_FILE
        self._journal = _GrowingFile(path, whole=lambda: read_journal(path).size, header=self._header)

    def append(self, step: int, epoch: int, responsibilities: Tensor) -> None:
        """Writes one entry into the journal, where `read_scores` finds it from now on.

        Args:
            step: The training step.
            epoch: The epoch.
            responsibilities: (N, K), on any device.

        Raises:
            ValueError: `mixture_scores.pt` or the journal is not ours; it is left as it is.
            OSError: The entry could not be written; the files are as they were.
        """
        payload = _serialised(_entry(step, epoch, responsibilities))
        self._journal.append(JOURNAL_RECORD.pack(len(payload), zlib.crc32(payload)) + payload)

    def flush(self) -> None:
        """Moves the journal's entries, a killed predecessor's included, into `mixture_scores.pt`.

        Raises:
            ValueError: `mixture_scores.pt` or the journal is not ours; both are left as they are.
            OSError: The list could not be written; the entries stay in the journal.
        """
        if self._journal.path.exists():
            self._journal.open()
            entries = read_appended(self._folder)
            if entries:
                write_atomically(self._folder / LIST_FILE, _serialised(entries), durable=True)
            self._journal.close()
            self._journal.path.unlink()
            self._listed = len(entries)

    def close(self) -> None:
        """Flushes, and leaves no file open."""
        self.flush()
        self._journal.close()

    def _header(self) -> bytes:
        base, self._listed = self._listed, None
        return JOURNAL_HEADER.pack(JOURNAL_MAGIC, len(read_list(self._folder / LIST_FILE)) if base is None else base)


class PerStepScores:
    """Writes each entry into a file of its own, `mixture_scores/step_000123.pt`.

    Args:
        log_dir: The run folder.
    """

    def __init__(self, log_dir: str | Path) -> None:
        self._folder = Path(log_dir).absolute() / SHARD_FOLDER
        self._warned = False

    def append(self, step: int, epoch: int, responsibilities: Tensor) -> None:
        """Writes one entry, in place of an earlier one of the same step; that warns once.

        Args:
            step: The training step.
            epoch: The epoch.
            responsibilities: (N, K), on any device.

        Raises:
            OSError: The entry could not be written; an earlier one is as it was.
        """
        path = self._folder / SHARD_NAME.format(step)
        replaces = path.exists()
        write_atomically(path, _serialised(_entry(step, epoch, responsibilities)))
        if replaces and not self._warned:
            self._warned = True
            warnings.warn(f"`{path}` was there already and has been replaced, as will be others.", stacklevel=2)

    def flush(self) -> None:
        """Does nothing: every entry is complete when `append` returns."""

    def close(self) -> None:
        """Does nothing: no file stays open."""


def write_atomically(path: Path, data: bytes | memoryview, *, durable: bool = False) -> None:
    """Makes `data` the content of a file, which at no instant is missing, if it was there, or incomplete.

    Args:
        path: The file; its folder is made if need be.
        data: The whole content.
        durable: Outlast a loss of power too, for some milliseconds.

    Raises:
        OSError: The file could not be written; it is as it was, and no temporary file is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")  # always the same, so that those of killed processes do not pile up
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_atomically(path: Path, value: object) -> None:
    """Makes a file what `torch.load` reads `value` from, as `write_atomically` does, past a loss of power.

    Args:
        path: The file; its folder is made if need be.
        value: Anything that `torch.save` takes.

    Raises:
        OSError: The file could not be written; it is as it was.
    """
    write_atomically(path, _serialised(value), durable=True)


class _GrowingFile:
    """A file that grows by whole pieces, and opens itself where it has to.

    Args:
        path: The file; its folder is made if need be.
        whole: Returns how many bytes of the existing file are whole, or raises where it is not ours. What is behind
            them, the torn end of a write that a crash interrupted, is cut off with a warning.
        header: Returns what goes into an empty file first.
    """

    def __init__(self, path: Path, *, whole: Callable[[], int], header: Callable[[], bytes]) -> None:
        self.path = path
        self._whole = whole
        self._header = header
        self._file: io.FileIO | None = None

    def append(self, data: bytes) -> None:
        """Hands all of `data` to the operating system, or nothing."""
        _write_through(self.open(), data)

    def open(self) -> io.FileIO:
        """Returns the open file, an open one that was deleted from under us opened anew."""
        if self._file is not None and os.fstat(self._file.fileno()).st_nlink == 0:
            self.close()
        if self._file is None:
            whole = self._whole() if self.path.exists() else 0
            self._file = _open_behind(self.path, whole, header=b"" if whole else self._header())
        return self._file

    def sync(self) -> None:
        """Waits until the disk has what the operating system has."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file if it is open."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _open_behind(path: Path, whole: int, *, header: bytes) -> io.FileIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.FileIO(path, "a")
    try:
        torn = file.seek(0, os.SEEK_END) - whole
        file.truncate(whole)
        _write_through(file, header)
        if torn:
            warnings.warn(f"`{path}` ended in {torn} bytes of an unfinished write; they were dropped.", stacklevel=4)
    except BaseException:
        file.close()
        raise
    return file


def _write_through(file: io.FileIO, data: bytes) -> None:
    start = file.seek(0, os.SEEK_END)
    try:
        rest = memoryview(data)
        while rest:  # a disk that fills up takes a part before it raises
            rest = rest[file.write(rest) :]
    except BaseException:
        file.truncate(start)
        raise


def _entry(step: int, epoch: int, responsibilities: Tensor) -> ScoreEntry:
    R = responsibilities.detach().to("cpu", torch.float32)
    # A copy: torch.save writes a view's whole storage.
    return {"step": int(step), "epoch": int(epoch), "responsibilities": R.clone(memory_format=torch.contiguous_format)}


def _serialised(value: object) -> bytes:
    """Returns the bytes of `torch.save`, which told to write a file itself hides an OSError in a RuntimeError."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
