"""The demo: SimCLR on the 1,797 handwritten digits that ship with scikit-learn, with mixture diagnostics."""

import math
from collections.abc import Iterator
from pathlib import Path

import attrs
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import update_bn

from mixture_core.config import as_integer, integer, string
from mixture_torch.app.folders import CHECKPOINT_FILE
from mixture_torch.app.report import Report, summarise
from mixture_torch.app.training import (
    BEGINNING,
    Batch,
    Place,
    TrainingStep,
    current_place,
    pick_device,
    restore,
    synchronised,
    train,
)
from mixture_torch.config import MixtureRuntimeConfig
from mixture_torch.estimator import MixtureStats
from mixture_torch.losses import NTXentLoss

N_DIGITS = 10
# The embeddings move fast in a run of 240 steps: at 0.95 the means lag, and inertia rises to 1.09 times the best.
MIXTURE = MixtureRuntimeConfig(enabled=True, K=N_DIGITS, ema_decay=0.9)

# Stronger augmentations blur the digits for k-means.
ROTATION = 10.0  # degrees either way
SHIFT = 0.3  # pixels either way, of 8
NOISE = 0.1  # standard deviation; ink is 1
ERASED = 2  # side of the erased square, in pixels
ERASE_SHARE = 0.5  # of the views

WIDTH = 256  # of the encoder's hidden layers
EMBEDDING = 32  # D
TEMPERATURE = 0.3
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1e-4


@attrs.frozen(kw_only=True)
class DemoConfig:
    """The options of the training; those of the mixture are a `MixtureRuntimeConfig`.

    Raises:
        TypeError: A value has the wrong type; the message names the option, the expected type and the value.
        ValueError: A value is out of range; the message names the option, the range and the value.
    """

    # Passes over the images.
    epochs: int = attrs.field(default=80, converter=as_integer, validator=integer(at_least=1))
    # Images per step, on all ranks together.
    batch_size: int = attrs.field(default=512, converter=as_integer, validator=integer(at_least=2))
    # Of the weights, the order of the images and their views. Each rank adds its number; torch's seeds end at 2^64.
    seed: int = attrs.field(default=0, converter=as_integer, validator=integer(at_least=0, at_most=2**63 - 1))
    # `auto`, or a device name of torch.
    device: str = attrs.field(default="auto", validator=string)


@attrs.frozen(eq=False, kw_only=True)
class Job:
    """A run that is ready to start: iterating over `steps` trains the encoder."""

    encoder: nn.Module  # from images (N, 1, 8, 8) to embeddings (N, D), not yet normalised
    estimator: MixtureStats
    images: Tensor  # (1797, 1, 8, 8) in [0, 1]
    digits: Tensor  # (1797,) int64
    n_steps: int  # of the whole run
    n_done: int  # of these, done before the run was resumed
    steps: Iterator[TrainingStep]

    def embeddings(self) -> Tensor:
        """Returns the embeddings of all images without augmentation, (1797, D) of norm 1."""
        update_bn([self.images], self.encoder)  # after a short run, the running averages still lag
        self.encoder.eval()
        with torch.no_grad():
            return functional.normalize(self.encoder(self.images), dim=1)

    def report(self) -> Report:
        """Returns how the mixture divides the digits.

        Raises:
            ValueError: No step has been taken.
        """
        state = self.estimator.state
        if state is None:
            raise ValueError("There is no mixture to report: no step has been taken.")
        return summarise(state.moments, self.estimator.assign(self.embeddings(), self.digits), self.digits)


def check(demo: DemoConfig, mixture: MixtureRuntimeConfig) -> None:
    """Checks that `prepare` will succeed, before anything is written.

    Raises:
        ValueError: The batch is too small for the ranks or larger than the data, K is too small for the ten digits as
            labels, or the device is not available.
    """
    place, n_images = current_place(), len(load_digits().target)
    if not 2 * place.world <= demo.batch_size <= n_images:
        raise ValueError(
            f"`batch_size` must be at least 2 for each of {place.world} processes and at most {n_images}, "
            f"got {demo.batch_size}."
        )
    if mixture.enabled and mixture.uses_labels and mixture.K < N_DIGITS:
        raise ValueError(f"`K` must be at least {N_DIGITS} with the ten digits as labels, got {mixture.K}.")
    pick_device(demo.device)


