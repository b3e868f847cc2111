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
    iterations, of labels for two, the ranks add up counts and sums of x minus the centroid that all of them have,
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
    (N, D), K, centroids = x.shape, config.K, moments.mean
    given = labelled(x, as_labels(labels, N=N, device=x.device), K) if config.uses_labels else None
    # A label's rows may be far from where its mean has been: the second time, they are about means of their own.
    iterations = config.max_assign_iters if given is None else 2
    index, R, rows = _assign(x, centroids, given)
    for _ in range(iterations - 1):
        sums = peers.total(torch.cat([R.sum(dim=0)[:, None], R.mT @ rows], dim=1))
        centroids = centroids + safe_divide(sums[:, 1:], sums[:, :1])
        index, R, rows = _assign(x, centroids, given)

    nothing = Moments(weight=x.new_zeros(K), mean=x.new_zeros(K, D), covariance=x.new_zeros(K, D, D))
    own, _ = absorb(nothing, rows, index)
    seen = torch.stack([torch.full_like(index[:1].sum(), N), (index == K).sum()])
    sums = torch.cat([own.weight, (own.weight[:, None] * own.mean).flatten(), seen.to(x.dtype)])
    weight, sums, seen = peers.total(sums).split_with_sizes([K, K * D, 2])
    shift = safe_divide(sums.view(K, D), weight[:, None])
    away = own.mean - shift  # differences of means that are near 0: nothing is lost where embeddings are far from it
    scatter = own.weight[:, None, None] * (own.covariance + away[:, :, None] * away[:, None, :])
    batch = Moments(
        weight=weight,
        mean=centroids + shift,
        covariance=safe_divide(_over_all(scatter, peers), weight[:, None, None]),
    )
    return index, R, batch, seen[1].to(torch.int64), seen[1] == seen[0]


def _assign(x: Tensor, centroids: Tensor, given: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
    """The component of each row, the same as R, and the rows without the centroid of theirs, 0 where they have none."""
    index, R = given or nearest_means(x, centroids, iterations=1)
    K = len(centroids)
    own = centroids.index_select(0, index.clamp(max=K - 1))
    return index, R, torch.where((index < K)[:, None], x - own, 0.0)


def _over_all(symmetric: Tensor, peers: Peers) -> Tensor:
    """The sum of symmetric matrices, (K, D, D), over all ranks, of which each sends a triangle."""
    D = symmetric.shape[-1]
    row, column = torch.tril_indices(D, D, device=symmetric.device)
    lower = peers.total(symmetric[:, row, column])
    whole = torch.empty_like(symmetric)
    whole[:, row, column] = lower
    whole[:, column, row] = lower
    return whole
