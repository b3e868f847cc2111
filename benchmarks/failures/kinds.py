"""Faults, and changes that are no faults: functions that change a run in progress."""

import zlib
from collections.abc import Callable, Mapping

import attrs
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.failures import methods
from benchmarks.failures.data import N_CLASSES
from benchmarks.failures.training import Training
from mixture_core import kmeans_plusplus, lloyd
from mixture_torch.app import faults

HIGH, LOW = 30.0, 0.3  # factors of the learning rate
TEMPERATURE = 5.0
STRONGER = 2.0
PSEUDO_LABELS, SHARPNESS, PULL = 64, 10.0, 5.0
DRIFT = 30  # steps until the heaviest weight is e^2


@attrs.frozen
class Kind:
    """A way in which a run changes.

    Attributes:
        what: It in a few words.
        begin: Changes a run.
        is_fault: Whether training suffers, or would suffer if it went on.
        from_start: Whether the run is so from its first step, or from a random later one.
        methods: The methods that can have it.
    """

    what: str
    begin: Callable[[Training], None]
    is_fault: bool = True
    from_start: bool = False
    methods: tuple[str, ...] = methods.NAMES


def attraction_only(run: Training) -> None:
    """Leaves only the pull between views: no negatives, or no counterpart of them."""
    run.loss = lambda views, z1, z2: methods.attraction(z1, z2)


def hot(run: Training) -> None:
    """Raises the temperature, so that near negatives count no more than far ones."""
    run.loss = lambda views, z1, z2: methods.nt_xent(z1, z2, temperature=TEMPERATURE)


def pseudo_labelled(run: Training) -> None:
    """Pulls embeddings to the nearest of 64 fixed centroids of themselves, beside the method's loss."""
    z = _embeddings(run)
    centroids = lloyd(z, kmeans_plusplus(z, PSEUDO_LABELS, generator=run.chance), iterations=10)[1]

    def loss(views: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
        scores = SHARPNESS * functional.normalize(torch.cat([z1, z2]), dim=1) @ centroids.mT
        return run.usual_loss(views, z1, z2) + PULL * functional.cross_entropy(scores, scores.argmax(dim=1))

    run.loss = loss


@torch.no_grad()
def _embeddings(run: Training) -> Tensor:
    run.network.eval()
    z = functional.normalize(run.network(run.data.x[run.rows]), dim=1)
    run.network.train()
    return z


def learning_rate(factor: float) -> Callable[[Training], None]:
    """Returns a change that multiplies the learning rate for the rest of the run."""

    def begin(run: Training) -> None:
        run.schedule.base_lrs = [factor * rate for rate in run.schedule.base_lrs]
        for group in run.optimizer.param_groups:
            group["lr"] *= factor

    return begin


def classes_gone(n: int) -> Callable[[Training], None]:
    """Returns a change that takes n random classes out of the stream."""

    def begin(run: Training) -> None:
        gone = torch.randperm(N_CLASSES, generator=_generator(run, f"{n} gone"))[:n]
        run.gone = gone.tolist()
        _draw_from(run, run.rows[~torch.isin(run.data.labels[run.rows], gone)])

    return begin


def one_image(run: Training) -> None:
    """Makes all images of one class the same image."""
    is_of = run.data.labels[run.rows] == int(torch.randint(N_CLASSES, (), generator=_generator(run, "one image")))
    _draw_from(run, torch.where(is_of, run.rows[is_of][0], run.rows))


def unshuffled(run: Training) -> None:
    """Draws the images in the order of their classes."""
    run.shuffled = False
    _draw_from(run, run.rows[run.data.labels[run.rows].argsort(stable=True)])


def drifting(run: Training) -> None:
    """Draws some classes more and more often and others more and more rarely."""
    order = torch.randperm(N_CLASSES, generator=_generator(run, "drifting"))
    begin, slope = run.step, torch.linspace(-2, 2, N_CLASSES)[order]

    def draw() -> Tensor:
        weights = (slope * min(1.0, (run.step - begin) / DRIFT)).exp()[run.data.labels[run.rows]]
        return run.rows[torch.multinomial(weights, run.batch, generator=run.chance)]

    run.draw = draw


def frozen_layer(run: Training) -> None:
    """Stops the training of the first layer."""
    for parameter in next(iter(run.network.encoder.children())).parameters():
        parameter.requires_grad_(False)


def changed(change: faults.BatchChange) -> Callable[[Training], None]:
    """Returns a change of each batch."""

    def begin(run: Training) -> None:
        run.change = change

    return begin


def stronger(run: Training) -> None:
    """Doubles the augmentation."""
    run.strength *= STRONGER


def larger_batch(run: Training) -> None:
    """Doubles the batch."""
    run.batch *= 2


def _generator(run: Training, change: str) -> torch.Generator:
    """Random numbers that choose classes: other ones for each setting and change, even if the seed is the same."""
    return torch.Generator().manual_seed(zlib.crc32(f"{run.setting}, {run.seed}, {change}".encode()))


def _draw_from(run: Training, rows: Tensor) -> None:
    run.rows, run.queue = rows, rows[:0]


KINDS: Mapping[str, Kind] = {
    "no negatives": Kind("only the pull between views is left of the loss", attraction_only),
    "temperature": Kind("the temperature is 5", hot, from_start=True, methods=("SimCLR",)),
    "watermark": Kind("both views share a random pattern", changed(faults.with_watermark), from_start=True),
    "no augmentation": Kind("both views are the image itself", changed(faults.without_augmentation), from_start=True),
    "learning rate": Kind("the learning rate is 30 times as high", learning_rate(HIGH)),
    "pseudo-labels": Kind("embeddings are pulled to 64 centroids", pseudo_labelled),
    "one class gone": Kind("one class is no longer drawn", classes_gone(1)),
    "three classes gone": Kind("three classes are no longer drawn", classes_gone(3)),
    "drifting classes": Kind("class weights drift by a factor of 7 either way in 30 steps", drifting),
    "one image": Kind("all images of one class are the same image", one_image),
    "unshuffled": Kind("images come in the order of their classes", unshuffled),
    "outliers": Kind("2 % of the images are 255 times too bright", changed(faults.with_outliers)),
    "frozen layer": Kind("the first layer is no longer trained", frozen_layer),
    "stronger augmentation": Kind("augmentation is twice as strong", stronger, is_fault=False),
    "lower learning rate": Kind("the learning rate is 0.3 times as high", learning_rate(LOW), is_fault=False),
    "larger batch": Kind("the batch is twice as large", larger_batch, is_fault=False),
}
