"""Who belongs where: responsibilities from labels and from k-means."""

import torch
from torch import Tensor

from mixture_core.inputs import as_embeddings, as_labels, as_tensor, usable_rows
from mixture_core.scatter import component_means, safe_divide

# Rows tried for each centroid of k-means++. With the customary 2 + log K, 7 of 50 random mixtures of 8 Gaussians whose
# means lie 14 standard deviations apart in 16 dimensions lost a component; with 32, none.
CANDIDATES = 32


def responsibilities_from_labels(labels: Tensor, K: int) -> Tensor:
    """Returns R, (N, K) float32: R_nk = 1 where label n is k; a row of zeros where it lies outside [0, K).

    Args:
        labels: (N,) integers, tensor or NumPy array.
        K: Number of components.

    Raises:
        TypeError: `labels` are no integers.
        ValueError: `labels` are not a vector.
    """
    labels = as_tensor(labels, name="labels")
    labels = as_labels(labels, N=labels.shape[0] if labels.ndim else 0, device=labels.device)
    return _one_hot(labels, K).to(torch.float32)


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
    start = as_embeddings(centroids, D=x.shape[1], name="centroids").to(x.dtype)
    if iterations < 1:
        raise ValueError(f"`iterations` must be at least 1, got {iterations}.")
    usable, center, x = _center(x)
    current = start - center
    for _ in range(iterations):
        R = torch.where(usable, _one_hot(_nearest(x, current), current.shape[0]).to(x.dtype), 0.0)
        occupied = R.sum(dim=0)[:, None] > 0
        current = torch.where(occupied, component_means(x, R), current)
    return R, torch.where(occupied, current + center, start)


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
    if K < 1:
        raise ValueError(f"`K` must be at least 1, got {K}.")
    if x.shape[0] == 0:
        return x.new_zeros(K, x.shape[1])
    # A stream of its own: where the data came from the generator's stream (one seed for everything), draws repeat the
    # very numbers that chose each row's component, and whole rounds propose rows of one component only.
    seed = torch.randint(2**62, (), generator=generator, device=generator.device)
    generator = torch.Generator(device="cpu").manual_seed(int(seed))
    usable, center, x = _center(x)
    weight = usable[:, 0].to(x.dtype)
    chosen = [_draw(weight, 1, generator)[0]]
    distance = _squared_distances(x, x[chosen[0]][None])[:, 0] * weight
    for _ in range(K - 1):
        # Rows drawn twice change nothing: where all distances are 0, any usable row does.
        candidates = _draw(torch.where(distance.sum() > 0, distance, weight), CANDIDATES, generator)
        remaining = torch.minimum(distance[:, None], _squared_distances(x, x[candidates]) * weight[:, None])
        best = remaining.sum(dim=0).argmin()
        chosen.append(candidates[best])
        distance = remaining[:, best]
    centroids = x[torch.stack(chosen)] + center
    return torch.where(usable.any(), centroids, 0.0)


def _one_hot(index: Tensor, K: int) -> Tensor:
    """Membership, (N, K) bool; false throughout where the index lies outside [0, K)."""
    return index[:, None] == torch.arange(K, device=index.device)


def _center(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows are usable, (N, 1); their mean, (D,); and x about that mean, with 0 in rows that are not usable.

    Distances from |c|^2 - 2 x.c lose all digits of embeddings far from 0. About the batch's own mean they do not, and
    unlike about the mean of the centroids they do not either while some centroids are left behind by a collapse.
    """
    usable = usable_rows(x)[:, None]
    center = safe_divide(torch.where(usable, x, 0.0).sum(dim=0), usable.sum(dim=0).to(x.dtype))
    return usable, center, torch.where(usable, x - center, 0.0)


def _nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """The index of each row's nearest centroid, (N,)."""
    return (centroids.square().sum(dim=1) - 2 * (x @ centroids.mT)).argmin(dim=1)


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
