"""A step whose batch is spread over ranks: each works on its own rows, and sums are all that they exchange.

Nothing here has a derivative.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from mixture_core.assign import labelled, nearest_means
from mixture_core.grouped import BLOCK, Workspace, complete_
from mixture_core.inputs import as_labels
from mixture_core.moments import Moments, safe_divide
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
    work: Workspace | None = None,
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
        work: As in `advance`; of the state's covariance's own memory it must be another.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: A shape is wrong, or labels are missing.
    """
    config = state.config
    x, moments = match(state, embeddings)
    (N, D), K = x.shape, config.K
    memory = work or Workspace.like(moments.covariance, N=N)
    given = labelled(x, as_labels(labels, N=N, device=x.device), K) if config.uses_labels else None
    centroids = moments.mean.double()
    for _ in range(config.max_assign_iters - 1 if given is None else 0):
        away, count, mean, _, _ = _members(x, centroids, None)
        sums = peers.total(torch.cat([count, count * mean], dim=1))
        centroids = centroids + safe_divide(sums[:, 1:], sums[:, :1])
    away, count, mean, index, R = _members(x, centroids, given)
    seen = torch.stack([torch.full_like(index[:1].sum(), N), (index == K).sum()]).double()
    sums = peers.total(torch.cat([count.flatten(), (count * mean).flatten(), seen]))
    weight, sums, seen = sums.split_with_sizes([K, K * D, 2])
    shift = safe_divide(sums.view(K, D), weight[:, None])

    # About the rank's own means first, and then, by the difference of means, about those of all.
    nothing = Moments(weight=x.new_zeros(K), mean=x.new_zeros(K, D), covariance=x.new_zeros(K, D, D))
    absorb(nothing, away.sub_(_of_rows(mean, index)).to(x.dtype), index, work=memory)
    apart = (mean - shift).to(x.dtype)
    memory.covariance.addcmul_(apart[:, :, None], apart[:, None, :])
    scatter = peers.total(pack(memory.covariance) * count.to(x.dtype))

    before = history(config, moments, keep=(seen[1] == seen[0]) | continues)
    batch_mean = (centroids + shift).to(x.dtype)
    new = _with_scatter(before, weight.to(x.dtype), batch_mean, scatter, out=memory.covariance)
    if work is None:
        complete_(new.covariance)
    n_revived = torch.zeros((), dtype=torch.int64, device=x.device)
    if config.revives and continues is False:
        new, n_revived = revive(new, batch_mean, x, index, R, revive_below=config.revive_below, peers=peers)
    stats = StepStats(moments=new, R=R, n_ignored=seen[1].to(torch.int64), n_revived=n_revived)
    return MixtureState(config=config, moments=new), stats


def _members(
    x: Tensor, centroids: Tensor, given: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows without their centroid, (N, D); count, (K, 1), and mean, (K, D), of these; whose they are, as index and R.

    In float64: what is a difference of large numbers here is all there is of the batch's moments in the end.
    """
    index, R = given or nearest_means(x, centroids.to(x.dtype), iterations=1)
    away = (
        x.to(torch.float64, copy=True)
        .sub_(_of_rows(centroids, index))
        .masked_fill_((index == len(centroids))[:, None], 0.0)
    )
    members = R.double()
    count = members.sum(dim=0)[:, None]
    return away, count, safe_divide(members.mT @ away, count), index, R


def _of_rows(of_components: Tensor, index: Tensor) -> Tensor:
    return of_components.index_select(0, index.clamp(max=len(of_components) - 1))


def _with_scatter(before: Moments, count: Tensor, mean: Tensor, scatter: Tensor, *, out: Tensor) -> Moments:
    """What `merge` returns, where the batch's scatter is packed; only the lower triangle of the covariance is right."""
    weight = before.weight + count
    share, kept = safe_divide(count, weight), torch.where(weight > 0, safe_divide(before.weight, weight), 1.0)
    step = (share * kept).sqrt()[:, None] * (mean - before.mean)  # a product with itself is symmetric to the bit
    unpack_(scatter * safe_divide(torch.ones_like(weight), weight)[:, None], out)
    out.addcmul_(before.covariance, kept[:, None, None]).addcmul_(step[:, :, None], step[:, None, :])
    return Moments(weight=weight, mean=torch.lerp(before.mean, mean, share[:, None]), covariance=out)


def pack(lower: Tensor) -> Tensor:
    """Returns the lower triangles of (K, D, D) matrices, (K, D (D + 1) / 2), by blocks of rows."""
    parts = []
    for rows, start, (row, column) in _blocks(lower):
        parts += [rows[:, :, :start].flatten(1), rows[:, row, column]]
    return torch.cat(parts, dim=1)


def unpack_(packed: Tensor, out: Tensor) -> None:
    """Writes what `pack` has packed into the lower triangles of `out`, (K, D, D)."""
    K, place = len(out), 0
    for rows, start, (row, column) in _blocks(out):
        size = rows.shape[1] * start
        rows[:, :, :start] = packed[:, place : place + size].view(K, rows.shape[1], start)
        rows[:, row, column] = packed[:, place + size : place + size + len(row)]
        place += size + len(row)


def _blocks(matrices: Tensor) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Blocks of rows, where each begins, and which entries of it are in the lower triangle right of there, (2, ...)."""
    D = matrices.shape[-1]
    block = 4 * BLOCK if matrices.is_cuda else BLOCK  # launches are slow on a GPU, and indices on the CPU
    for start in range(0, D, block):
        rows = matrices[:, start : start + block]
        indices = torch.tril_indices(rows.shape[1], rows.shape[1], device=matrices.device)
        indices[1] += start
        yield rows, start, indices
