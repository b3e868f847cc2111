"""Pure functions that keep a K-component Gaussian mixture of embeddings, over immutable records of tensors."""

from mixture_core.assign import lloyd, responsibilities_from_labels
from mixture_core.config import MixtureConfig
from mixture_core.moments import Moments, decay, merge
from mixture_core.relocate import relocate
from mixture_core.scatter import batch_moments
from mixture_core.seeding import kmeans_plusplus
from mixture_core.stats import StepStats
from mixture_core.step import MixtureState, assign, init, step

__all__ = [
    "MixtureConfig",
    "MixtureState",
    "Moments",
    "StepStats",
    "assign",
    "batch_moments",
    "decay",
    "init",
    "kmeans_plusplus",
    "lloyd",
    "merge",
    "relocate",
    "responsibilities_from_labels",
    "step",
]
