"""Pairs of views, of this rank's batch or of those of all ranks."""

import torch
from torch import Tensor
from torch.utils._pytree import tree_map  # torch has no public pytree module

from mixture_core import MixtureConfig, Moments
from mixture_core.pairs import Pairs, accumulate, from_sums, none, pair_sums
from mixture_core.sharded import Total
from mixture_torch.update.batch import Batch

EVERY = 10  # steps, for which the pairs of the last stand: to observe pairs takes nearly as long as a step


def is_due(config: MixtureConfig, n: int) -> bool:
    """Returns whether the pairs of the nth step are observed."""
    return n <= EVERY or n % EVERY == 0 or not config.averages


def pairs_after(
    config: MixtureConfig,
    earlier: Pairs | None,
    batch: Batch,
    R: Tensor,
    moments: Moments,
    *,
    keeps: bool | Tensor,
    n: int,
    total: Total | None,
) -> Pairs:
    """Returns the statistics of pairs after a batch of them, the same on all ranks.

    Args:
        config: Says how fast weights decay.
        earlier: The statistics before; None if there have been no pairs.
        batch: The rows, of all ranks or, with `total`, a share of them.
        R: (N, K) their responsibilities.
        moments: The mixture after the batch.
        keeps: Whether the batch continues a step, whose weights have decayed already.
        n: The number of the step, from 1; `is_due`.
        total: Sums a tensor over all ranks; None if the batch has the rows of all.
    """
    K, D = moments.mean.shape
    sums = pair_sums(batch.by_view(batch.x), batch.by_view(R), moments)
    own = from_sums(sums if total is None else total(sums), K=K)
    gap = EVERY if n > EVERY and config.averages else 1  # as if the batch had come in each of so many steps
    decay = config.ema_decay if config.averages else 0.0
    steps, squares = ((1 - factor**gap) / (1 - factor) for factor in (decay, decay**2))
    own = Pairs(weight=own.weight * steps, V=own.V, squares=own.squares * squares)
    decay **= gap
    # Only a GPU knows whether its step is idle, which decays nothing.
    kept = (own.weight == 0) | keeps if isinstance(keeps, Tensor) or own.weight.is_cuda else keeps
    factor = torch.where(kept, 1.0, decay) if isinstance(kept, Tensor) else 1.0 if kept else decay
    before = tree_map(lambda tensor: tensor.to(own.V.device), earlier or none(K=K, D=D))
    return accumulate(before, own, decay=factor)
