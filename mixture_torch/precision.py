"""Full float32, whatever training has set up around the estimator."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mixture_core import Moments, StepStats
from mixture_core.pytrees import pytree

MATMULS: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]  # set at run time


@contextmanager
def full_float32(beside: object) -> Iterator[None]:
    """Runs its block without gradients, inference mode, autocast or reduced matrix products; puts all back after it.

    Casting to float32 would not be enough: inside autocast a product of float32 matrices is bfloat16 again. Per backend
    rather than through `torch.set_float32_matmul_precision`, whose getter raises where a backend was set on its own.

    Args:
        beside: What is computed with; on the device of a tensor, and on the CPU for anything else.
    """
    device_type = beside.device.type if isinstance(beside, Tensor) and not beside.is_meta else "cpu"
    reduced = [(matmul, matmul.fp32_precision) for matmul in MATMULS if matmul.fp32_precision not in ("ieee", "none")]
    for matmul, _ in reduced:
        matmul.fp32_precision = "ieee"
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device_type, enabled=False):
            yield
    finally:
        for matmul, precision in reduced:
            matmul.fp32_precision = "none"  # as it was if it follows the setting of all backends
            if matmul.fp32_precision != precision:
                matmul.fp32_precision = precision


@pytree
class ExactMoments(Moments):
    """Moments that are derived in full float32 whatever context they are read in; the others need no matrix product."""

    @property
    def B(self) -> Tensor:
        """Between-component covariance, (D, D)."""
        with full_float32(self.weight):
            return super().B

    @property
    def opnorm_B(self) -> Tensor:
        """Operator norm of B, ()."""
        with full_float32(self.weight):
            return super().opnorm_B

    @property
    def participation_ratio(self) -> Tensor:
        """Number of directions in use, ()."""
        with full_float32(self.weight):
            return super().participation_ratio


def exact(stats: StepStats) -> StepStats:
    """Returns the same statistics, derived in full float32 whatever context they are read in."""
    m = stats.moments
    moments = ExactMoments(weight=m.weight, mean=m.mean, covariance=m.covariance)
    return StepStats(moments=moments, R=stats.R, n_ignored=stats.n_ignored, n_revived=stats.n_revived)
