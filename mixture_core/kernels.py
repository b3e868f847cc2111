"""Triton kernels for hard assignments and their moments, for float32 embeddings on CUDA.

A step by these functions waits for nothing on the host, allocates by `torch.empty` alone, so that a CUDA graph can
hold it, and repeats bit for bit: no two programs add to the same number. Without Triton the module can be imported
and `usable_on` says no. The arguments are trusted: float32 and contiguous, indices int32, all on one device. A kernel
is compiled for each D and K, not for each N.
"""
# Kernels are written in Triton's language, of which mypy knows nothing; what launches them is typed.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mixture_core.inputs import largest_usable

try:
    import triton
    import triton.language as tl
except ImportError:
    AVAILABLE = False
else:
    AVAILABLE = True

LARGEST = largest_usable(torch.float32)
TILE = 64  # of the covariance; its kernel with 4 warps, 3 stages and 32 rows at a time was the fastest on an H100
MAX_K = 65_535  # rows of a grid
MAX_SUMMARY_K = 128  # one program holds a K x K matrix
SQUARINGS = 16  # as in moments


def _jit(kernel: Any) -> Any:
    """Compiles a kernel, where there is Triton, once for all N: the last batch of an epoch must not wait for that."""
    try:
        return triton.jit(kernel, do_not_specialize=["N"]) if AVAILABLE else kernel
    except ValueError:  # without source files, as in an archive, there is nothing to compile, which `_work_on` will see
        return kernel


def usable_on(x: Tensor, *, K: int = 1) -> bool:
    """Returns whether the kernels can work on x: float32 on a GPU with bfloat16, or anywhere in the interpreter.

    Args:
        x: Any tensor.
        K: The number of components.
    """
    if not AVAILABLE or x.dtype != torch.float32 or K > MAX_K:
        return False
    return INTERPRETED or (x.is_cuda and _work_on(x.device))


