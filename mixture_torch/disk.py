"""Every change that the package makes to a disk: files that grow, files that appear whole, and whose folder it is.

Nothing here knows what is in a file. There are two ways to write, and neither leaves half of anything: files that grow
take a piece whole and hand it to the operating system before `append` returns; other files appear under their name when
they are complete.
"""

import errno
import os
import socket
import stat
import warnings
import weakref
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

fcntl: Any
try:
    import fcntl
except ModuleNotFoundError:  # not on Windows, where nothing is locked
    fcntl = None

LOCK_FILE = "mixture.lock"
HOLDER = b"process "  # how it begins
ATTEMPTS = 100  # to take a lock whose file is deleted again and again
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # of file systems that know none


class Whole(NamedTuple):
    """How much of a file that grows is as it should be."""

    size: int  # bytes up to the end of the last whole piece
    torn: int  # bytes behind them that an unfinished write left
    news: tuple[str, ...] = ()  # what else there is to say of it


class GrowingFile:
    """A file that grows by whole pieces, opens itself if need be, and may have a tail that the next piece replaces.

    Args:
        path: The file; its folder is made if need be.
        whole: Returns how much of the existing file is whole, or raises where it is not ours. What is torn is cut off
            with a warning; what is neither whole nor torn is the tail.
        header: What goes into an empty file first.
        say: Is told what there is to warn about, when the file is open.
    """

    def __init__(
        self, path: Path, *, whole: Callable[[], Whole], header: bytes = b"", say: Callable[[str], None] = warnings.warn
    ) -> None:
        self.path = path
        self._whole = whole
        self._header = header
        self._say = say
        self._fd: int | None = None
        self._has_identity = True  # or the file system gives it none to go by
        self._vanished = False
        self._end = 0  # of the last whole piece
        self._size = 0  # of the file, tail included

    @property
    def end(self) -> int:
        """Bytes up to the end of the last whole piece; of an open file."""
        return self._end

    @property
    def has_tail(self) -> bool:
        """Whether something stands behind the last piece; of an open file."""
        return self._size > self._end

    def open(self) -> None:
        """Opens the file unless it is open, anew where somebody deleted, moved or changed it.

        Raises:
            ValueError: The file is not ours; it is left as it is.
            OSError: The file cannot be opened.
        """
        if self._fd is not None:
            is_here = _is_at(self._fd, self.path) if self._has_identity else os.fstat(self._fd).st_nlink
            if is_here and os.fstat(self._fd).st_size == self._size:
                return
            self._vanished = not self.path.exists()
            self.close()
        whole = self._whole() if self.path.exists() else Whole(0, 0)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        try:
            self._size = os.fstat(self._fd).st_size
            self._end = whole.size
            self._has_identity = _is_at(self._fd, self.path)
            if whole.torn:
                self._cut()
            if not self._end and self._header:
                self._put([self._header], tail=False)
        except BaseException:
            self.close()
            raise
        if self._vanished:
            self._vanished = False
            self._say(f"`{self.path}` was moved or deleted; a new one is begun.")
        for news in whole.news:
            self._say(news)
        if whole.torn:
            self._say(f"`{self.path}` ended in {whole.torn} bytes of an unfinished write; they were dropped.")

    def append(self, data: bytes) -> None:
        """Hands all of `data` to the operating system, behind the last piece and in place of a tail, or nothing.

        Raises:
            ValueError: The file is not ours; it is left as it is.
            OSError: The data could not be written; the pieces are as they were.
        """
        self.open()
        self._put([data], tail=False)

    def cut(self, size: int) -> None:
        """Keeps the pieces in the first `size` bytes and nothing behind them, on the disk too.

        Raises:
            ValueError: The file is not ours; it is left as it is.
            OSError: The file could not be cut.
        """
        self.open()
        self._end = size
        self._cut()
        self.sync()

    def finish(self, tail: Iterable[bytes]) -> None:
        """Puts a tail behind the last piece, in place of an earlier one, and brings all to the disk.

        Raises:
            ValueError: The file is not ours; it is left as it is.
            OSError: The tail could not be written; the pieces are as they were.
        """
        self.open()
        self._put(tail, tail=True)
        self.sync()

    def sync(self) -> None:
        """Waits until the disk has what the operating system has."""
        if self._fd is not None:
            os.fsync(self._fd)

    def close(self) -> None:
        """Closes the file if it is open."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)

    def _put(self, pieces: Iterable[bytes], *, tail: bool) -> None:
        try:
            if self.has_tail:
                self._cut()
            for piece in pieces:
                self._size += _write(self._opened(), piece)
        except BaseException:
            try:
                os.ftruncate(self._opened(), self._end)
            finally:
                self.close()  # so that the next to open it looks what there is
            raise
        if not tail:
            self._end = self._size

    def _cut(self) -> None:
        os.ftruncate(self._opened(), self._end)
        self._size = self._end

    def _opened(self) -> int:
        assert self._fd is not None
        return self._fd


def write_atomically(path: Path, data: bytes | memoryview | Iterable[bytes], *, durable: bool = False) -> None:
    """Makes `data` the content of a file, which at no instant is missing, if it was there, or incomplete.

    Args:
        path: The file, or a link to it, which stays one; its folder is made if need be.
        data: The whole content, in one piece or in several.
        durable: Outlast a loss of power too, for some milliseconds.

    Raises:
        OSError: The file could not be written; it is as it was, and no temporary file is left.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Always the same, so that those of killed processes do not pile up, and no name that somebody else would choose.
    temporary = path.with_name(f".{path.name}.mixture_torch.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
    try:
        fd = os.open(temporary, flags, 0o666)
        try:
            for piece in [data] if isinstance(data, (bytes, memoryview)) else data:
                _write(fd, piece)
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        _sync_folder(path.parent)


def move(paths: Iterable[Path], folder: Path) -> None:
    """Moves files, each at once and under its name, into a folder, which is made if need be; for good.

    To another file system, a file is copied, and may be in both places for a while.

    Raises:
        OSError: A file could not be moved; it and those behind it are where they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        try:
            os.replace(path, folder / path.name)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            write_atomically(folder / path.name, path.read_bytes(), durable=True)
            os.unlink(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    """A new name in a folder outlasts a loss of power only when the folder itself is on the disk."""
    if os.name == "nt":  # opens no folders
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write(fd: int, data: bytes | memoryview) -> int:
    rest = memoryview(data).cast("B")
    while rest:  # a disk that fills up takes a part before it raises
        rest = rest[os.write(fd, rest) :]
    return memoryview(data).nbytes


class FolderLock:
    """Keeps a run folder to one process, where the file system can; another one is told who has it.

    The lock ends with the process, however that ends. A forked child does not have it.

    Args:
        folder: The run folder; it is made if need be.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK_FILE
        self._fd: int | None = None
        self._has_identity = True  # as a file that grows
        _locks.add(self)

    @property
    def is_held(self) -> bool:
        """Whether this process has it."""
        return self._fd is not None

    def acquire(self) -> None:
        """Takes the lock unless it is held; anew where the folder was deleted or moved.

        Raises:
            ValueError: Another process has it, or the file is not ours.
            OSError: The lock file cannot be made.
        """
        if self._fd is not None:
            if _is_at(self._fd, self._path) if self._has_identity else os.fstat(self._fd).st_nlink:
                return
            self._drop()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        for attempt in count(1):
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                self._lock(fd)
                self._check(fd)
                # Not deleted in between by the one who had it; nor for ever where files have no identity to go by.
                self._has_identity = _is_at(fd, self._path)
                os.lseek(fd, 0, os.SEEK_SET)
                if self._has_identity or attempt == ATTEMPTS:
                    os.ftruncate(fd, 0)
                    _write(fd, HOLDER + f"{os.getpid()} on {socket.gethostname()}".encode())
                    self._fd, fd = fd, -1
                    return
            finally:
                if fd >= 0:
                    os.close(fd)

    def release(self) -> None:
        """Gives the lock up if it is held, and removes its file."""
        if self._fd is not None:
            try:
                if _is_at(self._fd, self._path):
                    os.unlink(self._path)
            finally:
                self._drop()

    def _lock(self, fd: int) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(fd, 200, 0).decode("utf-8", errors="replace") or "another process"
            raise ValueError(
                f"`log_dir` must be a folder that no other process writes to, got `{self._path.parent}`, which "
                f"{holder} has open; end that one or choose another `log_dir`."
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise

    def _check(self, fd: int) -> None:
        is_file = stat.S_ISREG(os.fstat(fd).st_mode)
        begins = os.read(fd, len(HOLDER)).rstrip(b"\0") if is_file else b""  # a power cut leaves zeros
        if not (is_file and HOLDER.startswith(begins)):
            raise ValueError(
                f"`{self._path}` must be the lock of a run folder, got something else; "
                "move the file away or choose another `log_dir`."
            )

    def _drop(self) -> None:
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)


_locks: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _forget_in_child() -> None:
    """A forked child's copy would keep the lock for as long as the child lives."""
    for lock in list(_locks):
        lock._drop()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


def _is_at(fd: int, path: Path) -> bool:
    """Whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False
