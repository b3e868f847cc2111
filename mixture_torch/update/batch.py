"""Checks the arguments of `update` and makes one float32 batch of them, of this rank or of all ranks."""

import zlib
from collections.abc import Callable
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixture_core.config import shown
from mixture_core.inputs import as_embeddings, as_labels
from mixture_torch.config import MixtureRuntimeConfig
from mixture_torch.update.ranks import HEADER, Entries, Ranks, is_out_of_memory, local_rows, text_of, together

IGNORED_LABELS = (-1, -100)
FINE = -1  # value of a doubt if nothing is wrong


class Doubt(NamedTuple):
    """A possible fault of a batch on a GPU, which the host will check later without waiting."""

    value: Tensor  # () int64, FINE if nothing is wrong
    error: Callable[[int, str], Exception]  # of the value and the step (" at step 3", or "" if it is this one)


class Batch(NamedTuple):
    """The rows that an update works on."""

    x: Tensor  # (N, D) float32 embeddings
    labels: Tensor | None  # (N,) int64 if responsibilities come from labels
    n_rows: int | Tensor  # rows of all ranks that count
    everyone: Tensor  # (M, D) the rows of all ranks if means have to be seeded from them, otherwise x
    doubts: tuple[Doubt, ...] = ()
    sizes: tuple[int, ...] = ()  # of the ranks' parts of x if rows n and n + size / 2 of each are views of one sample

    def by_view(self, values: Tensor) -> Tensor:
        """Returns the rows of a tensor in another order: the first views of all samples, then all second views."""
        if len(self.sizes) == 1:
            return values
        parts = [part.tensor_split(2) for part in values.split_with_sizes(self.sizes)]
        return torch.cat([*(first for first, _ in parts), *(second for _, second in parts)])


def receive(config: MixtureRuntimeConfig, embeddings: Any, labels: Any, *, D: int | None, views: int) -> Batch:
    """Returns this rank's batch: float32 embeddings, and labels if responsibilities come from them.

    The host does not wait to see labels on a GPU. If one is wrong, all labels of the batch become -1, so that the step
    changes nothing, and the batch carries a doubt. `D` is the width to insist on, None before the first batch.
    """
    _refuse_without_values("embeddings", embeddings)
    x = as_plain_embeddings(embeddings, D=D)
    if views == 2 and len(x) % 2:
        raise ValueError(
            f"`embeddings` must have an even number of rows with views=2, since rows n and n + N/2 are views of one "
            f"sample, got {len(x)}."
        )
    sizes = (len(x),) if views == 2 else ()
    if not config.uses_labels:
        return Batch(x, None, x.shape[0], x, sizes=sizes)
    _refuse_without_values("labels", labels)
    labels, wrong = _receive_labels(labels, x, config.K)
    doubt = Doubt(wrong, partial(_label_error, config.K))
    if not x.is_cuda:
        settle(doubt)
    return Batch(x, labels, len(x), x, (doubt,), sizes)


def exchange(
    config: MixtureRuntimeConfig, own: Callable[[], Batch], *, ranks: Ranks, same: object, like: Tensor | None
) -> Batch:
    """Returns the batch of all ranks in rank order; with `cross_rank: reduce`, this rank's share of it.

    Every rank takes part, whether its own batch is usable or not, and if one is not, all raise the same error. Ranks
    that reduce on GPUs do not wait for one another: if a batch is not usable, they go on to a step that changes nothing
    on any rank, and the batch carries a doubt. `own` returns this rank's batch or raises, `same` must not differ
    between ranks, and `like` holds the means of the state, (K, D), or None if means have to be seeded.
    """
    reduces = config.cross_rank == "reduce"
    waits = not reduces or like is None or not ranks.on_gpu or config.strict
    fault: Exception | None = None
    try:
        batch = own()
        if waits:
            for doubt in batch.doubts:
                settle(doubt)
    except Exception as error:  # any: the other ranks are waiting
        fault = MemoryError(text_of(error)) if is_out_of_memory(error) else error
        batch = _without_rows(torch.zeros(0, 1) if like is None else like[:0])
    digest = zlib.crc32(repr(same).encode())
    doubts = [] if waits else [doubt.value for doubt in batch.doubts]
    entries = ranks.enter(fault is not None, *batch.x.shape, digest, waits, doubts=doubts)
    if not waits:
        return _unseen(batch, entries, fault)
    try:
        sizes = ranks.settle(entries, fault)
    except Exception as error:
        # Ranks that did not wait are already in the all-reduce: take part.
        others = entries.D[(entries.waits == 0) & (entries.header == HEADER)]
        if not len(others):
            raise
        return _unseen(_without_rows(batch.x.new_zeros(0, int(others[0]))), entries, error)
    with together():
        if reduces:
            everyone = batch.x if config.uses_labels or like is not None else ranks.gather(batch.x, sizes)
            return batch._replace(n_rows=sum(sizes), everyone=everyone, doubts=())
        x, labels = ranks.gather(batch.x, sizes), batch.labels
        labels = None if labels is None else ranks.gather(labels, sizes)
        return Batch(x, labels, len(x), x, sizes=tuple(sizes) if batch.sizes else ())


