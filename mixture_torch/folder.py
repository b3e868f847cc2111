"""The run folder: whose it is, in which order it is written to, and what happens where the disk refuses.

All estimators of a process that write to the same place share one `RunFolder`. A row is kept in memory until it is in
the folder, and every call tries all that are kept, in order. So a fault of the disk costs no row while the process
lives, and what is interrupted goes on at the next call: each part is marked as done right behind the write itself.
"""

import os
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from torch import Tensor

from mixture_torch.backlog import Backlog, Mode, Row
from mixture_torch.caller import warn_caller
from mixture_torch.disk import FolderLock
from mixture_torch.scores import AppendScores, PerStepScores
from mixture_torch.writers import CsvWriter

P = ParamSpec("P")
T = TypeVar("T")


class _Turns:
    """One lock for all folders: one for each could wait for another's, where a garbage collection closes that."""

    lock = threading.RLock()

    @classmethod
    def begin_anew(cls) -> None:
        """For a forked child, in which nobody gives back what another thread of its parent has."""
        cls.lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Turns.begin_anew)


def in_turn(function: Callable[P, T]) -> Callable[P, T]:
    """Has one thread at a time call any of the functions that this decorates."""

    @wraps(function)
    def one_at_a_time(*arguments: P.args, **options: P.kwargs) -> T:
        with _Turns.lock:
            return function(*arguments, **options)

    return one_at_a_time


