"""Four ways to train an encoder without labels, each with a loss on the two views of a batch.

SimCLR: Chen et al. 2020, section 2.1. BYOL: Grill et al. 2020, section 3.1. Barlow Twins: Zbontar et al. 2021, section
2.1. VICReg: Bardes, Ponce, LeCun 2022, section 4.1.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.failures.text import LastLayer
from mixture_torch.losses import NTXentLoss

NAMES = ("SimCLR", "BYOL", "VICReg", "Barlow Twins")
ENCODERS = ("mlp", "conv")  # of images
WIDTH = 256  # of hidden layers and of the representation of images
EMBEDDING = 32  # D, of what the estimator sees
TEMPERATURE = 0.3
MOMENTUM = 0.98  # of BYOL's target
VARIANCE, INVARIANCE, COVARIANCE = 25.0, 25.0, 1.0
OFF_DIAGONAL = 0.02  # weight of the redundancy term of Barlow Twins


class Network(nn.Module):
    """An encoder and a projector; for BYOL also a predictor and a target.

    Args:
        method: One of `NAMES`.
        encoder: One of `ENCODERS`, or `transformer` for sentences.
        x: Any sample, (1, ...).
    """

    def __init__(self, method: str, encoder: str, x: Tensor) -> None:
        super().__init__()
        side = x.shape[-1]
        makers = {"mlp": lambda: _mlp_encoder(side), "conv": lambda: _conv_encoder(side), "transformer": LastLayer}
        self.encoder: nn.Module = makers[encoder]()
        width = side if encoder == "transformer" else WIDTH
        self.projector = nn.Linear(width, EMBEDDING) if method == "SimCLR" else _head(width, EMBEDDING)
        self.predictor = _head(EMBEDDING, EMBEDDING) if method == "BYOL" else None
        self.target = copy.deepcopy(nn.Sequential(self.encoder, self.projector)) if method == "BYOL" else None

    def forward(self, x: Tensor) -> Tensor:
        """Returns the projections of samples, (N, D)."""
        projections: Tensor = self.projector(self.encoder(x))
        return projections

    @torch.no_grad()
    def follow(self) -> None:
        """Moves BYOL's target towards the network."""
        if self.target is not None:
            own = (*self.encoder.parameters(), *self.projector.parameters())
            for theirs, ours in zip(self.target.parameters(), own, strict=True):
                theirs.lerp_(ours, 1 - MOMENTUM)


def loss_of(method: str, network: Network, views: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """Returns the loss of a method, ().

    Args:
        method: One of `NAMES`.
        network: For BYOL, whose loss compares predictions with the target's projections.
        views: (2N, ...) the views that the projections belong to.
        z1: (N, D) projections of the first views.
        z2: (N, D) projections of the second views.
    """
    match method:
        case "SimCLR":
            return nt_xent(z1, z2, temperature=TEMPERATURE)
        case "BYOL":
            return byol(network, views, z1, z2)
        case "VICReg":
            return vicreg(z1, z2)
        case _:
            return barlow_twins(z1, z2)


def nt_xent(z1: Tensor, z2: Tensor, *, temperature: float) -> Tensor:
    """Returns SimCLR's loss."""
    loss: Tensor = NTXentLoss(temperature)(z1, z2)
    return loss


def attraction(z1: Tensor, z2: Tensor) -> Tensor:
    """Returns 1 - mean cos(z1, z2): the pull between views that all four methods share, and nothing that resists it."""
    return 1 - functional.cosine_similarity(z1, z2).mean()


def byol(network: Network, views: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """Returns 2 - 2 cos between predictions of one view and the target's projections of the other."""
    assert network.predictor is not None
    assert network.target is not None
    p1, p2 = network.predictor(torch.cat([z1, z2])).chunk(2)
    with torch.no_grad():
        t1, t2 = network.target(views).chunk(2)
    return attraction(p1, t2) + attraction(p2, t1)


def vicreg(z1: Tensor, z2: Tensor) -> Tensor:
    """Returns VICReg's three terms: variance, invariance and covariance."""
    spread = sum(functional.relu(1 - (z.var(dim=0) + 1e-4).sqrt()).mean() for z in (z1, z2)) / 2
    shared = sum(_off_diagonal(z.mT.cov()).square().sum() / z.shape[1] for z in (z1, z2))
    return VARIANCE * spread + INVARIANCE * functional.mse_loss(z1, z2) + COVARIANCE * shared


def barlow_twins(z1: Tensor, z2: Tensor) -> Tensor:
    """Returns how far the correlations of the two views' projections are from the identity."""
    a, b = ((z - z.mean(dim=0)) / (z.std(dim=0) + 1e-5) for z in (z1, z2))
    correlations = a.mT @ b / len(a)
    on_diagonal = (correlations.diagonal() - 1).square().sum()
    return on_diagonal + OFF_DIAGONAL * _off_diagonal(correlations).square().sum()


def _off_diagonal(square: Tensor) -> Tensor:
    return square - torch.diag(square.diagonal())


def _head(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, outputs))


def _mlp_encoder(side: int) -> nn.Module:
    first = nn.Sequential(nn.Flatten(), nn.Linear(side * side, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU())
    return nn.Sequential(first, nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU())


def _conv_encoder(side: int) -> nn.Module:
    first = nn.Sequential(nn.Conv2d(1, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    second = nn.Sequential(nn.Conv2d(32, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten())
    left = -(-side // 4)
    return nn.Sequential(first, second, nn.Linear(64 * left * left, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU())
