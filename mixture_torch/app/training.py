"""A contrastive training loop that keeps the mixture of what it trains, on one process or on several."""

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
    labels: Tensor  # (N,) integers, for an estimator that takes its responsibilities from labels


class TrainingStep(NamedTuple):
    """What a reader needs of a step that has been taken."""

    step: int  # from 0 on, over all epochs
    epoch: int  # from 0 on
    loss: Tensor  # () of this rank's batch, before the step


class Start(NamedTuple):
    """Where a run begins, or goes on."""

    epoch: int  # how many are done
    step: int  # how many are done


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
    """Yields each step after it has been taken and logged; nothing happens unless the caller asks for the next.

    A run that is ended at any instant, and goes on in another process from what `restore` returns, ends as the same to
    the bit, if it has as many ranks as before.

    Args:
        model: From views to embeddings (N, D); trained in place.
        epochs: The batches of each epoch, the first one's too where a run goes on.
        loss: Of the embeddings of both views.
        optimizer: Of the model's parameters.
        schedule: Of the optimizer's learning rate, one move per step.
        estimator: Active during the loss alone, so that nothing else the caller computes between steps is counted.
        checkpoint: File to go on from, written after each epoch; None writes none, as on all ranks but the main one.
        start: From `restore`.
    """
    model.train()
    step = start.step
    for epoch, batches in enumerate(epochs):
        if epoch < start.epoch:
            deque(batches, maxlen=0)  # drawn all the same, so that random numbers go on where they were
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
        estimator.flush()  # first: what a checkpoint says is done has to be on the disk
        if checkpoint is not None:
            parts = _parts(model, optimizer, schedule, estimator)
            states = {name: part.state_dict() for name, part in parts.items()}
            save(checkpoint, {**states, "epoch": epoch + 1, "step": step}, durable=True)


def restore(
    checkpoint: Path, *, model: nn.Module, optimizer: Optimizer, schedule: LRScheduler, estimator: MixtureStats
) -> Start:
    """Returns where a run goes on, with all its parts as they were there: the beginning if there is no checkpoint yet.

    Args:
        checkpoint: The file that `train` writes, perhaps on other devices or on another number of ranks.
        model: As `train` will take it; likewise the others.
        optimizer: Of the model's parameters.
        schedule: Of the optimizer's learning rate.
        estimator: Its log goes on from there too.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no checkpoint of these parts, some of which may have been changed.
    """
    if not checkpoint.exists():
        estimator.load_state_dict(estimator.state_dict())  # what is logged already is logged anew
        return BEGINNING
    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        for name, part in _parts(model, optimizer, schedule, estimator).items():
            part.load_state_dict(saved[name])
        return Start(epoch=saved["epoch"], step=saved["step"])
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch raises whatever comes up while it parses foreign bytes
        raise ValueError(
            f"`{checkpoint}` must be a checkpoint of this run, got something else; "
            "move the file away to start the run anew."
        ) from error


class _Stateful(Protocol):
    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


def _parts(
    model: nn.Module, optimizer: Optimizer, schedule: LRScheduler, estimator: MixtureStats
) -> dict[str, _Stateful]:
    """What a checkpoint consists of, the model as it is on one process, so that it can go on on any number."""
    alone = model.module if isinstance(model, DistributedDataParallel) else model
    return {"model": alone, "optimizer": optimizer, "schedule": schedule, "mixture": estimator}


class Place(NamedTuple):
    """Which of the processes of a run this one is."""

    rank: int  # 0 is the main one
    world: int  # how many there are


def current_place() -> Place:
    """Returns this process's place as torchrun's variables tell it, before a process group is up too."""
    if not dist.is_torchelastic_launched():
        return Place(0, 1)
    return Place(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def pick_device(name: str) -> torch.device:
    """Returns the device to train on: under torchrun each process has a GPU of its own.

    Args:
        name: `auto`, a GPU for each process on this machine or else the CPU for all, or what torch calls a device.

    Raises:
        ValueError: Torch knows no such device, or it is not to be had here.
    """
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if name == "auto":
        name = "cuda" if torch.cuda.device_count() >= local_world else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.zeros(1, device=device).item()  # reading it back tells a device that computes from one that does not
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"`device` must be auto, cpu, cuda or another that torch has here, got {name!r}.") from error
    return device


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins the processes that torchrun started, if it did, for the length of a `with` block.

    Args:
        device: Where this process trains: NCCL connects GPUs, gloo everything else.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def synchronised(model: nn.Module) -> nn.Module:
    """Returns the model with its gradients averaged over the process group, or the model itself outside of one."""
    if not dist.is_initialized():
        return model
    # A bucket for each parameter from the first step on. Torch sums all in one bucket there and deals them out anew
    # later; with three ranks or more that is another order of summation, and a run that goes on would show it.
    known = inspect.signature(DistributedDataParallel).parameters
    options: dict[str, Any] = {"bucket_cap_mb_list": [1e-6]} if "bucket_cap_mb_list" in known else {}
    return DistributedDataParallel(model, **options)