def _without_rows(x: Tensor) -> Batch:
    return Batch(x, torch.zeros(0, dtype=torch.int64, device=x.device), 0, x)


def _unseen(batch: Batch, entries: Entries, fault: Exception | None) -> Batch:
    """Returns this rank's share of a batch; if the entry of any rank is wrong, no row of any rank counts."""
    wrong = (entries.header != HEADER) | (entries.has_fault > 0) | (entries.digest != entries.digest[0])
    odd = torch.where(wrong.any(), wrong.to(torch.int8).argmax(), FINE)
    x = torch.where(wrong.any(), torch.nan, batch.x)
    own = batch.doubts if fault is None else (Doubt(odd, lambda *_: fault),)
    return Batch(x, batch.labels, entries.N.sum(), x, (*own, Doubt(odd, _rank_error)), batch.sizes)


def settle(doubt: Doubt, *, at: str = "") -> None:
    """Raises the error of a doubt if its value, which must have arrived, confirms it; `at` may be " at step 3"."""
    if (value := int(doubt.value)) != FINE:
        raise doubt.error(value, at)


def as_views(views: int) -> int:
    """Returns `views` if it is an integer, 1 or 2."""
    if isinstance(views, bool) or not isinstance(views, Integral) or views not in (1, 2):
        raise ValueError(f"`views` must be 1 or 2, got {shown(views)}.")
    return int(views)


def ignored(count: int, N: int, at: str = "") -> str:
    """Returns a sentence that counts ignored rows, without its full stop."""
    return f"{count} of {N} rows were ignored{at} (NaN, infinite, beyond 1.8e13, or label -1 or -100)"


def _refuse_without_values(name: str, value: Any) -> None:
    """Refuses tensors of vmap and of fake tensor modes, which would put no numbers, or too many, into the state."""
    kind = ""
    if isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value):
        kind = "a batched one; call it outside of torch.func.vmap"
    elif torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) or hasattr(value, "fake_mode"):
        kind = "a fake one; call it outside of FakeTensorMode"  # the class of fake tensors is slow to import
    if kind:
        raise TypeError(f"`{name}` must be a tensor that holds the numbers of one batch in `update`, got {kind}.")


def _label_error(K: int, label: int, at: str) -> ValueError:
    return ValueError(f"`labels` must be in [0, {K}), or -1 or -100 for a row to ignore, got {label}{at}.")


def _rank_error(rank: int, at: str) -> ValueError:
    return ValueError(f"Rank {rank} refused its batch{at}, or its options or updates differ; see its own error.")


def as_plain_embeddings(embeddings: Any, *, D: int | None = None) -> Tensor:
    """Returns this rank's embeddings as a plain (N, D) float32 tensor, whatever subclass of Tensor they are."""
    if type(embeddings) is not Tensor:
        embeddings = local_rows(embeddings)
    x = as_embeddings(embeddings, D=D).to(torch.float32)
    if type(x) is not Tensor:
        x = x.as_subclass(Tensor)
    return x.resolve_neg() if x.is_neg() else x


def _receive_labels(value: Any, x: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Labels, (N,) int64, all of them -1 if one is wrong; and the first wrong one or FINE, ()."""
    labels = as_labels(local_rows(value), N=len(x), device=x.device).as_subclass(Tensor)
    wrong = (labels >= K) | ((labels < 0) & (labels != IGNORED_LABELS[0]) & (labels != IGNORED_LABELS[1]))
    if not len(labels):
        return labels, labels.new_full((), FINE)
    first = wrong.to(torch.int8).argmax()[None]
    wrong_label = torch.where(wrong.gather(0, first), labels.gather(0, first), FINE)[0]
    return torch.where(wrong.any(), -1, labels), wrong_label
