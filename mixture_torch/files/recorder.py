"""Hands finished rows to the files; the estimators of a process take turns."""

import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from mixture_torch.files.extra import joined, read_extra
from mixture_torch.files.log import Existing, Mode, Position, Row, read_log
from mixture_torch.files.run_folder import RunFolder
from mixture_torch.files.snapshots import Snapshot, read_snapshots

__all__ = ["Recorder", "Row"]


class Recorder:
    """Writes the rows of one estimator to its run folder.

    Args:
        log_dir: The run folder. None writes nothing.
        scores_mode: How responsibilities are stored; None if they are not.
        existing: What becomes of rows that the folder has before the first one of this estimator.
        writes: Returns whether this process writes. It is called once, at the first row.
        strict: Whether to raise an OSError if something cannot be written. In any case it is kept, and later calls try
            again to write it.
    """

    # Of the process. One lock for all folders: with two, threads that collect garbage could wait for each other.
    _turn = threading.RLock()
    _folders: ClassVar[weakref.WeakValueDictionary[str, RunFolder]] = weakref.WeakValueDictionary()

    def __init__(
        self,
        log_dir: str | os.PathLike[str] | None,
        *,
        scores_mode: Mode | None,
        existing: Existing = "append",
        writes: Callable[[], bool],
        strict: bool,
    ) -> None:
        if log_dir is not None and not isinstance(log_dir, (str, os.PathLike)):
            raise TypeError(f"`log_dir` must be a path or None, got {log_dir!r}.")
        if log_dir is not None and not os.fspath(log_dir):
            raise ValueError("`log_dir` is empty; use `.` for the working directory, or None for no files.")
        # Absolute: the working directory may change before the first row.
        self._log_dir = None if log_dir is None else Path(log_dir).absolute()
        self.scores_mode, self.existing = scores_mode, existing
        self._writes = cache(writes)
        self._strict = strict
        self._folder: RunFolder | None = None
        self._opened_by = 0  # a process
        self._user = object()  # stands for this recorder in the folder, which must not keep it alive

    @staticmethod
    def turn() -> threading.RLock:
        """Returns the lock that all estimators of this process take for their files."""
        return Recorder._turn

    @staticmethod
    def begin_anew() -> None:
        """In a forked child, leaves the folders to the parent, and the lock to the thread that may have it there."""
        for folder in list(Recorder._folders.values()):
            folder.lock.drop()
        Recorder._turn, Recorder._folders = threading.RLock(), weakref.WeakValueDictionary()

    @property
    def has_folder(self) -> bool:
        """Whether there is a run folder."""
        return self._log_dir is not None

    @property
    def is_ours(self) -> bool:
        """Whether this process itself called `open`, rather than its parent before a fork."""
        return self._opened_by == os.getpid()

    def open(self) -> bool:
        """Opens the run folder, if there is one, unless it is open; returns whether this process writes.

        Raises:
            ValueError: A file has another format, the folder has rows that `existing` refuses, or another process has
                it. Nothing is changed.
        """
        if not self._writes():
            return False
        if self._log_dir is None:
            self._opened_by = os.getpid()
            return True
        with self._turn:
            if self._folder is None or not self.is_ours:
                place = os.path.realpath(self._log_dir)  # the same, whatever path leads there
                self._folder = self._folders.setdefault(place, RunFolder(self._log_dir))
                self._opened_by = os.getpid()
            self._folder.join(self._user, self.scores_mode, self.existing)
            self.existing = "append"  # from now on, the rows are its own
        return True

    def write(self, row: Row) -> None:
        """Writes a row, once even if it is given twice."""
        self._do(lambda folder: folder.write(row, self.scores_mode, strict=self._strict))

    def write_snapshot(self, entry: Mapping[str, Any]) -> None:
        """Writes a snapshot after the rows so far, if there were any since `close`; at most 16 wait for the disk.

        `entry` has `step` and `epoch`, ints, and any numbers and dense tensors.
        """
        self._do(lambda folder: folder.write_snapshot(entry, self._user, strict=self._strict))

    def read(self, *, before: Position) -> tuple[Iterable[dict[str, Any]], list[Snapshot]]:
        """Returns the rows before an (epoch, step), by column, and the snapshots; nothing if no file can be read."""
        if self._log_dir is None:
            return (), []
        try:
            rows = joined(read_log(self._log_dir), read_extra(self._log_dir), before=before)
        except (OSError, ValueError):  # a fault of the disk, of which `write` has warned
            return (), []
        with suppress(OSError):
            return rows, read_snapshots(self._log_dir)
        return rows, []

    def flush(self) -> None:
        """Makes all files complete."""
        self._do(lambda folder: folder.flush(strict=self._strict))

    def close(self, *, for_good: bool = False, last: Mapping[str, Any] | None = None) -> None:
        """Makes all files complete and closes them; a later row opens them again.

        Args:
            for_good: Whether the estimator is gone: then nothing is raised, and what cannot be written is lost.
            last: A state_dict for `mixture_last.pt`, if rows were written since the last `close`. It must not change.
        """
        strict = self._strict and not for_good
        self._do(lambda folder: folder.leave(self._user, last, strict=strict, for_good=for_good))

    def _do(self, action: Callable[[RunFolder], None]) -> None:
        """Does something with the folder, unless it was never opened or is the parent's, and warns of its news."""
        with self._turn:
            if (folder := self._folder) is not None and self.is_ours:
                action(folder)
                while folder.news and not folder.is_busy:
                    warn_caller(folder.news.pop(0))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=Recorder.begin_anew)


def warn_caller(text: str) -> None:
    """Warns at the line outside of this package and of torch that led here: an `update`, a `flush`, a loss."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("mixture_torch.", "torch.")):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)
