"""For your own tests: hypothesis strategies, and the estimator once more in float64 and plain loops, as an oracle.

The oracle takes what the functions of `mixture_core` take, embeddings as tensors only, and returns the same records in
float64. It is slow, and meant to be read: loops over samples and components, and the definitions as they stand in a
textbook.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mixture_core import MixtureConfig, MixtureState, Moments, StepStats

try:
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError(
        "`mixture_core.testing` needs hypothesis: pip install 'mixture-diagnostics[testing]'.", name="hypothesis"
    ) from error

Size = int | tuple[int, int]  # exactly so many, or between these two, both included

UNUSABLE = (float("nan"), float("inf"), float("-inf"), 1e300)


# Bulk is drawn from torch, sizes and exceptions from hypothesis, which can shrink them.
_GENERATORS = st.integers(0, 2**31).map(lambda seed: torch.Generator(device="cpu").manual_seed(seed))


class Mixture(NamedTuple):
    """A sample of a mixture whose components nobody can confuse."""

    embeddings: Tensor  # (N, D)
    labels: Tensor  # (N,) int64: each row's component
    means: Tensor  # (K, D) the components' centers


@st.composite
def embeddings(
    draw: st.DrawFn,
    *,
    N: Size = (0, 32),
    D: Size = (1, 8),
    scale: float = 1.0,
    offset: float = 0.0,
    dtype: torch.dtype = torch.float32,
    with_bad_rows: bool = False,
) -> Tensor:
    """Draws embeddings, (N, D): Gaussian, some rows perhaps copies of the first.

    Args:
        draw: Given by hypothesis.
        N: Number of rows.
        D: Width.
        scale: Standard deviation of every entry.
        offset: Mean of every entry.
        dtype: Of the result.
        with_bad_rows: Whether some rows may hold a NaN, an infinity or a number too large to square.
    """
    N, D = _size(draw, N), _size(draw, D)
    x = offset + scale * _normal(draw(_GENERATORS), N, D)
    for n in draw(_some_of(N)):
        x[n] = x[0]
    for n in draw(_some_of(N)) if with_bad_rows else []:
        x[n, draw(st.integers(0, D - 1))] = draw(st.sampled_from(UNUSABLE))
    return x.to(dtype)


@st.composite
def mixtures(
    draw: st.DrawFn,
    *,
    N: Size = (8, 32),
    D: Size = (1, 8),
    K: Size = (1, 6),
    scale: float = 1.0,
    separation: float = 10.0,
    offset: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Mixture:
    """Draws a sample of K well separated components of random weights, each with at least one row where N >= K.

    Every row lies within `scale` of its component's center, and centers lie `separation * scale` apart or more.

    Args:
        draw: Given by hypothesis.
        N: Number of rows.
        D: Width.
        K: Number of components.
        scale: Radius of a component.
        separation: Distance between centers, in radii.
        offset: Added to every entry.
        dtype: Of embeddings and means.
    """
    N, D, K, generator = _size(draw, N), _size(draw, D), _size(draw, K), draw(_GENERATORS)
    # Corner k of a grid has the digits of k for coordinates. Moved by less than half a cell, corners stay half a cell
    # apart.
    side = next(side for side in range(1, K + 1) if side**D >= K)
    corners = torch.tensor([[k // side**d % side for d in range(D)] for k in range(K)], device="cpu")
    means = offset + 2 * separation * scale * (corners + _uniform(generator, K, D) / 2)

    own = torch.cat([torch.arange(K, device="cpu"), (K * _uniform(generator, N, 1)[:, 0] ** 2).long()])[:N]
    own = own[_uniform(generator, N, 1)[:, 0].argsort()]
    noise = _normal(generator, N, D) / D**0.5
    noise = noise / noise.norm(dim=1, keepdim=True).clamp(min=1)
    return Mixture((means[own] + scale * noise).to(dtype), own, means.to(dtype))


@st.composite
def labels(draw: st.DrawFn, *, N: Size = (0, 32), K: int = 4, with_ignored: bool = True) -> Tensor:
    """Draws labels, (N,) int64 in [0, K); with_ignored: and -1 and -100 among them, which `step` ignores."""
    values = [*range(K), -1, -100] if with_ignored else [*range(K)]
    N = _size(draw, N)
    drawn = draw(st.lists(st.sampled_from(values), min_size=N, max_size=N))
    return torch.tensor(drawn, device="cpu", dtype=torch.int64)


@st.composite
def states(
    draw: st.DrawFn,
    *,
    config: MixtureConfig | None = None,
    K: Size = (1, 6),
    D: Size = (1, 8),
    scale: float = 1.0,
    offset: float = 0.0,
    dtype: torch.dtype = torch.float32,
    with_empty: bool = True,
) -> MixtureState:
    """Draws a state in the middle of its life.

    Args:
        draw: Given by hypothesis.
        config: The choices; None draws them, with K components.
        K: Number of components, unless `config` says.
        D: Width.
        scale: Standard deviation of the means' entries.
        offset: Mean of the means' entries.
        dtype: Of the moments.
        with_empty: Whether some components may have weight 0.
    """
    D = _size(draw, D)
    if config is None:
        config = MixtureConfig(
            K=_size(draw, K),
            assigner=draw(st.sampled_from(("kmeans_online", "label_supervised"))),
            mode=draw(st.sampled_from(("ema", "per_batch", "label_supervised"))),
            ema_decay=draw(st.sampled_from((0.95, 0.5, 0.999))),
            max_assign_iters=draw(st.integers(1, 3)),
        )
    generator = draw(_GENERATORS)
    weight = 10 * _normal(generator, config.K, 1)[:, 0].exp()
    if with_empty:
        weight[draw(_some_of(config.K))] = 0.0
    factor = scale * _normal(generator, config.K * D, D).reshape(config.K, D, D) / D**0.5
    covariance = (factor @ factor.mT) * (weight > 0)[:, None, None]
    mean = offset + scale * _normal(generator, config.K, D)
    moments = Moments(weight=weight.to(dtype), mean=mean.to(dtype), covariance=covariance.to(dtype))
    return MixtureState(config=config, moments=moments)


def oracle_batch_moments(x: Tensor, R: Tensor) -> Moments:
    """Returns the moments of a batch: what `mixture_core.batch_moments` should, in float64.

    Args:
        x: (N, D) embeddings.
        R: (N, K) responsibilities.
    """
    usable = _usable(x)
    x, R = x.double(), R.double()
    weight = [sum(float(R[n, k]) for n in usable) for k in range(R.shape[1])]
    mean = x.new_zeros(R.shape[1], x.shape[1])
    covariance = x.new_zeros(R.shape[1], x.shape[1], x.shape[1])
    for k in range(R.shape[1]):
        rows = [n for n in usable if R[n, k] > 0]
        for n in rows:
            mean[k] += R[n, k] / weight[k] * x[n]
        for n in rows:
            covariance[k] += R[n, k] / weight[k] * _outer(x[n] - mean[k])
    return Moments(weight=x.new_tensor(weight), mean=mean, covariance=covariance)


def oracle_merge(a: Moments, b: Moments) -> Moments:
    """Returns the moments of the union of two sets of samples: what `mixture_core.merge` should, in float64.

    Per component the covariance of a union is the weighted mean of the parts' covariances, each about the mean of the
    union: C_a + (mean_a - mean)(mean_a - mean)^T.
    """
    a, b = _double(a), _double(b)
    weight, mean, covariance = a.weight + b.weight, a.mean.clone(), a.covariance.clone()
    for k in range(weight.shape[0]):
        if weight[k] > 0:
            mean[k] = (a.weight[k] * a.mean[k] + b.weight[k] * b.mean[k]) / weight[k]
            about_a = a.covariance[k] + _outer(a.mean[k] - mean[k])
            about_b = b.covariance[k] + _outer(b.mean[k] - mean[k])
            covariance[k] = (a.weight[k] * about_a + b.weight[k] * about_b) / weight[k]
    return Moments(weight=weight, mean=mean, covariance=covariance)


def oracle_derived(moments: Moments) -> dict[str, Tensor]:
    """Returns pi, mu, Sigma, B, trace_B, opnorm_B and participation_ratio of moments by their definitions, in float64.

    Args:
        moments: Of K components, without leading batch dimensions.
    """
    m = _double(moments)
    K = m.weight.shape[0]
    total_weight = m.weight.sum()
    pi = m.weight / total_weight if total_weight > 0 else torch.zeros_like(m.weight)
    center = torch.zeros_like(m.mean[0])
    for k in range(K):
        center = center + pi[k] * m.mean[k]
    B = total = torch.zeros_like(m.covariance[0])
    for k in range(K):
        B = B + pi[k] * _outer(m.mean[k] - center)
        total = total + pi[k] * m.covariance[k]
    total = total + B
    square = total.square().sum()
    return {
        "pi": pi,
        "mu": m.mean,
        "Sigma": m.covariance,
        "B": B,
        "trace_B": B.trace(),
        "opnorm_B": torch.linalg.eigvalsh(B)[-1].clamp(min=0),
        "participation_ratio": total.trace().square() / square if square > 0 else torch.zeros_like(square),
    }


def oracle_nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """Returns the index of each row's nearest centroid, (N,) int64: the lowest where several are, -1 for unusable rows.

    Args:
        x: (N, D) embeddings.
        centroids: (K, D).
    """
    nearest = [-1] * x.shape[0]
    for n in _usable(x):
        distances = [float((x[n].double() - centroid).square().sum()) for centroid in centroids.double()]
        nearest[n] = distances.index(min(distances))
    return torch.tensor(nearest, device=x.device, dtype=torch.int64)


def oracle_lloyd(x: Tensor, centroids: Tensor, *, iterations: int) -> tuple[Tensor, Tensor]:
    """Returns R and the centroids after some Lloyd iterations: what `mixture_core.lloyd` should, in float64.

    Args:
        x: (N, D) embeddings.
        centroids: (K, D) to start from.
        iterations: At least 1; each assigns, then recomputes.
    """
    centroids = centroids.double()
    for _ in range(iterations):
        R = _one_hot(oracle_nearest(x, centroids), centroids.shape[0])
        moments = oracle_batch_moments(x, R)
        rows = [moments.mean[k] if moments.weight[k] > 0 else centroid for k, centroid in enumerate(centroids)]
        centroids = torch.stack(rows)
    return R, centroids


def oracle_step(state: MixtureState, x: Tensor, labels: Tensor | None = None) -> tuple[MixtureState, StepStats]:
    """Returns the state after one batch and what there is to read: what `mixture_core.step` should, in float64.

    Args:
        state: Before the batch.
        x: (N, D) embeddings.
        labels: (N,) int64 where responsibilities come from labels.
    """
    config, old = state.config, _double(state.moments)
    if config.uses_labels:
        if labels is None:
            raise ValueError("`labels` must be given where responsibilities come from labels, got None.")
        R = _one_hot(labels.where(oracle_nearest(x, old.mean) >= 0, -1), config.K)  # unusable rows are nobody's
    else:
        R, _ = oracle_lloyd(x, old.mean, iterations=config.max_assign_iters)
    batch = oracle_batch_moments(x, R)
    if batch.weight.sum() == 0:
        new = old
    elif config.mode == "ema":
        decayed = Moments(weight=config.ema_decay * old.weight, mean=old.mean, covariance=old.covariance)
        new = oracle_merge(decayed, batch)
    else:
        centroids = torch.zeros_like(old.mean) if config.uses_labels else old.mean
        empty = Moments(weight=old.weight * 0, mean=centroids, covariance=old.covariance * 0)
        new = oracle_merge(empty, batch)
    n_ignored = (R.sum(dim=1) == 0).sum()
    stats = StepStats(moments=new, R=R, n_ignored=n_ignored)
    return MixtureState(config=config, moments=new), stats


def _size(draw: st.DrawFn, size: Size) -> int:
    return size if isinstance(size, int) else draw(st.integers(*size))


def _some_of(N: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, N - 1), unique=True) if N else st.just([])


def _normal(generator: torch.Generator, rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=generator, device="cpu", dtype=torch.float64)


def _uniform(generator: torch.Generator, rows: int, columns: int) -> Tensor:
    return torch.rand(rows, columns, generator=generator, device="cpu", dtype=torch.float64)


def _usable(x: Tensor) -> list[int]:
    """Indices of rows whose entries are finite and not too large to sum the squares of many."""
    largest = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).max
    return [n for n, row in enumerate(x.double()) if all(abs(value) <= largest**0.5 / 2**20 for value in row.tolist())]


def _one_hot(index: Tensor, K: int) -> Tensor:
    """R, (N, K): 1 where the row's index is k, a row of zeros where it lies outside [0, K)."""
    R = torch.zeros(index.shape[0], K, device=index.device, dtype=torch.float64)
    for n, k in enumerate(index.tolist()):
        if 0 <= k < K:
            R[n, k] = 1.0
    return R


def _outer(v: Tensor) -> Tensor:
    return torch.outer(v, v)


def _double(moments: Moments) -> Moments:
    return Moments(
        weight=moments.weight.double(),
        mean=moments.mean.double(),
        covariance=moments.covariance.double(),
    )
