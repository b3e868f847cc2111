"""A step whose batch is spread over ranks: each works on its own rows, and sums are all that they exchange."""

import torch
from torch import Tensor

from mixture_core.assign import labelled, nearest_means
from mixture_core.config import MixtureConfig
from mixture_core.inputs import as_labels
from mixture_core.moments import Moments, merge, safe_divide
from mixture_core.peers import Peers
from mixture_core.revive import revive
from mixture_core.scatter import absorb
from mixture_core.stats import StepStats
from mixture_core.step import MixtureState, history, match


def advance_share(
    state: MixtureState,
    embeddings: Tensor,
    labels: Tensor | None = None,
    *,
    peers: Peers,
    continues: bool | Tensor = False,
) -> tuple[MixtureState, StepStats]:
    """Does what `advance` does with the rows of all ranks, of which this one has a share.

    The new state is the same on all ranks, R is of the share, n_ignored of all rows. For each of max_assign_iters
    iterations, of labels for one, the ranks add up counts and sums of x minus the centroid that all of them have,
    K (1 + D) numbers, and in the end, about the means that come of it, the lower triangles of the scatter,
    K D (D + 1) / 2 numbers; two more count rows. Where a component is dead, moving it takes 1,027 + 2 D + K and one per
    rank more; on a GPU, where nobody looks whether one is, at every step.

    Args:
        state: The same on all ranks.
        embeddings: (N, D) this rank's rows; N may differ between ranks and be 0.
        labels: (N,) integers; only looked at where responsibilities come from them.
        peers: The ranks.
        continues: As in `advance`.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: A shape is wrong, or labels are missing.
    """
    config = state.config
    x, moments = match(state, embeddings)
    index, R, batch, n_ignored, idle = _batch(config, x, moments, labels, peers)
    new = merge(history(config, moments, keep=idle | continues), batch)
    n_revived = torch.zeros((), dtype=torch.int64, device=x.device)
    if config.revives and continues is False:
        new, n_revived = revive(new, batch.mean, x, index, R, revive_below=config.revive_below, peers=peers)
    stats = StepStats(moments=new, R=R, n_ignored=n_ignored, n_revived=n_revived)
    return MixtureState(config=config, moments=new), stats


def _batch(
    config: MixtureConfig, x: Tensor, moments: Moments, labels: Tensor | None, peers: Peers
) -> tuple[Tensor, Tensor, Moments, Tensor, Tensor]:
    """The component of each row and the same as R; of all ranks, the moments, the ignored rows, and whether all are."""
    (N, D), K, centroids = x.shape, config.K, moments.mean.double()
    given = labelled(x, as_labels(labels, N=N, device=x.device), K) if config.uses_labels else None
    for _ in range(config.max_assign_iters - 1 if given is None else 0):
        index, R = nearest_means(x, centroids.to(x.dtype), iterations=1)
        away, count, mean = _about(x, centroids, index, R)
        sums = peers.total(torch.cat([count, count * mean], dim=1))
        centroids = centroids + safe_divide(sums[:, 1:], sums[:, :1])
    index, R = given or nearest_means(x, centroids.to(x.dtype), iterations=1)
    away, count, mean = _about(x, centroids, index, R)
    seen = torch.stack([torch.full_like(index[:1].sum(), N), (index == K).sum()])
    sums = peers.total(torch.cat([count.flatten(), (count * mean).flatten(), seen.double()]))
    weight, sums, seen = sums.split_with_sizes([K, K * D, 2])
    shift = safe_divide(sums.view(K, D), weight[:, None])

    # About the rank's own means first, and then, by the difference of means, about those of all.
    nothing = Moments(weight=x.new_zeros(K), mean=x.new_zeros(K, D), covariance=x.new_zeros(K, D, D))
    own, _ = absorb(nothing, (away - _of_rows(mean, index)).to(x.dtype), index)
    apart = (mean - shift).to(x.dtype) * (count > 0)
    scatter = own.weight[:, None, None] * (own.covariance + apart[:, :, None] * apart[:, None, :])
    weight = weight.to(x.dtype)
    batch = Moments(
        weight=weight,
        mean=(centroids + shift).to(x.dtype),
        covariance=safe_divide(_over_all(scatter, peers), weight[:, None, None]),
    )
    return index, R, batch, seen[1].to(torch.int64), seen[1] == seen[0]


def _about(x: Tensor, centroids: Tensor, index: Tensor, R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows without the centroid of theirs, (N, D), 0 where they have none; their count, (K, 1), and means, (K, D).

    In float64: what is a difference of large numbers here is all there is of the batch's moments in the end.
    """
    away = torch.where((index < len(centroids))[:, None], x.double() - _of_rows(centroids, index), 0.0)
    members = R.double()
    count = members.sum(dim=0)[:, None]
    return away, count, safe_divide(members.mT @ away, count)


def _of_rows(of_components: Tensor, index: Tensor) -> Tensor:
    return of_components.index_select(0, index.clamp(max=len(of_components) - 1))


def _over_all(symmetric: Tensor, peers: Peers) -> Tensor:
    """The sum of symmetric matrices, (K, D, D), over all ranks, of which each sends a triangle."""
    D = symmetric.shape[-1]
    row, column = torch.tril_indices(D, D, device=symmetric.device)
    lower = peers.total(symmetric[:, row, column])
    whole = torch.empty_like(symmetric)
    whole[:, row, column] = lower
    whole[:, column, row] = lower
    return whole
