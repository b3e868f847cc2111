"""Everything that knows of other ranks: which one is the main, and the exchange of rows between all."""

import os

import torch
import torch.distributed as dist
from torch import Tensor


def is_main_rank() -> bool:
    """Returns whether this process is rank 0: of the process group, or by the variable RANK before there is one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return int(os.environ.get("RANK") or 0) == 0


def in_process_group() -> bool:
    """Returns whether there are other ranks to exchange rows with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather_rows(x: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Returns the embeddings and the labels of all ranks, in the order of ranks.

    Every rank calls the same collectives whatever its batch: one of the shapes, and then, where there is any row at
    all, one of the embeddings and one of the labels, both padded to the largest batch.

    Args:
        x: (N, D) this rank's embeddings; N may differ between ranks and be 0.
        labels: (N,) int64, on all ranks or on none.

    Raises:
        ValueError: Ranks differ in D, or one has announced a fault; on every rank.
    """
    device = _exchange_device()
    shapes = _exchange_shapes([1, x.shape[0], x.shape[1]], device)
    _check_shapes(shapes)
    sizes = [N for _, N, _ in shapes]
    x_of_all = _gather_padded(x.to(device), sizes).to(x.device)
    return x_of_all, None if labels is None else _gather_padded(labels.to(device), sizes).to(x.device)


def announce_fault() -> None:
    """Takes this rank's part in `gather_rows` where its batch cannot be used, so that all raise and none hangs."""
    _exchange_shapes([0, 0, 0], _exchange_device())


def _exchange_device() -> torch.device:
    """Where the process group's collectives want their tensors."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _exchange_shapes(shape: list[int], device: torch.device) -> list[list[int]]:
    own = torch.tensor(shape, dtype=torch.int64, device=device)
    of_all = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(of_all, own)
    return [list(map(int, other)) for other in torch.stack(of_all).tolist()]


def _check_shapes(shapes: list[list[int]]) -> None:
    faulty = [rank for rank, (good, _, _) in enumerate(shapes) if not good]
    if faulty:
        raise ValueError(f"`update` must get a usable batch on every rank, but rank {faulty[0]} raised; see its error.")
    widths = [D for _, _, D in shapes]
    if len(set(widths)) > 1:
        raise ValueError(f"`embeddings` must have the same width D on every rank, got {widths} on ranks 0, 1, ....")


def _gather_padded(rows: Tensor, sizes: list[int]) -> Tensor:
    if not any(sizes):
        return rows
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    of_all = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(of_all, padded)
    return torch.cat([other[:size] for other, size in zip(of_all, sizes, strict=True)])


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
