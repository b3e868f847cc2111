"""All collectives, and the choice of the rank that writes files."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

HEADER = 0x6D697874757265  # first word of each entry; another value means that a rank is in another collective
ERRORS = (ValueError, TypeError, MemoryError, OSError, Exception)


class Entries(NamedTuple):
    """What all ranks send each other before an update, whether their batches are usable or not: (W,) int64 each."""

    header: Tensor
    has_fault: Tensor
    N: Tensor
    D: Tensor
    digest: Tensor  # of what must be the same on all ranks
    waits: Tensor  # whether a rank waits for the entries of the others


class Ranks:
    """The ranks of a process group, which all make the same calls in the same order; None is the default group."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.world, self.rank = dist.get_world_size(group), dist.get_rank(group)
        if self.rank < 0:
            raise ValueError("`process_group` does not include this process, but `cross_rank` needs it to.")

    @cached_property
    def device(self) -> torch.device:
        """Device that the tensors of the group's collectives must be on."""
        if "nccl" in dist.get_backend(self._group):
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    @property
    def on_gpu(self) -> bool:
        """Whether collectives run on the GPU, so that the host need not wait for them."""
        return self.device.type != "cpu"

    def enter(self, *entry: int, doubts: list[Tensor]) -> Entries:
        """Returns the entries of all ranks; the host does not wait for a GPU.

        `entry` is that of this rank, without the header. A doubt, () int64, is at least 0 if this rank has a fault that
        the host has not seen yet.
        """
        own = torch.tensor([HEADER, *entry], dtype=torch.int64).to(self.device, non_blocking=True)
        for doubt in doubts:
            own[1] += doubt >= 0
        return Entries(*torch.stack(self._gather(own)).unbind(dim=1))

    def settle(self, entries: Entries, fault: Exception | None) -> list[int]:
        """Returns the size of each rank's batch, or raises the same error on every rank; waits for a GPU."""
        headers, faults, sizes, widths, digests, _ = (column.tolist() for column in entries)
        if (rank := next((rank for rank, header in enumerate(headers) if header != HEADER), None)) is not None:
            raise RuntimeError(
                f"Ranks are out of step: rank {rank} called another collective instead of `update`; call `update` "
                "equally often on every rank."
            )
        if any(faults):
            raise self._error_of(next(rank for rank, count in enumerate(faults) if count), fault) from fault
        if odd := _odd(widths):
            rank, most = odd
            D = widths[rank]
            raise ValueError(f"`embeddings` must have the same width D on every rank, {most}, got {D} on rank {rank}.")
        if odd := _odd(digests):
            raise ValueError(
                "`update` must be called on every rank with the same `step`, `views`, options, state_dict and number "
                f"of earlier updates, but one of these differs on rank {odd[0]}."
            )
        return sizes

    def gather(self, rows: Tensor, sizes: list[int]) -> Tensor:
        """Returns the rows of all ranks, (sum of sizes, ...), in the order of ranks."""
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
        """Returns the sum of a tensor over all ranks, identical on each."""
        whole = tensor.to(self.device, copy=True).contiguous()
        dist.all_reduce(whole, group=self._group)
        return whole.to(tensor.device)

    def _error_of(self, odd: int, fault: Exception | None) -> Exception:
        """Returns one rank's error for all ranks to raise; its own class and message may exist on that rank alone."""
        kind = next(error for error in ERRORS if fault is None or isinstance(fault, error))
        of_all = [(kind, "")] * self.world
        dist.all_gather_object(of_all, (kind, text_of(fault)), group=self._group)
        kind, text = of_all[odd]
        return kind(f"{text.rstrip('.')}, on rank {odd}.")


def is_main_rank(group: Any = None) -> bool:
    """Returns whether this process is rank 0: of the process group, or by the variable RANK before there is a group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(group) == 0
    rank = os.environ.get("RANK") or "0"
    try:
        return int(rank) == 0
    except ValueError:
        raise ValueError(
            f"The environment variable RANK must be an integer, got {rank!r}; correct it, or give `is_main`."
        ) from None


def other_ranks(group: Any = None, *, was_together: bool) -> Ranks | None:
    """Returns the ranks to exchange with, None if this process is alone; `was_together`: it was not alone before."""
    if dist.is_available() and dist.is_initialized():
        ranks = Ranks(group)
        return ranks if ranks.world > 1 else None
    if was_together:
        raise RuntimeError(
            "The process group of earlier updates has been destroyed, but `cross_rank` is on; to go on alone, load the "
            "state_dict into an estimator without it."
        )
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether an error means that memory ran out; on a CPU, torch has no class for it."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in text_of(error)


@contextmanager
def together() -> Iterator[None]:
    """Turns out-of-memory errors inside the block into RuntimeErrors, because no rank can leave an exchange midway."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):  # a rank that skipped the batch would mistake the next message of the others
            raise RuntimeError("`update` ran out of memory in the middle of an exchange with other ranks.") from error
        raise


def text_of(error: object) -> str:
    """Returns an error's message in one printable line, or the name of its class if it has no readable message."""
    try:
        text = "".join(char if char.isprintable() else "?" for char in " ".join(str(error).split()))
        return text or type(error).__name__
    except Exception:
        return type(error).__name__


def _odd(values: list[int]) -> tuple[int, int] | None:
    """The first rank with another value than most, and the value of most; None if all have the same."""
    usual = Counter(values).most_common(1)[0][0]
    return next(((rank, usual) for rank, value in enumerate(values) if value != usual), None)


def local_rows(x: object) -> object:
    """Returns this rank's rows of a DTensor as a plain tensor, and anything else unchanged."""
    if not hasattr(x, "to_local"):
        return x
    placements = x.placements  # type: ignore[attr-defined]  # a DTensor, whose module is slow to import
    if not all(placement.is_shard(0) or placement.is_replicate() for placement in placements):
        raise ValueError(f"`embeddings` must be sharded by rows or replicated, got a DTensor with {placements}.")
    return x.to_local()
