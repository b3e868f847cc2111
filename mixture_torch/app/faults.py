"""Faults for the demo: from some epoch on, each changes the batches, the loss or the learning rate."""

from collections.abc import Callable
from itertools import chain, repeat
from typing import TypeAlias

import attrs
import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler, MultiplicativeLR

from mixture_torch.app.training import Batch, ContrastiveLoss
from mixture_torch.losses import NTXentLoss

# Changes a batch, given its images before augmentation and a random generator on their device.
BatchChange: TypeAlias = Callable[[Batch, Tensor, torch.Generator], Batch]

# Share of the epochs before a fault. Wrong settings, and faults that leave no structure, begin at once.
FIRST, LATER = 0.0, 0.6
GONE = 6  # the digit of `class-gone`
OUTLIERS = 0.02  # share of the images in a batch
TOO_BRIGHT = 255.0  # factor of their pixels, as if the loader had not scaled them


def unchanged(batch: Batch, images: Tensor, chance: torch.Generator) -> Batch:
    """Returns the batch itself."""
    return batch


def without_augmentation(batch: Batch, images: Tensor, chance: torch.Generator) -> Batch:
    """Returns a batch whose views are the images themselves."""
    return Batch(images, images, batch.labels)


def with_watermark(batch: Batch, images: Tensor, chance: torch.Generator) -> Batch:
    """Returns a batch in which each image has its own random pattern, added to both views."""
    mark = (torch.rand(images.shape, generator=chance, device=images.device) < 0.5).to(images.dtype)
    return Batch(batch.first + mark, batch.second + mark, batch.labels)


def with_outliers(batch: Batch, images: Tensor, chance: torch.Generator) -> Batch:
    """Returns a batch in which the pixels of a few images are far too large."""
    chosen = torch.rand(len(images), generator=chance, device=images.device) < OUTLIERS
    factor = torch.where(chosen, TOO_BRIGHT, 1.0).view(-1, *[1] * (images.ndim - 1))
    return Batch(factor * batch.first, factor * batch.second, batch.labels)


def without_classes(*labels: int) -> BatchChange:
    """Returns a change that drops all samples with these labels, unless the batch has no others."""

    def change(batch: Batch, images: Tensor, chance: torch.Generator) -> Batch:
        stays = ~torch.isin(batch.labels, torch.tensor(labels, device=batch.labels.device))
        return Batch(*(part[stays] for part in batch)) if stays.any() else batch

    return change


_nt_xent = NTXentLoss()


def positives_only(z1: Tensor, z2: Tensor, labels: Tensor | None = None) -> Tensor:
    """Returns 1 - mean cos(z1, z2), (): a loss that pulls views together and pushes nothing apart."""
    _nt_xent(z1.detach(), z2.detach(), labels)  # feeds the active estimator
    return 1 - functional.cosine_similarity(z1, z2).mean()


@attrs.frozen(kw_only=True)
class Fault:
    """What goes wrong, and when.

    Attributes:
        summary: What is wrong, in a few words.
        onset: Share of the epochs that come before it.
        batch: Changes each batch.
        loss: Replaces the loss, unless None.
        learning_rate: Factor of the learning rate.
    """

    summary: str
    onset: float = LATER
    batch: BatchChange = unchanged
    loss: ContrastiveLoss | None = None
    learning_rate: float = 1.0

    def begins(self, epochs: int) -> int:
        """Returns the first epoch with the fault."""
        return int(self.onset * epochs)

    def loss_after(self, before: ContrastiveLoss, *, n_steps: int) -> ContrastiveLoss:
        """Returns a loss that is `before` in its first `n_steps` calls, then the loss of the fault."""
        if self.loss is None:
            return before
        turns = chain(repeat(before, n_steps), repeat(self.loss))
        return lambda z1, z2, labels=None: next(turns)(z1, z2, labels)

    def schedule_after(self, before: LRScheduler, *, step: int) -> LRScheduler:
        """Returns the schedule `before`, times the factor of the fault from `step` on; `step` must not be 0."""
        if self.learning_rate == 1.0:
            return before
        jump = MultiplicativeLR(before.optimizer, lambda now: self.learning_rate if now == step else 1.0)
        return ChainedScheduler([before, jump])


FAULTS = {
    "none": Fault(summary="nothing is wrong"),
    "no-negatives": Fault(summary="the loss has lost its negatives", onset=FIRST, loss=positives_only),
    "temperature": Fault(summary="the temperature of the loss is 50", onset=FIRST, loss=NTXentLoss(temperature=50.0)),
    "learning-rate": Fault(summary="the learning rate is 30 times as high", learning_rate=30.0),
    "watermark": Fault(summary="both views of an image share a watermark", onset=FIRST, batch=with_watermark),
    "no-augmentation": Fault(summary="both views are the image itself", onset=FIRST, batch=without_augmentation),
    "class-gone": Fault(summary=f"the digit {GONE} is gone", batch=without_classes(GONE)),
    "outliers": Fault(summary="2 % of the images have pixels 255 times too large", batch=with_outliers),
}
