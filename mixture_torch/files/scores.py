"""`mixture_scores.pt`: the responsibilities of all logged steps in one file; and how the scores of a run are read."""

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from mixture_torch.files.disk import GrowingFile, set_aside, superseded, write_atomically
from mixture_torch.files.scores_format import (
    HEADER,
    INDEX,
    archive,
    beginning,
    pack,
    read_record,
    scan,
    tail,
    torn,
    unpacked,
)
from mixture_torch.files.shards import (
    SHARD_FOLDER,
    SHARD_PATTERN,
    ScoreEntry,
    entries_folder,
    load_entry,
    load_list,
    readable,
)

SCORES_FILE = "mixture_scores.pt"


class ScoresFile(GrowingFile):
    """Appends entries to `mixture_scores.pt`, at a cost that does not depend on how many came before."""

    def __init__(self, path: Path, *, say: Callable[[str], None]) -> None:
        super().__init__(path, header=HEADER, say=say)
        self._index = bytearray()  # the records in the file, 44 bytes each

    def is_as_left(self) -> bool:
        """Returns whether the file and the index agree; an interrupt may have come between changes of the two."""
        return super().is_as_left() and self._indexed == self.end

    def append_entry(self, step: int, epoch: int, R: Tensor) -> None:
        """Appends one entry, (N, K), to the open file; `read_scores` finds it at once."""
        record, data = pack(self.end, step, epoch, R)
        self.put(data)
        self._index += INDEX.pack(*record)

    def supersede(self, position: tuple[int, int], number: int) -> int:
        """Moves the entries at or after a position to `mixture_scores.superseded-<number>.pt`.

        Returns how many there were. If something cannot be written, entries may be in both files.
        """
        if not self.path.exists():
            return 0
        self.open()
        records = list(unpacked(self._index))
        kept = [record for record in records if (record.epoch, record.step) < position]
        if moved := len(records) - len(kept):
            aside = superseded(self.path, number)
            if not kept:
                self.flush()
                self.close()
                set_aside(self.path, aside)
                return moved
            write_atomically(aside, archive(self._entries(lambda at: at >= position)), durable=True)
            if kept == records[: len(kept)]:
                del self._index[len(kept) * INDEX.size :]
                self.cut(records[len(kept)].offset)
            else:
                write_atomically(self.path, archive(self._entries(lambda at: at < position)), durable=True)
        self.flush()
        return moved

    def flush(self) -> None:
        """Completes the file if it has been opened, so that `torch.load` reads it, and waits until the disk has it."""
        if self.end and self.path.exists():
            self.open()
            if self._size == self.end:
                self.put(tail(self._index, self.end), is_tail=True)
            self.sync()

    def look(self) -> int:
        """Returns how many bytes are whole entries; makes the index anew from the last known entry on."""
        if not self.path.exists():
            self._index.clear()
            return 0
        if beginning(self.path) != HEADER:  # a list that somebody saved, damage, or what a crash left
            self._index.clear()
            write_atomically(self.path, archive(read_entries(self.path, self._say)), durable=True)
        elif self._index and not _holds(self.path, self._index[-INDEX.size :]):
            self._index.clear()
        for record, _ in scan(self.path, self._say, start=self._indexed):
            self._index += INDEX.pack(*record)
        if size := torn(self.path, self._indexed):
            self._say(f"An unfinished write of {size} bytes at the end of `{self.path}` was dropped.")
        return self._indexed

    def _entries(self, takes: Callable[[tuple[int, int]], bool]) -> Iterator[ScoreEntry]:
        for record, R in scan(self.path, lambda _: None):
            if takes((record.epoch, record.step)):
                yield {"step": record.step, "epoch": record.epoch, "responsibilities": R}

    @property
    def _indexed(self) -> int:
        """Bytes up to the end of the last record in the index."""
        return max((record.end for record in unpacked(self._index[-INDEX.size :])), default=len(HEADER))


def read_scores(log_dir: str | os.PathLike[str]) -> list[ScoreEntry]:
    """Returns all responsibilities in a run folder, whichever `scores_mode` wrote them.

    Entries of `append` come first, in the order in which they were logged, whether or not they were flushed. Those of
    `per_step` follow in the order of their steps. Damaged entries are left out with a warning. Reading changes no file
    and may be done while the run still writes.

    Args:
        log_dir: The run folder, as given to the estimator, or the file or folder of scores in it.

    Returns:
        Entries `{"step": int, "epoch": int, "responsibilities": (N, K) float32 CPU tensor}`.

    Raises:
        FileNotFoundError: There is no such folder, or it has no scores of either mode.
        ValueError: The file is another program's.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from mixture_torch import MixtureStats, read_scores
        >>> folder = tempfile.mkdtemp()
        >>> with MixtureStats(K=2, enabled=True, log_dir=folder, store_scores=True) as estimator:
        ...     _ = estimator.update(torch.randn(64, 8))
        ...     estimator.log_step(step=0, epoch=0)
        >>> read_scores(folder)[0]["responsibilities"].shape
        torch.Size([64, 2])
    """
    shards = list(entries_folder(log_dir, SHARD_FOLDER).glob(SHARD_PATTERN))
    path = Path(log_dir) if Path(log_dir).is_file() else Path(log_dir) / SCORES_FILE
    if not (shards or path.exists()):
        raise FileNotFoundError(
            f"`{log_dir}` has neither `{SCORES_FILE}` nor `{SHARD_FOLDER}/{SHARD_PATTERN}`; was `store_scores` on?"
        )
    appended = list(read_entries(path, _warn)) if path.exists() else []
    return appended + sorted(readable(shards, load_entry), key=lambda entry: entry["step"])


def read_entries(path: Path, say: Callable[[str], None]) -> Iterator[ScoreEntry]:
    """Yields the entries of a file that `ScoresFile` or `torch.save` wrote; raises a ValueError if it is neither."""
    begin, end = beginning(path), 0
    for record, R in scan(path, say) if begin is not None else ():
        end = record.end
        yield {"step": record.step, "epoch": record.epoch, "responsibilities": R}
    if begin is None or not (end or HEADER.startswith(begin.rstrip(b"\0"))):
        yield from load_list(path)
        return
    if end and begin != HEADER:
        say(f"The beginning of `{path}` is damaged and was skipped.")
    if size := torn(path, end or len(HEADER) * (begin == HEADER)):
        say(f"An unfinished write of {size} bytes at the end of `{path}` was left out.")


def _holds(path: Path, packed: bytes | bytearray) -> bool:
    (record,) = unpacked(packed)
    with open(path, "rb") as file:
        return (read_record(file, record.offset) or [None])[0] == record


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)
