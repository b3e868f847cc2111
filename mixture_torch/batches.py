"""From what a training loop hands in to one checked float32 batch: this rank's, or that of all ranks."""

from typing import Any

import torch
from torch import Tensor

from mixture_core.inputs import as_embeddings, as_labels
from mixture_torch.config import MixtureRuntimeConfig
from mixture_torch.distributed import announce_fault, gather_rows, in_process_group, local_rows

IGNORED_LABELS = (-1, -100)


def receive(
    config: MixtureRuntimeConfig, embeddings: Any, labels: Any, *, D: int | None
) -> tuple[Tensor, Tensor | None]:
    """Returns the batch to update from: float32 embeddings, and labels where responsibilities come from them.

    With `cross_rank`, it is that of all ranks, in rank order. Where one rank's batch is refused, all ranks raise.

    Args:
        config: The choices.
        embeddings: (N, D) of any real type, tensor or NumPy array.
        labels: (N,) integers; only looked at where responsibilities come from them.
        D: The width to insist on, None before the first batch.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: A shape or a label is wrong, here or on another rank.
    """
    exchanges = config.cross_rank and in_process_group()
    try:
        x = as_plain_embeddings(embeddings, D=D)
        labels = _receive_labels(labels, x, config.K) if config.uses_labels else None
    except (TypeError, ValueError):
        if exchanges:
            announce_fault()
        raise
    return gather_rows(x, labels) if exchanges else (x, labels)


def as_plain_embeddings(embeddings: Any, *, D: int | None = None) -> Tensor:
    """Returns this rank's embeddings as (N, D) float32, without whatever a subclass of Tensor adds to them.

    Args:
        embeddings: (N, D) of any real type, tensor or NumPy array.
        D: The width to insist on, if any.

    Raises:
        TypeError: No tensor or array, or no real numbers.
        ValueError: The shape is not (N, D).
    """
    return as_embeddings(local_rows(embeddings), D=D).to(torch.float32).as_subclass(Tensor)


def _receive_labels(value: Any, x: Tensor, K: int) -> Tensor:
    labels = as_labels(local_rows(value), N=len(x), device=x.device).as_subclass(Tensor)
    ignored = torch.isin(labels, torch.tensor(IGNORED_LABELS, device=x.device))
    wrong = labels[~ignored & ((labels < 0) | (labels >= K))]
    if len(wrong):
        raise ValueError(f"`labels` must be in [0, {K}), or -1 or -100 for a row to ignore, got {int(wrong[0])}.")
    return labels
