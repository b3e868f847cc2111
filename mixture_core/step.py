"""The estimator itself: `init` makes a state, `step` takes it through one batch."""

import attrs
import torch
from torch import Tensor
from torch.utils._pytree import tree_map  # torch has no public pytree module

from mixture_core.absorb import absorb
from mixture_core.absorb_cpu import Workspace
from mixture_core.assign import labelled, nearest_means
from mixture_core.config import MixtureConfig
from mixture_core.inputs import as_embeddings, as_labels, is_plain
from mixture_core.moments import Moments, decay
from mixture_core.pytrees import STATIC, pytree
from mixture_core.seeding import kmeans_plusplus
from mixture_core.stats import StepStats


@pytree
@attrs.frozen(eq=False, kw_only=True)
class MixtureState:
    """The state that the next step needs. The means are the centroids that its k-means starts from.

    Attributes:
        config: The options.
        moments: Weight (K,), mean (K, D) and covariance (K, D, D) of each component.
        residual: (K, D) rounding error of the means, so that steps smaller than a mean's last digit still add up. Zero
            if left out.

    Example:
        >>> import torch, mixture_core
        >>> state = mixture_core.init(mixture_core.MixtureConfig(K=2), torch.tensor([[0.0, 1.0], [4.0, 1.0]]))
        >>> state.config.K, state.moments.weight.tolist(), tuple(state.moments.covariance.shape)
        (2, [0.0, 0.0], (2, 2, 2))
    """

    config: MixtureConfig = attrs.field(metadata=STATIC)
    moments: Moments
    residual: Tensor = attrs.field(default=attrs.Factory(lambda self: torch.zeros_like(self.moments.mean), True))


