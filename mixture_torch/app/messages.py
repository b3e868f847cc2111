"""Errors and warnings of the command line, one line each on standard error."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from mixture_torch.app.training import current_place
from mixture_torch.report.run import printable


def complain(message: str) -> None:
    """Prints one line that says what the user should change, on the main process only.

    Args:
        message: Line breaks in it become spaces.
    """
    if current_place().rank == 0:
        _say("Error:", message)


@contextmanager
def one_line_errors(*, every_rank: bool = False) -> Iterator[None]:
    """Turns an error inside the block into one line and exit code 2; 1 if a package is not installed.

    Args:
        every_rank: Whether each process prints its errors, because others may not have the same.
    """
    try:
        yield
    except (ImportError, OSError, TypeError, ValueError) as error:
        if every_rank and (rank := current_place().rank):
            _say(f"Error on rank {rank}:", str(error))
        else:
            complain(str(error))
        raise typer.Exit(1 if isinstance(error, ImportError) else 2) from error


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Prints each warning inside the block as one line, without the line of code, which is not the user's."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        _say("Note:", str(message))

    with warnings.catch_warnings():  # restores showwarning
        warnings.showwarning = show
        yield


def _say(kind: str, message: str) -> None:
    print(kind, printable(" ".join(message.split())), file=sys.stderr)
