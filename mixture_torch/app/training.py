"""A contrastive training loop with mixture diagnostics, on one process or on several."""

import importlib
import inspect
import os
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mixture_torch.context import activate
from mixture_torch.estimator import MixtureStats
from mixture_torch.files.shards import save


class Batch(NamedTuple):
    """Two views of each of N samples."""

    first: Tensor  # (N, ...) one view
    second: Tensor  # (N, ...) the other view of the same samples, in the same order
    labels: Tensor  # (N,) integers, for an estimator that uses labels


class TrainingStep(NamedTuple):
    """A step that has been taken."""

    step: int  # counted from 0 over all epochs
    epoch: int  # counted from 0
    loss: Tensor  # () of this rank's batch, before the step


class Start(NamedTuple):
    """Where a run begins or resumes."""

    epoch: int  # completed epochs
    step: int  # completed steps


BEGINNING = Start(epoch=0, step=0)


class ContrastiveLoss(Protocol):
    """A loss on two views that feeds the active estimator, such as `NTXentLoss`."""

    def __call__(self, z1: Tensor, z2: Tensor, labels: Tensor | None = None) -> Tensor:
        """Returns the loss, ()."""


def train(
    model: nn.Module,
    epochs: Iterable[Iterable[Batch]],
    *,
    loss: ContrastiveLoss,
    optimizer: Optimizer,
    schedule: LRScheduler,
    estimator: MixtureStats,
    checkpoint: Path | None = None,
    start: Start = BEGINNING,
) -> Iterator[TrainingStep]:
    """Yields each step after it has been taken and logged; a step is taken when the caller asks for it.

    A run that is killed at any instant and resumed with `restore` ends with the same bits as an uninterrupted run, if
    the number of ranks stays the same.

    Args:
        model: Maps views to embeddings (N, D); trained in place.
        epochs: The batches of each epoch, from the first epoch on even if the run is resumed.
        loss: Of the embeddings of both views.
        optimizer: Of the model's parameters.
        schedule: Of the optimizer's learning rate; advances at each step.
        estimator: Active only while the loss is computed.
        checkpoint: File to resume from, written after each epoch; None writes none, as on all ranks but rank 0.
        start: From `restore`.
    """
    model.train()
    step = start.step
    for epoch, batches in enumerate(epochs):
        if epoch < start.epoch:
            deque(batches, maxlen=0)  # drawn, so that the random numbers continue where they stopped
            continue
        for batch in batches:
            # One pass for both views: under DDP a second would change the buffers that the first still needs.
            z1, z2 = model(torch.cat([batch.first, batch.second])).chunk(2)
            with activate(estimator, step=step):
                value = loss(z1, z2, batch.labels)
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]  # torch leaves it without annotations
            optimizer.step()
            schedule.step()
            estimator.log_step(step=step, epoch=epoch)
            yield TrainingStep(step, epoch, value.detach())
            step += 1
        estimator.flush()  # first: steps that a checkpoint counts as done must be on disk
        if checkpoint is not None:
            parts = _parts(model, optimizer, schedule, estimator)
            states = {name: part.state_dict() for name, part in parts.items()}
            save(checkpoint, {**states, "epoch": epoch + 1, "step": step})


def restore(
    checkpoint: Path, *, model: nn.Module, optimizer: Optimizer, schedule: LRScheduler, estimator: MixtureStats
) -> Start:
    """Loads a checkpoint into all parts of a run and returns where the run resumes.

    Args:
        checkpoint: File written by `train`, on any device and any number of ranks. Without it the run begins anew.
        model: The model that `train` will be given.
        optimizer: Of the model's parameters.
        schedule: Of the optimizer's learning rate.
        estimator: Its log is resumed too.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is no checkpoint of these parts; some of them may have been changed.
    """
    if not checkpoint.exists():
        estimator.load_state_dict(estimator.state_dict())  # its next row supersedes those already logged
        return BEGINNING
    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        for name, part in _parts(model, optimizer, schedule, estimator).items():
            part.load_state_dict(saved[name])
        return Start(epoch=saved["epoch"], step=saved["step"])
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch raises many kinds of errors for files of another format
        raise ValueError(
            f"`{checkpoint}` is not a checkpoint of this run; move it away to start the run from the beginning."
        ) from error


def _parts(model: nn.Module, optimizer: Optimizer, schedule: LRScheduler, estimator: MixtureStats) -> dict[str, Any]:
    """Returns the parts of a checkpoint, with the model outside DDP so that any number of processes can load it."""
    alone = model.module if isinstance(model, DistributedDataParallel) else model
    return {"model": alone, "optimizer": optimizer, "schedule": schedule, "mixture": estimator}


class Place(NamedTuple):
    """The rank of this process, and the number of processes."""

    rank: int  # 0 is the main process
    world: int  # number of processes


def current_place() -> Place:
    """Returns the place of this process from torchrun's environment variables; needs no process group."""
    if not dist.is_torchelastic_launched():
        return Place(0, 1)
    return Place(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def pick_device(name: str) -> torch.device:
    """Returns the device to train on; under torchrun each process gets its own GPU.

    Args:
        name: A device name of torch, or `auto`: one GPU per process if there are enough, otherwise the CPU.

    Raises:
        ValueError: Torch does not know the device, or it is not available here.
    """
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if name == "auto":
        name = "cuda" if torch.cuda.device_count() >= local_world else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.zeros(1, device=device).item()  # reading it back fails on a device that cannot compute, such as meta
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"`device` must be auto or a device that torch has here, such as cpu, got {name!r}."
        ) from error
    return device


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Keeps a process group open inside a `with` block if torchrun started this process.

    Args:
        device: Where this process trains; the backend is NCCL for GPUs and gloo otherwise.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # DDP imports this module. If it did so after the group is made, default arguments would keep the group and its
    # threads until Python ends, and a thread that lets go of a tensor then aborts the process (torch 2.13).
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def synchronised(model: nn.Module) -> nn.Module:
    """Returns the model in DDP, or the model itself if there is no process group."""
    if not dist.is_initialized():
        return model
    # One bucket per parameter from the first step on. By default torch regroups the buckets after the first step, which
    # changes the order of summation on three ranks or more, so that a resumed run would end with other bits.
    known = inspect.signature(DistributedDataParallel).parameters
    options: dict[str, Any] = {"bucket_cap_mb_list": [1e-6]} if "bucket_cap_mb_list" in known else {}
    return DistributedDataParallel(model, **options)
