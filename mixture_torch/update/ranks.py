"""Everything that knows of other ranks: which one is the main, and all that goes between them."""

import os
import zlib
from collections import Counter
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

MESSAGE = 1000  # bytes of an error that other ranks are told
ERRORS = (ValueError, TypeError, MemoryError, OSError, Exception)


class Entry(NamedTuple):
    """What every rank tells all others before an update, whatever became of its batch."""

    N: int
    D: int
    digest: int  # of what has to be the same on all ranks
    waits: bool  # for the others' entries
    fault: Exception | None = None


class Ranks:
    """The ranks of a process group, which all make the same calls in the same order.

    Args:
        group: None is the default one.

    Raises:
        ValueError: This process is not in the group.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self.world, self.rank = dist.get_world_size(group), dist.get_rank(group)
        if self.rank < 0:
            raise ValueError("`process_group` must hold this process where `cross_rank` is on, got one without it.")

    @cached_property
    def device(self) -> torch.device:
        """Where the group's collectives want their tensors."""
        if "nccl" in dist.get_backend(self._group):
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    @property
    def on_gpu(self) -> bool:
        """Whether the ranks exchange what is on GPUs, without a host's waiting."""
        return self.device.type != "cpu"

    def enter(self, entry: Entry, doubts: list[Tensor]) -> Tensor:
        """Returns the entries of all ranks, as `settle` reads them, (W, 5) int64; on a GPU nobody waits for them.

        Args:
            entry: This rank's.
            doubts: Each () int64, not negative where there is a fault that nobody has seen yet.
        """
        values = [entry.fault is not None, entry.N, entry.D, entry.digest, entry.waits]
        own = torch.tensor(values, dtype=torch.int64).to(self.device, non_blocking=True)
        for doubt in doubts:
            own[0] += doubt >= 0
        return torch.stack(self._gather(own))

    def settle(self, entries: Tensor, fault: Exception | None) -> list[int]:
        """Returns the sizes of all ranks' batches, where each is fit for an exchange; waits for a GPU.

        Args:
            entries: From `enter`.
            fault: This rank's.

        Raises:
            Exception: A rank has entered with a fault, which is raised on every rank.
            ValueError: Ranks differ in D, in options or in state; on every rank.
        """
        faults, sizes, widths, digests, _ = zip(*entries.tolist(), strict=True)
        if any(faults):
            raise self._error_of(faults.index(1), fault) from fault
        if (rank := _odd(widths)) is not None:
            most, D = _usual(widths), widths[rank]
            raise ValueError(f"`embeddings` must have the same width D on every rank, {most}, got {D} on rank {rank}.")
        if (rank := _odd(digests)) is not None:
            raise ValueError(
                "`update` must be called on every rank with the same `step`, on an estimator of the same options that "
                f"has as many updates and the same state_dict behind it, got another of these on rank {rank}."
            )
        return list(sizes)

    def gather(self, rows: Tensor, sizes: list[int]) -> Tensor:
        """Returns the rows of all ranks, in the order of ranks.

        Args:
            rows: (N, ...) this rank's; N may differ between ranks and be 0.
            sizes: N of every rank.
        """
        if not any(sizes):
            return rows
        padded = rows.new_zeros(max(sizes), *rows.shape[1:], device=self.device)
        padded[: len(rows)] = rows
        of_all = self._gather(padded)
        return torch.cat([other[:size] for other, size in zip(of_all, sizes, strict=True)]).to(rows.device)

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        of_all = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(of_all, tensor, group=self._group)
        return of_all

    def total(self, tensor: Tensor) -> Tensor:
        """Returns the sum of a tensor over all ranks, the same to the bit on each."""
        whole = tensor.to(self.device, copy=True).contiguous()
        dist.all_reduce(whole, group=self._group)
        return whole.to(tensor.device)

    def _error_of(self, odd: int, fault: Exception | None) -> Exception:
        """The error of one rank, for all to raise: which of ERRORS it is, and its text, go around in bytes."""
        kind = next(n for n, error in enumerate(ERRORS) if fault is None or isinstance(fault, error))
        own = bytes([kind]) + text_of(fault).encode(errors="replace")[:MESSAGE]
        padded = torch.tensor(list(own.ljust(1 + MESSAGE, b"\0")), dtype=torch.uint8)
        kind, *text = self._gather(padded.to(self.device))[odd].tolist()
        message = bytes(text).rstrip(b"\0").decode(errors="replace").rstrip(".")
        return ERRORS[kind](f"{message}, on rank {odd}.")


def is_main_rank(group: Any = None) -> bool:
    """Returns whether this process is rank 0: of the process group, or by the variable RANK before there is one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(group) == 0
    return int(os.environ.get("RANK") or 0) == 0


def other_ranks(group: Any = None) -> Ranks | None:
    """Returns the ranks to exchange with; None where there are none.

    Args:
        group: The process group, None for the default one.

    Raises:
        ValueError: This process is not in the group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    ranks = Ranks(group)
    return ranks if ranks.world > 1 else None


def text_of(error: object) -> str:
    """Returns what an error says, in one line; its class where it cannot say it."""
    try:
        return " ".join(str(error).split())
    except Exception:
        return type(error).__name__


def digest(*values: object) -> int:
    """Returns a number that is the same on two ranks where these values are."""
    return zlib.crc32(repr(values).encode())


def _usual(values: tuple[int, ...]) -> int:
    """What most ranks have."""
    return Counter(values).most_common(1)[0][0]


def _odd(values: tuple[int, ...]) -> int | None:
    """The first rank that has another value than most, None where all have the same."""
    return next((rank for rank, value in enumerate(values) if value != _usual(values)), None)


def local_rows(x: object) -> object:
    """Returns this rank's rows of a DTensor as a plain tensor, and anything else unchanged.

    Raises:
        ValueError: This rank holds no whole rows.
    """
    if not hasattr(x, "to_local"):
        return x
    placements = x.placements  # type: ignore[attr-defined]  # a DTensor, whose module is slow to import
    if not all(placement.is_shard(0) or placement.is_replicate() for placement in placements):
        raise ValueError(f"`embeddings` must be sharded by rows or replicated, got a DTensor with {placements}.")
    return x.to_local()
