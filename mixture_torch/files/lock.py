"""The lock of a run folder: one process at a time writes there."""

import errno
import os
import socket
import stat
import weakref
from pathlib import Path
from typing import Any

fcntl: Any
try:
    import fcntl
except ModuleNotFoundError:  # on Windows, where nothing is locked
    fcntl = None

LOCK_FILE = "mixture.lock"
HOLDER = b"process "  # how the file of a held lock begins
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # of file systems without locks


class FolderLock:
    """A lock that the operating system releases when its process ends, even if it is killed.

    A forked child does not have it. The file names the process that has it, and `release` leaves it there, empty. The
    package `filelock` would do the same, if all versions that torch accepts kept the name when another process tries.

    Args:
        folder: The run folder. It is made if it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK_FILE
        self._fd: int | None = None
        _locks.add(self)

    @property
    def is_held(self) -> bool:
        """Whether this process has the lock."""
        return self._fd is not None

    def acquire(self) -> None:
        """Takes the lock unless it is held, and again if the folder was moved; ValueError if another process has it."""
        if self._fd is not None:
            if self._is_in_place(self._fd):
                return
            self._drop()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            self._take(fd)
            os.ftruncate(fd, 0)
            os.write(fd, HOLDER + f"{os.getpid()} on {socket.gethostname()}".encode())
            self._fd = fd
        except BaseException:
            self._fd = None
            os.close(fd)
            raise

    def release(self) -> None:
        """Releases the lock if it is held."""
        if self._fd is not None:
            try:
                os.ftruncate(self._fd, 0)
            finally:
                _flock(self._fd, "LOCK_UN")  # before it is closed, as an interrupt may come in between
                self._drop()

    def _take(self, fd: int) -> None:
        begin = os.read(fd, len(HOLDER)).rstrip(b"\0") if stat.S_ISREG(os.fstat(fd).st_mode) else b"?"
        if not HOLDER.startswith(begin):  # a power cut leaves a part or zeros
            raise ValueError(
                f"`{self._path}` is not the lock of a run folder; move the file away or choose another `log_dir`."
            )
        try:
            _flock(fd, "LOCK_EX", "LOCK_NB")
        except BlockingIOError as error:
            os.lseek(fd, 0, os.SEEK_SET)
            holder = os.read(fd, 200).decode("utf-8", errors="replace") or "another process"
            raise ValueError(
                f"`log_dir` is in use: {holder} writes to `{self._path.parent}`; end it or choose another `log_dir`."
            ) from error
        os.lseek(fd, 0, os.SEEK_SET)

    def _is_in_place(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self._path))
        except (FileNotFoundError, NotADirectoryError):
            return False

    def _drop(self) -> None:
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)


_locks: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _flock(fd: int, *how: str) -> None:
    try:
        if fcntl is not None:
            fcntl.flock(fd, sum(getattr(fcntl, name) for name in how))
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


def _drop_in_child() -> None:
    """A forked child's copy would keep the lock for as long as the child lives."""
    for lock in list(_locks):
        lock._drop()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_in_child)
