"""A step whose batch is spread over ranks: each works on its own rows, and they only exchange sums.

Nothing here has a derivative.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mixture_core.absorb import absorb
from mixture_core.absorb_cpu import Workspace, complete_, pack, unpack_
from mixture_core.assign import iterate, labelled, nearest_means
from mixture_core.inputs import is_plain
from mixture_core.moments import Moments, merge_means, safe_divide
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

    The new state is the same on all ranks; R is that of this rank's rows; n_ignored and counts are of all rows. In
    each of max_assign_iters iterations (with labels, in the only one), the ranks add up the counts and sums of x minus
    the centroid, K (1 + D) numbers. In the end they add up the lower triangles of the scatter about the new means,
    K D (D + 1) / 2 numbers, and two counts of rows.

    Args:
        state: The same on all ranks.
        embeddings: (N, D) this rank's rows; N may differ between ranks and be 0.
        labels: As in `step`.
        total: Sums a tensor over all ranks. All ranks call it equally often, with the same shapes.
        continues: As in `advance`.
        work: As in `advance`; it must not be the memory of the state's covariance.
    """
    state, x, labels = match(state, embeddings, labels)
    config, m, (N, D), K = state.config, state.moments, x.shape, state.config.K
    plain = is_plain(x, labels, m.weight, m.mean, m.covariance, state.residual)
    memory = work or Workspace.like(m.covariance, N=N)

    def members(centroids: Tensor) -> _Members:
        if labels is not None:
            return _Members.of(x, centroids, *labelled(x, labels, K))
        return _Members.of(x, centroids, *nearest_means(x, centroids.to(x.dtype), iterations=1, plain=plain))

    def means(own: _Members, centroids: Tensor) -> Tensor:
        sums = total(torch.cat([own.counts, own.counts * own.means], dim=1))
        return centroids + safe_divide(sums[:, 1:], sums[:, :1])

    iterations = config.max_assign_iters if labels is None else 1
    own, centroids = iterate(members, means, m.mean.double() + state.residual, iterations=iterations)
    seen = torch.stack([torch.full_like(own.component[:1].sum(), N), (own.component == K).sum()]).double()
    sums = total(torch.cat([own.counts.flatten(), (own.counts * own.means).flatten(), seen]))
    weight, sums, seen = sums.split_with_sizes([K, K * D, 2])
    shift = safe_divide(sums.view(K, D), weight[:, None])

    # About the rank's own means first, and then, by the difference of means, about those of all.
    nothing = Moments(weight=x.new_zeros(K), mean=x.new_zeros(K, D), covariance=x.new_zeros(K, D, D))
    away = own.away.sub_(_of_rows(own.means, own.component)).to(x.dtype)
    absorb(nothing, nothing.mean, away, own.component, plain=plain, work=memory)
    apart = (own.means - shift).to(x.dtype)
    memory.covariance.addcmul_(apart[:, :, None], apart[:, None, :])
    scatter = total(pack(memory.covariance) * own.counts.to(x.dtype))

    before, residual = history(state, keep=(seen[1] == seen[0]) | continues)
    new, residual = _with_scatter(before, residual, weight.to(x.dtype), centroids + shift, scatter, memory.covariance)
    if work is None:
        complete_(new.covariance)
    n_ignored, counts = seen[1].to(torch.int64), weight.to(x.dtype)
    stats = StepStats(moments=new, R=own.R, n_ignored=n_ignored, counts=counts)
    return MixtureState(config=config, moments=new, residual=residual), stats


class _Members(NamedTuple):
    """A rank's rows relative to the centroid that each belongs to.

    In float64: the batch's moments come from these differences of large numbers alone.
    """

    away: Tensor  # (N, D) rows minus their centroid, 0 if ignored
    counts: Tensor  # (K, 1) rows of each component
    means: Tensor  # (K, D) mean of `away` for each component
    component: Tensor  # (N,) of each row, K if ignored
    R: Tensor  # (N, K) the same, one-hot

    @classmethod
    def of(cls, x: Tensor, centroids: Tensor, index: Tensor, R: Tensor) -> "_Members":
        ignored = (index == len(centroids))[:, None]
        away = x.to(torch.float64, copy=True).sub_(_of_rows(centroids, index)).masked_fill_(ignored, 0.0)
        members = R.double()
        count = members.sum(dim=0)[:, None]
        return cls(away, count, safe_divide(members.mT @ away, count), index, R)


def _of_rows(of_components: Tensor, index: Tensor) -> Tensor:
    return of_components.index_select(0, index.clamp(max=len(of_components) - 1))


def _with_scatter(
    before: Moments, residual: Tensor, count: Tensor, mean: Tensor, scatter: Tensor, out: Tensor
) -> tuple[Moments, Tensor]:
    """Does what `merge_exactly` does, from a packed scatter and a float64 mean; the covariance is a `Lower`."""
    weight = before.weight + count
    share, kept = safe_divide(count, weight), torch.where(weight > 0, safe_divide(before.weight, weight), 1.0)
    near = mean.to(before.mean.dtype)
    batch = near, (mean - near).to(near.dtype)
    (new_mean, residual), d = merge_means((before.mean, residual), batch, share[:, None])
    step = (share * kept).sqrt()[:, None] * d  # a product with itself is symmetric to the bit
    unpack_(scatter * safe_divide(torch.ones_like(weight), weight)[:, None], out)
    out.addcmul_(before.covariance, kept[:, None, None]).addcmul_(step[:, :, None], step[:, None, :])
    return Moments(weight=weight, mean=new_mean, covariance=out), residual
