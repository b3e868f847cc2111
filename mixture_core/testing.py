"""For your own tests: hypothesis strategies, and the estimator once more in float64 and plain loops, as an oracle.

The oracle takes what the functions of `mixture_core` take, embeddings as tensors only, and returns the same records in
float64. It is slow, and written to be read: loops over samples and components, and textbook definitions.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map  # torch has no public pytree module

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
    """A sample of a mixture whose components are easy to tell apart."""

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
    """Draws embeddings, (N, D): Gaussian with mean `offset` and standard deviation `scale`; some rows may coincide.

    With `with_bad_rows` some rows may hold a NaN, an infinity or a number too large to square.
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
    """Draws a sample of K components of random weights, each with at least one row if N >= K.

    Every row lies within `scale` of its component's center; centers lie `separation * scale` apart or more. `offset` is
    added to every entry.
    """
    N, D, K, generator = _size(draw, N), _size(draw, D), _size(draw, K), draw(_GENERATORS)
    # Corner k of a grid has the digits of k for coordinates. Moved by less than half a cell, they stay as far apart.
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
    """Draws labels, (N,) int64 in [0, K); and, with `with_ignored`, also -1 and -100, which `step` ignores."""
    values, N = [*range(K), *((-1, -100) if with_ignored else ())], _size(draw, N)
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
    """Draws a state after some steps: means with mean `offset` and standard deviation `scale` per entry.

    Without a `config` it draws one with K components. With `with_empty` some components may have weight 0.
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
    """Returns what `mixture_core.batch_moments` should, in float64."""
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
            covariance[k] += R[n, k] / weight[k] * _square(x[n] - mean[k])
    return Moments(weight=x.new_tensor(weight), mean=mean, covariance=covariance)


def oracle_merge(a: Moments, b: Moments) -> Moments:
    """Returns what `mixture_core.merge` should, in float64.

    Per component the covariance of a union is the weighted mean of the parts' covariances, each about the mean of the
    union: C_a + (mean_a - mean)(mean_a - mean)^T.
    """
    a, b = tree_map(torch.Tensor.double, (a, b))
    weight, mean, covariance = a.weight + b.weight, a.mean.clone(), a.covariance.clone()
    for k in range(weight.shape[0]):
        if weight[k] > 0:
            mean[k] = (a.weight[k] * a.mean[k] + b.weight[k] * b.mean[k]) / weight[k]
            about_a = a.covariance[k] + _square(a.mean[k] - mean[k])
            about_b = b.covariance[k] + _square(b.mean[k] - mean[k])
            covariance[k] = (a.weight[k] * about_a + b.weight[k] * about_b) / weight[k]
    return Moments(weight=weight, mean=mean, covariance=covariance)


def oracle_derived(moments: Moments) -> dict[str, Tensor]:
    """Returns pi, mu, Sigma, B, trace_B, opnorm_B and participation_ratio by their definitions, in float64.

    Args:
        moments: Without leading batch dimensions.
    """
    m: Moments = tree_map(torch.Tensor.double, moments)
    total_weight = m.weight.sum()
    pi = m.weight / total_weight if total_weight > 0 else torch.zeros_like(m.weight)
    center = (pi[:, None] * m.mean).sum(dim=0)
    B = torch.zeros_like(m.covariance[0])
    for k in range(len(pi)):
        B = B + pi[k] * _square(m.mean[k] - center)
    total = B + (pi[:, None, None] * m.covariance).sum(dim=0)
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
    """Returns the index of each row's nearest centroid, (N,) int64: the lowest of several, -1 for unusable rows."""
    nearest = [-1] * x.shape[0]
    for n in _usable(x):
        distances = [float((x[n].double() - centroid).square().sum()) for centroid in centroids.double()]
        nearest[n] = distances.index(min(distances))
    return torch.tensor(nearest, device=x.device, dtype=torch.int64)


def oracle_lloyd(x: Tensor, centroids: Tensor, *, iterations: int) -> tuple[Tensor, Tensor]:
    """Returns what `mixture_core.lloyd` should, R and the centroids, in float64."""
    centroids = centroids.double()
    for _ in range(iterations):
        R = _one_hot(oracle_nearest(x, centroids), centroids.shape[0])
        moments = oracle_batch_moments(x, R)
        centroids = torch.where(moments.weight[:, None] > 0, moments.mean, centroids)
    return R, centroids


def oracle_step(state: MixtureState, x: Tensor, labels: Tensor | None = None) -> tuple[MixtureState, StepStats]:
    """Returns what `mixture_core.step` should, in float64."""
    config, old = state.config, tree_map(torch.Tensor.double, state.moments)
    if config.uses_labels:
        if labels is None:
            raise ValueError("`labels` are missing, but this config takes responsibilities from labels.")
        R = _one_hot(labels.where(oracle_nearest(x, old.mean) >= 0, -1), config.K)  # unusable rows are ignored
    else:
        R, _ = oracle_lloyd(x, old.mean, iterations=config.max_assign_iters)
    new, batch = old, oracle_batch_moments(x, R)
    if batch.weight.sum() > 0:
        factor = config.ema_decay if config.mode == "ema" else 0.0
        mean = torch.zeros_like(old.mean) if config.mode != "ema" and config.uses_labels else old.mean
        covariance = old.covariance if config.mode == "ema" else torch.zeros_like(old.covariance)
        new = oracle_merge(Moments(weight=factor * old.weight, mean=mean, covariance=covariance), batch)
    n_ignored = (R.sum(dim=1) == 0).sum()
    return MixtureState(config=config, moments=new), StepStats(moments=new, R=R, n_ignored=n_ignored)


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
    """R, (N, K): 1 if the row's index is k, a row of zeros if it lies outside [0, K)."""
    return (index[:, None] == torch.arange(K, device=index.device)).double()


def _square(v: Tensor) -> Tensor:
    return torch.outer(v, v)
