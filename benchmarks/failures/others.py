"""Figures of one batch that others watch, each as its paper defines it, and probes of the representation.

All but the loss take the L2-normalised projections of both views.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

NEIGHBOURS = 20
RIDGE = 1e-2
LOGISTIC_STEPS, LOGISTIC_RATE = 50, 0.05
LIDAR_DELTA = 1e-4  # the paper's


def figures(z1: Tensor, z2: Tensor) -> Mapping[str, float]:
    """Returns RankMe, effective rank, LiDAR, alpha-ReQ, uniformity, alignment and std.

    Args:
        z1: (N, D) projections of the first views, of norm 1.
        z2: (N, D) projections of the second views.
    """
    z = torch.cat([z1, z2]).double()
    spectrum = torch.linalg.eigvalsh(z.mT.cov(correction=0)).flip(0).clamp_min(0.0)
    return {
        "RankMe": rankme(z),
        "effective rank": float(_effective(spectrum)),
        "LiDAR": lidar(z1.double(), z2.double()),
        "alpha-ReQ": alpha_req(spectrum),
        "uniformity": uniformity(z),
        "alignment": float((z1 - z2).square().sum(dim=1).mean()),
        "std": float(z.std(dim=0).mean() * z.shape[1] ** 0.5),
    }


def rankme(z: Tensor) -> float:
    """Returns the exponential of the entropy of the singular values of z.

    Garrido et al., "RankMe" (2023), equation 1: p_k = sigma_k / |sigma|_1 + epsilon.
    """
    values = torch.linalg.eigvalsh(z.mT @ z).clamp_min(0.0).sqrt()
    p = values / values.sum() + 1e-7
    return float((-p * p.log()).sum().exp())


def lidar(z1: Tensor, z2: Tensor) -> float:
    """Returns the effective rank of the discriminant matrix in which each sample is a class.

    Thilak et al., "LiDAR" (2024), section 4, with two views per sample.
    """
    centre, half = (z1 + z2) / 2, (z1 - z2) / 2
    between = centre.mT.cov(correction=0)
    within = half.mT @ half / len(half) + LIDAR_DELTA * torch.eye(z1.shape[1], dtype=z1.dtype)
    values, axes = torch.linalg.eigh(within)
    whitening = axes * values.rsqrt()
    return float(_effective(torch.linalg.eigvalsh(whitening.mT @ between @ whitening).clamp_min(0.0)))


def alpha_req(spectrum: Tensor) -> float:
    """Returns alpha of the power law j^-alpha that fits the eigenvalues of the covariance best in logarithms.

    Agrawal et al., "alpha-ReQ" (2022), section 3.
    """
    kept = spectrum[spectrum > 1e-12 * spectrum.max()]
    x = torch.arange(1, len(kept) + 1, dtype=kept.dtype).log()
    y = kept.log()
    return float(-((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum().clamp_min(1e-12))


def uniformity(z: Tensor) -> float:
    """Returns the logarithm of the mean of exp(-2 |x - y|^2) over pairs of different rows.

    Wang, Isola, "Understanding contrastive representation learning" (2020), section 4.1.
    """
    return float(torch.pdist(z.float()).square().mul(-2).exp().mean().log())


def _effective(values: Tensor) -> Tensor:
    """The exponential of the entropy of values that are divided by their sum (Roy, Vetterli 2007)."""
    p = values / values.sum().clamp_min(1e-300)
    effective: Tensor = torch.special.entr(p).sum().exp()
    return effective


@torch.no_grad()
def probes(encoder: nn.Module, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> Mapping[str, float]:
    """Returns test accuracies of three probes of the representation, without augmentation.

    Args:
        encoder: From images to representations; its mode is kept.
        train: Images and labels.
        test: Images and labels.
    """
    was_training = encoder.training
    encoder.eval()
    (x, y), (a, b) = ((encoder(images).double(), labels) for images, labels in (train, test))
    encoder.train(was_training)
    mean, std = x.mean(dim=0), x.std(dim=0) + 1e-6
    x, a = (functional.pad((features - mean) / std, (0, 1), value=1.0) for features in (x, a))
    return {"linear": _ridge(x, y, a, b), "kNN": _neighbours(x, y, a, b), "logistic": _logistic(x, y, a, b)}


def _accuracy(scores: Tensor, labels: Tensor) -> float:
    return float((scores.argmax(dim=1) == labels).double().mean())


def _ridge(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> float:
    wanted = functional.one_hot(y).double()
    gram = x.mT @ x + RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    return _accuracy(a @ torch.linalg.solve(gram, x.mT @ wanted), b)


def _neighbours(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> float:
    near = (functional.normalize(a, dim=1) @ functional.normalize(x, dim=1).mT).topk(NEIGHBOURS, dim=1).indices
    return _accuracy(functional.one_hot(y[near]).sum(dim=1), b)


def _logistic(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> float:
    x, a = x.float(), a.float()
    weight = torch.zeros(x.shape[1], int(y.max()) + 1, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=LOGISTIC_RATE)
    with torch.enable_grad():
        for _ in range(LOGISTIC_STEPS):
            optimizer.zero_grad()
            functional.cross_entropy(x @ weight, y).backward()  # type: ignore[no-untyped-call]  # torch leaves it without annotations
            optimizer.step()
    return _accuracy(a @ weight, b)
