"""The sufficient statistics of a Gaussian mixture, and the two operations that combine them."""

import attrs
import torch
from torch import Tensor

from mixture_core import kernels
from mixture_core.inputs import is_plain, looks
from mixture_core.kernels.summary import MAX_K, summary
from mixture_core.pytrees import pytree

# Four times four squarings give the 65,536th power, in which a smaller eigenvalue counts only if float32 cannot tell it
# from the largest.
ROUNDS, SQUARINGS = 4, 4
SMALLEST_TRACE = 1e-35  # of a power of a matrix that is not 0


@pytree
@attrs.frozen(eq=False, kw_only=True)
class Moments:
    """Weight, mean and covariance of every component: the sufficient statistics, from which all else is derived.

    Derived properties accept leading batch dimensions, as `torch.func.vmap` adds. If the total weight is 0, pi, B and
    the scalars are 0. Covariances are divided by the weight, not by the weight minus 1.

    Attributes:
        weight: (K,) how many samples each component has seen, decayed or fractional.
        mean: (K, D) component means, in the units of the embeddings.
        covariance: (K, D, D) component covariances, in the square of these units.

    Example:
        >>> import torch, mixture_core
        >>> moments = mixture_core.Moments(
        ...     weight=torch.tensor([1.0, 3.0]), mean=torch.tensor([[0.0], [4.0]]), covariance=torch.ones(2, 1, 1)
        ... )
        >>> moments.pi.tolist(), float(moments.trace_B)
        ([0.25, 0.75], 3.0)
    """

    weight: Tensor
    mean: Tensor
    covariance: Tensor

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
        factor = _between_factor(self.pi, self.mean)
        return factor.mT @ factor

    @property
    def trace_B(self) -> Tensor:
        """Variance between components, (): the trace of B."""
        return _between_factor(self.pi, self.mean).square().sum(dim=(-2, -1))

    @property
    def opnorm_B(self) -> Tensor:
        """Variance between components along the direction that has most of it, (): the operator norm of B."""
        return _squared_norm(_between_factor(self.pi, self.mean))

    @property
    def participation_ratio(self) -> Tensor:
        """Number of directions in use, () in [1, D]: (tr T)^2 / |T|_F^2 of the total T = sum_k pi_k Sigma_k + B.

        Gao et al., "A theory of multineuronal dimensionality, dynamics and measurement" (2017), section 2.
        """
        within = (self.pi[..., None, None] * self.covariance).sum(dim=-3)
        total = within + self.B
        unit = safe_divide(total, _trace(total)[..., None, None])  # squares of the total itself could overflow
        return safe_divide(_trace(unit).square(), unit.square().sum(dim=(-2, -1)))


def merge(a: Moments, b: Moments) -> Moments:
    """Returns the moments of the union of two sets of samples.

    Per component, with w = w_a + w_b and d = mean_b - mean_a:

        mean = mean_a + d w_b / w
        covariance = (w_a C_a + w_b C_b) / w + d d^T w_a w_b / w^2

    Commutative and associative up to rounding, except that components of weight 0 keep the mean and
    covariance of `a`. If one side has no weight for a component, the other side's numbers are kept to the bit.

    Args:
        a: Moments of the one set; leading batch dimensions are allowed.
        b: Moments of the other, of the same K and D.

    Raises:
        ValueError: They differ in K or D.

    Example:
        >>> import torch, mixture_core
        >>> x, R = torch.tensor([[0.0], [1.0], [5.0]]), torch.ones(3, 1)
        >>> first, second = mixture_core.batch_moments(x[:2], R[:2]), mixture_core.batch_moments(x[2:], R[2:])
        >>> both = mixture_core.merge(first, second)
        >>> float(both.weight), float(both.mean), round(float(both.covariance), 2)
        (3.0, 2.0, 4.67)

    Chan, Golub and LeVeque, "Algorithms for computing the sample variance" (1983), section 2.
    """
    if a.mean.shape[-2:] != b.mean.shape[-2:]:
        expected, came = tuple(a.mean.shape[-2:]), tuple(b.mean.shape[-2:])
        raise ValueError(f"`b` must have the K and D of `a`, {expected}, got {came}.")
    return merge_exactly((a, torch.zeros_like(a.mean)), (b, torch.zeros_like(b.mean)))[0]


def merge_exactly(a: tuple[Moments, Tensor], b: tuple[Moments, Tensor]) -> tuple[Moments, Tensor]:
    """Does what `merge` does with means that come with their rounding error, (K, D)."""
    (a_, low_a), (b_, low_b) = a, b
    weight = a_.weight + b_.weight
    share = safe_divide(b_.weight, weight)[..., None]  # of b, (K, 1)
    (mean, residual), d = merge_means((a_.mean, low_a), (b_.mean, low_b), share)
    shift = (share * (1 - share))[..., None] * (d[..., :, None] * d[..., None, :])  # symmetric to the bit
    covariance = torch.lerp(a_.covariance, b_.covariance, share[..., None]) + shift
    return Moments(weight=weight, mean=mean, covariance=covariance), residual


