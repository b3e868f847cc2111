"""Warnings that point at the user's line, however deep in the package they arise."""

import sys
import warnings


def warn_caller(message: str) -> None:
    """Warns at the line outside of this package that led here: a `log_step`, a `flush`, or a garbage collection.

    Args:
        message: One line.
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("mixture_torch."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
