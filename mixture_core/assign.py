"""Who belongs where: responsibilities from labels and from k-means."""

import torch
from torch import Tensor

from mixture_core import kernels
from mixture_core.grouped import CHUNK, Workspace, group_means, inverse
from mixture_core.inputs import (
    as_embeddings,
    as_labels,
    as_tensor,
    is_plain,
    looks,
    middle_row,
    rows_not_all_usable,
    usable_rows,
)
from mixture_core.scatter import component_means, one_hot

# Rows tried for each centroid of k-means++. With the customary 2 + log K, 7 of 50 random mixtures of 8 Gaussians whose
# means lie 14 standard deviations apart in 16 dimensions lost a component; with 32, none.
CANDIDATES = 32
FAR = 16  # rows get a second look if the largest |c|^2 exceeds this many times the least squared distance of centroids
ROUNDING = 256  # times eps times the largest |c|^2: bounds the rounding error of a squared distance


def responsibilities_from_labels(labels: Tensor, K: int) -> Tensor:
    """Returns R, (N, K) float32: R_nk = 1 where label n is k; a row of zeros where it lies outside [0, K).

    Args:
        labels: (N,) integers, tensor or NumPy array.
        K: Number of components.

    Raises:
        TypeError: `labels` are no integers.
        ValueError: `labels` are not a vector, or `K` is below 1.
    """
    _check_count("K", K)
    labels = as_tensor(labels, name="labels")
    if labels.ndim != 1:
        raise ValueError(f"`labels` must have shape (N,), got {tuple(labels.shape)}.")
    labels = as_labels(labels, N=labels.shape[0], device=labels.device)
    return one_hot(labels, K).to(torch.float32)


def lloyd(x: Tensor, centroids: Tensor, *, iterations: int) -> tuple[Tensor, Tensor]:
    """Returns the assignment and the centroids after some Lloyd iterations, each of which assigns, then recomputes.

    Ties go to the lowest index. A component to which no row is assigned stays where it was.

    Args:
        x: (N, D) embeddings, tensor or NumPy array; rows that are not finite are assigned to nobody.
        centroids: (K, D) to start from.
        iterations: At least 1.

    Returns:
        R, (N, K): the last assignment; and its centroids, (K, D).

    Raises:
        TypeError: `x` is neither tensor nor array, or complex.
        ValueError: A shape is wrong, or `iterations` below 1.

    Lloyd, "Least squares quantization in PCM" (1982).
    """
    x = as_embeddings(x, name="x")
    start = as_embeddings(centroids, D=x.shape[1], name="centroids", rows="K").to(x.dtype)
    if start.shape[0] < 1:
        raise ValueError(f"`centroids` must have shape (K, {x.shape[1]}), K at least 1, got {tuple(start.shape)}.")
    _check_count("iterations", iterations)
    usable = usable_rows(x)
    for _ in range(iterations):
        index = _Rows(x, usable).lloyd(start, iterations=1)
        start = _means_exactly(x, index, start)
    return one_hot(index, len(start)).to(x.dtype), start


