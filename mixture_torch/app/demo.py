"""The demo: SimCLR on the 1,797 handwritten digits that ship with scikit-learn, with mixture diagnostics."""

from collections.abc import Iterator
from pathlib import Path

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import update_bn

from mixture_core.config import as_integer, integer, one_of, string
from mixture_torch.app.digits import N_DIGITS, load_images, view
from mixture_torch.app.faults import FAULTS, unchanged
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

# The embeddings move fast in a run of 240 steps: at 0.95 the means lag, and inertia rises to 1.09 times the best.
MIXTURE = MixtureRuntimeConfig(enabled=True, K=N_DIGITS, ema_decay=0.9)

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
    # What goes wrong in the training, on purpose: a name in `FAULTS`.
    fault: str = attrs.field(default="none", validator=one_of(*FAULTS))


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
            labels, the run is too short for its fault, or the device is not available.
    """
    place, n_images = current_place(), len(load_images(torch.device("cpu"))[0])
    if not 2 * place.world <= demo.batch_size <= n_images:
        raise ValueError(
            f"`batch_size` must be at least 2 for each of {place.world} processes and at most {n_images}, "
            f"got {demo.batch_size}."
        )
    if mixture.enabled and mixture.uses_labels and mixture.K < N_DIGITS:
        raise ValueError(f"`K` must be at least {N_DIGITS} with the ten digits as labels, got {mixture.K}.")
    fault = FAULTS[demo.fault]
    if fault.onset and not fault.begins(demo.epochs):
        raise ValueError(
            f"`epochs` must be at least 2 with the fault {demo.fault}, which comes later, got {demo.epochs}."
        )
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
    fault = FAULTS[demo.fault]
    onset = fault.begins(demo.epochs)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=demo.epochs * n_batches)
    schedule = fault.schedule_after(cosine, step=onset * n_batches)
    estimator = MixtureStats.from_config(mixture, log_dir=log_dir, is_main=is_main)
    checkpoint = None if log_dir is None else log_dir / CHECKPOINT_FILE
    start = BEGINNING
    if checkpoint is not None and resume:
        start = restore(checkpoint, model=model, optimizer=optimizer, schedule=schedule, estimator=estimator)
    steps = train(
        model,
        epochs_of_views(images, digits, demo, place),
        loss=fault.loss_after(NTXentLoss(TEMPERATURE), n_steps=max(0, onset - start.epoch) * n_batches),
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
    fault = FAULTS[demo.fault]
    for epoch in range(demo.epochs):
        shuffled = torch.randperm(len(images), generator=order)[: n_batches * size].to(images.device)
        own = shuffled.view(n_batches, place.world, -1)[:, place.rank]
        change = fault.batch if epoch >= fault.begins(demo.epochs) else unchanged
        yield (change(_views(images[rows], digits[rows], chance), images[rows], chance) for rows in own)


def _views(images: Tensor, digits: Tensor, chance: torch.Generator) -> Batch:
    return Batch(view(images, generator=chance), view(images, generator=chance), digits)