def merge_means(
    a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], share: Tensor, *, a_is_heavier: bool = False
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Returns the merged mean, as a float and its rounding error, and d = mean_b - mean_a, all (K, D).

    A float32 mean alone would ignore steps smaller than its last digit.

    Args:
        a: Mean of the one set and its rounding error, (K, D) each.
        b: The same of the other.
        share: (K, 1) of b in the union's weight.
        a_is_heavier: Whether all of `share` is known to be below 0.5, which saves time.
    """
    d = (b[0] - a[0]) + (b[1] - a[1])
    if a_is_heavier:
        return two_sum(a[0], torch.addcmul(a[1], share, d)), d
    # Step from the heavier mean: the lighter one may be so large that its last digit is coarser than the other's.
    from_a = share < 0.5
    step = torch.where(from_a, a[1] + share * d, b[1] - (1 - share) * d)
    return two_sum(torch.where(from_a, a[0], b[0]), step), d


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a + b, rounded, and the rounding error: exact if |b| <= |a|, else to the last digit of b.

    Dekker, "A floating-point technique for extending the available precision" (1971), section 4.
    """
    total = a + b
    return total, b - (total - a)


def decay(moments: Moments, factor: float | Tensor) -> Moments:
    """Returns the moments with all weights multiplied by `factor`, and nothing else changed.

    Example:
        >>> import torch, mixture_core
        >>> x = torch.tensor([[0.0], [2.0]])
        >>> old = mixture_core.decay(mixture_core.batch_moments(x, torch.ones(2, 1)), 0.5)
        >>> float(old.weight), float(old.mean)
        (1.0, 1.0)
    """
    return Moments(weight=moments.weight * factor, mean=moments.mean, covariance=moments.covariance)


def safe_divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Returns the quotient, 0 where the denominator is not positive, with finite gradients everywhere."""
    if denominator.numel() == 1 and looks(denominator) and denominator > 0:
        return numerator / denominator
    positive = denominator > 0
    return torch.where(positive, numerator / torch.where(positive, denominator, 1.0), 0.0)


def figures(moments: Moments) -> Tensor:
    """Returns the smallest pi, the largest pi, trace_B and opnorm_B, (4,): the logged figures of a step."""
    weight, mean = moments.weight, moments.mean
    if mean.is_cuda and is_plain(weight, mean) and kernels.usable_on(mean, K=len(weight)) and len(weight) <= MAX_K:
        return summary(weight, mean)
    pi = moments.pi
    return _figures(pi, _between_factor(pi, mean))


def more_figures(moments: Moments, *, with_ratio: bool) -> Tensor:
    """Returns `figures`, tr T, |L|_F, |diag L|, tr Sigma_k for each k, and pi, (7 + 2 K,).

    L is the lower triangle of T / tr T, so that 1 / (2 |L|_F^2 - |diag L|^2) is the participation ratio. The norms
    are nan unless `with_ratio` is set, because they need all of the covariances' lower triangles. No upper one is read.
    """
    pi, covariance = moments.pi, moments.covariance
    factor, within = _between_factor(pi, moments.mean), _trace(covariance)
    four = figures(moments) if covariance.is_cuda else _figures(pi, factor)
    total = torch.dot(pi, within) + four[2]
    norms = [torch.full_like(total, torch.nan)] * 2
    if with_ratio:  # of T / tr T, since squares of T itself could overflow
        unit = total.reciprocal()
        T = torch.mv(covariance.flatten(1).mT, pi * unit).view_as(covariance[0])
        L = T.addmm_(factor.mT, factor * unit).tril_()
        norms = [torch.linalg.vector_norm(L), torch.linalg.vector_norm(L.diagonal())]
    return torch.cat([four, torch.stack([total, *norms]), within, pi])


def _figures(pi: Tensor, factor: Tensor) -> Tensor:
    return torch.stack([*pi.aminmax(), factor.square().sum(), _squared_norm(factor)])


def _between_factor(pi: Tensor, mean: Tensor) -> Tensor:
    """A = sqrt(pi) (mu - m), (K, D), so that B = A^T A; with a finite gradient even if pi is 0."""
    pi = pi[..., None]
    # Centred twice, since pi sums to 1 only up to rounding.
    once = mean - pi.mT @ mean
    deviation = once - pi.mT @ once
    if is_plain(pi):
        return pi.sqrt() * deviation
    positive = pi > 0
    return torch.where(positive, torch.where(positive, pi, 1.0).sqrt(), 0.0) * deviation


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(dim=-1)


def _squared_norm(A: Tensor) -> Tensor:
    """The largest eigenvalue of A^T A, (...,), from the smaller of the two products of A (..., K, D) with itself."""
    return _largest_eigenvalue(A @ A.mT if A.shape[-2] <= A.shape[-1] else A.mT @ A)


def _largest_eigenvalue(G: Tensor) -> Tensor:
    """Returns the largest eigenvalue of symmetric positive semi-definite matrices, without a host sync.

    P, the normalised 2^16th power of G, weighs G's eigenvalues so that only the largest count: tr(G P) / tr(P).

    Args:
        G: (..., M, M).
    """
    if looks(G):
        try:
            spectrum: Tensor = torch.linalg.eigvalsh(G)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # of NaN, which a damaged state can bring
            return G.new_full(G.shape[:-2], float("nan"))
        return spectrum[..., -1]
    # With a trace of about sqrt(M) the largest eigenvalue is between M^-0.5 and M^0.5: its 16th power is a float32.
    root = 2.0 ** (G.shape[-1].bit_length() // 2)  # a power of 2, which rounds nothing
    scale = _trace(G)
    unit = safe_divide(G, scale[..., None, None]) * root
    P = unit
    for _ in range(ROUNDS):
        for _ in range(SQUARINGS):
            P = P @ P
        P = P / (_trace(P)[..., None, None] * (1 / root)).clamp(min=SMALLEST_TRACE)
    return (unit * P).sum(dim=(-2, -1)) * scale * root**-2
