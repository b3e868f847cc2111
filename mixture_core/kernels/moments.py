"""Merges sorted rows into the moments so far."""
# Kernels are written in Triton's language, of which mypy knows nothing; the functions that launch them are typed.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
from torch import Tensor

from mixture_core.kernels import INTERPRETED, ceil, jit, launch, tl
from mixture_core.kernels.assign import mean_about

TILE = 64  # of the covariance; its kernel with 4 warps, 3 stages and 32 rows at a time was the fastest on an H100


@jit
def _split_kernel(
    x, order, offsets, weight, mean, residual, new_weight, new_mean, new_residual, steps, Z, N, K: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    begin, end = tl.load(offsets + k), tl.load(offsets + k + 1)
    near = mean_about(x, order, begin, end, tl.zeros((BD,), tl.float32), d, D, BR, BD)

    # Differences from a point so near are exact, and their mean is its rounding error.
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


@jit
def _lower_tile(t):
    """Row and column of the t-th tile on or below the diagonal, row by row."""
    i = ((tl.sqrt(8.0 * t + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > t, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= t, i + 1, i)
    return i, t - i * (i + 1) // 2


@jit
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
    """Does what `mixture_core.absorb_cpu.absorb_rows` does, for rows that `group` has sorted.

    The scatter is exact to float32: three bfloat16 hold a float32 to the last bit, and six of their nine products its
    square. The memory `out`, (K, D, D), for the new covariance may be the old one's.
    """
    (N, D), K = x.shape, weight.shape[0]
    width = ceil(D, TILE) * TILE  # the columns between are 0 and need no mask
    new_weight, new_mean, new_residual = torch.empty_like(weight), torch.empty_like(mean), torch.empty_like(mean)
    steps = torch.empty((2, K, D), dtype=x.dtype, device=x.device)
    Z = torch.empty((3, N, width), dtype=torch.bfloat16, device=x.device)
    inputs = (x, order, offsets, weight, mean, residual)
    results = (new_weight, new_mean, new_residual, steps, Z)
    grid = (width // 32, K)
    BR = 256 if grid[0] * K <= 128 else 128  # few programs take longer turns; many need the registers
    launch(_split_kernel, grid, x.device, *inputs, *results, N, K, D, width, BR=BR, BD=32, num_warps=8)
    tiles = width // TILE * (width // TILE + 1) // 2
    product = tl.float32 if INTERPRETED else tl.bfloat16  # the interpreter multiplies the bits of bfloat16 as integers
    in_place = out.data_ptr() == covariance.data_ptr()
    arguments = (Z, offsets, weight, steps, covariance, out, N, K, D, width, in_place, product)
    options = {"T": TILE, "BR": 32, "num_warps": 4, "num_stages": 3}
    launch(_merge_kernel, (tiles, K), x.device, *arguments, **options)
    return new_weight, new_mean, new_residual, out
