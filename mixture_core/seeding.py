"""Chooses the centroids to start from: greedy k-means++."""

import torch
from torch import Tensor

from mixture_core.inputs import as_embeddings, check_count, middle_row, usable_rows

# Rows tried for each centroid. With the customary 2 + log K, 7 of 50 random mixtures of 8 Gaussians whose means lie 14
# standard deviations apart in 16 dimensions lost a component; with 32, none.
CANDIDATES = 32


def kmeans_plusplus(x: Tensor, K: int, *, generator: torch.Generator) -> Tensor:
    """Returns K rows of x that are far from each other, to start k-means from: (K, D).

    The first is drawn uniformly. For each of the others, 32 rows are drawn with probability in proportion to their
    squared distance from the centroids so far, and the one that lowers the sum of these distances most is kept. If
    fewer than K rows differ, some centroids coincide; if no row is usable, all are 0.

    Args:
        x: (N, D) embeddings, tensor or NumPy array; rows with a NaN, an infinity or an entry beyond 1.8e13 are ignored.
        K: Number of centroids.
        generator: Source of randomness. One number is drawn from it; the same rows are chosen on every device.

    Raises:
        TypeError: `x` is complex, or not a tensor or array; `K` is not an integer; `generator` is not a
            torch.Generator.
        ValueError: The shape is wrong, or `K` is below 1.

    Example:
        >>> import torch, mixture_core
        >>> x = torch.tensor([[0.0], [0.0], [5.0], [5.0], [9.0]])
        >>> sorted(mixture_core.kmeans_plusplus(x, 3, generator=torch.Generator().manual_seed(0)).flatten().tolist())
        [0.0, 5.0, 9.0]

    Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding" (2007), section 2.2, and its greedy variant
    in section 5.
    """
    x = as_embeddings(x, name="x")
    check_count("K", K)
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"`generator` must be a torch.Generator, got {generator!r}.")
    if x.shape[0] == 0:
        return x.new_zeros(K, x.shape[1])
    # A stream of its own: if the data were drawn from the generator's stream (one seed for everything), draws would
    # repeat the numbers that chose each row's component, and whole rounds would propose rows of one component only.
    seed = torch.randint(2**62, (), generator=generator, device=generator.device)
    generator = torch.Generator(device="cpu").manual_seed(int(seed))
    rows = x
    usable = usable_rows(rows)
    # In float64: float32 could round away the spread within groups that are far apart.
    x = torch.where(usable[:, None], rows.double() - middle_row(rows, usable), 0.0)
    weight = usable.to(x.dtype)
    chosen = [_draw(weight, 1, generator)[0]]
    distance = _squared_distances(x, x[chosen[0]][None])[:, 0] * weight
    for _ in range(K - 1):
        # Rows drawn twice do no harm: if all distances are 0, any usable row will do.
        candidates = _draw(torch.where(distance.sum() > 0, distance, weight), CANDIDATES, generator)
        remaining = torch.minimum(distance[:, None], _squared_distances(x, x[candidates]) * weight[:, None])
        best = torch.where(weight[candidates] > 0, remaining.sum(dim=0), torch.inf).argmin()
        chosen.append(candidates[best])
        distance = remaining[:, best]
    return torch.where(usable.any(), rows[torch.stack(chosen)], 0.0)


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
