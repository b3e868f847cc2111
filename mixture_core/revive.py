"""A second life for components that nothing is assigned to any more."""

import torch
from torch import Tensor

from mixture_core import kernels
from mixture_core.inputs import is_plain, looks
from mixture_core.moments import Moments, safe_divide
from mixture_core.peers import ALONE, Peers, nth_largest


def revive(
    moments: Moments,
    batch_mean: Tensor,
    x: Tensor,
    index: Tensor,
    R: Tensor,
    *,
    revive_below: float,
    peers: Peers = ALONE,
) -> tuple[Moments, Tensor]:
    """Returns the moments with at most one dead component moved to where the batch fits worst, and how many moved.

    Dead is the lightest component if its share of the weight is below revive_below / K. Of the rows, the one that lies
    farthest from the batch's mean of its own component, but for the farthest 5 %, which may be outliers, says where the
    component goes, with weight and covariance 0: to the middle of that row's side of its component, the rows no farther
    out and at an acute angle to it. (To the row itself would not do: in many dimensions rows are nearer to a mean than
    to another row, so that a component there dies again.) Nothing moves where the row is its mean, up to rounding.

    Args:
        moments: After the step.
        batch_mean: (K, D) of the step's batch.
        x: (N, D) the step's embeddings.
        index: (N,) the component of each row, K where it counts for nothing.
        R: (N, K) the same as responsibilities.
        revive_below: Share, times K, under which a component is dead.
        peers: Who holds the other rows of the batch.
    """
    N, K = R.shape
    if N == 0 and peers is ALONE:
        return moments, torch.zeros((), dtype=torch.int64, device=x.device)
    if peers is ALONE and is_plain(moments.weight, x) and kernels.usable_on(x, K=K):
        m = moments
        return m, kernels.revive(
            m.weight, m.mean, m.covariance, batch_mean, x.contiguous(), index, revive_below=revive_below
        )
    if looks(moments.weight) and _all_live(moments.weight.tolist(), revive_below / K):  # elsewhere nobody may look
        return moments, torch.zeros((), dtype=torch.int64, device=x.device)
    dead = moments.weight.min() < moments.weight.sum() * (revive_below / K)
    lightest = moments.weight.argmin()
    used = index < K
    difference = torch.where(used[:, None], x - R @ batch_mean, 0.0)
    distance = torch.where(used, difference.square().sum(dim=1), -1.0)
    if peers is ALONE:
        row = distance.sort(descending=True, stable=True).indices.gather(0, used.sum()[None] // kernels.OUTLIERS)
        far, direction, own = distance.gather(0, row), difference.index_select(0, row)[0], R.index_select(0, row)[0]
    else:
        chosen = nth_largest(distance, used, peers.total(used.sum()) // kernels.OUTLIERS, peers).to(x.dtype)
        parts = torch.cat([(chosen @ distance)[None], chosen @ difference, chosen @ R])
        far, direction, own = peers.total(parts).split_with_sizes([1, x.shape[1], K])
    side = ((R @ own > 0) & (distance <= far) & (difference @ direction > 0)).to(x.dtype)
    sums, count = peers.total(torch.cat([side @ difference, side.sum()[None]])).split_with_sizes([x.shape[1], 1])
    target = own @ batch_mean + safe_divide(sums, count)

    rounding = (8 * torch.finfo(x.dtype).eps) ** 2 * (own @ batch_mean).square().sum()
    moves = dead & (far > rounding)[0]
    moved = moves & (torch.arange(K, device=x.device) == lightest)
    return Moments(
        weight=torch.where(moved, 0.0, moments.weight),
        mean=torch.where(moved[:, None], target, moments.mean),
        covariance=torch.where(moved[:, None, None], 0.0, moments.covariance),
    ), moves.to(torch.int64)


def _all_live(weights: list[float], share: float) -> bool:
    """Whether the lightest is clear of that share, beyond what rounding in another order could make of it."""
    return min(weights) > sum(weights) * share * 1.001
