"""The sufficient statistics of a Gaussian mixture, and the two operations that every estimate is made of."""

import attrs
import torch
from torch import Tensor

from mixture_core.inputs import as_embeddings, as_tensor, center_rows
from mixture_core.pytrees import pytree
from mixture_core.scatter import component_means, component_scatter, safe_divide

SQUARINGS = 16  # the spectrum's 65,536th power: what is left of a tie is below float32's resolution


@pytree
@attrs.frozen(eq=False, kw_only=True)
class Moments:
    """Weight, mean and covariance of every component; all else is derived from them when it is read.

    Derived properties accept leading batch dimensions, so that they can be read from what vmap returns. Where the
    total weight is 0, pi, B and the scalars are 0.
    """

    weight: Tensor  # (K,) how many samples, decayed or fractional, each component has seen
    mean: Tensor  # (K, D) component means, units of the embeddings
    covariance: Tensor  # (K, D, D) component covariances, divided by weight

    @property
    def pi(self) -> Tensor:
        """Mixing weights, (K,): weight_k / sum_j weight_j."""
        return safe_divide(self.weight, self.weight.sum(dim=-1, keepdim=True))

    @property
    def mu(self) -> Tensor:
        """Component means, (K, D)."""
        return self.mean

    @property
    def Sigma(self) -> Tensor:
        """Component covariances, (K, D, D)."""
        return self.covariance

    @property
    def B(self) -> Tensor:
        """Between-component covariance, (D, D): sum_k pi_k (mu_k - m)(mu_k - m)^T with m = sum_k pi_k mu_k."""
        factor = self._between_factor()
        return factor.mT @ factor

    @property
    def trace_B(self) -> Tensor:
        """Variance between components, (): the trace of B."""
        return (self.pi * self._deviation().square().sum(dim=-1)).sum(dim=-1)

    @property
    def opnorm_B(self) -> Tensor:
        """Variance between components along the direction that has most of it, (): the operator norm of B."""
        factor = self._between_factor()
        K, D = factor.shape[-2:]
        return _largest_eigenvalue(factor @ factor.mT if K <= D else factor.mT @ factor)

    @property
    def participation_ratio(self) -> Tensor:
        """Number of directions in use, () in [1, D]: (tr T)^2 / |T|_F^2 of the total T = sum_k pi_k Sigma_k + B.

        Gao et al., "A theory of multineuronal dimensionality, dynamics and measurement" (2017), section 2.
        """
        within = (self.pi[..., None, None] * self.covariance).sum(dim=-3)
        total = within + self.B
        unit = safe_divide(total, _trace(total)[..., None, None])  # squares of the total itself could overflow
        return safe_divide(_trace(unit).square(), unit.square().sum(dim=(-2, -1)))

    def _deviation(self) -> Tensor:
        """Means about their weighted mean, (K, D); centred twice, since pi sums to 1 only up to rounding."""
        pi = self.pi[..., None]
        once = self.mean - (pi * self.mean).sum(dim=-2, keepdim=True)
        return once - (pi * once).sum(dim=-2, keepdim=True)

    def _between_factor(self) -> Tensor:
        """A = sqrt(pi) (mu - m), (K, D), so that B = A^T A; with a finite gradient where pi is 0."""
        pi = self.pi[..., None]
        root = torch.where(pi > 0, torch.where(pi > 0, pi, 1.0).sqrt(), 0.0)
        return root * self._deviation()


def merge(a: Moments, b: Moments) -> Moments:
    """Returns the moments of the union of two sets of samples.

    Per component, with w = w_a + w_b and d = mean_b - mean_a:

        mean = mean_a + d w_b / w
        covariance = (w_a C_a + w_b C_b) / w + d d^T w_a w_b / w^2

    Commutative and associative up to rounding, and up to the mean and covariance of components of weight 0, where
    those of `a` are kept. A component to which one side adds no weight keeps the other's numbers to the bit.

    Args:
        a: Moments of the one set; leading batch dimensions are allowed.
        b: Moments of the other, of the same K and D.

    Raises:
        ValueError: They differ in K or D.

    Chan, Golub and LeVeque, "Algorithms for computing the sample variance" (1983), section 2.
    """
    if a.mean.shape[-2:] != b.mean.shape[-2:]:
        expected, came = tuple(a.mean.shape[-2:]), tuple(b.mean.shape[-2:])
        raise ValueError(f"`b` must have the K and D of `a`, {expected}, got {came}.")
    weight = a.weight + b.weight
    share = safe_divide(b.weight, weight)[..., None]  # of b, (K, 1)
    d = b.mean - a.mean
    shift = (share * (1 - share))[..., None] * (d[..., :, None] * d[..., None, :])  # symmetric to the bit
    return Moments(
        weight=weight,
        mean=torch.lerp(a.mean, b.mean, share),
        covariance=torch.lerp(a.covariance, b.covariance, share[..., None]) + shift,
    )


def decay(moments: Moments, factor: float | Tensor) -> Moments:
    """Returns the moments with all weights scaled by `factor`, and nothing else changed."""
    return Moments(weight=moments.weight * factor, mean=moments.mean, covariance=moments.covariance)


def batch_moments(x: Tensor, R: Tensor) -> Moments:
    """Returns the moments of one batch under given responsibilities.

    With w_k = sum_n R_nk: mean_k = sum_n R_nk x_n / w_k and covariance_k = sum_n R_nk (x_n - mean_k)(x_n - mean_k)^T
    / w_k, by the corrected two-pass algorithm (Chan, Golub and LeVeque 1983, equation 1.7). A component without weight
    has mean and covariance 0. Rows that are not finite count for nothing.

    Args:
        x: (N, D) embeddings, tensor or NumPy array.
        R: (N, K) responsibilities, any non-negative numbers.

    Raises:
        TypeError: An argument is neither tensor nor array, or complex.
        ValueError: A shape is wrong.
    """
    x = as_embeddings(x, name="x")
    R = as_tensor(R, name="R")
    if R.is_complex():
        raise TypeError(f"`R` must be real numbers, got {R.dtype}.")
    if R.ndim != 2 or R.shape[0] != x.shape[0] or R.shape[1] < 1:
        raise ValueError(f"`R` must have shape ({x.shape[0]}, K), one row per embedding, got {tuple(R.shape)}.")
    usable, center, centered = center_rows(x)
    R = torch.where(usable, R.to(x.dtype), 0.0)
    weight = R.sum(dim=0)
    mean = torch.where(weight[:, None] > 0, center + component_means(centered, R), 0.0)
    # About the means themselves: differences from them are exact, and what rounding took from them is in `sums`.
    sums, scatter = component_scatter(torch.where(usable, x, 0.0), R, mean)
    lost = safe_divide(sums, weight[:, None])
    return Moments(
        weight=weight,
        mean=mean + lost,
        covariance=safe_divide(scatter, weight[:, None, None]) - lost[:, :, None] * lost[:, None, :],
    )


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(dim=-1)


def _largest_eigenvalue(G: Tensor) -> Tensor:
    """Returns the largest eigenvalue of symmetric positive semi-definite matrices, without a host sync.

    P, the normalised 2^16th power of G, weighs G's eigenvalues so that only the largest count: tr(G P) / tr(P).

    Args:
        G: (..., M, M).
    """
    scale = _trace(G)[..., None, None]
    unit = safe_divide(G, scale)
    P = unit
    for _ in range(SQUARINGS):
        P = P @ P
        P = safe_divide(P, _trace(P)[..., None, None])
    return (unit * P).sum(dim=(-2, -1)) * scale[..., 0, 0]
