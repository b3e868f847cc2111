"""From what a training loop hands in to one checked float32 batch: this rank's, or that of all ranks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixture_core.inputs import as_embeddings, as_labels
from mixture_torch.config import MixtureRuntimeConfig
from mixture_torch.distributed import Entry, Ranks, local_rows, text_of

IGNORED_LABELS = (-1, -100)
FINE = -1  # the value of a doubt that nothing has come of


class Doubt(NamedTuple):
    """Something that may be wrong with a batch on a GPU, for which nobody has waited."""

    value: Tensor  # () int64, FINE if nothing is
    refuse: Callable[[int, str], None]  # raises, given the value, and when that was if it is a while ago


class Batch(NamedTuple):
    """What an update starts from."""

    x: Tensor  # (N, D) float32 embeddings to work on
    labels: Tensor | None  # (N,) int64, where responsibilities come from labels
    n_rows: int | Tensor  # of all ranks whose rows count
    everyone: Tensor  # the rows of all these ranks, if there has to be a start from them
    doubts: tuple[Doubt, ...] = ()


def receive(config: MixtureRuntimeConfig, embeddings: Any, labels: Any, *, D: int | None) -> Batch:
    """Returns this rank's batch: float32 embeddings, and labels where responsibilities come from them.

    Wrong labels on a GPU are not waited for: they turn into labels to ignore, all of them, so that the step changes
    nothing, and a doubt is left.

    Args:
        config: The choices.
        embeddings: (N, D) of any real type, tensor or NumPy array.
        labels: (N,) integers; only looked at where responsibilities come from them.
        D: The width to insist on, None before the first batch.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: A shape or a label is wrong.
    """
    x = as_plain_embeddings(embeddings, D=D)
    if not config.uses_labels:
        return Batch(x, None, len(x), x)
    labels, wrong = _receive_labels(labels, x, config.K)
    doubt = Doubt(wrong, partial(_refuse_label, config.K))
    if x.is_cuda:
        return Batch(x, labels, len(x), x, (doubt,))
    settle(doubt)
    return Batch(x, labels, len(x), x)


def exchange(
    config: MixtureRuntimeConfig, own: Callable[[], Batch], *, ranks: Ranks, digest: int, like: Tensor | None
) -> Batch:
    """Returns the batch of all ranks, in rank order; where they reduce, this rank's share of it.

    All ranks take part whatever becomes of their own batch, and where one of them cannot use its own, all raise its
    error. Ranks that reduce on GPUs do not wait for one another: they go on, to a step that then changes nothing on any
    of them, and a doubt is left.

    Args:
        config: The choices.
        own: Returns this rank's batch, or raises.
        ranks: The ranks.
        digest: Of what has to be the same on all of them.
        like: (K, D) means of the state, on this rank's device; None as long as there has to be a start.

    Raises:
        Exception: As `own` does, here or on another rank.
        ValueError: Ranks differ in D, options or state.
    """
    reduces = config.cross_rank == "reduce"
    waits = not reduces or like is None or not ranks.on_gpu or config.strict
    fault: Exception | None = None
    try:
        batch = own()
        if waits:
            for doubt in batch.doubts:
                settle(doubt)
    except Exception as error:  # whatever it is, the others are waiting
        fault = MemoryError(text_of(error)) if is_out_of_memory(error) else error
        nothing = torch.zeros(0, 1) if like is None else like[:0]
        batch = Batch(nothing, torch.zeros(0, dtype=torch.int64, device=nothing.device), 0, nothing)
    N, D = batch.x.shape
    entries = ranks.enter(Entry(N, D, digest, waits, fault), [doubt.value for doubt in batch.doubts if not waits])
    if not waits:
        return _unseen(batch, entries, fault)
    try:
        sizes = ranks.settle(entries, fault)
    except Exception as error:  # whatever a rank has entered with: who does not wait is adding up already
        going_on = entries[entries[:, 4] == 0]
        if not len(going_on):
            raise
        nothing = batch.x.new_zeros(0, int(going_on[0, 2]))
        return _unseen(Batch(nothing, None if batch.labels is None else batch.labels[:0], 0, nothing), entries, error)
    with together():
        if reduces:
            everyone = batch.x if config.uses_labels or like is not None else ranks.gather(batch.x, sizes)
            return Batch(batch.x, batch.labels, sum(sizes), everyone)
        x, labels = ranks.gather(batch.x, sizes), batch.labels
        return Batch(x, None if labels is None else ranks.gather(labels, sizes), len(x), x)


def _unseen(batch: Batch, entries: Tensor, fault: Exception | None) -> Batch:
    """The share of a batch that may be none, where nobody has looked at what the ranks have entered."""
    wrong = (entries[:, 0] > 0) | (entries[:, 3] != entries[0, 3])
    odd = torch.where(wrong.any(), wrong.to(torch.int8).argmax(), FINE)
    x = torch.where(wrong.any(), torch.nan, batch.x)  # nobody's rows count
    own = batch.doubts if fault is None else (Doubt(odd, partial(_raise, fault)),)
    return Batch(x, batch.labels, entries[:, 1].sum(), x, (*own, Doubt(odd, _refuse_rank)))


def settle(doubt: Doubt, *, at: str = "") -> None:
    """Raises where something has come of a doubt, whose value is there.

    Args:
        doubt: It.
        at: When that was, if it is a while ago.

    Raises:
        Exception: Whatever it was about.
    """
    if (value := int(doubt.value)) != FINE:
        doubt.refuse(value, at and f" at {at}")


def _refuse_label(K: int, label: int, at: str) -> None:
    raise ValueError(f"`labels` must be in [0, {K}), or -1 or -100 for a row to ignore, got {label}{at}.")


def _refuse_rank(rank: int, at: str) -> None:
    raise ValueError(
        f"`update` must get a usable batch, with the same options and updates behind it, on every rank, but rank "
        f"{rank} had none{at}; see its error."
    )


def _raise(error: Exception, _: int, __: str) -> None:
    raise error


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether there was too little memory, for which torch has a class on GPUs only."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in text_of(error)


@contextmanager
def together() -> Iterator[None]:
    """Has a want of memory in its block raise as something else: ranks that exchange cannot be left by one of them.

    Raises:
        RuntimeError: Memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):  # who went on would take what the others still send for what comes next
            raise RuntimeError("`update` ran out of memory in the middle of an exchange with other ranks.") from error
        raise


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
    """Labels, (N,) int64, and the first wrong one, (), or FINE; where there is a wrong one all labels are -1."""
    labels = as_labels(local_rows(value), N=len(x), device=x.device).as_subclass(Tensor)
    wrong = (labels >= K) | ((labels < 0) & (labels != IGNORED_LABELS[0]) & (labels != IGNORED_LABELS[1]))
    if not len(labels):
        return labels, labels.new_full((), FINE)
    first = wrong.to(torch.int8).argmax()[None]
    wrong_label = torch.where(wrong.gather(0, first), labels.gather(0, first), FINE)[0]
    return torch.where(wrong.any(), -1, labels), wrong_label
