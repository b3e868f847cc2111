"""Assigns rows to components, by labels or by Lloyd's iterations of k-means."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from mixture_core import kernels
from mixture_core.absorb_cpu import CHUNK, Workspace
from mixture_core.inputs import (
    as_embeddings,
    as_labels,
    as_tensor,
    check_count,
    is_plain,
    middle_and_usable,
    usable_rows,
)
from mixture_core.kernels import assign as on_gpu
from mixture_core.scatter import component_means, one_hot

FAR = 16  # centroids lie far apart if the largest |c|^2 exceeds this many times the least squared distance of two
ROUNDING = 256  # times eps times the largest |c|^2: bounds the rounding error of a squared distance

Assigned = TypeVar("Assigned")


def responsibilities_from_labels(labels: Tensor, K: int) -> Tensor:
    """Returns R, (N, K) float32: R_nk = 1 if label n is k, and a row of zeros if it lies outside [0, K).

    Args:
        labels: (N,) integers, tensor or NumPy array.
        K: Number of components.

    Raises:
        TypeError: `labels` or `K` are no integers.
        ValueError: `labels` are not a vector, or `K` is below 1.

    Example:
        >>> import torch, mixture_core
        >>> mixture_core.responsibilities_from_labels(torch.tensor([1, 0, -1]), 2).tolist()
        [[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]
    """
    check_count("K", K)
    labels = as_tensor(labels, name="labels")
    if labels.ndim != 1:
        raise ValueError(f"`labels` must have shape (N,), got {tuple(labels.shape)}.")
    labels = as_labels(labels, N=labels.shape[0], device=labels.device)
    return one_hot(labels, K).to(torch.float32)


def lloyd(x: Tensor, centroids: Tensor, *, iterations: int) -> tuple[Tensor, Tensor]:
    """Returns the assignment and the centroids after some iterations of k-means.

    Each iteration assigns every row to its nearest centroid, then moves each centroid to the mean of its rows. Ties go
    to the lowest index. A centroid without rows stays where it is.

    Args:
        x: (N, D) embeddings, tensor or NumPy array; rows with a NaN, an infinity or an entry beyond 1.8e13 are ignored.
        centroids: (K, D) to start from, in the units of x.
        iterations: At least 1.

    Returns:
        R, (N, K), the last assignment: 1 for the row's component, a row of zeros if it is ignored. And the means of
        that assignment, (K, D).

    Raises:
        TypeError: `x` is complex, or not a tensor or array; `iterations` is not an integer.
        ValueError: A shape is wrong, or `iterations` is below 1.

    Example:
        >>> import torch, mixture_core
        >>> x = torch.tensor([[0.0], [2.0], [8.0], [10.0]])
        >>> R, centroids = mixture_core.lloyd(x, torch.tensor([[0.0], [2.0]]), iterations=2)
        >>> R.argmax(dim=1).tolist(), centroids.flatten().tolist()
        ([0, 0, 1, 1], [1.0, 9.0])

    Lloyd, "Least squares quantization in PCM" (1982).
    """
    x = as_embeddings(x, name="x")
    start = as_embeddings(centroids, D=x.shape[1], name="centroids", rows="K").to(x.dtype)
    if start.shape[0] < 1:
        raise ValueError(f"`centroids` must have shape (K, {x.shape[1]}), K at least 1, got {tuple(start.shape)}.")
    check_count("iterations", iterations)
    plain = is_plain(x, start)  # then so are its means
    nearest = partial(nearest_means, x, iterations=1, plain=plain)
    (index, _), last = iterate(nearest, lambda assigned, c: _means(x, assigned[0], c), start, iterations=iterations)
    return one_hot(index, len(start)).to(x.dtype), _means(x, index, last)


def iterate(
    nearest: Callable[[Tensor], Assigned],
    means: Callable[[Assigned, Tensor], Tensor],
    centroids: Tensor,
    *,
    iterations: int,
) -> tuple[Assigned, Tensor]:
    """Returns the last assignment of Lloyd's iterations, and the centroids that it assigns to, (K, D).

    `nearest` assigns all rows to given centroids; `means` takes an assignment, and those it assigns to as a fallback.
    """
    assigned = nearest(centroids)
    for _ in range(iterations - 1):
        centroids = means(assigned, centroids)
        assigned = nearest(centroids)
    return assigned, centroids


def labelled(x: Tensor, labels: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Returns the component of each row by its label, (N,) int64, K if the row is ignored; and R, (N, K).

    Args:
        x: (N, D) embeddings.
        labels: (N,) int64; rows whose label lies outside [0, K) are ignored.
        K: Number of components.
    """
    index = torch.where(usable_rows(x) & (labels >= 0) & (labels < K), labels, K)
    return index, one_hot(index, K).to(x.dtype)


def nearest_means(
    x: Tensor, centroids: Tensor, *, iterations: int, plain: bool, work: Workspace | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the component of each row by Lloyd's iterations, (N,) integers, K if the row is ignored; and R, (N, K).

    Args:
        x: (N, D) embeddings.
        centroids: (K, D) to start from.
        iterations: At least 1.
        plain: Whether `is_plain` is true of both.
        work: Memory to use on the CPU if `plain`.
    """
    K = len(centroids)
    if plain and x.device.type == "cpu":
        index = _by_products(x, centroids, iterations, None if work is None else work.rows[0])
        # In two calls, which is faster than four.
        return index, torch.eye(K + 1, K, dtype=x.dtype, device=x.device).index_select(0, index)
    if plain and kernels.usable_on(x, K=K):
        return _by_kernels(x.contiguous(), centroids, iterations)
    index = _by_differences(x.detach(), centroids.detach(), iterations)
    return index, one_hot(index, K).to(x.dtype)


def _by_differences(x: Tensor, centroids: Tensor, iterations: int) -> Tensor:
    """The last assignment, (N,), by the definition, without branches on values."""
    usable = usable_rows(x)

    def nearest(current: Tensor) -> Tensor:
        return torch.where(usable, _nearest(x, current), len(centroids))

    index: Tensor = iterate(nearest, partial(_means, x), centroids, iterations=iterations)[0]
    return index


def _by_kernels(x: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """The last assignment on a GPU, as index, (N,), and as R."""

    def means(assigned: tuple[Tensor, Tensor], current: Tensor) -> Tensor:
        return on_gpu.component_means(x, *on_gpu.group(assigned[0], len(current)), current)

    return iterate(partial(on_gpu.nearest, x), means, centroids, iterations=iterations)[0]


def _by_products(x: Tensor, centroids: Tensor, iterations: int, memory: Tensor | None) -> Tensor:
    """The last assignment, (N,), on the CPU.

    One matrix product gives all squared distances but for |x|^2, as |c|^2 - 2 x.c about a point amid the rows. Its
    rounding error grows with the largest |c|^2, and could decide between two centroids that are close by comparison. If
    there are such centroids, the rows that rounding could decide are assigned again by differences.
    """
    rows = _Rows(x, memory)
    about = centroids - rows.center  # a few iterations move centroids little, so these decide for all
    reach = float(about.square().sum(dim=1).max())
    if len(about) == 1 or reach <= FAR * float(torch.pdist(about).min()) ** 2:
        return iterate(rows.nearest, rows.means, about, iterations=iterations)[0]
    rounding = ROUNDING * torch.finfo(x.dtype).eps * reach
    return iterate(lambda c: rows.surely_nearest(rounding, c), rows.exact_means, centroids, iterations=iterations)[0]


class _Rows:
    """The rows of a batch, as they are and about a point amid them, a chunk at a time."""

    def __init__(self, x: Tensor, memory: Tensor | None) -> None:
        self.center, self._usable = middle_and_usable(x)
        self._chunks = torch.split(x, CHUNK)
        self._memory = torch.empty_like(self._chunks[0]) if memory is None else memory
        self._held = -1  # the chunk that is in memory

    def nearest(self, about: Tensor) -> Tensor:
        """Returns the nearest of centroids about the center, (N,); K for rows that are not usable."""
        # `min` is twice as fast as `argmin`; on the CPU it too finds the first of equal ones.
        return self._whole([_distances(rows, about).min(dim=0)[1] for rows in self._centered()], len(about))

    def surely_nearest(self, rounding: float, centroids: Tensor) -> Tensor:
        """Returns the nearest centroids, (N,), with distances that are closer than `rounding` compared again."""
        about, parts = centroids - self.center, []
        for rows, centered in zip(self._chunks, self._centered(), strict=True):
            least, nearest = _distances(centered, about).topk(2, dim=0, largest=False)
            doubtful = (least[1] - least[0] <= rounding).nonzero()[:, 0]
            parts.append(nearest[0].index_copy(0, doubtful, _nearest(rows[doubtful], centroids)))
        return self._whole(parts, len(centroids))

    def means(self, index: Tensor, about: Tensor) -> Tensor:
        """Returns the means of the rows of each component about the center, (K, D); the previous one if it has none."""
        return self._averages(self._centered(), index, about)

    def exact_means(self, index: Tensor, centroids: Tensor) -> Tensor:
        """Returns the means of the rows of each component, which may lie far from 0; the previous one if none."""
        near = self._averages(self._chunks, index, centroids)
        own = torch.cat([near, near[:1]])
        away = (rows - own.index_select(0, i) for rows, i in zip(self._chunks, torch.split(index, CHUNK), strict=True))
        return near + self._averages(away, index, torch.zeros_like(near))

    def _averages(self, chunks: Iterable[Tensor], index: Tensor, fallback: Tensor) -> Tensor:
        """The averages of rows by component, (K, D); the fallback's if there are none."""
        K, D = fallback.shape
        counts, sums = torch.bincount(index, minlength=K)[:K, None], fallback.new_zeros(K + 1, D)
        for rows, own in zip(chunks, torch.split(index, CHUNK), strict=True):
            sums.index_add_(0, own, rows)
        return torch.where(counts > 0, sums[:K] / counts.clamp(min=1), fallback)

    def _whole(self, parts: list[Tensor], K: int) -> Tensor:
        index = parts[0] if len(parts) == 1 else torch.cat(parts)
        return index if self._usable is None else torch.where(self._usable, index, K)

    def _centered(self) -> Iterator[Tensor]:
        for n, rows in enumerate(self._chunks):
            if self._held != n:
                self._current = torch.sub(rows, self.center, out=self._memory[: len(rows)])
                self._held = n
            yield self._current


def _distances(rows: Tensor, centroids: Tensor) -> Tensor:
    """The squared distances but for |x|^2, (K, N)."""
    return torch.addmm(centroids.square().sum(dim=1)[:, None], centroids, rows.mT, alpha=-2)


def _nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """The index of each row's nearest centroid, (N,), by differences: equal centroids are equally far to the bit."""
    return torch.cdist(x, centroids, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1)


def _means(x: Tensor, index: Tensor, previous: Tensor) -> Tensor:
    """The means of the rows of each component, (K, D); the previous one if there is no row."""
    R = one_hot(index, len(previous)).to(x.dtype)
    x = torch.where((index < len(previous))[:, None], x, 0.0)
    near = component_means(x, R)
    lost = component_means(x - near.index_select(0, index.clamp(max=len(previous) - 1)), R)
    return torch.where(R.sum(dim=0)[:, None] > 0, near + lost, previous)
