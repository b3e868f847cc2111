"""What is measured: sizes, inputs, the estimator's step and its competitors."""

import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from benchmarks.competitors import RowFile, ScikitLearn, Textbook
from mixture_torch import MixtureStats

BATCHES = 3  # in turn, so that no step finds its input in the cache
LARGEST_DIFFERENCES = 2e9  # bytes of (N, K, D) differences; beyond that the textbook is left out

PRODUCT = "x.T @ x"
ESTIMATOR = "update + log_step"
COMPILED = "update + log_step, compiled"
READ = "with Sigma and B read"
TEXTBOOK = "textbook"
SCIKIT_LEARN = "scikit-learn"

Run = Callable[[], object]


class Size(NamedTuple):
    """The size of one measurement."""

    N: int
    D: int
    K: int


CPU_SIZES = (Size(512, 128, 8), Size(1024, 256, 8), Size(2048, 512, 8), Size(1024, 2048, 8), Size(4096, 128, 64))
CUDA_SIZES = (Size(512, 128, 8), Size(4096, 128, 8), Size(4096, 128, 64), Size(4096, 2048, 8), Size(16384, 2048, 16))
QUICK_SIZES = (Size(256, 16, 4),)


class Settings(NamedTuple):
    """How to measure."""

    device: torch.device
    quick: bool = False  # few repetitions at small sizes, to see that everything runs
    training_seconds: float = 30.0  # per configuration of the training theme

    @property
    def rounds(self) -> int:
        """Number of interleaved rounds."""
        return 3 if self.quick else 21

    @property
    def warmups(self) -> int:
        """Steps before the clock starts, in which the state settles and CUDA kernels are compiled."""
        return 10 if self.device.type == "cuda" else 5


class Stepper(Protocol):
    """A competitor: takes batches and keeps a mixture of them."""

    def step(self, x: Tensor) -> None:
        """Takes one batch, (N, D)."""


def draw(size: Size, *, device: torch.device, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Returns batches, (N, D) each, of K separated Gaussians of unit covariance, and their means, (K, D).

    Args:
        size: N, D and K. Components are equally frequent.
        device: Of the tensors; the numbers are the same on all devices.
        seed: Of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    # Two of these means are 2 sqrt(2 D) apart: 11 standard deviations at D = 16.
    centers = 2 * torch.randn(size.K, size.D, generator=generator)
    component = torch.arange(size.N) % size.K
    batches = [centers[component] + torch.randn(size.N, size.D, generator=generator) for _ in range(BATCHES)]
    return [batch.to(device) for batch in batches], centers.to(device)


def make_estimator(K: int, folder: Path, *, compile: bool = False) -> MixtureStats:
    """Returns the estimator that is measured: online k-means, exponential window, a row per step.

    Args:
        K: Number of components.
        folder: For its files.
        compile: Whether it compiles its step, if it can.
    """
    return MixtureStats(K=K, enabled=True, is_main=True, log_dir=folder, compile=compile)


class Ours:
    """The estimator's step in a training loop."""

    def __init__(self, size: Size, folder: Path, *, compile: bool = False, read: bool = False) -> None:
        self.estimator = make_estimator(size.K, folder, compile=compile)
        self._read = read
        self._steps = itertools.count()

    def step(self, x: Tensor) -> None:
        """Takes one batch and writes its row; reads Sigma and B if `read`."""
        stats = self.estimator.update(x)
        self.estimator.log_step(step=next(self._steps), epoch=0, stats=stats)
        if self._read:
            stats["Sigma"], stats["B"]


class Product:
    """The yardstick: one product of the batch with itself."""

    def step(self, x: Tensor) -> None:
        """Computes x.T @ x."""
        x.T @ x


@contextmanager
def competitors(size: Size, names: Iterable[str], *, device: torch.device) -> Iterator[dict[str, Run]]:
    """Yields competitors by name, each a function that takes the next batch; closes their files afterwards.

    Args:
        size: N, D and K. Competitors that do not fit are left out (see `fits`).
        names: Some of the constants of this module.
        device: Where the batches are.
    """
    batches, centers = draw(size, device=device)
    with tempfile.TemporaryDirectory() as root, ExitStack() as files:
        runs: dict[str, Run] = {}
        for number, name in enumerate(names):
            if not fits(name, size):
                continue
            folder = Path(root) / str(number)
            folder.mkdir()
            runs[name] = in_turn(_make(name, size, centers, folder, files).step, batches)
        yield runs


def fits(name: str, size: Size) -> bool:
    """Returns whether a competitor is measured at a size."""
    return name != TEXTBOOK or 4 * size.N * size.K * size.D <= LARGEST_DIFFERENCES


def in_turn(step: Callable[[Tensor], None], batches: list[Tensor]) -> Run:
    """Returns a function that takes a step with the next batch at each call."""
    endless = itertools.cycle(batches)
    return lambda: step(next(endless))


def _make(name: str, size: Size, centers: Tensor, folder: Path, files: ExitStack) -> Stepper:
    if name == PRODUCT:
        return Product()
    if name == TEXTBOOK:
        return Textbook(centers, files.enter_context(RowFile(folder)))
    if name == SCIKIT_LEARN:
        return ScikitLearn(centers, size.N, files.enter_context(RowFile(folder)))
    ours = Ours(size, folder, compile=name == COMPILED, read=name == READ)
    files.enter_context(ours.estimator)
    return ours
