"""A snapshot of a mixture: what is too large, or takes too long, for a row of the log."""

import math
from typing import Any

import torch
from torch import Tensor

from mixture_core import MixtureState
from mixture_core.null import excess
from mixture_core.pairs import Pairs, alignment, lidar
from mixture_core.readings import alpha_req, effective_rank, nc1, rankme, share_B

WIDE = 1024  # if D is larger, only the spectrum of T is computed: each further reading takes as long again
MOST_WORK = 2e10  # multiplications for the null, which take about a second
SHADOWS, STEPS = 2, 60
EXCESS_EVERY = 100  # steps between two computations of the excess


def snapshot(
    state: MixtureState, pairs: Pairs | None, *, N: int, before: Tensor | None, with_excess: bool
) -> dict[str, Any]:
    """Returns the entries of a snapshot by name, tensors and floats; a float that was not computed is nan.

    - weight and trace_Sigma, (K,); spectrum_T, (D,), and spectrum_B, (min(K, D),), the largest first.
    - axes, (2, D): the two leading directions of B, turned within their plane towards `before`. Projected onto them:
      plane_mean, (K, 2), relative to the mean of all, and plane_covariance, (K, 2, 2).
    - share_B, effective_rank, rankme, alpha_req, nc1 and excess.
    - With pairs of views: alignment, lidar and standard_errors, (K + 2,).

    Args:
        state: The mixture.
        pairs: Statistics of pairs of views; None if there were none.
        N: Rows per step, for the excess.
        before: Axes of the previous snapshot; None for the first.
        with_excess: Whether to compute the excess, if that is not too much work; of one component there is none.
    """
    m = state.moments
    K, D = m.mean.shape
    away = m.mean - m.pi @ m.mean
    factor = m.pi.sqrt()[:, None] * away
    _, size, directions = torch.linalg.svd(factor, full_matrices=False)
    axes = _turned(torch.cat([directions, directions.new_zeros(2, D)])[:2], before)
    T = torch.addmm((m.pi @ m.covariance.flatten(1)).view(D, D), factor.mT, factor)
    entry: dict[str, Any] = {
        "weight": m.weight, "axes": axes, "plane_mean": away @ axes.mT,
        "plane_covariance": axes @ m.covariance @ axes.mT, "spectrum_B": size.square(),
        "trace_Sigma": m.covariance.diagonal(dim1=1, dim2=2).sum(dim=1),
        "spectrum_T": torch.linalg.eigvalsh(T).flip(0).clamp(min=0.0), "share_B": float(share_B(m)),
    }  # fmt: skip
    entry |= dict.fromkeys(("effective_rank", "rankme", "alpha_req", "nc1", "excess"), math.nan)
    if D <= WIDE:
        entry |= {"effective_rank": float(effective_rank(m)), "rankme": float(rankme(m)), "nc1": float(nc1(m))}
        entry |= {"alpha_req": float(alpha_req(m))} if D > 11 else {}
    if with_excess and K > 1 and SHADOWS * STEPS * 2.0 * N * D * max(D, K) <= MOST_WORK:
        entry["excess"] = float(excess(state, N, shadows=SHADOWS, steps=STEPS))
    if pairs is not None:
        entry |= {"alignment": float(alignment(pairs)), "standard_errors": pairs.standard_errors}
        entry |= {"lidar": float(lidar(m, pairs))} if D <= WIDE else {}
    return entry


def _turned(axes: Tensor, before: Tensor | None) -> Tensor:
    """The axes of the same plane nearest to those before (Schoenemann, "orthogonal Procrustes problem", 1966)."""
    if before is None or before.shape != axes.shape:
        return axes
    left, _, right = torch.linalg.svd(before.to(axes) @ axes.mT)
    turn: Tensor = left @ right
    return turn @ axes
