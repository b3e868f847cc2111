"""Assigns rows to centroids, sorts them by component, and averages them: Lloyd's iterations on a GPU."""
# Kernels are written in Triton's language, of which mypy knows nothing; the functions that launch them are typed.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
from torch import Tensor

from mixture_core.inputs import largest_usable
from mixture_core.kernels import ceil, jit, launch, power_of_2, tl

LARGEST = largest_usable(torch.float32)


@jit
def _nearest_kernel(
    x, centroids, index, R, N, K: tl.constexpr, D: tl.constexpr, LARGEST: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = x + n.to(tl.int64)[:, None] * D
    least = tl.full((BN,), float("inf"), tl.float32)
    nearest = tl.zeros((BN,), tl.int32)
    strange = tl.zeros((BN, BD), tl.int32)
    for first in range(0, K, BK):
        k = first + tl.arange(0, BK)
        squares = tl.zeros((BN, BK, BD), tl.float32)
        for start in range(0, D, BD):
            d = start + tl.arange(0, BD)
            v = tl.load(rows + d[None, :], mask=(n < N)[:, None] & (d < D)[None, :], other=0.0)
            c = tl.load(centroids + k.to(tl.int64)[:, None] * D + d[None, :], mask=(k < K)[:, None] & (d < D)[None, :],
                        other=0.0)  # fmt: skip
            usable = tl.abs(v) <= LARGEST
            strange += tl.where(usable, 0, 1)
            difference = tl.where(usable, v, 0.0)[:, None, :] - c[None, :, :]
            squares += difference * difference
        # Differences work for groups far apart, and give equal centroids equal distances.
        distance = tl.where((k < K)[None, :], tl.sum(squares, axis=2), float("inf"))
        smallest, which = tl.min(distance, axis=1, return_indices=True, return_indices_tie_break_left=True)
        nearest = tl.where(smallest < least, first + which, nearest)
        least = tl.minimum(smallest, least)
    nearest = tl.where(tl.sum(strange, axis=1) == 0, nearest, K)
    tl.store(index + n, nearest, mask=n < N)
    for first in range(0, K, BK):
        k = first + tl.arange(0, BK)
        own = tl.where(nearest[:, None] == k[None, :], 1.0, 0.0)
        tl.store(R + n.to(tl.int64)[:, None] * K + k[None, :], own, mask=(n < N)[:, None] & (k < K)[None, :])


def nearest(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the index of each row's nearest centroid, (N,) int32, ties to the lowest; and R, (N, K).

    A row that is not usable has index K and a row of zeros in R.

    Args:
        x: (N, D) embeddings.
        centroids: (K, D).
    """
    (N, D), K = x.shape, centroids.shape[0]
    index = torch.empty((N,), dtype=torch.int32, device=x.device)
    R = torch.empty((N, K), dtype=x.dtype, device=x.device)
    options = {"BN": 16, "BK": power_of_2(K, 2, 16), "BD": 32, "num_warps": 4}
    launch(_nearest_kernel, (ceil(N, 16),), x.device, x, centroids, index, R, N, K, D, LARGEST, **options)
    return index, R


@jit
def _group_kernel(index, order, offsets, N, K: tl.constexpr, BLOCK: tl.constexpr):
    k = tl.program_id(0)
    before = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        whose = tl.load(index + n, mask=n < N, other=-1)
        before += tl.where((whose >= 0) & (whose < k), 1, 0)
    position = tl.sum(before, axis=0)
    tl.store(offsets + k, position)
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        own = tl.where(tl.load(index + n, mask=n < N, other=-1) == k, 1, 0)
        tl.store(order + position + tl.cumsum(own, axis=0) - 1, n, mask=own != 0)
        position += tl.sum(own, axis=0)
    if k == K - 1:
        tl.store(offsets + K, position)


def group(index: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Returns row numbers sorted by component, (N,) int32, and where each component begins and ends, (K + 1,) int32.

    order[offsets[k] : offsets[k + 1]] are component k's; entries beyond offsets[K] are undefined.

    Args:
        index: (N,) int32; rows whose index lies outside [0, K) are ignored.
        K: Number of components.
    """
    N = index.shape[0]
    order = torch.empty_like(index)
    offsets = torch.empty((K + 1,), dtype=torch.int32, device=index.device)
    launch(_group_kernel, (K,), index.device, index, order, offsets, N, K, BLOCK=4096, num_warps=8)
    return order, offsets


@jit
def mean_about(x, order, begin, end, origin, d, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    """The mean of x - origin over the rows order[begin:end], in columns d (BD,); 0 of none."""
    total = tl.zeros((BR, BD), tl.float32)
    for start in range(begin, end, BR):
        r = start + tl.arange(0, BR)
        n = tl.load(order + r, mask=r < end, other=0).to(tl.int64)
        v = tl.load(x + n[:, None] * D + d[None, :], mask=(r < end)[:, None] & (d < D)[None, :], other=0.0)
        total += tl.where((r < end)[:, None], v - origin[None, :], 0.0)
    return tl.sum(total, axis=0) / tl.maximum(end - begin, 1).to(tl.float32)


@jit
def _means_kernel(x, order, offsets, previous, means, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    k = tl.program_id(1)
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    begin, end = tl.load(offsets + k), tl.load(offsets + k + 1)
    cells = k.to(tl.int64) * D + d
    near = mean_about(x, order, begin, end, tl.zeros((BD,), tl.float32), d, D, BR, BD)
    mean = near + mean_about(x, order, begin, end, near, d, D, BR, BD)
    mean = tl.where(begin < end, mean, tl.load(previous + cells, mask=d < D, other=0.0))
    tl.store(means + cells, mean, mask=d < D)


def component_means(x: Tensor, order: Tensor, offsets: Tensor, previous: Tensor) -> Tensor:
    """Returns the mean of each component's rows, (K, D), given the output of `group`; the previous one if none."""
    K, D = previous.shape
    means = torch.empty_like(previous)
    options = {"BR": 256, "BD": 32, "num_warps": 8}
    launch(_means_kernel, (ceil(D, 32), K), x.device, x, order, offsets, previous, means, D, **options)
    return means
