"""Disks that a process dies at, that interrupt it, or that refuse, at a chosen one of all calls that change them."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest

FOR_GOOD = 10**9  # calls
CHANGES = ("open", "write", "ftruncate", "replace", "rename", "fsync", "unlink", "mkdir", "close")


class Died(BaseException):
    """What a dead process would have done next."""


class Call(NamedTuple):
    """A call that changes the disk."""

    name: str
    size: int  # bytes to be written; 0 for another call


class Instant(NamedTuple):
    """One in the life of a process."""

    call: int  # how many calls have been made before it
    written: int  # bytes of the one that it is in the middle of; 0 is right before it


Fate = Callable[[], None]  # raises


class Disk:
    """Counts the calls of `os` that change a disk, and at one of them lets something happen.

    Nothing waits for a disk to have what the operating system has: no process that dies can tell.
    """

    def __init__(self, at: Instant | None = None, fate: Fate | None = None, *, lasts: int = 1) -> None:
        self.calls: list[Call] = []
        self._at = at
        self._fate = fate
        self._left = lasts  # calls for it to happen at

    @contextmanager
    def under(self) -> Iterator["Disk"]:
        """Puts it under everything in its block."""
        with pytest.MonkeyPatch.context() as patch:
            for name in CHANGES:
                patch.setattr(os, name, self._watched(name, getattr(os, name)))
            yield self

    def instants(self) -> list[Instant]:
        """Returns one before each call so far, and some in the middle of each write and right behind it."""
        return [
            Instant(place, written)
            for place, call in enumerate(self.calls)
            for written in sorted({0, 1, call.size // 2, call.size - 1, call.size})
            if written == 0 or 0 < written <= call.size
        ]

    def _watched(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            place = len(self.calls)
            self.calls.append(Call(name, len(arguments[1]) if name == "write" else 0))
            if self._at is not None and self._fate and self._left and place >= self._at.call:
                self._left -= 1
                if place == self._at.call and name == "write" and self._at.written:
                    original(arguments[0], arguments[1][: self._at.written])
                if name == "close" and self._fate is refuses:
                    original(*arguments)  # a file is closed, whatever becomes of what was written to it
                self._fate()
            result = None if name == "fsync" else original(*arguments, **options)
            self.done(name, result, arguments)
            return result

        return call

    def done(self, name: str, result: Any, arguments: tuple[Any, ...]) -> None:
        """Is told of every call that nothing happened at."""


def dies() -> None:
    """Ends a process: it does nothing any more, not even what is in its `finally`."""
    raise Died


def interrupts() -> None:
    """Ctrl-C."""
    raise KeyboardInterrupt


def refuses() -> None:
    """A disk that says no, once."""
    raise OSError(errno.EIO, os.strerror(errno.EIO))
