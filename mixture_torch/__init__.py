"""Mixture diagnostics for training loops: an estimator that is fed at every step and writes one row about it."""

from typing import TYPE_CHECKING, Any

from mixture_torch.config import MixtureRuntimeConfig
from mixture_torch.context import activate, active_estimator
from mixture_torch.estimator import MixtureStats
from mixture_torch.files.extra import read_extra
from mixture_torch.files.log import read_log
from mixture_torch.files.scores import read_scores
from mixture_torch.files.snapshots import read_snapshots
from mixture_torch.losses import NTXentLoss
from mixture_torch.update.stats import StepStats

if TYPE_CHECKING:
    from mixture_torch.report.figures import plot
    from mixture_torch.report.run import read_run
    from mixture_torch.report.verdicts import verdicts

__all__ = [
    "MixtureRuntimeConfig",
    "MixtureStats",
    "NTXentLoss",
    "StepStats",
    "activate",
    "active_estimator",
    "plot",
    "read_extra",
    "read_log",
    "read_run",
    "read_scores",
    "read_snapshots",
    "verdicts",
]


def __getattr__(name: str) -> Any:
    """Imports what reads runs when it is asked for, as training does not need it."""
    if name == "plot":
        from mixture_torch.report.figures import plot

        return plot
    if name == "read_run":
        from mixture_torch.report.run import read_run

        return read_run
    if name == "verdicts":
        from mixture_torch.report.verdicts import verdicts

        return verdicts
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Returns the public names, so that completion offers all of them."""
    return sorted({*globals(), *__all__})
