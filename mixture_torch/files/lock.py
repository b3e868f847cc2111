"""The lock of a run folder: one process at a time writes there."""

import errno
import os
import socket
import stat
from pathlib import Path
from typing import Any

fcntl: Any
try:
    import fcntl
except ModuleNotFoundError:  # on Windows, where nothing is locked
    fcntl = None

NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)  # not on Windows
LOCK_FILE = "mixture.lock"
HOLDER = b"process "  # how the file of a held lock begins
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # of file systems without locks


class FolderLock:
    """A lock that the operating system releases when its process ends, even if it is killed.

    The file names the process that has it, and `release` leaves it there, empty. The package `filelock` would do the
    same, if all versions that torch accepts kept the name when another process tries.

    Args:
        folder: The run folder. It is made if it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK_FILE
        self._fd: int | None = None

    def acquire(self) -> None:
        """Takes the lock unless it is held, and again if the folder was moved; ValueError if another process has it."""
        if self._fd is not None:
            if self._is_in_place(self._fd):
                return
            self.drop()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | NO_FOLLOW, 0o666)
            self._take(self._fd)
            os.ftruncate(self._fd, 0)
            os.write(self._fd, HOLDER + f"{os.getpid()} on {socket.gethostname()}".encode())
        except BaseException:
            self.drop()
            raise

    def release(self) -> None:
        """Releases the lock if it is held."""
        if self._fd is not None:
            try:
                os.ftruncate(self._fd, 0)
            finally:
                _flock(self._fd, "LOCK_UN")  # before it is closed, as an interrupt may come in between
                self.drop()

    def drop(self) -> None:
        """Closes the file if it is open. A forked child must do so, or it keeps the lock for as long as it lives."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)

    def _take(self, fd: int) -> None:
        content = os.read(fd, 200) if stat.S_ISREG(os.fstat(fd).st_mode) else b"?"
        if not HOLDER.startswith(content[: len(HOLDER)].rstrip(b"\0")):  # a power cut leaves a part or zeros
            raise ValueError(
                f"`{self._path}` is not the lock of a run folder; move the file away or choose another `log_dir`."
            )
        try:
            _flock(fd, "LOCK_EX", "LOCK_NB")
        except BlockingIOError as error:
            holder = content.decode("utf-8", errors="replace") or "another process"
            raise ValueError(
                f"`log_dir` is in use: {holder} writes to `{self._path.parent}`; end it or choose another `log_dir`."
            ) from error

    def _is_in_place(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self._path))
        except (FileNotFoundError, NotADirectoryError):
            return False


def _flock(fd: int, *how: str) -> None:
    try:
        if fcntl is not None:
            fcntl.flock(fd, sum(getattr(fcntl, name) for name in how))
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
