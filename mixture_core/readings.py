"""Readings: the usual figures of representation learning, computed from a mixture's moments instead of from rows.

All are pure functions that work under `vmap` and `grad`. They compute in float64 and return the dtype of the moments.
The moments say all that a reading needs of the rows, so it equals its paper's definition on the weighted rows. But
float32 moments cannot tell an eigenvalue of 0 from one of 1e-7 times the largest, whose square root is 3e-4: on rows of
exact rank 4 in 64 dimensions, `rankme` reads 4.17.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map  # torch has no public pytree module

from mixture_core.inputs import as_embeddings
from mixture_core.moments import Moments, _trace, safe_divide

EPSILON = 1e-7  # RankMe and LiDAR add it to each share
NOISE = 1e-6  # singular values below this share of the largest are rounding errors of float32


class NC2(NamedTuple):
    """How far the component means are from a simplex: both are 0 at full neural collapse."""

    equinorm: Tensor  # () standard deviation of |mu_k - m| over its mean
    equiangle: Tensor  # () mean of |cos(mu_j - m, mu_k - m) + 1 / (K - 1)|


def total(moments: Moments) -> Tensor:
    """Returns T, the covariance of all embeddings, (D, D): sum_k pi_k Sigma_k + B."""
    m = _exact(moments)
    return _as(moments, _within(m) + m.B)


def trace_T(moments: Moments) -> Tensor:
    """Returns the total variance, (): the trace of T, without computing T."""
    return (moments.pi * _trace(moments.covariance)).sum(dim=-1) + moments.trace_B


def share_B(moments: Moments) -> Tensor:
    """Returns the share of variance between components, () in [0, 1]: tr B / tr T."""
    return safe_divide(moments.trace_B, trace_T(moments))


def participation_ratio(moments: Moments) -> Tensor:
    """Returns the number of directions in use, () in [1, D]; see `Moments.participation_ratio`."""
    return moments.participation_ratio


def spectrum(moments: Moments) -> Tensor:
    """Returns the eigenvalues of T, (D,), the largest first.

    Example:
        >>> import torch, mixture_core
        >>> from mixture_core import readings
        >>> x = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> moments = mixture_core.batch_moments(x, torch.ones(4, 1))
        >>> readings.spectrum(moments).tolist(), round(float(readings.effective_rank(moments)), 3)
        ([2.0, 0.5], 1.649)
    """
    return _as(moments, _eigenvalues(total(_exact(moments))))


def effective_rank(moments: Moments) -> Tensor:
    """Returns exp(H(p)), () in [1, D], with p the eigenvalues of T over their sum.

    Roy and Vetterli, "The effective rank: a measure of effective dimensionality" (2007), section 2.
    """
    return _as(moments, _exp_entropy(_shares(spectrum(_exact(moments)))))


def rankme(moments: Moments) -> Tensor:
    """Returns RankMe, () in [1, D]: exp(H(p)), p the singular values of the uncentred rows over their sum.

    The singular values are the square roots of the eigenvalues of T + m m^T, up to a factor that cancels.

    Garrido et al., "RankMe: Assessing the downstream performance of pretrained self-supervised representations by their
    rank" (2023), section 3.1.
    """
    m = _exact(moments)
    mean = m.pi[..., None, :] @ m.mean
    second = total(m) + mean.mT @ mean
    return _as(moments, _exp_entropy(_shares(_safe_sqrt(_eigenvalues(second))) + EPSILON))


def alpha_req(moments: Moments, *, first: int = 11, last: int = 100) -> Tensor:
    """Returns alpha, (), if the eigenvalues of T fall like i^-alpha: the slope of their logarithms, weighted by 1 / i.

    Args:
        moments: Of the embeddings.
        first: Rank i of the first eigenvalue in the fit, from 1 on.
        last: Rank of the last one; ranks beyond D are left out.

    Raises:
        ValueError: Fewer than two ranks are left.

    Agrawal et al., "alpha-ReQ: Assessing representation quality in self-supervised learning by measuring eigenspectrum
    decay" (2022), section 3, with the fit of Stringer et al., "High-dimensional geometry of population responses in
    visual cortex" (2019).
    """
    D = moments.mean.shape[-1]
    last = min(last, D)
    if not 1 <= first < last:
        raise ValueError(f"`first` must be at least 1 and less than {last} (the smaller of D and `last`), got {first}.")
    eigenvalues = spectrum(_exact(moments))[..., first - 1 : last]
    rank = torch.arange(first, last + 1, dtype=eigenvalues.dtype, device=eigenvalues.device)
    weight, log_rank = 1 / rank / (1 / rank).sum(), rank.log()
    centred = weight * (log_rank - (weight * log_rank).sum())
    logs = eigenvalues.clamp(min=torch.finfo(torch.float32).tiny).log()
    return _as(moments, -(centred * logs).sum(dim=-1) / (centred * log_rank).sum())


def std(moments: Moments) -> Tensor:
    """Returns the standard deviation of the embeddings, averaged over dimensions, ().

    For rows of norm 1 it is SimSiam's check for collapse: 1 / sqrt(D) if they fill the sphere, 0 at collapse.

    Chen and He, "Exploring simple siamese representation learning" (2021), section 4.1.
    """
    m = _exact(moments)
    variance = m.covariance.diagonal(dim1=-2, dim2=-1) + _deviations(m).square()
    return _as(moments, _safe_sqrt((m.pi[..., None] * variance).sum(dim=-2)).mean(dim=-1))


def effective_components(moments: Moments) -> Tensor:
    """Returns the effective number of components, () in [1, K]: exp(H(pi))."""
    return _as(moments, _exp_entropy(_exact(moments).pi))


def rank_B(moments: Moments) -> Tensor:
    """Returns the rank of B, () int64, at most K - 1; singular values that may be rounding errors do not count."""
    m = _exact(moments)
    size: Tensor = torch.linalg.svdvals(m.pi.sqrt()[..., None] * _deviations(m))
    return (size > NOISE * size[..., :1]).sum(dim=-1)


def nc1(moments: Moments) -> Tensor:
    """Returns NC1, (): tr(Sigma_W Sigma_B^+) / K, the variability within components relative to that between them.

    Sigma_W is the mean of the Sigma_k over all embeddings and Sigma_B the covariance of the means, all equally heavy.
    Components without weight are left out.

    Papyan, Han and Donoho, "Prevalence of neural collapse during the terminal phase of deep learning training" (2020),
    section "Measurements".
    """
    m = _exact(moments)
    alive = (m.weight > 0).to(m.mean.dtype)
    inverse = torch.linalg.pinv(alive[..., None] * _deviations(m), rtol=NOISE)  # (D, K)
    # tr(W (M^T M / K)^+) / K with M the deviations, and (M^T M)^+ = M^+ M^+^T.
    return _as(moments, (inverse * (_within(m) @ inverse)).sum(dim=(-2, -1)))


def nc2(moments: Moments) -> NC2:
    """Returns NC2, how far the means are from equal norms and equal angles; components without weight are left out.

    Papyan, Han and Donoho (2020), section "Measurements".
    """
    m = _exact(moments)
    deviation, alive = _deviations(m), (m.weight > 0).to(m.mean.dtype)
    count, norm = alive.sum(dim=-1), _safe_sqrt(deviation.square().sum(dim=-1))
    mean = safe_divide((alive * norm).sum(dim=-1), count)
    variance = safe_divide((alive * (norm - mean[..., None]).square()).sum(dim=-1), count)
    unit = safe_divide(deviation, norm[..., None])
    off = 1 - torch.eye(norm.shape[-1], dtype=norm.dtype, device=norm.device)
    pairs = alive[..., :, None] * alive[..., None, :] * off
    angle = (unit @ unit.mT + safe_divide(torch.ones_like(count), count - 1)[..., None, None]).abs()
    equiangle = safe_divide((pairs * angle).sum(dim=(-2, -1)), pairs.sum(dim=(-2, -1)))
    return NC2(_as(moments, safe_divide(_safe_sqrt(variance), mean)), _as(moments, equiangle))


def log_likelihood(moments: Moments, x: Tensor, *, shrinkage: float = 0.1) -> Tensor:
    """Returns the log-density of each row under the mixture, (N,), in nats.

    A component with fewer rows than dimensions has no density of its own, so each Sigma_k is replaced by
    (1 - shrinkage) Sigma_k + shrinkage W, with W = sum_k pi_k Sigma_k, the pooled covariance. If the rows lie in a
    subspace, W has no density either, so 1e-6 of the Frobenius norm is added to the variance in each direction.

    Raises:
        TypeError: `x` is neither a tensor nor an array.
        ValueError: `x` does not have the shape (N, D), or `shrinkage` is not in [0, 1].

    Friedman, "Regularized discriminant analysis" (1989), equation 16.
    """
    if not 0 <= shrinkage <= 1:
        raise ValueError(f"`shrinkage` must be in [0, 1], got {shrinkage}.")
    m, D = _exact(moments), moments.mean.shape[-1]
    rows = as_embeddings(x, D=D, name="x").double()
    pooled = _within(m)[..., None, :, :]
    shrunk = torch.lerp(m.covariance, pooled, shrinkage)
    least = NOISE * torch.linalg.matrix_norm(shrunk, keepdim=True) + torch.finfo(torch.float32).tiny
    factor = torch.linalg.cholesky(shrunk + least * torch.eye(D, dtype=rows.dtype, device=rows.device))
    away = (rows[..., None, :, :] - m.mean[..., :, None, :]).mT  # (K, D, N)
    squares = torch.linalg.solve_triangular(factor, away, upper=False).square().sum(dim=-2)
    log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)
    log_density = -0.5 * (squares + log_det[..., None] + D * math.log(2 * math.pi))
    log_pi = torch.where(m.pi > 0, torch.where(m.pi > 0, m.pi, 1.0).log(), -torch.inf)
    return _as(moments, torch.logsumexp(log_pi[..., None] + log_density, dim=-2))


def match(a: Moments, b: Moments) -> Tensor:
    """Returns the component of `b` that corresponds to each component of `a`, (K,) int64.

    The sum of squared distances between matched means is the smallest possible (Kuhn, "The Hungarian method for the
    assignment problem", 1955). Needs SciPy. Does not work under `vmap` or `grad`.

    Raises:
        ImportError: SciPy is not installed.
        ValueError: `a` and `b` differ in K or D.
    """
    try:
        from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]  # SciPy has no types
    except ModuleNotFoundError:
        raise ImportError('`match` needs SciPy: pip install "mixture-diagnostics[match]".') from None
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"`b` must have the K and D of `a`, {tuple(a.mean.shape)}, got {tuple(b.mean.shape)}.")
    distance = torch.cdist(a.mean.double(), b.mean.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    return torch.as_tensor(linear_sum_assignment(distance.detach().cpu().numpy())[1], device=a.mean.device)


def _exact(moments: Moments) -> Moments:
    """The moments in float64."""
    doubled: Moments = tree_map(Tensor.double, moments)
    return doubled


def _as(moments: Moments, value: Tensor) -> Tensor:
    return value.to(moments.mean.dtype)


def _within(m: Moments) -> Tensor:
    """The mean covariance of the components, (D, D): sum_k pi_k Sigma_k."""
    return (m.pi[..., None, None] * m.covariance).sum(dim=-3)


def _deviations(m: Moments) -> Tensor:
    """mu_k - m, (K, D)."""
    return m.mean - m.pi[..., None, :] @ m.mean


def _eigenvalues(matrix: Tensor) -> Tensor:
    """Those of a symmetric positive semi-definite matrix, the largest first."""
    eigenvalues: Tensor = torch.linalg.eigvalsh(matrix)
    return eigenvalues.flip(-1).clamp(min=0.0)


def _safe_sqrt(value: Tensor) -> Tensor:
    """The square root, with a finite gradient at 0."""
    positive = value > 0
    return torch.where(positive, torch.where(positive, value, 1.0).sqrt(), 0.0)


def _shares(value: Tensor) -> Tensor:
    return safe_divide(value, value.sum(dim=-1, keepdim=True))


def _exp_entropy(p: Tensor) -> Tensor:
    """exp(-sum p log p); 0 log 0 is 0."""
    return torch.exp(-torch.where(p > 0, p * torch.where(p > 0, p, 1.0).log(), 0.0).sum(dim=-1))
