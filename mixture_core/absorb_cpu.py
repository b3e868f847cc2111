"""Adds hard-assigned rows to the moments on the CPU, by one matrix product per component on its own rows."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from mixture_core.moments import merge_means

CHUNK = 16_384  # rows at a time: float32 sums of more squares lose digits
# (K, D, D) symmetric matrices of which only the lower triangle is defined; `complete_` fills in the upper one. It takes
# half the time to compute.
Lower: TypeAlias = Tensor
# Of larger covariances only the block rows' lower parts are computed. At D = 512 and 2048, with K = 8, blocks of 64 to
# 256 rows took 0.76 to 0.88 and 0.68 to 0.65 of the whole product's time (AMD EPYC, one thread); fewer blocks are fewer
# calls.
BLOCK = 128
# BLAS adds the products for so few columns one by one to the old covariance, which loses the digits of small ones.
NARROW = 16
LARGE = 65_536  # numbers in a component's rows: with more, a call per component costs less than a copy of all rows


class Workspace(NamedTuple):
    """Memory for a step to write to."""

    covariance: Lower  # for the new covariance
    rows: Tensor  # (2, M, D) for rows on their way: M at least min(N, CHUNK) + K on the CPU

    @classmethod
    def like(cls, covariance: Tensor, *, N: int) -> "Workspace":
        """Returns fresh memory for a batch of N rows."""
        return cls(torch.empty_like(covariance), cls.rows_for(covariance, N=N))

    @staticmethod
    def rows_for(covariance: Tensor, *, N: int) -> Tensor:
        """Returns fresh memory for the rows alone."""
        return covariance.new_empty(2, Workspace.length(covariance, N=N), covariance.shape[-1])

    @staticmethod
    def length(covariance: Tensor, *, N: int) -> int:
        """Returns how long the memory for the rows has to be."""
        return min(N, CHUNK) + covariance.shape[0] if covariance.device.type == "cpu" else 0


def absorb_rows(
    weight: Tensor, mean: Tensor, residual: Tensor, covariance: Lower, x: Tensor, index: Tensor, work: Workspace
) -> tuple[Tensor, Tensor, Tensor, Lower]:
    """Returns weight, mean, residual and covariance of history and batch together.

    With Z the rows x_n - mean_b and one row sqrt(w_a w_b / w) d, covariance = (w_a / w) C_a + Z^T Z / w. Components
    without a row keep their mean and covariance to the bit, at no cost if the memory is the history's own.

    Args:
        weight: (K,) of the history.
        mean: (K, D) of the history.
        residual: (K, D) its rounding error.
        covariance: (K, D, D) of the history.
        x: (N, D) embeddings, N at most CHUNK.
        index: (N,) int64, the component of each row; K if the row is ignored.
        work: Memory; that for the covariance may be `covariance` itself.

    Returns:
        Weight of both, (K,); their mean and its residual, (K, D) each; and their covariance, in `work`.
    """
    K, N = weight.shape[0], x.shape[0]
    counts = torch.bincount(index, minlength=K).tolist()[:K]
    sizes = [count + 1 for count in counts]
    # Each component's rows in turn, and after them one more for d, which belongs to no component until the end.
    component, source = torch.cat([index, torch.arange(K, device=index.device)]).sort(stable=True)
    component, source = component[: sum(sizes)], source[: sum(sizes)].clamp_(max=N - 1)
    last = torch.tensor([end - 1 for end in accumulate(sizes)], device=x.device)
    component.index_fill_(0, last, K)
    rows, scratch = work.rows[:, : len(source)].unbind()
    groups = torch.index_select(x, 0, source, out=rows).split_with_sizes(sizes)
    one_over = inverse(counts, like=x)
    near = group_means(rows, component, one_over)
    _subtract(near, rows, groups, component, scratch)
    # The differences from `near` are exact, and their means are its rounding error.
    lost = group_means(rows, component, one_over)
    _subtract(lost, rows, groups, component, scratch)

    olds = weight.tolist()
    totals = [old + count or 1.0 for old, count in zip(olds, counts, strict=True)]
    shares = [count / total for count, total in zip(counts, totals, strict=True)]
    roots = [(old * share) ** 0.5 for old, share in zip(olds, shares, strict=True)]
    total, share, root = x.new_tensor([[w + n for w, n in zip(olds, counts, strict=True)], shares, roots]).unbind()
    batch, a_is_heavier = (near[:K], lost[:K]), max(shares) < 0.5
    (new_mean, new_residual), d = merge_means((mean, residual), batch, share[:, None], a_is_heavier=a_is_heavier)
    rows.index_copy_(0, last, d.mul_(root[:, None]))
    for k, (Z, C, out) in enumerate(zip(groups, covariance.unbind(), work.covariance.unbind(), strict=True)):
        if counts[k]:
            _add_products(C, Z, old=olds[k] / totals[k], new=1 / totals[k], out=out)
        elif work.covariance is not covariance:
            out.copy_(C)
    return total, new_mean, new_residual, work.covariance


def complete_(covariance: Lower) -> Tensor:
    """Returns the matrices, (K, D, D), after writing the lower triangle's mirror image to their upper one."""
    D = covariance.shape[-1]
    block = 4 * BLOCK if covariance.is_cuda else BLOCK // 4  # launches are slow on a GPU
    for start in range(0, D, block):
        rows = covariance[:, start : start + block]
        covariance[:, :start, start : start + block] = rows[:, :, :start].mT
        diagonal = rows[:, :, start : start + block]
        size = diagonal.shape[-1]
        below = torch.ones(size, size, dtype=torch.bool, device=covariance.device).tril()
        diagonal.copy_(torch.where(below, diagonal, diagonal.mT))
    return covariance


