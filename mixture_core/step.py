"""The estimator itself: `init` makes a state, `step` takes it through one batch."""

import attrs
import torch
from torch import Tensor

from mixture_core.assign import kmeans_plusplus, lloyd, responsibilities_from_labels
from mixture_core.config import MixtureConfig
from mixture_core.inputs import as_embeddings, as_labels, usable_rows
from mixture_core.moments import Moments, batch_moments, decay, merge
from mixture_core.pytrees import STATIC, pytree
from mixture_core.revive import revive
from mixture_core.stats import StepStats


@pytree
@attrs.frozen(eq=False, kw_only=True)
class MixtureState:
    """All that the next step needs. The means are the centroids that its k-means starts from."""

    config: MixtureConfig = attrs.field(metadata=STATIC)
    moments: Moments  # weight (K,), mean (K, D), covariance (K, D, D)


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
    config = state.config
    x, moments = _match(state, embeddings)
    R = _responsibilities(config, x, moments, labels, iterations=config.max_assign_iters)
    ignored = R.sum(dim=1) == 0
    batch = batch_moments(x, R)
    new = merge(_history(config, moments, idle=ignored.all()), batch)
    n_revived = torch.zeros((), dtype=torch.int64, device=x.device)
    if config.averages and not config.uses_labels and config.revive_below > 0:
        new, n_revived = revive(new, batch, x, R, revive_below=config.revive_below)
    stats = StepStats(moments=new, R=R, n_ignored=ignored.sum(), n_revived=n_revived)
    return MixtureState(config=config, moments=new), stats


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
    x, moments = _match(state, embeddings)
    return _responsibilities(state.config, x, moments, labels, iterations=1)


def _match(state: MixtureState, embeddings: Tensor) -> tuple[Tensor, Moments]:
    """Embeddings and moments in one type: float64 if either is."""
    m = state.moments
    x = as_embeddings(embeddings, D=m.mean.shape[1])
    dtype = torch.promote_types(x.dtype, m.mean.dtype)
    return x.to(dtype), Moments(weight=m.weight.to(dtype), mean=m.mean.to(dtype), covariance=m.covariance.to(dtype))


def _responsibilities(
    config: MixtureConfig, x: Tensor, moments: Moments, labels: Tensor | None, *, iterations: int
) -> Tensor:
    if not config.uses_labels:
        return lloyd(x, moments.mean, iterations=iterations)[0]
    labels = as_labels(labels, N=x.shape[0], device=x.device)
    R = responsibilities_from_labels(labels, config.K).to(x.dtype)
    return torch.where(usable_rows(x)[:, None], R, 0.0)


def _history(config: MixtureConfig, moments: Moments, *, idle: Tensor) -> Moments:
    """What the batch is merged into: the decayed moments in `mode: ema`, else nothing but the centroids of k-means.

    An idle step, one without a usable row, decays and forgets nothing.
    """
    if config.averages:
        return decay(moments, torch.where(idle, 1.0, moments.weight.new_full((), config.ema_decay)))
    keep = idle.to(moments.weight.dtype)
    return Moments(
        weight=moments.weight * keep,
        mean=moments.mean * keep if config.uses_labels else moments.mean,
        covariance=moments.covariance * keep,
    )