@lru_cache
def _work_on(device: torch.device) -> bool:
    """Whether a kernel can be compiled and launched: that takes a C compiler, which not every machine has."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        group(torch.zeros(1, dtype=torch.int32, device=device), 1)
    except Exception as error:  # Triton and the compilers below it raise all sorts, and none may stop a training run
        cause = (str(error).splitlines() or [""])[0]
        warnings.warn(f"Triton cannot run here, steps will be slower: {type(error).__name__}: {cause}", stacklevel=2)
        return False
    return True


def _launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **options: Any) -> None:
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel[grid](*arguments, **options)
    else:  # only here, because entering a device costs as much as the launch
        with torch.cuda.device(device):
            kernel[grid](*arguments, **options)


def _ceil(length: int, block: int) -> int:
    return -(-length // block)


def _power_of_2(length: int, low: int, high: int) -> int:
    """The power of 2 at or above a length, within limits that are such powers."""
    return int(min(max(1 << (length - 1).bit_length(), low), high))


# Who belongs where


@_jit
def _nearest_kernel(
    x, centroids, index, R, N, K: tl.constexpr, D: tl.constexpr, LARGEST: tl.constexpr, WITH_R: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
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
    if WITH_R:
        for first in range(0, K, BK):
            k = first + tl.arange(0, BK)
            own = tl.where(nearest[:, None] == k[None, :], 1.0, 0.0)
            tl.store(R + n.to(tl.int64)[:, None] * K + k[None, :], own, mask=(n < N)[:, None] & (k < K)[None, :])


def nearest(x: Tensor, centroids: Tensor, *, with_responsibilities: bool) -> tuple[Tensor, Tensor]:
    """Returns the index of every row's nearest centroid, (N,) int32, ties to the lowest; and R, (N, K), or (N, 0).

    A row that is not usable has index K and a row of zeros in R.

    Args:
        x: (N, D) embeddings.
        centroids: (K, D).
        with_responsibilities: Whether R is wanted.
    """
    (N, D), K = x.shape, centroids.shape[0]
    index = torch.empty((N,), dtype=torch.int32, device=x.device)
    R = torch.empty((N, K if with_responsibilities else 0), dtype=x.dtype, device=x.device)
    options = {"BN": 16, "BK": _power_of_2(K, 2, 16), "BD": 32, "num_warps": 4}
    arguments = (x, centroids, index, R, N, K, D, LARGEST, with_responsibilities)
    _launch(_nearest_kernel, (_ceil(N, 16),), x.device, *arguments, **options)
    return index, R


@_jit
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
    """Returns the rows of each component in their order, (N,) int32, and where each begins and ends, (K + 1,) int32.

    order[offsets[k] : offsets[k + 1]] are component k's; what lies beyond offsets[K] is left as it was.

    Args:
        index: (N,) int32; rows whose index lies outside [0, K) belong to nobody.
        K: Number of components.
    """
    N = index.shape[0]
    order = torch.empty_like(index)
    offsets = torch.empty((K + 1,), dtype=torch.int32, device=index.device)
    _launch(_group_kernel, (K,), index.device, index, order, offsets, N, K, BLOCK=4096, num_warps=8)
    return order, offsets


# Means and covariances


@_jit
def _mean_about(x, order, begin, end, origin, d, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    """The mean of x - origin over the rows order[begin:end], in columns d (BD,); 0 of none."""
    total = tl.zeros((BR, BD), tl.float32)
    for start in range(begin, end, BR):
        r = start + tl.arange(0, BR)
        n = tl.load(order + r, mask=r < end, other=0).to(tl.int64)
        v = tl.load(x + n[:, None] * D + d[None, :], mask=(r < end)[:, None] & (d < D)[None, :], other=0.0)
        total += tl.where((r < end)[:, None], v - origin[None, :], 0.0)
    return tl.sum(total, axis=0) / tl.maximum(end - begin, 1).to(tl.float32)


@_jit
def _means_kernel(x, order, offsets, previous, means, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    k = tl.program_id(1)
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    begin, end = tl.load(offsets + k), tl.load(offsets + k + 1)
    cells = k.to(tl.int64) * D + d
    near = _mean_about(x, order, begin, end, tl.zeros((BD,), tl.float32), d, D, BR, BD)
    mean = near + _mean_about(x, order, begin, end, near, d, D, BR, BD)
    mean = tl.where(begin < end, mean, tl.load(previous + cells, mask=d < D, other=0.0))
    tl.store(means + cells, mean, mask=d < D)


def component_means(x: Tensor, order: Tensor, offsets: Tensor, previous: Tensor) -> Tensor:
    """Returns the mean of each component's rows, (K, D); the previous one's bits where there is no row.

    Args:
        x: (N, D) embeddings.
        order: (N,) int32 from `group`.
        offsets: (K + 1,) int32 from `group`.
        previous: (K, D).
    """
    K, D = previous.shape
    means = torch.empty_like(previous)
    options = {"BR": 256, "BD": 32, "num_warps": 8}
    _launch(_means_kernel, (_ceil(D, 32), K), x.device, x, order, offsets, previous, means, D, **options)
    return means


@_jit
def _split_kernel(
    x, order, offsets, weight, mean, residual, new_weight, new_mean, new_residual, steps, Z, N, K: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    begin, end = tl.load(offsets + k), tl.load(offsets + k + 1)
    near = _mean_about(x, order, begin, end, tl.zeros((BD,), tl.float32), d, D, BR, BD)

    # About a point that near, differences are exact; what its own rounding took from the mean is their mean.
    plane = N.to(tl.int64) * WIDTH
    total = tl.zeros((BR, BD), tl.float32)
    for start in range(begin, end, BR):
        r = start + tl.arange(0, BR)
        inside = (r < end)[:, None] & (d < D)[None, :]
        n = tl.load(order + r, mask=r < end, other=0).to(tl.int64)
        v = tl.load(x + n[:, None] * D + d[None, :], mask=inside, other=0.0)
        z = tl.where(inside, v - near[None, :], 0.0)
        total += z
        high = z.to(tl.bfloat16)
        rest = z - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        cells = Z + r.to(tl.int64)[:, None] * WIDTH + d[None, :]
        tl.store(cells, high, mask=(r < end)[:, None])
        tl.store(cells + plane, middle, mask=(r < end)[:, None])
        tl.store(cells + 2 * plane, low, mask=(r < end)[:, None])
    count = (end - begin).to(tl.float32)
    lost = tl.sum(total, axis=0) / tl.maximum(count, 1.0)

    w_a = tl.load(weight + k)
    w = w_a + count
    cells = k * D + d
    old = tl.load(mean + cells, mask=d < D, other=0.0)
    old_lost = tl.load(residual + cells, mask=d < D, other=0.0)
    shift = (near - old) + (lost - old_lost)
    # As in merge_means: from the heavier side, and with what rounding takes from the sum.
    share = count / tl.where(w > 0, w, 1.0)
    base = tl.where(share < 0.5, old, near)
    step = tl.where(share < 0.5, old_lost + share * shift, lost - (1.0 - share) * shift)
    new = base + step
    of_step = new - base
    left = (base - (new - of_step)) + (step - of_step)
    tl.store(new_mean + cells, tl.where(count > 0, new, old), mask=d < D)
    tl.store(new_residual + cells, tl.where(count > 0, left, old_lost), mask=d < D)
    tl.store(steps + cells, shift, mask=d < D)
    tl.store(steps + K * D + cells, lost, mask=d < D)
    if tl.program_id(0) == 0:
        tl.store(new_weight + k, w)


@_jit
def _lower_tile(t):
    """Row and column of the t-th tile on or below the diagonal, row by row."""
    i = ((tl.sqrt(8.0 * t + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > t, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= t, i + 1, i)
    return i, t - i * (i + 1) // 2


@_jit
def _merge_kernel(
    Z, offsets, weight, steps, old, new, N, K: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    IN_PLACE: tl.constexpr, PRODUCT: tl.constexpr, T: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(1).to(tl.int64)
    i, j = _lower_tile(tl.program_id(0))
    i, j = i * T + tl.arange(0, T), j * T + tl.arange(0, T)
    begin, end = tl.load(offsets + k), tl.load(offsets + k + 1)

    plane = N.to(tl.int64) * WIDTH
    acc = tl.zeros((T, T), tl.float32)
    for start in range(begin, end, BR):
        r = tl.arange(0, BR)
        rows = Z + tl.cast(start, tl.int64) * WIDTH
        left, right = rows + (r[:, None] * WIDTH + i[None, :]), rows + (r[:, None] * WIDTH + j[None, :])
        inside = (start + r < end)[:, None]
        a1 = tl.trans(tl.load(left, mask=inside, other=0.0)).to(PRODUCT)
        a2 = tl.trans(tl.load(left + plane, mask=inside, other=0.0)).to(PRODUCT)
        a3 = tl.trans(tl.load(left + 2 * plane, mask=inside, other=0.0)).to(PRODUCT)
        b1 = tl.load(right, mask=inside, other=0.0).to(PRODUCT)
        b2 = tl.load(right + plane, mask=inside, other=0.0).to(PRODUCT)
        b3 = tl.load(right + 2 * plane, mask=inside, other=0.0).to(PRODUCT)
        # The smallest products first; those left out are below float32's resolution.
        acc = tl.dot(a3, b1, acc)
        acc = tl.dot(a1, b3, acc)
        acc = tl.dot(a2, b2, acc)
        acc = tl.dot(a2, b1, acc)
        acc = tl.dot(a1, b2, acc)
        acc = tl.dot(a1, b1, acc)

    # Each program reads and writes nothing but its tile, so that old and new may be the same memory.
    count = (end - begin).to(tl.float32)
    rows_there, w_a = tl.maximum(count, 1.0), tl.load(weight + k)
    w = w_a + rows_there
    cells = k * D * D + i.to(tl.int64)[:, None] * D + j[None, :]
    writes = tl.where(count > 0, D, 0) if IN_PLACE else D  # so many rows of tiles, all or none
    reads = tl.where((count == 0) | (w_a > 0), writes, 0)
    history = tl.load(old + cells, mask=(i < reads)[:, None] & (j < D)[None, :], other=0.0)
    shift_i = tl.load(steps + k * D + i, mask=i < D, other=0.0)[:, None]
    shift_j = tl.load(steps + k * D + j, mask=j < D, other=0.0)[None, :]
    lost_i = tl.load(steps + K * D + k * D + i, mask=i < D, other=0.0)[:, None]
    lost_j = tl.load(steps + K * D + k * D + j, mask=j < D, other=0.0)[None, :]
    a, b = w_a / w, rows_there / w
    merged = a * history + b * (acc / rows_there - lost_i * lost_j) + (a * b) * shift_i * shift_j
    tl.store(new + cells, tl.where(count > 0, merged, history), mask=(i < writes)[:, None] & (j < D)[None, :])


def absorb(
    weight: Tensor, mean: Tensor, residual: Tensor, covariance: Tensor, x: Tensor, order: Tensor, offsets: Tensor,
    *, out: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns weight, mean, residual (the mean's rounding error) and covariance of history and batch together.

    Per component, with w_b rows, w = w_a + w_b and d = mean_b - mean_a:

        mean = mean_a + d w_b / w
        covariance = (w_a C_a + S) / w + d d^T w_a w_b / w^2,  S = sum (x - mean_b)(x - mean_b)^T

    Without a row, the history's bits; without history (w_a = 0), the batch's alone. Of covariances only what lies on
    or below the diagonal is used and means something. S is exact to float32: three bfloat16 hold a float32 to the last
    bit, and six of their nine products its square.

    Args:
        weight: (K,) of the history, decayed.
        mean: (K, D) of the history.
        residual: (K, D) its rounding error.
        covariance: (K, D, D) of the history.
        x: (N, D) embeddings.
        order: (N,) int32 from `group`.
        offsets: (K + 1,) int32 from `group`.
        out: (K, D, D) memory for the new covariance, which may be the old one's.
    """
    (N, D), K = x.shape, weight.shape[0]
    width = _ceil(D, TILE) * TILE  # the columns between are 0 and need no mask
    new_weight, new_mean, new_residual = torch.empty_like(weight), torch.empty_like(mean), torch.empty_like(mean)
    steps = torch.empty((2, K, D), dtype=x.dtype, device=x.device)
    Z = torch.empty((3, N, width), dtype=torch.bfloat16, device=x.device)
    inputs = (x, order, offsets, weight, mean, residual)
    results = (new_weight, new_mean, new_residual, steps, Z)
    grid = (width // 32, K)
    BR = 256 if grid[0] * K <= 128 else 128  # few programs take longer turns; many need the registers
    _launch(_split_kernel, grid, x.device, *inputs, *results, N, K, D, width, BR=BR, BD=32, num_warps=8)
    tiles = width // TILE * (width // TILE + 1) // 2
    product = tl.float32 if INTERPRETED else tl.bfloat16  # the interpreter multiplies the bits of bfloat16 as integers
    in_place = out.data_ptr() == covariance.data_ptr()
    arguments = (Z, offsets, weight, steps, covariance, out, N, K, D, width, in_place, product)
    options = {"T": TILE, "BR": 32, "num_warps": 4, "num_stages": 3}
    _launch(_merge_kernel, (tiles, K), x.device, *arguments, **options)
    return new_weight, new_mean, new_residual, out


# What is logged


@_jit
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
        weight: (K,), K at most MAX_SUMMARY_K.
        mean: (K, D).
    """
    K, D = mean.shape
    figures = torch.empty((4,), dtype=mean.dtype, device=mean.device)
    BK = _power_of_2(K, 16, MAX_SUMMARY_K)
    # Not "ieee": one program's float32 units would take 10 us for each square of a 128 x 128 matrix.
    BD = 256 if D > 256 and BK <= 32 else 64
    options = {"PRECISION": "tf32x3", "BK": BK, "BD": BD, "num_warps": 8 if BK > 64 else 4}
    _launch(_summary_kernel, (1,), mean.device, weight, mean, figures, K, D, SQUARINGS, **options)
    return figures


INTERPRETED = type(_nearest_kernel).__name__ == "InterpretedFunction"
