"""What the tests of the wrapper share: small estimators, clear mixtures, and comparison to the bit."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixture_torch import MixtureStats
from tests.tolerances import FLOAT32

COVARIANCES = ("Sigma", "B", "trace_B", "opnorm_B")


def estimator(**options: Any) -> MixtureStats:
    """An enabled estimator of three components, unless the options say otherwise."""
    return MixtureStats(**{"K": 3, "enabled": True, **options})


def mixture(N: int = 60, *, K: int = 3, D: int = 4, apart: float = 20.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Embeddings (N, D) in K unit Gaussians in turn, with equidistant means, and their labels (N,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(N) % K
    return apart * torch.eye(K, D)[labels] + torch.randn(N, D, generator=generator), labels


def bits(values: Mapping[str, Any]) -> dict[str, Any]:
    """Everything as something that == compares to the bit, NaN included."""
    return {
        key: (value.dtype, value.shape, value.contiguous().numpy().tobytes()) if isinstance(value, Tensor) else value
        for key, value in values.items()
    }


def all_bits(estimator: MixtureStats) -> tuple[dict[str, Any], dict[str, Any]]:
    """All that an estimator knows and has said last."""
    return bits(estimator.state_dict()), bits(estimator.stats)


@contextmanager
def unchanged(estimator: MixtureStats) -> Iterator[None]:
    """Fails where its block changes the state or the last statistics of an estimator by a bit."""
    before = all_bits(estimator)
    yield
    assert all_bits(estimator) == before


def assert_close(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = FLOAT32, *, unit: float = 0.0
) -> None:
    """Compares what is in `expected`, relative to its largest entry.

    Args:
        actual: Statistics, or a part of them.
        expected: Statistics, or a part of them.
        tolerance: Largest relative difference.
        unit: Scale of the embeddings, where there may be nothing but rounding to compare.
    """
    for key, value in expected.items():
        found, wanted = actual[key].double(), value.double()
        assert found.shape == wanted.shape, key
        floor = unit**2 if key in COVARIANCES else unit
        scale = max(float(wanted.abs().max()), floor) if wanted.numel() else 1.0
        difference = float((found - wanted).abs().max()) if wanted.numel() else 0.0
        assert difference <= tolerance * scale, (key, difference, scale)


def update_quietly(estimator: MixtureStats, *batch: Any, step: Any = None) -> dict[str, Tensor]:
    """Updates without a warning about ignored rows."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* rows were ignored")
        return dict(estimator.update(*batch, step=step))


def log_steps(estimator: MixtureStats, steps: int = 3, *, epoch: int = 0) -> list[dict[str, Tensor]]:
    """Updates and logs, and returns the statistics of every step."""
    found = []
    for step in range(steps):
        found.append(dict(estimator.update(mixture(20 + step, seed=step)[0])))
        estimator.log_step(step=step, epoch=epoch)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, except for the lock that a run leaves behind."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "mixture.lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def assert_says(error: BaseException, name: str, text: str) -> None:
    """Checks that a message is one line that begins with the argument's name and says this of it."""
    message = str(error)
    assert "\n" not in message
    assert message.startswith(f"`{name}` must ")
    assert text in message


# YAML whose anchor `i` stands for 9^8 elements.
BOMB = "a: &a [x]\n" + "".join(
    f"{name}: &{name} [{', '.join(9 * [f'*{before}'])}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
