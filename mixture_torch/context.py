"""The estimator that a training loop has switched on, for the losses inside it to find."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixture_torch.estimator import MixtureStats

_active: ContextVar["MixtureStats | None"] = ContextVar("active_estimator", default=None)


@contextmanager
def activate(estimator: "MixtureStats | None") -> Iterator["MixtureStats | None"]:
    """Makes an estimator the active one inside a `with` block, and the one before it active again afterwards.

    Args:
        estimator: None makes none active.

    Raises:
        TypeError: It is something else.
    """
    if estimator is not None and not callable(getattr(estimator, "update", None)):
        raise TypeError(f"`estimator` must be a MixtureStats or None, got {estimator!r}.")
    token = _active.set(estimator)
    try:
        yield estimator
    finally:
        _active.reset(token)


def active_step(estimator: "MixtureStats") -> Any:
    return None


def active_estimator() -> "MixtureStats | None":
    """Returns the estimator of the innermost `activate` around the call, in this thread, or None."""
    return _active.get()
