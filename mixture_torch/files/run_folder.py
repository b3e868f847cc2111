"""The run folder: its lock, the order of its rows, and retries after disk faults.

A row is kept in memory until it is in the folder, and each call tries all that are kept, in order. A call during
another call, from a signal handler or a garbage collection, only queues its request; the outer call carries it out.
"""

from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mixture_torch.files.lock import FolderLock
from mixture_torch.files.log import SUPERSEDED_LOG, LogFile
from mixture_torch.files.scores import SUPERSEDED_SCORES, ScoresFile
from mixture_torch.files.shards import SUPERSEDED_SHARDS, ShardFolder

Mode = Literal["append", "per_step"]
MOST_KEPT = 2**30  # bytes of responsibilities: a full disk must not take the memory of the run


class Row(NamedTuple):
    """A logged step, whose numbers are all known."""

    step: int
    epoch: int
    K: int
    pi_min: float
    pi_max: float
    trace_B: float
    opnorm_B: float
    R: Tensor | None = None  # (N, K) responsibilities to store
    resumes: bool = False  # whether earlier rows at this (epoch, step) or later are superseded


@dataclass(eq=False)
class _Waiting:
    """A row that is still to be written, and how far that is."""

    row: Row
    scores_mode: Mode | None
    R: Tensor | None  # to be stored; None once it is
    resumes: bool
    kept_bytes: int = 0  # of a copy of R
    # Where the files ended before the row. If they have grown, it is there, though an interrupt came after the write.
    log_end: float = float("inf")
    scores_end: float = float("inf")
    number: int = 0  # of the files for what it supersedes, once they are begun
    moved: int = 0  # entries of responsibilities in them


