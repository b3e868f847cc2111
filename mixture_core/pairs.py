"""What pairs of views show: the covariance within samples, and the standard errors of the mixture's figures."""

import math

import attrs
import torch
from torch import Tensor

from mixture_core.inputs import as_embeddings, looks
from mixture_core.moments import Moments, _trace, safe_divide
from mixture_core.pytrees import pytree
from mixture_core.readings import EPSILON, _as, _exp_entropy, _safe_sqrt, _shares, total

RIDGE = 1e-4  # LiDAR's delta, added to each variance within samples
ROUNDING = 1e-12  # of the largest eigenvalue, that Cholesky's decomposition needs beside it
LARGEST = 1e38  # of `squares`, fourth powers of the embeddings: a far row must not leave infinities in the window


@pytree
@attrs.frozen(eq=False, kw_only=True)
class Pairs:
    """Statistics of pairs of views, averaged over the same window as the mixture.

    Attributes:
        weight: () number of pairs, decayed like the weights of samples.
        V: (D, D) covariance within samples: the mean of (z1 - z2)(z1 - z2)^T / 2.
        squares: (K + 2,) sums of the squared influence of each pair on pi_1, ..., pi_K, trace_B and share_B, decayed
            twice as fast.

    Example:
        >>> import torch, mixture_core
        >>> from mixture_core import pairs
        >>> x = torch.tensor([[0.0], [4.0], [1.0], [5.0]])  # rows 0 and 2 are views of one sample, as are 1 and 3
        >>> state, stats = mixture_core.step(mixture_core.init(mixture_core.MixtureConfig(K=2), x), x)
        >>> seen = pairs.observe(pairs.none(K=2, D=1), x, stats.R, stats.moments, decay=0.95)
        >>> float(seen.V), float(pairs.alignment(seen))
        (0.5, 1.0)
    """

    weight: Tensor
    V: Tensor
    squares: Tensor

    @property
    def standard_errors(self) -> Tensor:
        """Standard errors of pi_1, ..., pi_K, trace_B and share_B, (K + 2,); nan before the first pair.

        They assume that samples are independent and that borders between components are fixed. If clusters overlap,
        they are lower bounds, because other samples would move the borders. If all steps have equally many pairs, they
        are sqrt(v (1 - decay) / (1 + decay)), with v the variance of one step's mean.
        """
        return _safe_sqrt(self.squares) / self.weight[..., None]


def none(*, K: int, D: int) -> Pairs:
    """Returns the statistics before the first pair."""
    weight = torch.zeros((), dtype=torch.float32, device="cpu")  # whatever torch's defaults are
    return Pairs(weight=weight, V=weight.new_zeros(D, D), squares=weight.new_zeros(K + 2))


def observe(pairs: Pairs, x: Tensor, R: Tensor, moments: Moments, *, decay: float | Tensor) -> Pairs:
    """Returns the statistics after one more batch of pairs.

    With m the mean of all, a row's influence is R_k - pi_k on pi_k, psi = |x - m|^2 - sum_k R_k |x - mu_k|^2 - tr B on
    trace_B, and (psi - s (|x - m|^2 - tr T)) / tr T on s = share_B. The two rows of a pair are
    dependent, so the influence of a pair is the mean of theirs.

    Args:
        pairs: From `none`, or from the batch before.
        x: (2n, D) embeddings: rows i and i + n are views of one sample.
        R: (2n, K) their responsibilities; a pair with a row of zeros does not count.
        moments: The mixture after the batch.
        decay: Factor by which earlier weights are multiplied: `ema_decay`, or 1 for a further part of a step.

    Raises:
        ValueError: The number of rows is odd, or shapes do not fit.

    Hampel, "The influence curve and its role in robust estimation" (1974), for the variances.
    """
    K, D = moments.mean.shape
    if pairs.squares.shape != (K + 2,) or pairs.V.shape != (D, D):
        came = len(pairs.squares) - 2, len(pairs.V)
        raise ValueError(f"`pairs` must have the K and D of `moments`, {(K, D)}, got {came}.")
    return accumulate(pairs, from_sums(pair_sums(x, R, moments), K=K), decay=decay)


def pair_sums(x: Tensor, R: Tensor, moments: Moments) -> Tensor:
    """Returns sums over the pairs of a batch, (1 + 2 (K + 2) + D^2,); the sums of several ranks add up.

    They are the number of pairs, their influences, the squares of the influences, and (z1 - z2)(z1 - z2)^T. Only the
    diagonals of the covariances are read. Arguments and errors are those of `observe`.
    """
    K, D = moments.mean.shape
    x = as_embeddings(x, D=D, name="x")
    if x.shape[0] % 2 or R.shape[0] != x.shape[0]:
        raise ValueError(f"`x` and `R` must have the same, even number of rows, got {x.shape[0]} and {R.shape[0]}.")
    if R.shape[1:] != (K,):
        raise ValueError(f"`R` must have shape ({x.shape[0]}, {K}), as `moments` has K={K}, got {tuple(R.shape)}.")
    is_usable = R.sum(dim=1) > 0
    are_all = looks(is_usable) and bool(is_usable.all())
    if not are_all:
        x = torch.where(is_usable[:, None], x, 0.0)  # NaN would reach the gradients
    first, second = x.tensor_split(2)
    usable = torch.stack(is_usable.tensor_split(2)).all(dim=0)
    difference = first - second
    of_first, of_second = _influence(x, R, moments).tensor_split(2)
    influence = (of_first + of_second) / 2
    if not are_all:
        difference = torch.where(usable[:, None], difference, 0.0)
        influence = torch.where(usable[:, None], influence, 0.0)
    sums = [usable.sum()[None].to(x.dtype), influence.sum(dim=0), influence.square().sum(dim=0)]
    return torch.cat([*sums, (difference.mT @ difference).flatten()])


