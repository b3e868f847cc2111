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
]


def __getattr__(name: str) -> Any:
    """Imports `plot` and `read_run` when they are asked for, as training needs neither."""
    if name == "plot":
        from mixture_torch.report.figures import plot

        return plot
    if name == "read_run":
        from mixture_torch.report.run import read_run

        return read_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
