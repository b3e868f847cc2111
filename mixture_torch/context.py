"""The estimator that a training loop has switched on, for the losses inside it to find; compiled ones too."""

from contextlib import ContextDecorator
from contextvars import ContextVar
from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch._library.effects import EffectType  # torch has no public way to declare a side effect

from mixture_core.config import as_integer

if TYPE_CHECKING:
    from mixture_torch.estimator import MixtureStats

_entered: ContextVar[tuple["activate", ...]] = ContextVar("entered", default=())  # each thread has its own


class activate(ContextDecorator):
    """Makes an estimator the active one inside a `with` block, and restores the one before it afterwards.

    The same object may be entered several times: nested, one after the other, and by several threads at once.

    Args:
        estimator: None makes none active.
        step: Training step that everything inside the block belongs to; None gives no step.

    Raises:
        TypeError: An argument is of the wrong type.

    Example:
        >>> import torch
        >>> from mixture_torch import MixtureStats, NTXentLoss, activate
        >>> estimator, criterion = MixtureStats(K=2, enabled=True), NTXentLoss()
        >>> with activate(estimator):
        ...     loss = criterion(torch.randn(16, 4), torch.randn(16, 4))
        >>> estimator.stats.R.shape
        torch.Size([32, 2])
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
        """Ends the innermost block of this object, even if a later block has not ended yet, as in generators.

        Raises:
            RuntimeError: This object has no block in this thread.
        """
        entered = _entered.get()
        if self not in entered:
            raise RuntimeError("`activate` ended in a thread in which it did not begin.")
        own = max(place for place, other in enumerate(entered) if other is self)
        _entered.set(entered[:own] + entered[own + 1 :])


def as_step(step: int | str | None) -> int | str | None:
    """Returns a step, as an int if it is another library's integer."""
    if step is None or isinstance(step, str):
        return step
    if isinstance(number := as_integer(step), bool) or not isinstance(number, int):
        raise TypeError(f"`step` must be an integer, a text or None, got {step!r}.")
    return number


def active_estimator() -> "MixtureStats | None":
    """Returns the estimator of the innermost `activate` around the call, in this thread, or None.

    Example:
        >>> from mixture_torch import MixtureStats, activate, active_estimator
        >>> estimator = MixtureStats(K=2, enabled=True)
        >>> with activate(estimator):
        ...     active_estimator() is estimator
        True
    """
    entered = _entered.get()
    return entered[-1].estimator if entered else None


def active_step(estimator: "MixtureStats") -> int | str | None:
    """Returns the step of the innermost `activate` around the call if that is of this very estimator, or None."""
    entered = _entered.get()
    return entered[-1].step if entered and entered[-1].estimator is estimator else None


# torch.compile cannot trace an update. It sees one operator with a side effect, which finds the estimator when it runs.
OPERATOR = "mixture_torch::update"
ACTIVE = -1  # key of the active estimator, whichever that is when the operator runs
_estimators: WeakValueDictionary[int, Any] = WeakValueDictionary()  # anything with `update`
_keys = count()

torch.library.define(
    OPERATOR,
    "(Tensor embeddings, Tensor? labels, int key, SymInt? number, str? text, int views) -> ()",
    tags=(torch.Tag.cudagraph_unsafe,),
)
torch.library.register_fake(OPERATOR, lambda *_: None)
torch.library._register_effectful_op(OPERATOR, EffectType.ORDERED)  # else compilers would remove it


@torch.library.impl(OPERATOR, "default")
def _update(
    embeddings: Tensor, labels: Tensor | None, key: int, number: int | None, text: str | None, views: int
) -> None:
    estimator = active_estimator() if key == ACTIVE else _estimators.get(key)
    if estimator is not None:
        estimator.update(embeddings, labels, step=number if text is None else text, views=views)


def register(estimator: Any) -> int:
    """Returns a key by which compiled code finds an estimator, or anything with its `update`, as long as it lives."""
    key = next(_keys)
    _estimators[key] = estimator
    return key


def update_compiled(key: int, embeddings: Any, labels: Any, step: int | str | None, views: int) -> None:
    """Updates an estimator in code that torch.compile traces; `key` is from `register`, or ACTIVE."""
    text, number = (step, None) if isinstance(step, str) else (None, step)
    if labels is not None:
        labels = torch.as_tensor(labels)
    torch.ops.mixture_torch.update(torch.as_tensor(embeddings).detach(), labels, key, number, text, views)