class RunFolder:
    """A folder that one process at a time writes to, for all its estimators; from `run_folder`.

    Nothing is made before a user joins. Files are complete, closed, and the lock is given up when the last one leaves.
    A forked child has a copy of this, which it must leave alone: see `is_ours`.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._owner = os.getpid()
        self._lock = FolderLock(path)
        self._news: list[str] = []  # to be said when the work is done, as warnings may be made errors
        self._log = CsvWriter(path, say=self._news.append)
        self._per_step = PerStepScores(path, say=self._news.append)
        self._append = AppendScores(path, say=self._news.append)
        self._users: set[object] = set()
        self._backlog = Backlog()
        self._faults: dict[str, str] = {}  # why "rows" and "files" broke off, until they work again
        self._busy = False
        self._warned_of_order = False

    @property
    def is_ours(self) -> bool:
        """Whether this is the process that made it, and not a forked child."""
        return os.getpid() == self._owner

    @in_turn
    def join(self, user: object, scores_mode: Mode | None) -> None:
        """Opens the folder for a user, unless it is open for it.

        Args:
            user: Whoever is to `leave`.
            scores_mode: How its responsibilities will be stored; None where they will not.

        Raises:
            ValueError: A file is not ours, or another process has the folder; everything is left as it is.
        """
        if user in self._users:
            return
        is_shared = bool(self._users)
        try:
            with suppress(OSError):  # which costs no row, and is said when the first one cannot be written
                self._alone(lambda: self._open(scores_mode))
        except BaseException:
            if not is_shared:
                self._lock.release()
            raise
        if not is_shared:
            self._warned_of_order = False
        self._users.add(user)
        if is_shared:
            self._news.append(f"`{self._path}` is open in this process already; both write to it.")

    @in_turn
    def write(self, row: Row, *, strict: bool) -> None:
        """Writes a row behind those that are still to be written; where it cannot, it is kept.

        Args:
            row: One with its figures; the same one again changes nothing.
            strict: Whether to raise what the disk says, rather than to warn.

        Raises:
            OSError: The row could not be written; it is kept.
            ValueError: A file has been exchanged for one that is not ours; likewise.
        """
        self._backlog.keep(row)
        try:
            self._attempt("rows", self._write_rows, strict=strict)
        finally:
            self._backlog.hold(row)
        self._say_news()

    @in_turn
    def flush(self, *, strict: bool) -> None:
        """Makes all files complete, on the disk; where nobody has them open, closes them.

        Raises:
            OSError: Something could not be written; it is kept.
            ValueError: A file has been exchanged for one that is not ours; likewise.
        """
        self._attempt("rows", self._write_rows, strict=strict)
        self._attempt("files", self._complete, strict=strict)
        self._say_news()

    @in_turn
    def leave(self, user: object, *, strict: bool = False, for_good: bool = False) -> None:
        """Makes all files complete, and closes them behind the last user; a later `join` opens them again.

        Args:
            user: Whoever joined.
            strict: Whether to raise what the disk says, rather than to say what is missing.
            for_good: Whether the user will not try again.

        Raises:
            OSError: Something could not be written; it is kept.
            ValueError: A file has been exchanged for one that is not ours; likewise.
        """
        self._users.discard(user)
        try:
            self._attempt("rows", self._write_rows, strict=strict, quiet=True)
        finally:
            self._attempt("files", self._complete, strict=strict, quiet=True)
        if not (for_good and self._users):  # whom it concerns, and who will say it
            self._say_what_is_missing(for_good)
        self._say_news()

    def _open(self, scores_mode: Mode | None) -> None:
        """Looks at every file before it changes any."""
        self._lock.acquire()
        self._log.check()
        if scores_mode == "append":
            self._append.open()
        self._log.open()

    def _attempt(self, part: str, action: Callable[[], None], *, strict: bool, quiet: bool = False) -> None:
        """Does something; a fault is kept, and warned about where all was well before."""
        if self._busy:  # in the middle of something, by a garbage collection: whoever is there goes on with this too
            return
        was_well = not self._faults
        try:
            self._alone(action)
        except (OSError, ValueError) as error:
            self._faults[part] = _cause(error)  # and not the error, which keeps alive whoever called
            if strict:
                raise
            if was_well and not quiet:
                self._news.append(
                    f"`{self._path}` could not be written ({self._faults[part]}): rows are kept in memory and tried "
                    "again at every `log_step` and `flush`."
                )
        else:
            self._faults.pop(part, None)

    def _alone(self, action: Callable[[], None]) -> None:
        self._busy = True
        try:
            action()
        finally:
            self._busy = False

    def _write_rows(self) -> None:
        while (row := self._backlog.first) is not None:
            self._lock.acquire()
            self._log.open()
            if row.superseding is not None:
                row.superseding.run(self._path, row.position, log=self._log, append=self._append, say=self._news.append)
                row.superseding = None
                self._log.open()  # anew where it was replaced: how long it is tells whether the row is in it
            if row.R is not None:
                self._write_scores(row, row.R)
                self._backlog.stored(row)
            before = self._log.last
            if not row.log.is_in(self._log.end):
                self._log.append(row.step, row.epoch, row.K, row.figures)
            row.is_written = True
            if before is not None and row.position <= before:
                self._warn_of_order(row, *before)

    def _write_scores(self, row: Row, R: Tensor) -> None:
        if row.scores_mode == "per_step":
            self._per_step.append(row.step, row.epoch, R)
            return
        self._append.open()
        if not row.scores.is_in(self._append.end):
            self._append.append(row.step, row.epoch, R)

    def _warn_of_order(self, row: Row, epoch: int, step: int) -> None:
        if not self._warned_of_order:
            self._warned_of_order = True
            self._news.append(
                f"`{self._path}` got step {row.step} of epoch {row.epoch} after step {step} of epoch {epoch}, and "
                "keeps both, as it will others; call `load_state_dict` first, which sets the later ones aside, or "
                "choose another `log_dir`, or a `step` that counts on."
            )

    def _complete(self) -> None:
        if not self._lock.is_held:  # then nothing is open, and what lies there may be another's
            if "files" not in self._faults:
                return
            self._lock.acquire()
        try:  # all of them, whatever one of them raises
            try:
                self._complete_one(self._append)
            finally:
                self._complete_one(self._log)
        finally:
            if not self._users:
                self._lock.release()

    def _complete_one(self, writer: CsvWriter | AppendScores) -> None:
        if self._users:
            writer.flush()
        else:
            writer.close()

    def _say_what_is_missing(self, for_good: bool) -> None:
        said = []
        if self._faults:
            fate = "are lost" if for_good else "are kept in memory, and tried again at `log_step`, `flush` and `close`"
            said.append(
                f"could not be written ({next(iter(self._faults.values()))}): {self._backlog.rows} rows and "
                f"{self._backlog.entries} entries of responsibilities {fate}"
            )
        if self._backlog.dropped:
            said.append(f"lacks {self._backlog.dropped} entries of responsibilities, for which memory had no room")
            self._backlog.dropped = 0
        if said:
            self._news.append(f"`{self._path}` {'; it '.join(said)}.")

    def _say_news(self) -> None:
        while self._news:
            warn_caller(self._news.pop(0))


_folders: weakref.WeakValueDictionary[str, RunFolder] = weakref.WeakValueDictionary()


@in_turn
def run_folder(path: Path) -> RunFolder:
    """Returns the one `RunFolder` that this process has of a place.

    Args:
        path: The folder, there or not.
    """
    place = os.path.realpath(path)
    folder = _folders.get(place)
    if folder is None or not folder.is_ours:
        folder = _folders[place] = RunFolder(path)
    return folder


def _cause(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error).rstrip(".")
