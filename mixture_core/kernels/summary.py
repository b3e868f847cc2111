"""Computes the logged figures of the moments in one launch."""
# Kernels are written in Triton's language, of which mypy knows nothing; the functions that launch them are typed.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
from torch import Tensor

from mixture_core.kernels import jit, launch, power_of_2, tl

MAX_K = 128  # one program holds a K x K matrix
SQUARINGS = 16  # as in mixture_core.moments


@jit
def _summary_kernel(
    weight, mean, summary, K: tl.constexpr, D: tl.constexpr, SQUARINGS: tl.constexpr, PRECISION: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    k = tl.arange(0, BK)
    w = tl.load(weight + k, mask=k < K, other=0.0)
    total = tl.sum(w, axis=0)
    pi = tl.where(total > 0, w / tl.where(total > 0, total, 1.0), 0.0)
    G = tl.zeros((BK, BK), tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        mu = tl.load(mean + k[:, None] * D + d[None, :], mask=(k < K)[:, None] & (d < D)[None, :], other=0.0)
        mu -= tl.sum(pi[:, None] * mu, axis=0)[None, :]
        mu -= tl.sum(pi[:, None] * mu, axis=0)[None, :]  # twice: pi sums to 1 only up to rounding
        A = tl.sqrt(pi)[:, None] * mu
        G = tl.dot(A, tl.trans(A), G, input_precision=PRECISION)
    diagonal = k[:, None] == k[None, :]
    trace = tl.sum(tl.where(diagonal, G, 0.0))
    G = tl.where(trace > 0, G / tl.where(trace > 0, trace, 1.0), 0.0)
    P = G
    for _ in range(SQUARINGS):
        P = tl.dot(P, tl.trans(P), input_precision=PRECISION)
        scale = tl.sum(tl.where(diagonal, P, 0.0))
        P = P / tl.where(scale > 0, scale, 1.0)
    tl.store(summary, tl.min(tl.where(k < K, pi, 1.0), axis=0))
    tl.store(summary + 1, tl.max(pi, axis=0))
    tl.store(summary + 2, trace)
    tl.store(summary + 3, tl.sum(G * P) * trace)


def summary(weight: Tensor, mean: Tensor) -> Tensor:
    """Returns the least and the largest pi, and the trace and the operator norm of B, (4,), as `Moments` has them.

    Args:
        weight: (K,), K at most MAX_K.
        mean: (K, D).
    """
    K, D = mean.shape
    figures = torch.empty((4,), dtype=mean.dtype, device=mean.device)
    BK = power_of_2(K, 16, MAX_K)
    # Not "ieee": one program's float32 units would take 10 us for each square of a 128 x 128 matrix.
    BD = 256 if D > 256 and BK <= 32 else 64
    options = {"PRECISION": "tf32x3", "BK": BK, "BD": BD, "num_warps": 8 if BK > 64 else 4}
    launch(_summary_kernel, (1,), mean.device, weight, mean, figures, K, D, SQUARINGS, **options)
    return figures
