"""The formula: the moments of a batch under soft or hard responsibilities."""

from functools import reduce

import torch
from torch import Tensor

from mixture_core.absorb_cpu import CHUNK, Workspace, absorb_rows, complete_
from mixture_core.inputs import as_embeddings, as_tensor, looks, middle_row, usable_rows
from mixture_core.moments import Moments, merge, safe_divide


def batch_moments(x: Tensor, R: Tensor) -> Moments:
    """Returns the moments of one batch under given responsibilities.

    With w_k = sum_n R_nk: mean_k = sum_n R_nk x_n / w_k, and covariance_k = sum_n R_nk (x_n - mean_k)(x_n - mean_k)^T
    / w_k, by the corrected two-pass algorithm. A component without weight has mean and covariance 0. Rows of x with a
    NaN, an infinity or an entry beyond 1.8e13 are ignored.

    Args:
        x: (N, D) embeddings, tensor or NumPy array.
        R: (N, K) responsibilities, any non-negative numbers.

    Returns:
        Moments: weight (K,), the column sums of R; mean (K, D), in units of x; covariance (K, D, D), in their squares.

    Raises:
        TypeError: An argument is neither tensor nor array, or complex.
        ValueError: A shape is wrong.

    Example:
        >>> import torch, mixture_core
        >>> x = torch.tensor([[0.0], [2.0], [10.0]])
        >>> moments = mixture_core.batch_moments(x, torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]))
        >>> [round(float(w), 2) for w in moments.weight], [round(float(m), 2) for m in moments.mean]
        ([1.5, 1.5], [0.67, 7.33])

    Chan, Golub and LeVeque, "Algorithms for computing the sample variance" (1983), equation 1.7.
    """
    x = as_embeddings(x, name="x")
    R = as_tensor(R, name="R")
    if R.is_complex():
        raise TypeError(f"`R` must be real numbers, got {R.dtype}.")
    if R.ndim != 2 or R.shape[0] != x.shape[0] or R.shape[1] < 1:
        raise ValueError(f"`R` must have shape ({x.shape[0]}, K), one row per embedding, got {tuple(R.shape)}.")
    R = torch.where(usable_rows(x)[:, None], R.to(x.dtype), 0.0)
    form = _hard_moments if len(x) and looks(x, R) and _is_hard(R) else soft_moments
    parts = []
    for chunk in zip(torch.split(x, CHUNK), torch.split(R, CHUNK), strict=True):
        moments, residual = form(*chunk)
        parts.append(Moments(weight=moments.weight, mean=moments.mean + residual, covariance=moments.covariance))
    return reduce(merge, parts)


def _is_hard(R: Tensor) -> bool:
    """Whether each row belongs to one component or to none."""
    return bool(((R == 0) | (R == 1)).all() & (R.sum(dim=1) <= 1).all())


def _hard_moments(x: Tensor, R: Tensor) -> tuple[Moments, Tensor]:
    """`soft_moments` for hard R on the CPU, in N D^2 operations instead of N K D^2."""
    K, D = R.shape[1], x.shape[1]
    index = torch.where(R.sum(dim=1) > 0, R.argmax(dim=1), K)
    mean, covariance = x.new_zeros(K, D), x.new_zeros(K, D, D)
    work = Workspace.like(covariance, N=len(x))
    weight, mean, residual, lower = absorb_rows(x.new_zeros(K), mean, mean, covariance, x, index, work)
    return Moments(weight=weight, mean=mean, covariance=complete_(lower)), residual


def soft_moments(x: Tensor, R: Tensor) -> tuple[Moments, Tensor]:
    """Returns the moments of a batch, and the rounding error of its means, (K, D).

    Args:
        x: (N, D) embeddings.
        R: (N, K) responsibilities, 0 on rows that are not usable.
    """
    usable = usable_rows(x)
    x, center, weight = torch.where(usable[:, None], x, 0.0), middle_row(x, usable), R.sum(dim=0)
    mean = torch.where(weight[:, None] > 0, center + component_means(x - center, R).detach(), 0.0)
    # Differences from the rounded means are exact. Their sums hold the means' rounding error, and its derivatives.
    sums, scatter = _scatter(x, R, mean)
    lost = safe_divide(sums, weight[:, None])
    covariance = safe_divide(scatter, weight[:, None, None]) - lost[:, :, None] * lost[:, None, :]
    return Moments(weight=weight, mean=mean, covariance=covariance), lost


def component_means(x: Tensor, R: Tensor) -> Tensor:
    """Returns sum_n R_nk x_n / sum_n R_nk, (K, D); 0 if a component has no weight.

    Args:
        x: (N, D) finite embeddings, near 0 for accuracy.
        R: (N, K) responsibilities.
    """
    return safe_divide(R.mT @ x, R.sum(dim=0)[:, None])


def one_hot(index: Tensor, K: int) -> Tensor:
    """Returns membership, (N, K) bool; a row is false throughout if its index, (N,), lies outside [0, K)."""
    return index[:, None] == torch.arange(K, device=index.device)


def _scatter(x: Tensor, R: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """The sums over n of R_nk d_nk, (K, D), and of R_nk d_nk d_nk^T, (K, D, D), symmetric to the bit; d = x - mean."""
    # One component at a time: an (N, K, D) tensor of differences would take K times the memory of the embeddings.
    sums, scatters = [], []
    for weight, center in zip(R.unbind(dim=1), mean.unbind(dim=0), strict=True):
        difference = x - center
        weighted = weight[:, None] * difference
        sums.append(weighted.sum(dim=0))
        scatters.append(weighted.mT @ difference)
    scatter = torch.stack(scatters)
    return torch.stack(sums), (scatter + scatter.mT) / 2
