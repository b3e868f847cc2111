"""The run folder: its lock, the order of its rows, and retries after disk faults.

A row or snapshot waits in memory until it is in the folder, and each call tries to write all that wait, in order. A row
goes to `mixture.csv` last: if it is there, so are its responsibilities and its row of `mixture_extra.csv`. A call
during another call, from a signal handler or garbage collection, only queues its request for the outer call.
"""

from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from mixture_torch.files.cut import Cut
from mixture_torch.files.extra import EXTRA_FILE, ExtraFile
from mixture_torch.files.lock import FolderLock
from mixture_torch.files.log import HEADER, LOG_FILE, NOWHERE, Existing, Mode, Row, RowsFile, position_of
from mixture_torch.files.scores import SCORES_FILE, ScoresFile
from mixture_torch.files.shards import SHARD_FOLDER, ShardFolder, copied, load_entry, save, score_entry
from mixture_torch.files.snapshots import LAST_FILE, SNAPSHOT_FOLDER, Snapshot, load_snapshot

MOST_KEPT = 2**30  # bytes of responsibilities: a full disk must not take the memory of the run
MOST_SNAPSHOTS = 16  # that wait; older ones are dropped


class RunFolder:
    """A folder that one process at a time writes to, for all its estimators. A forked child leaves its copy alone."""

    def __init__(self, path: Path) -> None:
        self.news: list[str] = []  # warnings, to be said when the work is done, as they may be made errors
        self.is_busy = False
        self.lock = FolderLock(path)
        self._path = path
        self._log = RowsFile(path / LOG_FILE, HEADER, say=self.news.append)
        self._scores = ScoresFile(path / SCORES_FILE, say=self.news.append)
        self._shards = ShardFolder(path / SHARD_FOLDER, load_entry, say=self.news.append)
        self._extra = ExtraFile(path / EXTRA_FILE, say=self.news.append)
        self._snapshots = ShardFolder(path / SNAPSHOT_FOLDER, load_snapshot, say=self.news.append)
        self._users: set[object] = set()
        self._waiting: deque[Row | Cut | Snapshot] = deque()
        self._written: Row | None = None  # the last one
        self._last: Mapping[str, Any] | None = None  # to be written as LAST_FILE
        self._kept_bytes = self._dropped = 0  # bytes of copied responsibilities; entries without room for one
        self._fault: str | None = None  # why the last attempt failed
        self._is_open = self._completes = False  # whether files are open, and whether they are to be completed
        self._warned_of: set[str] = set()

    def join(self, user: object, scores_mode: Mode | None, existing: Existing) -> None:
        """Opens the folder for a user; ValueError, and no change, if its rows, its owner or a file forbid it."""
        if user in self._users:
            return
        if not self.is_busy:
            self._open(scores_mode, existing)
        if self._users:
            self.news.append(f"`{self._path}` is open in this process already; both estimators write to it.")
        else:
            self._warned_of.clear()
            self._extra.begin()
            if existing == "aside":  # now: rows of a user that joins before the first row is here must stay
                self._waiting.append(Cut(NOWHERE))
        self._users.add(user)

    def write(self, row: Row, scores_mode: Mode | None, *, strict: bool) -> None:
        """Writes a row after all that wait, unless it was given before; `strict` raises what the disk reports."""
        if row is not next((item for item in reversed(self._waiting) if isinstance(item, Row)), self._written):
            row.scores_mode = scores_mode
            self._waiting.extend([Cut((row.epoch, row.step)), row] if row.resumes else [row])
        try:
            self._work(strict=strict)
        finally:
            self._keep_responsibilities()

    def write_snapshot(self, entry: Mapping[str, Any], user: object, *, strict: bool) -> None:
        """Writes a snapshot after all that wait, if the folder is open for this user."""
        if user in self._users:
            self._waiting.append(copied(entry))
            kept = self._waiting_snapshots
            if len(kept) > MOST_SNAPSHOTS and not self.is_busy:
                self._waiting.remove(kept[0])
            self._work(strict=strict)

    def flush(self, *, strict: bool, quiet: bool = False) -> None:
        """Writes what waits and completes all files on the disk; closes them if they have no user."""
        self._completes = True
        self._work(strict=strict, quiet=quiet)

    def leave(self, user: object, last: Mapping[str, Any] | None, *, strict: bool, for_good: bool) -> None:
        """Flushes for a user that leaves; `for_good` means that it will not try again."""
        if last is not None and user in self._users:
            self._last = dict(last)
        self._users.discard(user)
        self.flush(strict=strict, quiet=True)
        if not (for_good and self._users):  # otherwise the others will try again
            self._say_what_is_missing(for_good)

    def _open(self, scores_mode: Mode | None, existing: Existing) -> None:
        """Takes the folder and checks all files before one of them is changed."""
        try:
            self.is_busy = True
            with suppress(OSError):  # `write` will meet it again, and keeps the row
                self.lock.acquire()
                if (rows := self._log.read().rows) and existing == "refuse":
                    what = f"`{self._path}` already has {len(rows)} rows, and `existing` is `refuse`"
                    raise ValueError(f"{what}; choose another `log_dir`, or load a checkpoint first.")
                self._extra.read()
                if scores_mode == "append":
                    self._scores.open()
                self._is_open = True
        except BaseException:
            if not self._users:
                self.lock.release()
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
                    self._write_waiting()
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

    def _write_waiting(self, passed: int = 0) -> None:
        while len(self._waiting) > passed:
            item = self._waiting[passed]
            self._is_open = True
            self.lock.acquire()
            if isinstance(item, Cut):
                if passed:
                    return
                self._save_last()  # of a user that has left
                item.make((self._log, self._extra, self._scores, self._shards, self._snapshots), self.news.append)
            elif isinstance(item, Row):
                self._write_row(item)
                self._written = item
            else:
                try:
                    self._snapshots.write(item)
                except (OSError, ValueError):  # it holds up no rows but one that supersedes it
                    self._write_waiting(passed + 1)
                    raise
            del self._waiting[passed]

    def _write_row(self, row: Row) -> None:
        self._log.open()
        if row.extra is not None and not self._extra.open_for(row.K):
            row.extra = None
        if row.R is not None:
            self._write_scores(row, row.R)
        if row.extra is not None and row.lacks(self._extra):
            self._extra.append_row(row.step, row.epoch, *row.extra)
        if row.lacks(self._log):
            self._check_order(row)
            self._log.append_row(row.step, row.epoch, row.K, row.pi_min, row.pi_max, row.trace_B, row.opnorm_B)

    def _write_scores(self, row: Row, R: Tensor) -> None:
        if row.scores_mode == "per_step":
            self._shards.write(score_entry(row.step, row.epoch, R))
        else:
            self._scores.open()
            if row.lacks(self._scores):
                self._scores.append_entry(row.step, row.epoch, R)
        self._kept_bytes -= row.kept_bytes
        row.R = None

    def _check_order(self, row: Row) -> None:
        last = self._log.last
        epoch, step = position_of(last)
        if (row.epoch, row.step) <= (epoch, step):
            self._warn(
                "order",
                f"`{self._path}` already has rows up to epoch {epoch}, step {step}; step {row.step} of epoch "
                f"{row.epoch} is appended. To replace later rows, call `load_state_dict` before `log_step`; to move "
                'earlier runs to other files, use `existing="aside"`.',
            )
        if (K := last.split(b",", 3)[2:3]) and K != [b"%d" % row.K]:
            change = f"K={K[0].decode('ascii', 'replace')} to K={row.K} at step {row.step} of epoch {row.epoch}"
            self._warn("K", f"`{self._log.path}` changes from {change}; use another `log_dir`.")

    def _warn(self, kind: str, text: str) -> None:
        """Warns once of each kind."""
        if kind not in self._warned_of:
            self._warned_of.add(kind)
            self.news.append(text)

    def _complete(self) -> None:
        asked, self._completes = self._completes, False
        if not (asked and self._is_open):  # otherwise the files may belong to another process
            return
        try:
            self.lock.acquire()
            self._log.sync()
            self._extra.sync()
            self._scores.flush()
            self._save_last()
            self._is_open = bool(self._users)
        except BaseException:
            self._completes = True
            raise
        finally:
            if not self._users:
                for file in (self._scores, self._extra, self._log):
                    file.close()
                self.lock.release()

    def _save_last(self) -> None:
        if self._last is not None:
            save(self._path / LAST_FILE, self._last)
            self._last = None

    @property
    def _waiting_snapshots(self) -> list[Snapshot]:
        return [item for item in self._waiting if isinstance(item, dict)]

    def _keep_responsibilities(self) -> None:
        """Copies responsibilities that could not be written, as their owner may change them, up to MOST_KEPT bytes."""
        for row in (item for item in reversed(self._waiting) if isinstance(item, Row)):
            if row.R is None or row.kept_bytes:
                break  # and so it is with all before it
            if self._kept_bytes + 4 * row.R.numel() > MOST_KEPT:
                row.R = None
                self._dropped += 1
            else:
                self._kept_bytes += row.keep(row.R)

    def _say_what_is_missing(self, for_good: bool) -> None:
        said, kept = [], "are kept in memory, and tried again at `log_step`, `flush` and `close`"
        if self._fault is not None:
            rows = [item for item in self._waiting if isinstance(item, Row)]
            n_entries, n_snapshots = sum(row.R is not None for row in rows), len(self._waiting_snapshots)
            counts = (len(rows), "rows"), (n_entries, "entries of responsibilities"), (n_snapshots, "snapshots")
            what = " and ".join(f"{n} {name}" for n, name in counts if n) or "the last changes"
            said.append(f"could not be written ({self._fault}): {what} {'are lost' if for_good else kept}")
        if self._dropped:
            said.append(f"lacks {self._dropped} entries of responsibilities, because more than 1 GiB was waiting")
            self._dropped = 0
        if said:
            self.news.append(f"`{self._path}` {'; it '.join(said)}.")
