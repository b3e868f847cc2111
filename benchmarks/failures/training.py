"""A run of the benchmark, of which any part can be made to go wrong while it goes on."""

import copy
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.failures import data, methods, others
from mixture_torch import MixtureStats
from mixture_torch.app.faults import BatchChange, unchanged
from mixture_torch.app.training import Batch

K, EMA_DECAY, SNAPSHOT_EVERY = data.N_CLASSES, 0.9, 20
BATCH = {"digits": 512, "fashion": 512, "sentences": 128}  # samples
LEARNING_RATE = {"mlp": 3e-3, "conv": 3e-3, "transformer": 3e-4}
ANNEALED = 440  # steps in which the learning rate would fall to 0; no run takes so many
WEIGHT_DECAY = 1e-4
PROBE_EVERY, MOST_PROBED = 20, 2000  # steps, and samples that probes are trained on
PLAIN = ("step", "queue", "figures", "probes", "recent")  # parts of the state that are no modules
RECENT = 10  # steps whose assignments tell which component a class is in


@attrs.frozen
class Setting:
    """What is trained on what."""

    method: str
    encoder: str
    samples: str

    def __str__(self) -> str:
        """Returns the setting as a part of a file's name."""
        return "-".join((self.method, self.encoder, self.samples)).replace(" ", "").lower()


class Training:
    """A run in progress; a fault changes its attributes.

    Args:
        setting: What is trained on what.
        seed: Of the weights, the order of the samples and their views.
        folder: The run folder.
    """

    def __init__(self, setting: Setting, seed: int, folder: Path) -> None:
        self.setting, self.seed, self.step = setting, seed, 0
        self.data = data.load(setting.samples)
        torch.manual_seed(seed)
        self.network = methods.Network(setting.method, setting.encoder, self.data.x[:1])
        own = [p for name, p in self.network.named_parameters() if not name.startswith("target")]
        self.optimizer = torch.optim.AdamW(own, lr=LEARNING_RATE[setting.encoder], weight_decay=WEIGHT_DECAY)
        self.schedule = CosineAnnealingLR(self.optimizer, T_max=ANNEALED)
        self.estimator = MixtureStats(
            K=K, ema_decay=EMA_DECAY, seed=seed, enabled=True, log_dir=folder, snapshot_every=SNAPSHOT_EVERY,
            on_alarm=lambda alarm: None,
        )  # fmt: skip
        self.chance = torch.Generator().manual_seed(seed)
        self.queue = torch.empty(0, dtype=torch.int64)  # rows of the rest of the epoch
        self.figures: list[dict[str, float]] = []  # of each step
        self.probes: list[dict[str, float]] = []
        self.recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=RECENT)  # labels and components of batches
        self.gone: list[int] = []  # classes that are no longer drawn
        # What faults change:
        self.rows = torch.arange(self.data.n_train)  # that batches are drawn from
        self.shuffled, self.batch, self.strength = True, BATCH[setting.samples], 1.0
        self.change: BatchChange = unchanged
        self.loss: Callable[[Tensor, Tensor, Tensor], Tensor] = self.usual_loss
        self.draw: Callable[[], Tensor] = self.next_rows

    def usual_loss(self, views: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
        """Returns the method's own loss; see `methods.loss_of`."""
        return methods.loss_of(self.setting.method, self.network, views, z1, z2)

    def next_rows(self) -> Tensor:
        """Returns the rows of the next batch; samples that do not fill a batch are left out of an epoch."""
        if len(self.queue) < self.batch:
            order = torch.randperm(len(self.rows), generator=self.chance) if self.shuffled else slice(None)
            self.queue = self.rows[order]
        rows, self.queue = self.queue[: self.batch], self.queue[self.batch :]
        return rows

    def run(self, until: int) -> None:
        """Takes steps until that many have been taken since the beginning."""
        while self.step < until:
            self.take_step()

    def take_step(self) -> None:
        """Trains on one batch, and records every figure of it."""
        rows = self.draw()
        x = self.data.x[rows]
        first, second = (self.data.view(x, strength=self.strength, generator=self.chance) for _ in range(2))
        batch = self.change(Batch(first, second, self.data.labels[rows]), x, self.chance)
        views = torch.cat([batch.first, batch.second])
        z1, z2 = self.network(views).chunk(2)
        loss = self.loss(views, z1, z2)
        z = functional.normalize(torch.cat([z1, z2]).detach(), dim=1)
        stats = self.estimator.update(z, views=2)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it without annotations
        self.optimizer.step()
        self.schedule.step()
        self.network.follow()
        self.estimator.log_step(step=self.step, epoch=0)
        self.recent.append((batch.labels.repeat(2), stats.R.argmax(dim=1)))
        self.figures.append({"loss": float(loss.detach()), **others.figures(*z.chunk(2))})
        self.step += 1
        if self.step % PROBE_EVERY == 0:
            self.probes.append(self.probe())

    def probe(self) -> dict[str, float]:
        """Returns the probes of the representation after this step."""
        n, x, labels = self.data.n_train, self.data.x, self.data.labels
        n_train, n_test = min(n, MOST_PROBED), min(len(x) - n, MOST_PROBED // 2)
        train, test = ((x[rows], labels[rows]) for rows in (slice(n_train), slice(n, n + n_test)))
        return {"step": self.step - 1, **others.probes(self.network.encoder, train, test)}

    def holders(self) -> list[int]:
        """Returns the component that held most samples of each class that is gone, in the last 10 steps."""
        labels, components = (torch.cat(parts) for parts in zip(*self.recent, strict=True))
        return [int(components[labels == label].bincount().argmax()) for label in self.gone]

    def state_dict(self) -> dict[str, Any]:
        """Returns what `load_state_dict` needs to go on from here."""
        parts = {name: getattr(self, name).state_dict() for name in ("network", "optimizer", "schedule", "estimator")}
        return {
            **parts,
            "chance": self.chance.get_state(),
            "plain": {name: copy.copy(getattr(self, name)) for name in PLAIN},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from where another run was; its folder must be a copy of that run's."""
        state = copy.deepcopy(state)  # an optimizer would share its averages with other runs
        for name in ("network", "optimizer", "schedule", "estimator"):
            getattr(self, name).load_state_dict(state[name])
        self.chance.set_state(state["chance"])
        for name, value in state["plain"].items():
            setattr(self, name, value)
