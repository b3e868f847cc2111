"""What a step needs to know of the ranks that hold the other rows of its batch: how to add something up over all."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

DIGIT = 8  # bits of a number that are looked at in one exchange


class Peers(NamedTuple):
    """The ranks that share a batch. Each of them calls `total` as often, and with the same shapes, as all others."""

    total: Callable[[Tensor], Tensor]  # the sum of a tensor over all ranks, the same to the bit on each
    rank: int  # this one, in the order of the rows
    world: int


def _itself(tensor: Tensor) -> Tensor:
    return tensor


ALONE = Peers(total=_itself, rank=0, world=1)


def nth_largest(values: Tensor, used: Tensor, n: Tensor, peers: Peers) -> Tensor:
    """Returns which of this rank's values is the n-th largest of all ranks', (N,) bool; false throughout on all others.

    Of equal values the first, in the order of ranks and rows, counts as the larger. Ranks exchange counts only, digit
    by digit of the numbers' bits: 256 for each 8 bits, and one per rank.

    Args:
        values: (N,) of this rank, at least 0 where used.
        used: (N,) bool; the others count for nothing.
        n: () int64, from 0 on.
        peers: The ranks.
    """
    # As integers, the bits of numbers that are not negative are in the order of the numbers.
    size = values.element_size()
    bits = values.view(torch.int32 if size == 4 else torch.int64).to(torch.int64)
    same = used
    for shift in range(8 * size - DIGIT, -1, -DIGIT):
        digits = torch.arange(2**DIGIT, device=values.device)
        digit = (bits >> shift) & (2**DIGIT - 1)
        counts = peers.total((same[:, None] & (digit[:, None] == digits)).sum(dim=0))
        above = counts.sum() - counts.cumsum(dim=0)
        found = (above <= n) & (n < above + counts)
        n = n - (above * found).sum()
        same = same & (digit == (digits * found).sum())
    everyone = torch.arange(peers.world, device=values.device)
    held = peers.total(same.sum() * (everyone == peers.rank))
    return same & (same.cumsum(dim=0) - 1 == n - (held * (everyone < peers.rank)).sum())
