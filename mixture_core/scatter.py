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


def component_scatter(x: Tensor, R: Tensor, mean: Tensor) -> Tensor:
    """Returns sum_n R_nk (x_n - mean_k)(x_n - mean_k)^T, (K, D, D), symmetric to the bit.

    Args:
        x: (N, D) finite embeddings.
        R: (N, K) responsibilities.
        mean: (K, D).
    """
    # One component at a time: an (N, K, D) tensor of differences would outgrow the embeddings K times.
    scatters = []
    for weight, center in zip(R.unbind(dim=1), mean.unbind(dim=0), strict=True):
        difference = x - center
        scatters.append((weight[:, None] * difference).mT @ difference)
    scatter = torch.stack(scatters)
    return (scatter + scatter.mT) / 2
