"""What the command line tells the user on standard error: one line at a time, and errors by the main process alone."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import typer

from mixture_torch.app.training import current_place


def complain(message: str) -> None:
    """Prints one line about what the user should change.

    Args:
        message: Line breaks in it become spaces.
    """
    if current_place().rank == 0:
        _say("Error:", message)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program with one line about what the user should change."""
    try:
        yield
    except (OSError, TypeError, ValueError) as error:
        complain(str(error))
        raise typer.Exit(2) from error


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Has a warning printed as one line, without the line of code that it is about, which is not the user's."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        _say("Note:", str(message))

    with warnings.catch_warnings():  # puts back what it finds here
        warnings.showwarning = show
        yield


def _say(kind: str, message: str) -> None:
    print(kind, " ".join(message.split()), file=sys.stderr)