def nearest_means(
    x: Tensor, centroids: Tensor, *, iterations: int, work: Workspace | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the last assignment of `lloyd` as an index, (N,), K where a row is not usable; and as R, (N, K).

    Args:
        x: (N, D) embeddings.
        centroids: (K, D) to start from.
        iterations: At least 1.
        work: Memory to use where one `looks`.
    """
    K = len(centroids)
    if is_plain(x, centroids) and kernels.usable_on(x, K=K):
        x = x.contiguous()
        for _ in range(iterations - 1):
            index, _ = kernels.nearest(x, centroids, with_responsibilities=False)
            centroids = kernels.component_means(x, *kernels.group(index, K), centroids)
        return kernels.nearest(x, centroids, with_responsibilities=True)
    rows = _Rows(x.detach(), rows_not_all_usable(x), work)
    index = rows.lloyd(centroids.detach(), iterations=iterations)
    if rows.looks:  # in two calls instead of four
        return index, torch.eye(K + 1, K, dtype=x.dtype, device=x.device).index_select(0, index)
    return index, one_hot(index, K).to(x.dtype)


class _Rows:
    """The rows of a batch that centroids compete for.

    If code may look at the numbers, one matrix product gives the squared distances, |c|^2 - 2 x.c about a point amid
    the rows. Its rounding error grows with the largest |c|^2 and may exceed the distance between two close centroids.
    Rows for which it could decide are assigned again by differences. If code may not look, all rows are.

    Args:
        x: (N, D) embeddings.
        usable: (N,) bool; None where all are.
        work: Memory for the rows where one looks.
    """

    def __init__(self, x: Tensor, usable: Tensor | None, work: Workspace | None = None) -> None:
        self._x, self._usable, self.looks = x, usable, looks(x)
        if self.looks:
            self._center = middle_row(x, usable)
            self._memory = torch.empty_like(x[:CHUNK]) if work is None else work.rows[0]
        self._held = -1  # start of the chunk that `_centered` is
        self._reach: float | None = None  # largest |c|^2 if close centroids lie far from the center, 0 if not
        self._doubtful = 0  # rows that the last assignment had to repeat
        self._about: Tensor | None = None  # centered centroids, more exact than their difference; None if unknown

    def lloyd(self, centroids: Tensor, *, iterations: int) -> Tensor:
        """Returns the last assignment, (N,), K if a row is not usable."""
        index = self._nearest(centroids)
        for _ in range(iterations - 1):
            centroids = self._means(index, centroids)
            index = self._nearest(centroids)
        return index

    def _nearest(self, centroids: Tensor) -> Tensor:
        centroids = centroids.detach()
        if not self.looks:
            index = _nearest_exactly(self._x.detach(), centroids)
        else:
            about, self._doubtful = centroids - self._center if self._about is None else self._about, 0
            squares = about.square().sum(dim=1)
            if self._reach is None:  # once: a few iterations move centroids little
                reach = float(squares.max())
                is_far = len(about) > 1 and reach > FAR * float(torch.pdist(about).min()) ** 2
                self._reach = reach if is_far else 0.0
            parts = [
                self._without_doubt(start, about, squares, centroids)
                if self._reach
                else self._distances(start, about, squares).argmin(dim=1)
                for start in self._starts()
            ]
            index = parts[0] if len(parts) == 1 else torch.cat(parts)
        return index if self._usable is None else torch.where(self._usable, index, len(centroids))

    def _without_doubt(self, start: int, about: Tensor, squares: Tensor, centroids: Tensor) -> Tensor:
        """The nearest centroids of one chunk, (M,), after assigning the doubtful rows again."""
        distance = self._distances(start, about, squares)
        nearest = distance.argmin(dim=1)
        own = nearest[:, None]
        gap = distance.scatter(1, own, torch.inf).amin(dim=1) - distance.gather(1, own)[:, 0]
        doubtful = (gap <= ROUNDING * torch.finfo(gap.dtype).eps * (self._reach or 0.0)).nonzero()[:, 0]
        self._doubtful += len(doubtful)
        if self._about is None:
            return nearest.index_copy(0, doubtful, _nearest_exactly(self._x[start + doubtful], centroids))
        return nearest.index_copy(0, doubtful, _nearest_exactly(self._chunk(start)[doubtful], self._about))

    def _distances(self, start: int, about: Tensor, squares: Tensor) -> Tensor:
        """The squared distances of one chunk but for |x|^2, (M, K)."""
        # The long side comes last in the product: a fifth faster, including the transposition.
        return torch.addmm(squares[:, None], about, self._chunk(start).mT, alpha=-2).mT.contiguous()

    def _means(self, index: Tensor, previous: Tensor) -> Tensor:
        if not self.looks or self._doubtful > len(self._x) / 2:  # groups lie very far apart
            self._about = None
            return _means_exactly(self._x, index, previous)
        K = len(previous)
        counts = torch.bincount(index, minlength=K).tolist()[:K]
        one_over = inverse(counts, like=previous)
        parts = [group_means(self._chunk(s), index[s : s + CHUNK], one_over) for s in self._starts()]
        about = sum(parts[1:], parts[0])[:K]
        means = about + self._center
        if not all(counts):
            occupied = torch.tensor(counts, device=means.device)[:, None] > 0
            before = previous - self._center if self._about is None else self._about
            about, means = torch.where(occupied, about, before), torch.where(occupied, means, previous)
        self._about = about
        return means

    def _starts(self) -> range:
        return range(0, max(len(self._x), 1), CHUNK)

    def _chunk(self, start: int) -> Tensor:
        if self._held != start:
            rows = self._x[start : start + CHUNK]
            self._centered = torch.sub(rows, self._center, out=self._memory[: len(rows)])
            self._held = start
        return self._centered


def _nearest_exactly(x: Tensor, centroids: Tensor) -> Tensor:
    """The index of each row's nearest centroid, (N,), by differences: equal centroids are equally far to the bit."""
    return torch.cdist(x, centroids, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1)


def _means_exactly(x: Tensor, index: Tensor, previous: Tensor) -> Tensor:
    """The means of the rows of each component, (K, D); the previous one's where there is no row."""
    R = one_hot(index, len(previous)).to(x.dtype)
    x = torch.where((index < len(previous))[:, None], x, 0.0)
    near = component_means(x, R)
    lost = component_means(x - near.index_select(0, index.clamp(max=len(previous) - 1)), R)
    return torch.where(R.sum(dim=0)[:, None] > 0, near + lost, previous)


def labelled(x: Tensor, labels: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Returns the labels' assignment as an index, (N,) int64, K where a row is not usable; and as R, (N, K).

    Args:
        x: (N, D) embeddings.
        labels: (N,) int64; those outside [0, K) make their row unusable.
        K: Number of components.
    """
    index = torch.where(usable_rows(x) & (labels >= 0) & (labels < K), labels, K)
    return index, one_hot(index, K).to(x.dtype)


def kmeans_plusplus(x: Tensor, K: int, *, generator: torch.Generator) -> Tensor:
    """Returns K rows of x, far from each other, to start k-means from: (K, D).

    Each next centroid is, of 32 rows drawn with probability in proportion to their squared distance from the centroids
    so far, the one that leaves the least of it. Where fewer than K rows differ, some centroids coincide; where there is
    no finite row, all are 0.

    Args:
        x: (N, D) embeddings, tensor or NumPy array; rows that are not finite are never drawn.
        K: Number of centroids.
        generator: The source of randomness, of which one number is drawn; the rows are the same on any device.

    Raises:
        TypeError: `x` is neither tensor nor array, or complex.
        ValueError: The shape is wrong, or `K` below 1.

    Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding" (2007), section 2.2, and its greedy variant
    in section 5.
    """
    x = as_embeddings(x, name="x")
    _check_count("K", K)
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"`generator` must be a torch.Generator, got {generator!r}.")
    if x.shape[0] == 0:
        return x.new_zeros(K, x.shape[1])
    # A stream of its own: where the data came from the generator's stream (one seed for everything), draws repeat the
    # very numbers that chose each row's component, and whole rounds propose rows of one component only.
    seed = torch.randint(2**62, (), generator=generator, device=generator.device)
    generator = torch.Generator(device="cpu").manual_seed(int(seed))
    rows = x
    usable = usable_rows(rows)
    x = torch.where(
        usable[:, None], rows.double() - middle_row(rows, usable), 0.0
    )  # float32 could round the spread of groups far apart away
    weight = usable.to(x.dtype)
    chosen = [_draw(weight, 1, generator)[0]]
    distance = _squared_distances(x, x[chosen[0]][None])[:, 0] * weight
    for _ in range(K - 1):
        # Rows drawn twice change nothing: where all distances are 0, any usable row does.
        candidates = _draw(torch.where(distance.sum() > 0, distance, weight), CANDIDATES, generator)
        remaining = torch.minimum(distance[:, None], _squared_distances(x, x[candidates]) * weight[:, None])
        best = torch.where(weight[candidates] > 0, remaining.sum(dim=0), torch.inf).argmin()
        chosen.append(candidates[best])
        distance = remaining[:, best]
    return torch.where(usable.any(), rows[torch.stack(chosen)], 0.0)


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}.")


def _squared_distances(x: Tensor, centroids: Tensor) -> Tensor:
    """Squared distances, (N, K)."""
    cross = x @ centroids.mT
    squares = x.square().sum(dim=1, keepdim=True) + centroids.square().sum(dim=1)
    return (squares - 2 * cross).clamp(min=0)


def _draw(weight: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices of up to `count` different rows, drawn in proportion to weight (N,): the first to ring of N alarm clocks.

    Efraimidis and Spirakis, "Weighted random sampling with a reservoir" (2006): no cumulative sum, which is not
    deterministic on CUDA.
    """
    uniform = torch.rand(weight.shape, generator=generator, device="cpu", dtype=torch.float64)
    ring = -torch.log1p(-uniform).to(weight.device) / weight
    return ring.topk(min(count, weight.shape[0]), largest=False).indices
