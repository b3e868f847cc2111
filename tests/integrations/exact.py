"""A small training whose arithmetic is exact in float32, so that all stacks must come to the same bytes.

Weights, inputs and gradients are multiples of a power of two: sums do not depend on their order, nor on the ranks.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from mixture_torch import MixtureStats

K, N, STEPS, EPOCHS = 3, 32, 4, 2  # steps in each epoch
OPTIONS = {"K": K, "ema_decay": 0.9}


class Net(nn.Module):
    """An encoder that is trained, and a projector that is not."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.encoder, self.projector = nn.Linear(6, 8, bias=False), nn.Linear(8, 4, bias=False)
        for layer in (self.encoder, self.projector):
            layer.weight.data = torch.randint(-2, 3, layer.weight.shape, generator=draw).float()
        self.projector.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns embeddings, (N, 4)."""
        return self.projector(self.encoder(x).relu())


def batches(*, rank: int = 0, world: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Returns the inputs and targets of an epoch's steps, or a rank's share of each."""
    draw = torch.Generator().manual_seed(0)
    xs = torch.randint(-4, 5, (STEPS, N, 6), generator=draw).float()
    ts = torch.randint(0, 2, (STEPS, N, 4), generator=draw).float() * 2 - 1
    return [(x.chunk(world)[rank], t.chunk(world)[rank]) for x, t in zip(xs, ts, strict=True)]


def loss_of(z: Tensor, target: Tensor) -> Tensor:
    """Returns a loss whose gradient at each embedding is +-1/128."""
    return (z * target).mean()


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    """Returns an optimizer with a step size that is a power of two."""
    return torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.5)


def trained(net: Net) -> Iterator[tuple[int, int, Tensor]]:
    """Trains in a plain loop, and yields step, epoch and embeddings before each optimizer step."""
    optimizer, step = optimizer_of(net), 0
    for epoch in range(EPOCHS):
        for x, target in batches():
            z = net(x)
            optimizer.zero_grad()
            loss_of(z, target).backward()
            yield step, epoch, z
            optimizer.step()
            step += 1


def plain(folder: Path | None) -> Tensor:
    """Trains in a plain loop that calls `update`, or without an estimator, and returns the weights."""
    net = Net()
    with MixtureStats(enabled=folder is not None, log_dir=folder, **OPTIONS) as estimator:
        for step, epoch, z in trained(net):
            estimator.update(z)
            estimator.log_step(step=step, epoch=epoch)
    return net.encoder.weight.detach()


def log(folder: Path) -> bytes:
    """Returns the bytes of both tables."""
    return (folder / "mixture.csv").read_bytes() + (folder / "mixture_extra.csv").read_bytes()
