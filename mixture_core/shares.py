"""A step whose batch is spread over ranks: each works on its own rows, and sums are all that they exchange.

Nothing here has a derivative.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mixture_core.assign import labelled, nearest_means
from mixture_core.grouped import Workspace, complete_, pack, unpack_
from mixture_core.inputs import as_labels
from mixture_core.moments import Moments, merge_means, safe_divide
from mixture_core.scatter import absorb
from mixture_core.stats import StepStats
from mixture_core.step import MixtureState, history, match

Total = Callable[[Tensor], Tensor]  # the sum of a tensor over all ranks, the same to the bit on each


def advance_share(
    state: MixtureState,
    embeddings: Tensor,
    labels: Tensor | None = None,
    *,
    total: Total,
    continues: bool | Tensor = False,
    work: Workspace | None = None,
) -> tuple[MixtureState, StepStats]:
    """Does what `advance` does with the rows of all ranks, of which this one has a share.

    The new state is the same on all ranks, R is of the share, n_ignored of all rows. For each of max_assign_iters
    iterations, of labels for one, the ranks add up counts and sums of x minus the centroid that all of them have,
    K (1 + D) numbers, and in the end, about the means that come of it, the lower triangles of the scatter,
    K D (D + 1) / 2 numbers; two more count rows.

    Args:
        state: The same on all ranks.
        embeddings: (N, D) this rank's rows; N may differ between ranks and be 0.
        labels: (N,) integers; only looked at where responsibilities come from them.
        total: Sums a tensor over all ranks. All ranks call it equally often, with the same shapes.
        continues: As in `advance`.
        work: As in `advance`; it must not be the memory of the state's covariance.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: A shape is wrong, or labels are missing.
    """
    config, K = state.config, state.config.K
    x, (moments, residual) = match(state, embeddings)
    N, D = x.shape
    memory = work or Workspace.like(moments.covariance, N=N)
    given = labelled(x, as_labels(labels, N=N, device=x.device), K) if config.uses_labels else None
    centroids = moments.mean.double() + residual
    for _ in range(config.max_assign_iters - 1 if given is None else 0):
        _, count, mean, _, _ = _members(x, centroids, None)
        sums = total(torch.cat([count, count * mean], dim=1))
        centroids = centroids + safe_divide(sums[:, 1:], sums[:, :1])
    away, count, mean, index, R = _members(x, centroids, given)
    seen = torch.stack([torch.full_like(index[:1].sum(), N), (index == K).sum()]).double()
    sums = total(torch.cat([count.flatten(), (count * mean).flatten(), seen]))
    weight, sums, seen = sums.split_with_sizes([K, K * D, 2])
    shift = safe_divide(sums.view(K, D), weight[:, None])

    # About the rank's own means first, and then, by the difference of means, about those of all.
    nothing = Moments(weight=x.new_zeros(K), mean=x.new_zeros(K, D), covariance=x.new_zeros(K, D, D))
    absorb(nothing, nothing.mean, away.sub_(_of_rows(mean, index)).to(x.dtype), index, work=memory)
    apart = (mean - shift).to(x.dtype)
    memory.covariance.addcmul_(apart[:, :, None], apart[:, None, :])
    scatter = total(pack(memory.covariance) * count.to(x.dtype))

    before, residual = history(config, moments, residual, keep=(seen[1] == seen[0]) | continues)
    new, residual = _with_scatter(before, residual, weight.to(x.dtype), centroids + shift, scatter, memory.covariance)
    if work is None:
        complete_(new.covariance)
    stats = StepStats(moments=new, R=R, n_ignored=seen[1].to(torch.int64))
    return MixtureState(config=config, moments=new, residual=residual), stats


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


def _with_scatter(
    before: Moments, residual: Tensor, count: Tensor, mean: Tensor, scatter: Tensor, out: Tensor
) -> tuple[Moments, Tensor]:
    """What `merge_exactly` returns, from a packed scatter and a float64 mean; only the lower triangle is right."""
    weight = before.weight + count
    share, kept = safe_divide(count, weight), torch.where(weight > 0, safe_divide(before.weight, weight), 1.0)
    near = mean.to(before.mean.dtype)
    batch = near, (mean - near).to(near.dtype)
    (new_mean, residual), d = merge_means((before.mean, residual), batch, share[:, None])
    step = (share * kept).sqrt()[:, None] * d  # a product with itself is symmetric to the bit
    unpack_(scatter * safe_divide(torch.ones_like(weight), weight)[:, None], out)
    out.addcmul_(before.covariance, kept[:, None, None]).addcmul_(step[:, :, None], step[:, None, :])
    return Moments(weight=weight, mean=new_mean, covariance=out), residual
