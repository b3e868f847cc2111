"""The estimator itself: `init` makes a state, `step` takes it through one batch."""

import attrs
import torch
from torch import Tensor

from mixture_core.assign import kmeans_plusplus, labelled, nearest_means
from mixture_core.config import MixtureConfig
from mixture_core.grouped import Workspace
from mixture_core.inputs import as_embeddings, as_labels, looks
from mixture_core.moments import Moments, decay
from mixture_core.pytrees import STATIC, pytree
from mixture_core.scatter import absorb
from mixture_core.stats import StepStats


@pytree
@attrs.frozen(eq=False, kw_only=True)
class MixtureState:
    """All that the next step needs. The means are the centroids that its k-means starts from."""

    config: MixtureConfig = attrs.field(metadata=STATIC)
    moments: Moments  # weight (K,), mean (K, D), covariance (K, D, D)
    # (K, D) rounding error of the means, so that steps smaller than a mean's last digit still add up. Zero if left out.
    residual: Tensor = attrs.field(default=attrs.Factory(lambda self: torch.zeros_like(self.moments.mean), True))


def init(
    config: MixtureConfig, embeddings: Tensor, labels: Tensor | None = None, *, generator: torch.Generator | None = None
) -> MixtureState:
    """Returns the state before the first step: all weights 0, and centroids from greedy k-means++ on the usable rows.

    Where responsibilities come from labels nothing is seeded: means are 0 until a label comes.

    Args:
        config: The choices.
        embeddings: (N, D) first batch, tensor or NumPy array.
        labels: (N,) integers; only looked at where responsibilities come from them, and optional there too.
        generator: The source of randomness; None is one with a fixed seed.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: A shape is wrong.
    """
    x = as_embeddings(embeddings)
    K, D = config.K, x.shape[1]
    if config.uses_labels:
        if labels is not None:
            as_labels(labels, N=x.shape[0], device=x.device)
        centroids = x.new_zeros(K, D)
    else:
        if generator is None:
            generator = torch.Generator(device="cpu").manual_seed(0)
        centroids = kmeans_plusplus(x, K, generator=generator)
    return MixtureState(
        config=config,
        moments=Moments(weight=x.new_zeros(K), mean=centroids, covariance=x.new_zeros(K, D, D)),
    )


def step(state: MixtureState, embeddings: Tensor, labels: Tensor | None = None) -> tuple[MixtureState, StepStats]:
    """Returns the state after one batch, and what there is to read.

    In `mode: ema` the new moments are merge(decay(old, ema_decay), batch): the sufficient statistics are averaged,
    sample by sample. In the other modes they are the batch's; a k-means component without a row keeps its mean. A
    batch without a usable row leaves the state.

    Args:
        state: From `init` or the step before.
        embeddings: (N, D), tensor or NumPy array; rows that are not finite are ignored.
        labels: (N,) integers; only looked at where responsibilities come from them. Those outside [0, K) are ignored.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: A shape is wrong, or labels are missing.
    """
    return advance(state, embeddings, labels)


def advance(
    state: MixtureState,
    embeddings: Tensor,
    labels: Tensor | None = None,
    *,
    continues: bool | Tensor = False,
    work: Workspace | None = None,
) -> tuple[MixtureState, StepStats]:
    """Does what `step` does, and may write to given memory, as in `absorb`.

    Args:
        state: From `init` or the step before.
        embeddings: As in `step`.
        labels: As in `step`.
        continues: Whether the batch is a further part of the last step, which then does not decay again. If only the
            device knows, a () bool tensor: false if no earlier part had a usable row, since idle parts decay nothing.
        work: Memory, as in `absorb`; None is new memory. Where it is given, only the lower triangle of the new
            covariance is right, and only that of the state's has to be.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: A shape is wrong, or labels are missing.
    """
    config = state.config
    x, (moments, residual) = match(state, embeddings)
    index, R = _members(config, x, moments, labels, iterations=config.max_assign_iters, work=work)
    n_ignored = (index == config.K).sum()
    idle = n_ignored == x.shape[0]
    keep = bool(idle | continues) if looks(index) else idle | continues
    before, residual = history(config, moments, residual, keep=keep)
    new, residual = absorb(before, residual, x, index, work=work)
    stats = StepStats(moments=new, R=R, n_ignored=n_ignored)
    return MixtureState(config=config, moments=new, residual=residual), stats


def assign(state: MixtureState, embeddings: Tensor, labels: Tensor | None = None) -> Tensor:
    """Returns R, (N, K): each row's nearest mean of the state, or its label, with no update of anything.

    Args:
        state: From `init` or `step`.
        embeddings: (N, D), tensor or NumPy array.
        labels: (N,) integers; only looked at where responsibilities come from them.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: A shape is wrong, or labels are missing.
    """
    x, (moments, _) = match(state, embeddings)
    return _members(state.config, x, moments, labels, iterations=1, work=None)[1]


def match(state: MixtureState, embeddings: Tensor) -> tuple[Tensor, tuple[Moments, Tensor]]:
    """Returns embeddings, and moments with their residual, in one type: float64 if either is."""
    m = state.moments
    x = as_embeddings(embeddings, D=m.mean.shape[1])
    if x.dtype == m.mean.dtype:
        return x, (m, state.residual)
    dtype = torch.promote_types(x.dtype, m.mean.dtype)
    moments = Moments(weight=m.weight.to(dtype), mean=m.mean.to(dtype), covariance=m.covariance.to(dtype))
    return x.to(dtype), (moments, state.residual.to(dtype))


def _members(
    config: MixtureConfig,
    x: Tensor,
    moments: Moments,
    labels: Tensor | None,
    *,
    iterations: int,
    work: Workspace | None,
) -> tuple[Tensor, Tensor]:
    """The component of each row, (N,), K where it counts for nothing; and the same as R, (N, K)."""
    if config.uses_labels:
        return labelled(x, as_labels(labels, N=x.shape[0], device=x.device), config.K)
    return nearest_means(x, moments.mean, iterations=iterations, work=work)


def history(
    config: MixtureConfig, moments: Moments, residual: Tensor, *, keep: bool | Tensor
) -> tuple[Moments, Tensor]:
    """Returns what a batch is merged into: the decayed moments in `mode: ema`, else nothing but k-means' centroids.

    Args:
        config: The choices.
        moments: So far.
        residual: (K, D) of their means.
        keep: Whether to return them as they are, a bool or () tensor: true for a batch without a usable row and for a
            further part of a step, since neither decays or forgets anything.
    """
    if keep is True:
        return moments, residual
    if config.averages:
        decayed = decay(moments, config.ema_decay)
        weight = decayed.weight if keep is False else torch.where(keep, moments.weight, decayed.weight)
        return Moments(weight=weight, mean=moments.mean, covariance=moments.covariance), residual
    kept = keep.to(moments.weight.dtype) if isinstance(keep, Tensor) else 0.0
    kept_mean = kept if config.uses_labels else 1.0
    forgotten = Moments(
        weight=moments.weight * kept, mean=moments.mean * kept_mean, covariance=moments.covariance * kept
    )
    return forgotten, residual * kept_mean
