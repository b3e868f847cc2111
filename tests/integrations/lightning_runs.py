"""Lightning runs of the exact training, and what tests need processes of their own for."""

import os
import signal
import socket
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.multiprocessing import get_context
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader

from mixture_torch import MixtureStats
from mixture_torch.integrations import watch
from mixture_torch.integrations.lightning import MixtureCallback
from tests.integrations.exact import EPOCHS, OPTIONS, Net, batches, loss_of, optimizer_of


class Module(LightningModule):
    """The exact training."""

    def __init__(self, parts: int = 1) -> None:
        super().__init__()
        self.net, self.parts = Net(), parts

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        """Returns the loss."""
        x, target = batch
        return loss_of(self.net(x), target)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns the optimizer."""
        return optimizer_of(self.net)

    def train_dataloader(self) -> DataLoader:
        """Returns whole batches, or this rank's share, or each in parts for gradient accumulation."""
        whole = batches(rank=self.trainer.global_rank, world=self.trainer.world_size)
        parts = [part for x, t in whole for part in zip(x.chunk(self.parts), t.chunk(self.parts), strict=True)]
        return DataLoader(parts, batch_size=None)


class Noisy(Module):
    """A training whose arithmetic is not exact, and which draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = {"encoder": nn.Linear(6, 8), "drop": nn.Dropout(), "projector": nn.Linear(8, 4)}
        self.net: Any = nn.Sequential(OrderedDict(layers))


class DieAt(Callback):
    """Kills the process before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Is called before each batch."""
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def fit(
    folder: Path,
    *callbacks: Callback,
    parts: int = 1,
    ckpt: Path | None = None,
    make: Callable[[], Module] | None = None,
    **options: Any,
) -> Module:
    """Returns the module after its training."""
    module = Module(parts) if make is None else make()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False} | options
    trainer = Trainer(
        max_epochs=EPOCHS, accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks),
        accumulate_grad_batches=parts, use_distributed_sampler=False, **({"devices": 1} | quiet),
    )  # fmt: skip
    trainer.fit(module, ckpt_path=ckpt, **({"weights_only": True} if ckpt else {}))
    return module


def distributed(rank: int, estimator: MixtureStats | None) -> Tensor:
    """Returns the weights after training a DDP module in a plain loop, with or without `watch`."""
    net = Noisy().net
    model, optimizer = DistributedDataParallel(net), optimizer_of(net)
    with nullcontext() if estimator is None else watch(net.projector, estimator):
        for x, target in batches(rank=rank, world=2):
            optimizer.zero_grad()
            loss_of(model(x), target).backward()
            optimizer.step()
    assert estimator is None or estimator.stats
    return parameters_to_vector(net.parameters()).detach()


def ddp(rank: int, port: int, folder: Path) -> None:
    """Is one of two ranks; saves what it comes to."""
    environment = {"LOCAL_RANK": rank, "RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)

    def train(*callbacks: Callback, **options: Any) -> Tensor:
        module = fit(folder, *callbacks, strategy="ddp", devices=2, log_every_n_steps=1, **options)
        return parameters_to_vector(module.net.parameters()).detach()

    def mixture(name: str = "") -> MixtureCallback:
        return MixtureCallback("net.projector", name=name, log_dir=folder, cross_rank=True, **OPTIONS)

    best = ModelCheckpoint(folder / "best", monitor="mixture/trace_B", every_n_train_steps=1)
    train(mixture(), best)
    saved = {
        "best": float(best.best_model_score),
        "lightning": [train(*callbacks, make=Noisy) for callbacks in ([], [mixture("noisy")])],
        "watch": [
            distributed(rank, estimator)
            for estimator in (
                None,
                *(MixtureStats(enabled=True, cross_rank=cross, **OPTIONS) for cross in (False, True)),
            )
        ],
    }
    torch.save(saved, folder / f"rank{rank}.pt")


def killed(folder: Path) -> None:
    """Is killed before step 6, with a checkpoint of each epoch: there Lightning's plain loaders resume."""
    torch.set_num_threads(1)
    save = ModelCheckpoint(folder / "checkpoints")
    fit(folder, DieAt(6), MixtureCallback("net.projector", log_dir=folder, **OPTIONS), save)


def ended(*calls: tuple[Callable[..., None], tuple[Any, ...]]) -> list[int | None]:
    """Runs each call in a process of its own, and returns their exit codes."""
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])  # so that Lightning is imported once
    processes = [context.Process(target=function, args=arguments) for function, arguments in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=90)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def free_port() -> int:
    """Returns a port that nobody uses."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
