"""Every file of a run. What is in the files is said in `readers`, how they get to the disk in `disk`.

Writers make nothing, not even the folder, before the first `append`, and may be used again after `close`.
"""

import io
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mixture_torch.disk import GrowingFile, Whole, write_atomically
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
        self._file = GrowingFile(path, whole=lambda: _whole(path, len(read_whole_lines(path))), header=LOG_HEADER)

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
        self._journal = GrowingFile(path, whole=lambda: _whole(path, read_journal(path).size))

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
        self.open()
        header = b"" if self._journal.end else self._header()
        self._journal.append(header + JOURNAL_RECORD.pack(len(payload), zlib.crc32(payload)) + payload)

    def open(self) -> None:
        """Opens the files, unless they are open.

        Raises:
            ValueError: `mixture_scores.pt` or the journal is not ours; it is left as it is.
            OSError: They could not be opened.
        """
        if self._listed is None and not self._journal.path.exists():
            self._listed = len(read_list(self._folder / LIST_FILE))
        self._journal.open()

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


def _whole(path: Path, size: int) -> Whole:
    return Whole(size, torn=path.stat().st_size - size)


def _entry(step: int, epoch: int, responsibilities: Tensor) -> ScoreEntry:
    R = responsibilities.detach().to("cpu", torch.float32)
    # A copy: torch.save writes a view's whole storage.
    return {"step": int(step), "epoch": int(epoch), "responsibilities": R.clone(memory_format=torch.contiguous_format)}


def _serialised(value: ScoreEntry | list[ScoreEntry]) -> bytes:
    """Returns the bytes of `torch.save`, which told to write a file itself hides an OSError in a RuntimeError."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
