"""Lightning runs of the exact training; as a program, one rank of a run on two of them."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

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


class DieAt(Callback):
    """Kills the process before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Is called before each batch."""
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def fit(folder: Path, *callbacks: Callback, parts: int = 1, ckpt: Path | None = None, **options: Any) -> Module:
    """Returns the module after its training."""
    module = Module(parts)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False} | options
    trainer = Trainer(
        max_epochs=EPOCHS, accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks),
        accumulate_grad_batches=parts, use_distributed_sampler=False, **({"devices": 1} | quiet),
    )  # fmt: skip
    trainer.fit(module, ckpt_path=ckpt, **({"weights_only": True} if ckpt else {}))
    return module


def main(kind: str, folder: Path) -> None:
    """Runs what a test needs a process of its own for."""
    if kind == "ddp":
        best = ModelCheckpoint(folder / "best", monitor="mixture/trace_B", every_n_train_steps=1)
        callback = MixtureCallback("net.projector", log_dir=folder, cross_rank=True, **OPTIONS)
        fit(folder, callback, best, strategy="ddp", devices=2, log_every_n_steps=1)
        assert best.best_model_path, "nothing was monitored"
        print("best", float(best.best_model_score))
    else:
        save = ModelCheckpoint(folder / "saved")  # Lightning's plain loaders resume at whole epochs
        fit(folder, DieAt(6), MixtureCallback("net.projector", log_dir=folder, **OPTIONS), save)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