def init(
    config: MixtureConfig, embeddings: Tensor, labels: Tensor | None = None, *, generator: torch.Generator | None = None
) -> MixtureState:
    """Returns the state before the first step: all weights 0, and centroids from greedy k-means++ on the usable rows.

    With labels nothing is seeded: a mean is 0 until its label appears.

    Args:
        config: The options.
        embeddings: (N, D) first batch, tensor or NumPy array.
        labels: (N,) integers; optional, and only checked if responsibilities come from labels.
        generator: Source of randomness; None is one with a fixed seed.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: A shape is wrong.

    Example:
        >>> import torch, mixture_core
        >>> x = torch.tensor([[0.0], [0.1], [5.0], [5.1]])
        >>> state = mixture_core.init(mixture_core.MixtureConfig(K=2), x, generator=torch.Generator().manual_seed(0))
        >>> sorted(round(float(mean)) for mean in state.moments.mean)
        [0, 5]
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
    """Returns the state after one batch, and the statistics of the mixture after it.

    In `mode: ema` the new moments are merge(decay(old, ema_decay), batch): the sufficient statistics are averaged,
    sample by sample. In the other modes they are the batch's; a k-means component without a row keeps its mean. A
    batch without a usable row changes nothing.

    Args:
        state: From `init` or the step before.
        embeddings: (N, D), tensor or NumPy array; rows with a NaN, an infinity or an entry beyond 1.8e13 are ignored.
        labels: (N,) integers; only read if responsibilities come from labels. Rows whose label lies outside [0, K) are
            ignored.

    Returns:
        The new state; and `StepStats` with the same moments, R, (N, K), and n_ignored, ().

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: A shape is wrong, or labels are missing.

    Example:
        >>> import torch, mixture_core
        >>> x = torch.tensor([[0.0], [2.0], [10.0], [float("nan")]])
        >>> state = mixture_core.init(mixture_core.MixtureConfig(K=2), x)
        >>> state, stats = mixture_core.step(state, x)
        >>> sorted(stats.mu.flatten().tolist()), int(stats.n_ignored), round(float(stats.trace_B), 1)
        ([1.0, 10.0], 1, 18.0)
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
        work: Memory, as in `absorb`; None is new memory. If it is given, the new covariance is a `Lower`, and so may be
            the state's.
    """
    state, x, labels = match(state, embeddings, labels)
    config, m = state.config, state.moments
    plain = is_plain(x, labels, m.weight, m.mean, m.covariance, state.residual)
    index, R = _members(state, x, labels, iterations=config.max_assign_iters, plain=plain, work=work)
    n_ignored = (index == config.K).sum()
    keep = (n_ignored == x.shape[0]) | continues
    before, residual = history(state, keep=bool(keep) if plain and x.device.type == "cpu" else keep)
    new, residual = absorb(before, residual, x, index, plain=plain, work=work)
    stats = StepStats(moments=new, R=R, n_ignored=n_ignored)
    return MixtureState(config=config, moments=new, residual=residual), stats


def assign(state: MixtureState, embeddings: Tensor, labels: Tensor | None = None) -> Tensor:
    """Returns R, (N, K): 1 for each row's nearest mean of the state, or for its label; the state stays as it is.

    Args:
        state: From `init` or `step`.
        embeddings: (N, D), tensor or NumPy array; rows with a NaN, an infinity or an entry beyond 1.8e13 get zeros.
        labels: (N,) integers; only read if responsibilities come from labels.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: A shape is wrong, or labels are missing.

    Example:
        >>> import torch, mixture_core
        >>> moments = mixture_core.Moments(
        ...     weight=torch.ones(2), mean=torch.tensor([[0.0], [4.0]]), covariance=torch.ones(2, 1, 1)
        ... )
        >>> state = mixture_core.MixtureState(config=mixture_core.MixtureConfig(K=2), moments=moments)
        >>> mixture_core.assign(state, torch.tensor([[1.0], [3.0], [float("inf")]])).tolist()
        [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    """
    state, x, labels = match(state, embeddings, labels)
    return _members(state, x, labels, iterations=1, plain=is_plain(x, state.moments.mean), work=None)[1]


def match(state: MixtureState, embeddings: Tensor, labels: Tensor | None) -> tuple[MixtureState, Tensor, Tensor | None]:
    """Returns the state and the embeddings in one type, float64 if either is; and the labels, None if not needed."""
    mean = state.moments.mean
    x = as_embeddings(embeddings, D=mean.shape[1])
    labels = as_labels(labels, N=x.shape[0], device=x.device) if state.config.uses_labels else None
    if x.dtype == mean.dtype:
        return state, x, labels
    dtype = torch.promote_types(x.dtype, mean.dtype)
    return tree_map(lambda tensor: tensor.to(dtype), state), x.to(dtype), labels


def _members(
    state: MixtureState, x: Tensor, labels: Tensor | None, *, iterations: int, plain: bool, work: Workspace | None
) -> tuple[Tensor, Tensor]:
    """The component of each row, (N,), K if the row is ignored; and the same as R, (N, K)."""
    if labels is not None:
        return labelled(x, labels, state.config.K)
    return nearest_means(x, state.moments.mean, iterations=iterations, plain=plain, work=work)


def history(state: MixtureState, *, keep: bool | Tensor) -> tuple[Moments, Tensor]:
    """Returns the moments that a batch is merged into, and the residual of their means.

    In `mode: ema` they are the decayed moments. In the other modes they have no weight, and only k-means' centroids.

    Args:
        state: Before the batch.
        keep: Whether to return the state's as they are, a bool or () tensor: true for a batch without a usable row and
            for a further part of a step, since neither decays or forgets anything.
    """
    config, m, residual = state.config, state.moments, state.residual
    if keep is True:
        return m, residual
    if config.averages:
        factor = config.ema_decay if keep is False else torch.where(keep, torch.ones_like(m.weight), config.ema_decay)
        return decay(m, factor), residual
    kept = keep.to(m.weight.dtype) if isinstance(keep, Tensor) else 0.0
    kept_mean = kept if config.uses_labels else 1.0
    forgotten = Moments(weight=m.weight * kept, mean=m.mean * kept_mean, covariance=m.covariance * kept)
    return forgotten, residual * kept_mean
