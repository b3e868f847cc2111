"""Sums over the samples of each component."""

import torch
from torch import Tensor


def safe_divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Returns the quotient where the denominator is positive and 0 elsewhere, with finite gradients everywhere."""
    positive = denominator > 0
    return torch.where(positive, numerator / torch.where(positive, denominator, 1.0), 0.0)


def component_means(x: Tensor, R: Tensor) -> Tensor:
    """Returns sum_n R_nk x_n / sum_n R_nk, (K, D); 0 where a component has no weight.

    Args:
        x: (N, D) finite embeddings, near 0 for accuracy.
        R: (N, K) responsibilities.
    """
    return safe_divide(R.mT @ x, R.sum(dim=0)[:, None])


def component_scatter(x: Tensor, R: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Returns sums of differences and of their products, for d_nk = x_n - mean_k.

    Args:
        x: (N, D) finite embeddings.
        R: (N, K) responsibilities.
        mean: (K, D).

    Returns:
        sum_n R_nk d_nk, (K, D); and sum_n R_nk d_nk d_nk^T, (K, D, D), symmetric to the bit.
    """
    # One component at a time: an (N, K, D) tensor of differences would outgrow the embeddings K times.
    sums, scatters = [], []
    for weight, center in zip(R.unbind(dim=1), mean.unbind(dim=0), strict=True):
        difference = x - center
        weighted = weight[:, None] * difference
        sums.append(weighted.sum(dim=0))
        scatters.append(weighted.mT @ difference)
    scatter = torch.stack(scatters)
    return torch.stack(sums), (scatter + scatter.mT) / 2
