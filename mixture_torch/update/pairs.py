"""Pairs of views, of this rank's batch or of those of all ranks."""

import torch
from torch import Tensor
from torch.utils._pytree import tree_map  # torch has no public pytree module

from mixture_core import MixtureConfig, Moments
from mixture_core.pairs import Pairs, accumulate, from_sums, none, pair_sums
from mixture_core.sharded import Total
from mixture_torch.update.batch import Batch


def pairs_after(
    config: MixtureConfig,
    earlier: Pairs | None,
    batch: Batch,
    R: Tensor,
    moments: Moments,
    *,
    continues: bool | Tensor,
    total: Total | None,
) -> Pairs:
    """Returns the statistics of pairs after a batch of them, the same on all ranks.

    Args:
        config: Says how fast weights decay.
        earlier: The statistics before; None if there have been no pairs.
        batch: The rows of all ranks or, with `total`, of this one.
        R: (N, K) their responsibilities.
        moments: The mixture after the batch.
        continues: Whether the batch continues a step, whose weights have decayed already.
        total: Sums a tensor over all ranks; None if the batch has the rows of all.
    """
    K, D = moments.mean.shape
    sums = pair_sums(batch.by_view(batch.x), batch.by_view(R), moments)
    own = from_sums(sums if total is None else total(sums), K=K)
    before = tree_map(lambda tensor: tensor.to(sums.device), earlier or none(K=K, D=D))
    # A batch without a usable pair decays nothing: on a GPU, the host cannot tell it from an idle one.
    factor = torch.where((own.weight == 0) | continues, 1.0, config.ema_decay if config.averages else 0.0)
    return accumulate(before, own, decay=factor.to(sums.dtype))