def from_sums(sums: Tensor, *, K: int) -> Pairs:
    """Returns the statistics of a batch, given its `pair_sums`."""
    n, influence, squares, outer = sums.split_with_sizes([1, K + 2, K + 2, len(sums) - 2 * K - 5])
    centred = (squares - influence * safe_divide(influence, n)).clamp(min=0.0)
    squares = torch.where(n > 1, centred * safe_divide(n, n - 1), squares)  # one pair has no variance of its own
    D = math.isqrt(len(outer))
    return Pairs(weight=n[0], V=safe_divide(outer, 2 * n).view(D, D), squares=squares)


def accumulate(pairs: Pairs, batch: Pairs, *, decay: float | Tensor) -> Pairs:
    """Returns the statistics of the earlier pairs, decayed, together with those of a batch."""
    weight = pairs.weight * decay + batch.weight
    V = torch.lerp(pairs.V, batch.V, safe_divide(batch.weight, weight))
    squares = (pairs.squares * decay**2 + batch.squares).nan_to_num(LARGEST).clamp(max=LARGEST)
    return Pairs(weight=weight, V=V, squares=squares)


def repeated(batch: Pairs, *, steps: int, decay: float) -> Pairs:
    """Returns the statistics as if the pairs of a batch had come in each of the last `steps` steps."""
    weight, squares = ((1 - factor**steps) / (1 - factor) for factor in (decay, decay**2))
    return Pairs(weight=batch.weight * weight, V=batch.V, squares=batch.squares * squares)


def alignment(pairs: Pairs) -> Tensor:
    """Returns the mean squared distance between views of a sample, (): 2 tr V.

    Wang and Isola, "Understanding contrastive representation learning through alignment and uniformity on the
    hypersphere" (2020), section 4.1, with alpha = 2.
    """
    return 2 * _trace(pairs.V)


def lidar(moments: Moments, pairs: Pairs) -> Tensor:
    """Returns LiDAR with two views of each sample, () in [1, D]: exp(H(p)).

    p holds the eigenvalues of Sigma_w^-1/2 Sigma_b Sigma_w^-1/2 over their sum, with Sigma_w = V + 1e-4 I and
    Sigma_b = (T - V / 2) n / (n - 1), for n samples.

    Args:
        moments: Of the same rows as `pairs`.
        pairs: Statistics of the views.

    Thilak et al., "LiDAR: Sensing linear probing performance in joint embedding SSL architectures" (2024), section 3.
    """
    V, T, n = pairs.V.double(), total(moments).double(), pairs.weight.double()[..., None, None]
    between = (T - V / 2) * safe_divide(n, n - 1)
    # Of fewer pairs than dimensions, rounding leaves V with eigenvalues on both sides of 0: all are raised to one side
    # of it, alike. No eigenvectors, whose gradients are infinite if eigenvalues are equal.
    size = torch.linalg.eigvalsh(V.detach())
    least = RIDGE + (-2 * size[..., :1]).clamp(min=0.0) + ROUNDING * size[..., -1:].clamp(min=0.0)
    factor = torch.linalg.cholesky(V + torch.diag_embed(least.expand_as(size)))
    half = torch.linalg.solve_triangular(factor, between, upper=False)
    whitened = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    eigenvalues = torch.linalg.eigvalsh((whitened + whitened.mT) / 2).clamp(min=0.0)
    return _as(moments, _exp_entropy(_shares(eigenvalues) + EPSILON))


def _influence(x: Tensor, R: Tensor, moments: Moments) -> Tensor:
    """Each row's influence on pi, trace_B and share_B, (2n, K + 2)."""
    pi = moments.pi
    mean = pi @ moments.mean
    y, offsets = x - mean, moments.mean - mean
    lengths = offsets.square().sum(dim=1)
    trace_B = pi @ lengths
    trace_T = pi @ _trace(moments.covariance) + trace_B
    scores = torch.addmm(lengths, y, offsets.mT, beta=-1, alpha=2)  # |y|^2 - |y - offset_k|^2
    psi, away = (R * scores).sum(dim=1) - trace_B, torch.linalg.vector_norm(y, dim=1).square()
    share = safe_divide(psi - safe_divide(trace_B, trace_T) * (away - trace_T), trace_T)
    return torch.cat([R - pi, psi[:, None], share[:, None]], dim=1)