def prepare(
    demo: DemoConfig, mixture: MixtureRuntimeConfig, *, log_dir: Path | None = None, resume: bool = False
) -> Job:
    """Returns the whole run, before its first step.

    All random numbers come from the run's own generators, so the configuration determines the run to the bit, with the
    estimator on or off. On several ranks, each rank contrasts the views of its own share of the batch.

    Args:
        demo: The options of the training.
        mixture: The options of the mixture.
        log_dir: The run folder; None writes nothing.
        resume: Whether to resume the run in that folder from its last checkpoint.

    Raises:
        OSError: The checkpoint cannot be read.
        ValueError: It is no checkpoint of this run.
    """
    device, place = pick_device(demo.device), current_place()
    images, digits = load_images(device)
    encoder = make_encoder(seed=demo.seed).to(device)
    model, is_main = synchronised(encoder), place.rank == 0
    n_batches = len(images) // _global_batch(demo, place)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=demo.epochs * n_batches)
    estimator = MixtureStats.from_config(mixture, log_dir=log_dir, is_main=is_main)
    checkpoint = None if log_dir is None else log_dir / CHECKPOINT_FILE
    start = BEGINNING
    if checkpoint is not None and resume:
        start = restore(checkpoint, model=model, optimizer=optimizer, schedule=schedule, estimator=estimator)
    steps = train(
        model,
        epochs_of_views(images, digits, demo, place),
        loss=NTXentLoss(TEMPERATURE),
        optimizer=optimizer,
        schedule=schedule,
        estimator=estimator,
        checkpoint=checkpoint if is_main else None,
        start=start,
    )
    return Job(
        encoder=encoder,
        estimator=estimator,
        images=images,
        digits=digits,
        n_steps=start.step + (demo.epochs - start.epoch) * n_batches,  # the number of ranks may have changed
        n_done=start.step,
        steps=steps,
    )


def load_images(device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the images, (1797, 1, 8, 8) float32, paper 0 and ink 1, and their digits, (1797,) int64."""
    data = load_digits()
    images = torch.as_tensor(data.images, dtype=torch.float32, device=device)[:, None] / 16
    return images, torch.as_tensor(data.target, dtype=torch.int64, device=device)


def make_encoder(*, seed: int) -> nn.Module:
    """Returns an encoder of two hidden layers and a projection, on the CPU; the global generator is not used.

    It has no convolutions: pixels of such small images keep the digits together from the first step on, so a mixture
    that starts there stays a good one.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(8 * 8, WIDTH),
            nn.BatchNorm1d(WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, WIDTH),
            nn.BatchNorm1d(WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, EMBEDDING),
        )


def _global_batch(demo: DemoConfig, place: Place) -> int:
    """Returns the images per step of all ranks, which have the same number each."""
    return demo.batch_size // place.world * place.world


def epochs_of_views(images: Tensor, digits: Tensor, demo: DemoConfig, place: Place) -> Iterator[Iterator[Batch]]:
    """Yields the batches of this rank for each epoch; in one epoch, all ranks together use an image at most once.

    Images that do not fill a batch are left out; each epoch leaves out different ones.

    Args:
        images: (N, 1, H, W).
        digits: (N,).
        demo: `epochs`, `batch_size` and `seed`.
        place: The rank whose batches they are.
    """
    order = torch.Generator().manual_seed(demo.seed)  # the same shuffle on all ranks, each of which takes its share
    chance = torch.Generator(images.device).manual_seed(demo.seed + 1 + place.rank)
    size = _global_batch(demo, place)
    n_batches = len(images) // size
    for _ in range(demo.epochs):
        shuffled = torch.randperm(len(images), generator=order)[: n_batches * size].to(images.device)
        own = shuffled.view(n_batches, place.world, -1)[:, place.rank]
        yield (
            Batch(view(images[rows], generator=chance), view(images[rows], generator=chance), digits[rows])
            for rows in own
        )


def view(images: Tensor, *, generator: torch.Generator) -> Tensor:
    """Returns a random view of each image, (N, 1, H, W): rotated, shifted, noisy, and some with a square erased.

    Args:
        images: (N, 1, H, W).
        generator: The source of randomness, on the images' device.
    """
    moved = _turn_and_shift(images, generator)
    noise = torch.randn(moved.shape, generator=generator, device=moved.device)
    return _erase(moved + NOISE * noise, generator)


def _turn_and_shift(images: Tensor, generator: torch.Generator) -> Tensor:
    N, _, H, W = images.shape
    turn, right, down = 2 * torch.rand((3, N), generator=generator, device=images.device) - 1
    angle = math.radians(ROTATION) * turn
    cos, sin = angle.cos(), angle.sin()
    # In affine_grid an image spans -1 to 1, so a pixel is 2 / W wide.
    rows = [torch.stack([cos, -sin, 2 * SHIFT / W * right], 1), torch.stack([sin, cos, 2 * SHIFT / H * down], 1)]
    grid = functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def _erase(images: Tensor, generator: torch.Generator) -> Tensor:
    N, _, H, W = images.shape
    device = images.device
    chosen = torch.rand((N, 1), generator=generator, device=device) < ERASE_SHARE
    top = torch.randint(H - ERASED + 1, (N, 1), generator=generator, device=device)
    left = torch.randint(W - ERASED + 1, (N, 1), generator=generator, device=device)
    y, x = torch.arange(H, device=device), torch.arange(W, device=device)
    in_rows = chosen & (top <= y) & (y < top + ERASED)  # (N, H)
    in_columns = (left <= x) & (x < left + ERASED)  # (N, W)
    return images.masked_fill((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 0.0)