def pack(covariance: Lower) -> Tensor:
    """Returns the lower triangles row by row, (K, D (D + 1) / 2)."""
    return covariance.flatten(1).index_select(1, _lower(covariance))


def unpack_(packed: Tensor, out: Lower) -> Lower:
    """Writes packed entries to the lower triangles of `out`, and returns it."""
    out.flatten(1).index_copy_(1, _lower(out), packed)
    return out


def _lower(matrices: Tensor) -> Tensor:
    """Indices of the lower triangle in a flattened matrix."""
    D = matrices.shape[-1]
    row, column = torch.tril_indices(D, D, device=matrices.device).unbind()
    return row * D + column


def inverse(counts: Sequence[int], *, like: Tensor) -> Tensor:
    """Returns 1 over each count, 1 if it is 0, and one more 1, (K + 1, 1), for `group_means`."""
    return like.new_tensor([1 / (count or 1) for count in counts] + [1.0])[:, None]


def group_means(rows: Tensor, component: Tensor, one_over: Tensor) -> Tensor:
    """Returns the means of the rows of each component, 0 if there are none, and one meaningless row: (K + 1, D).

    Args:
        rows: (M, D).
        component: (M,) int64; K if the row is ignored, which may then hold anything.
        one_over: (K + 1, 1) from `inverse`, of the number of rows to divide by.
    """
    return rows.new_zeros(one_over.shape[0], rows.shape[1]).index_add_(0, component, rows).mul_(one_over)


def _subtract(means: Tensor, rows: Tensor, groups: Sequence[Tensor], component: Tensor, scratch: Tensor) -> None:
    """Subtracts each component's mean, (K + 1, D), from its rows; ignored rows become undefined."""
    if rows.numel() > LARGE * len(groups):
        for group, mean in zip(groups, means.unbind(), strict=False):  # the last is meaningless
            group.sub_(mean)
    else:
        rows.sub_(torch.index_select(means, 0, component, out=scratch))


def _add_products(covariance: Tensor, rows: Tensor, *, old: float, new: float, out: Tensor) -> None:
    """Writes old * covariance + new * rows^T rows, (D, D), at least in its lower triangle."""
    D = rows.shape[1]
    if D <= BLOCK:
        _add_product(covariance, rows, rows, old=old, new=new, out=out)
        return
    for start in range(0, D, BLOCK):
        size = min(BLOCK, D - start)
        C, lower = (matrix.narrow(0, start, size).narrow(1, 0, start + size) for matrix in (covariance, out))
        left, right = rows.narrow(1, start, size), rows.narrow(1, 0, start + size)
        _add_product(C, left, right, old=old, new=new, out=lower)


def _add_product(C: Tensor, left: Tensor, right: Tensor, *, old: float, new: float, out: Tensor) -> None:
    """Writes old * C + new * left^T right to `out`."""
    if left.shape[1] < NARROW:
        torch.mul(C, old, out=out).add_(left.mT @ right, alpha=new)
    else:
        torch.addmm(C, left.mT, right, beta=old, alpha=new, out=out)
