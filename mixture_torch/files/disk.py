"""All changes on disk: files that grow by whole pieces, and files that are replaced as a whole.

Nothing here knows what is in a file. `GrowingFile.put` hands a piece to the operating system before it returns, and
takes back a piece that does not fit. `write_atomically` gives a file its name when its content is complete.
"""

import errno
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

BINARY = getattr(os, "O_BINARY", 0)  # Windows


class GrowingFile:
    """A file that grows by whole pieces; the next piece overwrites a tail, if there is one.

    A subclass says in `look` how much of an existing file is whole pieces. Call `open` before each change: it does
    nothing unless the file was closed, or somebody moved, deleted or changed it.

    Args:
        path: The file. Missing parent folders are made.
        header: The first piece of a new file.
        say: Called with each warning.
    """

    def __init__(self, path: Path, *, header: bytes, say: Callable[[str], None]) -> None:
        self.path = path
        self.end = 0  # bytes up to the end of the last piece; 0 before the file was opened
        self._header = header
        self._say = say
        self._fd: int | None = None
        self._inode = 0, 0  # device and inode of the open file, which no other file can have meanwhile
        self._size = 0  # its bytes
        self._vanished = False

    def look(self) -> int:
        """Returns how many bytes of the file are whole pieces, or raises a ValueError if it has another format."""
        raise NotImplementedError

    def open(self) -> None:
        """Opens the file unless it is open and as this object left it, and removes what is after the last piece.

        Raises:
            ValueError: The file has another format. It is left as it is.
            OSError: The file cannot be opened.
        """
        if self._fd is not None:
            if self.is_as_left():
                return
            self._vanished = not self.path.exists()
            self.close()
        end = self.look()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | BINARY, 0o666)
        try:
            status = os.fstat(self._fd)
            self._inode, self._size = (status.st_dev, status.st_ino), status.st_size
            self.cut(end)
            if not end:
                self.put(self._header)
        except BaseException:
            self.close()
            raise
        if self._vanished:
            self._vanished = False
            self._say(f"`{self.path}` was moved or deleted; a new one is begun.")

    def is_as_left(self) -> bool:
        """Returns whether the open file is as this object left it."""
        try:
            status = os.stat(self.path)
        except OSError:
            return False
        return (status.st_dev, status.st_ino, status.st_size) == (*self._inode, self._size)

    def put(self, data: bytes | memoryview, *, is_tail: bool = False) -> None:
        """Hands a piece or a tail to the operating system; on a fault the file is as it was."""
        assert self._fd is not None
        try:
            self.cut(self.end)
            self._size += _write(self._fd, data)
        except BaseException:
            try:
                os.ftruncate(self._fd, self.end)
            finally:
                self.close()  # the next `open` looks at what is there
            raise
        if not is_tail:
            self.end = self._size

    def cut(self, size: int) -> None:
        """Removes everything after the first `size` bytes, which are whole pieces."""
        assert self._fd is not None
        self.end = size
        if self._size > size:
            os.ftruncate(self._fd, size)
            self._size = size

    def sync(self) -> None:
        """Waits until the disk has what was written."""
        if self._fd is not None:
            os.fsync(self._fd)

    def close(self) -> None:
        """Closes the file if it is open."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)


def superseded(path: Path, number: int) -> Path:
    """Returns where a resumed run moves what it replaces in a file or folder, such as `mixture.superseded-1.csv`."""
    return path.with_name(f"{path.stem}.superseded-{number}{path.suffix}")


def write_atomically(
    path: Path,
    data: bytes | memoryview | Iterable[bytes | memoryview],
    *,
    durable: bool = False,
    temporary: str | None = None,
) -> None:
    """Replaces the content of a file, which at no instant is missing or incomplete.

    The content goes to a temporary file in the same folder first. Its name is always the same, so that a killed process
    leaves at most one, which the next write replaces. A link or a pipe of that name is neither followed nor opened.

    Args:
        path: The file, or a link to it, which stays one. Missing parent folders are made.
        data: The whole content, in one piece or in several.
        durable: Wait until the disk has it.
        temporary: Name of the temporary file, if no other thread writes to this folder. None makes one from `path`.

    Raises:
        OSError: The file could not be written. It is as it was.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(temporary or f".{path.name}.mixture_torch.tmp")
    with suppress(FileNotFoundError):
        os.unlink(unfinished)  # of a killed process
    fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | BINARY, 0o666)
    try:
        try:
            for piece in [data] if isinstance(data, (bytes, memoryview)) else data:
                _write(fd, piece)
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    if durable:
        _sync_folder(path.parent)


def set_aside(path: Path, to: Path) -> None:
    """Gives a file another name in its folder, and waits until the disk has it."""
    os.replace(path, to)
    _sync_folder(to.parent)


def move(paths: Iterable[Path], folder: Path) -> None:
    """Moves files into a folder, one after another, and waits until the disk has them.

    On another file system a file is copied before it is deleted. Missing folders are made.
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


def _write(fd: int, data: bytes | memoryview) -> int:
    rest = memoryview(data).cast("B")
    size = rest.nbytes
    while rest:  # a disk that fills up writes a part before it raises
        rest = rest[os.write(fd, rest) :]
    return size


def _sync_folder(folder: Path) -> None:
    """A new name outlasts a loss of power only if its folder has been synced."""
    if os.name == "nt":  # opens no folders
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
