"""How to read the numbers: what the estimator reports while the demo's encoder is trained well and badly.

    python -m benchmarks.readings

prints the table of benchmarks/README.md, in about a minute and a half on two cores.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mixture_torch import MixtureStats, NTXentLoss, activate, active_estimator
from mixture_torch.app import demo
from mixture_torch.app.digits import N_DIGITS, load_images
from mixture_torch.app.faults import positives_only
from mixture_torch.app.training import ContrastiveLoss, Place, train

STEPS = (1, 60, 240)
FIGURES = ("pi_min", "pi_max", "trace_B", "opnorm_B", "trace_B / total", "participation ratio", "moved so far")


class Case(NamedTuple):
    """One way to train."""

    name: str
    loss: ContrastiveLoss
    relocate: bool = demo.MIXTURE.relocate


def broken_first_batch() -> ContrastiveLoss:
    """Returns NT-Xent, with unnormalised embeddings for the estimator and three broken ones in the first batch."""
    factors, nt_xent = torch.tensor([1e2, 2e2, 3e2]), NTXentLoss(demo.TEMPERATURE)

    def loss(z1: Tensor, z2: Tensor, labels: Tensor | None = None) -> Tensor:
        nonlocal factors
        seen = torch.cat([z1, z2]).detach()
        seen[: len(factors)] *= factors[:, None]
        factors = factors[:0]
        _feed(seen)
        with activate(None):  # the loss itself would feed the normalised embeddings
            return nt_xent.forward(z1, z2)

    return loss


def read(case: Case) -> list[str]:
    """Returns the rows of one case.

    Args:
        case: The way to train.
    """
    settings = demo.DemoConfig()
    images, digits = load_images(torch.device("cpu"))
    encoder = demo.make_encoder(seed=settings.seed)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=demo.LEARNING_RATE, weight_decay=demo.WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(STEPS))
    estimator = MixtureStats(K=N_DIGITS, enabled=True, relocate=case.relocate)
    batches = demo.epochs_of_views(images, digits, settings, Place(0, 1))
    rows, relocated = [], 0
    steps = train(encoder, batches, loss=case.loss, optimizer=optimizer, schedule=schedule, estimator=estimator)
    for taken in steps:
        stats = estimator.stats
        relocated += int(stats["n_relocated"])
        if taken.step + 1 in STEPS:
            rows.append(_row(case.name, taken.step + 1, stats, relocated))
    return rows


def _feed(embeddings: Tensor) -> None:
    estimator = active_estimator()
    assert estimator is not None  # `train` activates one around the loss
    estimator.update(embeddings)


def _row(name: str, step: int, stats: Mapping[str, Tensor], relocated: int) -> str:
    within = (stats["pi"] * stats["Sigma"].diagonal(dim1=-2, dim2=-1).sum(dim=-1)).sum()
    share = stats["trace_B"] / (stats["trace_B"] + within)
    figures = [f"{float(stats[key]):.2g}" for key in ("trace_B", "opnorm_B")]
    pi = [f"{float(stats['pi'].min()):.3f}", f"{float(stats['pi'].max()):.3f}"]
    directions = f"{float(stats['participation_ratio']):.1f}"
    return "| " + " | ".join([name, str(step), *pi, *figures, f"{float(share):.2f}", directions, str(relocated)]) + " |"


def main() -> None:
    """Prints the table."""
    print("| " + " | ".join(("run", "step", *FIGURES)) + " |\n" + "|---" * (2 + len(FIGURES)) + "|")
    for case in (
        Case("healthy", NTXentLoss(demo.TEMPERATURE)),
        Case("dimensional collapse", NTXentLoss(temperature=5.0)),
        Case("complete collapse", positives_only),
        Case("dead components", broken_first_batch(), relocate=False),
        Case("the same, moved", broken_first_batch()),
    ):
        print("\n".join(read(case)), flush=True)


if __name__ == "__main__":
    main()
