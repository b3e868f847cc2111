"""The estimator that a training loop has switched on, for the losses inside it to find."""

from contextlib import ContextDecorator
from contextvars import ContextVar
from typing import TYPE_CHECKING

from mixture_core.config import as_integer

if TYPE_CHECKING:
    from mixture_torch.estimator import MixtureStats

_entered: ContextVar[tuple["activate", ...]] = ContextVar("entered", default=())  # a thread has its own


class activate(ContextDecorator):
    """Makes an estimator the active one inside a `with` block, and the one before it active again afterwards.

    The same object may be entered again, nested, one after the other, and by several threads at once.

    Args:
        estimator: None makes none active.
        step: All that the estimator is fed inside the block belongs to this training step; None tells it of no step.

    Raises:
        TypeError: One of them is something else.
    """

    def __init__(self, estimator: "MixtureStats | None", *, step: int | str | None = None) -> None:
        if estimator is not None and not callable(getattr(estimator, "update", None)):
            raise TypeError(f"`estimator` must be a MixtureStats or None, got {estimator!r}.")
        self.estimator = estimator
        self.step = as_step(step)

    def __enter__(self) -> "MixtureStats | None":
        """Returns the estimator."""
        _entered.set((*_entered.get(), self))
        return self.estimator

    def __exit__(self, *_: object) -> None:
        """Ends the innermost block of this object, also where a later block has not ended yet, as in generators.

        Raises:
            RuntimeError: There is none in this thread.
        """
        entered = _entered.get()
        if self not in entered:
            raise RuntimeError("`activate` must end in the thread that it began in, got the end of none from here.")
        own = max(place for place, other in enumerate(entered) if other is self)
        _entered.set(entered[:own] + entered[own + 1 :])


def as_step(step: int | str | None) -> int | str | None:
    """Returns what tells a step from others, NumPy's integers as an int.

    Raises:
        TypeError: It is something else.
    """
    if step is None or isinstance(step, str):
        return step
    if isinstance(number := as_integer(step), bool) or not isinstance(number, int):
        raise TypeError(f"`step` must be an integer, a text or None, got {step!r}.")
    return number


def active_estimator() -> "MixtureStats | None":
    """Returns the estimator of the innermost `activate` around the call, in this thread, or None."""
    entered = _entered.get()
    return entered[-1].estimator if entered else None


def active_step(estimator: "MixtureStats") -> int | str | None:
    """Returns the step that the innermost `activate` around the call tells this very estimator of, or None."""
    entered = _entered.get()
    return entered[-1].step if entered and entered[-1].estimator is estimator else None
