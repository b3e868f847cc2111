"""What the tests of the core share."""

from typing import TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map

from mixture_core import Moments
from mixture_core.testing import Mixture, mixtures

Record = TypeVar("Record")

DERIVED = ("pi", "mu", "Sigma", "B", "trace_B", "opnorm_B", "participation_ratio")


def gaussians(seed: int, *, N: int = 512, D: int = 16, K: int = 8, apart: float = 14.0) -> Mixture:
    """K equally heavy Gaussians of standard deviation 1, their means in random directions at that distance from 0."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(K, D, generator=generator)
    means = means / means.norm(dim=1, keepdim=True) * apart
    labels = torch.randint(K, (N,), generator=generator)
    return Mixture(means[labels] + torch.randn(N, D, generator=generator), labels, means)


@st.composite
def soft(draw: st.DrawFn, *, N: int, K: int) -> Tensor:
    """Responsibilities that are no probabilities: (N, K) non-negative, with zeros among them."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    R = torch.rand(N, K, generator=generator)
    return torch.where(draw(st.sampled_from((0.0, 0.3))) > R, 0.0, 3 * R)


@st.composite
def unit_norm_mixtures(draw: st.DrawFn, *, scale: float = 1e-3) -> Mixture:
    """Rows of norm 1 around one point, in well separated components of that radius: embeddings at a collapse."""
    x, labels, means = draw(mixtures(D=(3, 8), K=(2, 6), scale=scale, separation=3.0, dtype=torch.float64))
    point = torch.nn.functional.normalize(torch.arange(1.0, x.shape[1] + 1, dtype=torch.float64), dim=0)
    x, means = (torch.nn.functional.normalize(point + values, dim=1).float() for values in (x, means))
    return Mixture(x, labels, means)


def stack(*records: Record) -> Record:
    """Records with one more leading dimension in every tensor, for vmap."""
    stacked: Record = tree_map(lambda *leaves: torch.stack(leaves), *records)
    return stacked


def assert_moments_close(actual: Moments, expected: Moments, tolerance: float, *, scale: float = 1.0) -> None:
    """Compares the three tensors of moments of data of that scale: coinciding points have covariances near 0, not 0."""
    units = {"weight": 0.0, "mean": scale, "covariance": scale**2}
    for name, unit in units.items():
        found, wanted = getattr(actual, name).double(), getattr(expected, name).double()
        assert found.shape == wanted.shape, name
        difference = (found - wanted).abs().max() if wanted.numel() else 0.0
        assert difference <= tolerance * max(unit, float(wanted.abs().max())), (name, float(difference))


def assert_same_bits(actual: Moments, expected: Moments) -> None:
    """Compares the three tensors of moments exactly."""
    for name in ("weight", "mean", "covariance"):
        torch.testing.assert_close(
            getattr(actual, name), getattr(expected, name), rtol=0, atol=0, equal_nan=True, msg=name
        )
