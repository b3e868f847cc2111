"""Makes long series short enough to draw, without losing a spike."""

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def buckets(step: Array, values: Array, n: int) -> tuple[Array, Array, Array]:
    """Returns the first step, smallest value and largest value of each of at most n buckets.

    The sizes of buckets differ by at most one row. A series of at most n rows is returned as it is.

    Args:
        step: (S,) where the rows lie on the axis.
        values: (S,) or (S, K). NaN is ignored, unless a bucket has nothing else.
        n: Largest number of buckets, at least 1.

    Returns:
        `step`, (n,), and `low` and `high`, (n,) or (n, K).

    Example:
        >>> import numpy as np
        >>> buckets(np.arange(6), np.array([1.0, 9.0, 1.0, 1.0, np.nan, 2.0]), 2)
        (array([0, 3]), array([1., 1.]), array([9., 2.]))
    """
    S = len(step)
    if n >= S:
        return step, values, values
    first = np.arange(n) * S // n
    return step[first], np.fmin.reduceat(values, first, axis=0), np.fmax.reduceat(values, first, axis=0)


def least_even(step: Array, pi: Array, n: int) -> tuple[Array, Array]:
    """Returns the row with the least even weights in each bucket, so that no dead component is lost.

    Args:
        step: (S,) where the rows lie on the axis.
        pi: (S, K) weights.
        n: Largest number of buckets, at least 1.

    Returns:
        The steps and weights of these rows, (n,) and (n, K).
    """
    S = len(step)
    if n >= S:
        return step, pi
    uneven = np.nan_to_num(np.einsum("sk,sk->s", pi, pi))
    first = np.arange(n + 1) * S // n
    rows = [a + int(uneven[a:b].argmax()) for a, b in itertools.pairwise(first.tolist())]
    return step[rows], pi[rows]
