"""Mixture diagnostics for training loops: an estimator that is fed at every step and writes one row about it."""

from mixture_torch.config import MixtureRuntimeConfig
from mixture_torch.context import activate, active_estimator
from mixture_torch.estimator import MixtureStats
from mixture_torch.files.extra import read_extra
from mixture_torch.files.log import read_log
from mixture_torch.files.scores import read_scores
from mixture_torch.files.snapshots import read_snapshots
from mixture_torch.losses import NTXentLoss
from mixture_torch.update.stats import StepStats

__all__ = [
    "MixtureRuntimeConfig",
    "MixtureStats",
    "NTXentLoss",
    "StepStats",
    "activate",
    "active_estimator",
    "read_extra",
    "read_log",
    "read_scores",
    "read_snapshots",
]
