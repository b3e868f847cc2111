"""Who belongs where: responsibilities from labels and from k-means."""

import torch
from torch import Tensor

from mixture_core.inputs import as_embeddings, as_labels, as_tensor, center_rows
from mixture_core.scatter import component_means

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
        ValueError: `labels` are not a vector, or `K` is below 1.
    """
    _check_count("K", K)
    labels = as_tensor(labels, name="labels")
    if labels.ndim != 1:
        raise ValueError(f"`labels` must have shape (N,), got {tuple(labels.shape)}.")
    labels = as_labels(labels, N=labels.shape[0], device=labels.device)
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
    start = as_embeddings(centroids, D=x.shape[1], name="centroids", rows="K").to(x.dtype)
    if start.shape[0] < 1:
        raise ValueError(f"`centroids` must have shape (K, {x.shape[1]}), K at least 1, got {tuple(start.shape)}.")
    _check_count("iterations", iterations)
    usable, center, x = center_rows(x)
    current, moved = start - center, torch.zeros_like(start[:, :1], dtype=torch.bool)
    for _ in range(iterations):
        R = torch.where(usable, _one_hot(_nearest(x, current), current.shape[0]).to(x.dtype), 0.0)
        occupied = R.sum(dim=0)[:, None] > 0
        current, moved = torch.where(occupied, component_means(x, R), current), moved | occupied
    return R, torch.where(moved, current + center, start)


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
    usable, _, x = center_rows(rows)
    weight = usable[:, 0].to(x.dtype)
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


def _one_hot(index: Tensor, K: int) -> Tensor:
    """Membership, (N, K) bool; false throughout where the index lies outside [0, K)."""
    return index[:, None] == torch.arange(K, device=index.device)


def _nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """The index of each row's nearest centroid, (N,)."""
    centroids = centroids.detach()
    squares = centroids.square().sum(dim=1)
    nearest = (squares - 2 * (x.detach() @ centroids.mT)).argmin(dim=1)
    # Which of several equal centroids wins is up to the product's rounding; it has to be the first.
    first = (squares[:, None] == squares).to(torch.int8).argmax(dim=1)
    equal = (centroids.index_select(0, first) == centroids).all(dim=1)
    return torch.where(equal, first, torch.arange(len(squares), device=x.device)).gather(0, nearest)


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
