"""From what a training loop hands in to one checked float32 batch: this rank's, or that of all ranks."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixture_core.inputs import as_embeddings, as_labels
from mixture_torch.config import MixtureRuntimeConfig
from mixture_torch.distributed import announce_fault, gather_rows, in_process_group, local_rows

IGNORED_LABELS = (-1, -100)


class Batch(NamedTuple):
    """What an update starts from."""

    x: Tensor  # (N, D) float32 embeddings
    labels: Tensor | None  # (N,) int64, where responsibilities come from labels
    wrong_label: Tensor | None  # () int64, one to ignore if none is wrong; where a label may be wrong that nobody saw


def receive(config: MixtureRuntimeConfig, embeddings: Any, labels: Any, *, D: int | None) -> Batch:
    """Returns the batch to update from: float32 embeddings, and labels where responsibilities come from them.

    With `cross_rank`, it is that of all ranks, in rank order. Where one rank's batch is refused, all ranks raise.
    Wrong labels on a GPU are not waited for, unless `cross_rank` has to wait anyway: they turn into labels to ignore,
    all of them, so that the step changes nothing, and `wrong_label` tells.

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
        labels, wrong_label = _receive_labels(labels, x, config.K) if config.uses_labels else (None, None)
        if wrong_label is not None and (exchanges or not x.is_cuda):
            refuse(int(wrong_label), config.K)
            wrong_label = None
    except (TypeError, ValueError):
        if exchanges:
            announce_fault()
        raise
    if exchanges:
        x, labels = gather_rows(x, labels)
    return Batch(x, labels, wrong_label)


def refuse(label: int, K: int, *, at: str = "") -> None:
    """Raises for a label that is wrong.

    Args:
        label: As in `Batch.wrong_label`.
        K: Number of components.
        at: When that was, if it is a while ago.

    Raises:
        ValueError: It is neither a component nor one to ignore.
    """
    if label not in IGNORED_LABELS:
        raise ValueError(
            f"`labels` must be in [0, {K}), or -1 or -100 for a row to ignore, got {label}{at and ' at '}{at}."
        )


def as_plain_embeddings(embeddings: Any, *, D: int | None = None) -> Tensor:
    """Returns this rank's embeddings as (N, D) float32, without whatever a subclass of Tensor adds to them.

    Args:
        embeddings: (N, D) of any real type, tensor or NumPy array.
        D: The width to insist on, if any.

    Raises:
        TypeError: No tensor or array, or no real numbers.
        ValueError: The shape is not (N, D).
    """
    return as_embeddings(local_rows(embeddings), D=D).to(torch.float32).as_subclass(Tensor).resolve_neg()


def _receive_labels(value: Any, x: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Labels, (N,) int64, and the first wrong one, (), or -1; where there is a wrong one all labels are -1."""
    labels = as_labels(local_rows(value), N=len(x), device=x.device).as_subclass(Tensor)
    wrong = (labels >= K) | ((labels < 0) & (labels != IGNORED_LABELS[0]) & (labels != IGNORED_LABELS[1]))
    if not len(labels):
        return labels, labels.new_full((), -1)
    first = wrong.to(torch.int8).argmax()[None]
    wrong_label = torch.where(wrong.gather(0, first), labels.gather(0, first), -1)[0]
    return torch.where(wrong.any(), -1, labels), wrong_label
