"""Processes that log steps, say so, and are killed; and what their folder must hold then."""

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.harness.folders import Contents, Step, assert_nothing_lost, logged

needs_fork = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks with torch loaded, so Linux only")
NUMBER = 8  # bytes


class Child:
    """A forked process, which reports numbers.

    Args:
        body: What it does, with a function that reports a number at hand.
    """

    def __init__(self, body: Callable[[Callable[[int], None]], None]) -> None:
        self._reads, writes = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            status = 1
            try:
                warnings.simplefilter("ignore")
                body(lambda number: _report(writes, number))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)  # nothing of the parent's must run twice
        os.close(writes)

    def report(self) -> int | None:
        """Waits for the next report; None where it has ended and all have been read."""
        data = os.read(self._reads, NUMBER)
        return int.from_bytes(data, "big") if data else None

    def kill(self) -> None:
        """Ends it at once."""
        os.kill(self._pid, signal.SIGKILL)

    def ends(self) -> tuple[list[int], bool]:
        """Waits for its end, and returns the other reports, and whether it was killed."""
        reports = list(iter(self.report, None))
        code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        os.close(self._reads)
        assert code in (0, -signal.SIGKILL), f"the child ended with {code}"
        return [number for number in reports if number is not None], code != 0


def is_killed() -> None:
    """Ends this process at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def assert_all_reported_is_there(
    folder: Path, was: Contents, reported: Sequence[Step], possible: Step | None, *, scores_mode: str
) -> Contents:
    """Checks and returns what is in the folder of a process that was killed.

    Args:
        folder: The run folder.
        was: What was in it before.
        reported: The steps that it had logged.
        possible: The one that it may have been logging.
        scores_mode: How responsibilities are stored.
    """
    for step in reported:
        was = logged(was, step, scores_mode=scores_mode)
    return assert_nothing_lost(folder, was, possible, scores_mode=scores_mode)


def _report(fd: int, number: int, write: Callable[[int, bytes], int] = os.write) -> None:
    write(fd, number.to_bytes(NUMBER, "big"))  # the one of the operating system, whatever disk is put under the child