class RunFolder:
    """A folder that one process at a time writes to, for all its estimators. A forked child leaves its copy alone."""

    def __init__(self, path: Path) -> None:
        self.news: list[str] = []  # warnings, to be said when the work is done, as they may be made errors
        self.is_busy = False
        self._path = path
        self._lock = FolderLock(path)
        self._log = LogFile(path, say=self.news.append)
        self._scores = ScoresFile(path, say=self.news.append)
        self._shards = ShardFolder(path, say=self.news.append)
        self._users: set[object] = set()
        self._waiting: deque[_Waiting] = deque()
        self._written: Row | None = None  # the last one
        self._kept_bytes = self._dropped = 0  # bytes of copied responsibilities; entries without room for one
        self._fault: str | None = None  # why the last attempt failed
        self._is_open = self._completes = False  # whether files are open, and whether they are to be completed
        self._warned_of_order = False

    def join(self, user: object, scores_mode: Mode | None) -> None:
        """Opens the folder for a user, unless it is open for this one.

        Raises:
            ValueError: A file has another format, or another process has the folder. Nothing is changed.
        """
        if user in self._users:
            return
        if not self.is_busy:
            self._open(scores_mode)
        if self._users:
            self.news.append(f"`{self._path}` is open in this process already; both estimators write to it.")
        self._warned_of_order &= bool(self._users)
        self._users.add(user)

    def write(self, row: Row, scores_mode: Mode | None, *, strict: bool) -> None:
        """Writes a row after all that wait, unless it was given before; `strict` raises what the disk reports."""
        if row is not (self._waiting[-1].row if self._waiting else self._written):
            self._waiting.append(_Waiting(row, scores_mode, row.R, row.resumes))
        try:
            self._work(strict=strict)
        finally:
            self._keep_responsibilities()

    def flush(self, *, strict: bool, quiet: bool = False) -> None:
        """Writes what waits and completes all files on the disk; closes them if they have no user."""
        self._completes = True
        self._work(strict=strict, quiet=quiet)

    def leave(self, user: object, *, strict: bool, for_good: bool) -> None:
        """Flushes for a user that leaves; `for_good` means that it will not try again."""
        self._users.discard(user)
        self.flush(strict=strict, quiet=True)
        if not (for_good and self._users):  # otherwise the others will try again
            self._say_what_is_missing(for_good)

    def _open(self, scores_mode: Mode | None) -> None:
        """Checks all files, then opens them."""
        try:
            self.is_busy = True
            with suppress(OSError):  # `write` will meet it again, and keeps the row
                self._lock.acquire()
                self._log.check()
                if scores_mode == "append":
                    self._scores.open()
                self._log.open()
                self._is_open = True
        except BaseException:
            if not self._users:
                self._lock.release()
            raise
        finally:
            self.is_busy = False

    def _work(self, *, strict: bool, quiet: bool = False) -> None:
        """Writes all that waits and, if asked to, completes the files; warns about the first of several faults."""
        if self.is_busy:
            return
        before = self._fault
        try:
            self.is_busy = True
            while self._waiting or self._completes:
                try:
                    self._write_rows()
                finally:
                    self._complete()
            self._fault = None
        except (OSError, ValueError) as error:
            # Its text alone: the traceback of the error would keep the callers alive.
            self._fault = (error.strerror if isinstance(error, OSError) else None) or str(error).rstrip(".")
            if strict:
                raise
            if before is None and not quiet:
                kept = "rows are kept in memory and tried again at every `log_step` and `flush`"
                self.news.append(f"`{self._path}` could not be written ({self._fault}): {kept}.")
        finally:
            self.is_busy = False

    def _write_rows(self) -> None:
        while self._waiting:
            waiting = self._waiting[0]
            row, log = waiting.row, self._log
            self._is_open = True
            self._lock.acquire()
            log.open()
            if waiting.resumes:
                self._supersede(waiting)
                log.open()  # again if it was replaced
            if waiting.R is not None:
                self._write_scores(waiting, waiting.R)
            waiting.log_end = min(waiting.log_end, log.end)
            if log.end == waiting.log_end:
                self._check_order(row)
                log.append_row(row.step, row.epoch, row.K, row[3:7])
            self._written = row
            self._waiting.popleft()

    def _write_scores(self, waiting: _Waiting, R: Tensor) -> None:
        row = waiting.row
        if waiting.scores_mode == "per_step":
            self._shards.write(row.step, row.epoch, R)
        else:
            self._scores.open()
            waiting.scores_end = min(waiting.scores_end, self._scores.end)
            if self._scores.end == waiting.scores_end:
                self._scores.append_entry(row.step, row.epoch, R)
        self._kept_bytes -= waiting.kept_bytes
        waiting.R = None

    def _supersede(self, waiting: _Waiting) -> None:
        """Moves what was recorded at or after a row to files of their own; may be called again after a fault."""
        position = epoch, step = waiting.row.epoch, waiting.row.step
        waiting.number = waiting.number or next(n for n in count(1) if not self._superseded(n))
        steps = self._log.steps_from(position)
        waiting.moved += self._shards.supersede(position, waiting.number, steps=steps)
        try:
            waiting.moved += self._scores.supersede(position, waiting.number)
        except ValueError as error:  # a foreign file, which this run may not need
            self.news.append(f"{error} It was left as it is.")
        rows = self._log.supersede(position, waiting.number)  # last: it tells which shards to look at
        waiting.resumes = False
        if rows or waiting.moved:
            places = " and ".join(self._superseded(waiting.number))
            self.news.append(
                f"`{self._path}` is resumed at step {step} of epoch {epoch}: {rows} later rows and {waiting.moved} "
                f"entries of responsibilities were moved to {places}."
            )

    def _superseded(self, number: int) -> list[str]:
        names = [form.format(number) for form in (SUPERSEDED_LOG, SUPERSEDED_SCORES, SUPERSEDED_SHARDS)]
        return [f"`{name}`" for name in names if (self._path / name).exists()]

    def _check_order(self, row: Row) -> None:
        last = self._log.last
        if last is not None and (row.epoch, row.step) <= last and not self._warned_of_order:
            self._warned_of_order = True
            self.news.append(
                f"`{self._path}` already has rows up to epoch {last[0]}, step {last[1]}; step {row.step} of epoch "
                f"{row.epoch} is appended. To replace later rows, call `load_state_dict` before `log_step`."
            )

    def _complete(self) -> None:
        asked, self._completes = self._completes, False
        if not (asked and self._is_open):  # otherwise the files may belong to another process
            return
        try:
            self._lock.acquire()
            try:
                self._scores.flush()
            finally:
                self._log.sync()
            self._is_open = bool(self._users)
        except BaseException:
            self._completes = True
            raise
        finally:
            if not self._users:
                self._scores.close()
                self._log.close()
                self._lock.release()

    def _keep_responsibilities(self) -> None:
        """Copies responsibilities that could not be written, as their owner may change them, up to MOST_KEPT bytes."""
        for waiting in reversed(self._waiting):
            if waiting.R is None or waiting.kept_bytes:
                break  # and so it is with all before it
            size = waiting.R.numel() * torch.float32.itemsize
            if self._kept_bytes + size > MOST_KEPT:
                waiting.R = None
                self._dropped += 1
            else:
                waiting.R = waiting.R.detach().to("cpu", torch.float32, copy=True)
                waiting.kept_bytes = size
                self._kept_bytes += size

    def _say_what_is_missing(self, for_good: bool) -> None:
        said, kept = [], "are kept in memory, and tried again at `log_step`, `flush` and `close`"
        if self._fault is not None:
            entries = sum(waiting.R is not None for waiting in self._waiting)
            rows = f"{len(self._waiting)} rows and {entries} entries of responsibilities"
            said.append(f"could not be written ({self._fault}): {rows} {'are lost' if for_good else kept}")
        if self._dropped:
            said.append(f"lacks {self._dropped} entries of responsibilities, because more than 1 GiB was waiting")
            self._dropped = 0
        if said:
            self.news.append(f"`{self._path}` {'; it '.join(said)}.")
