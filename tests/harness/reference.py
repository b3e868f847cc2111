"""The estimator once more in float64: it goes by the responsibilities of the one that it is beside, and doubts them."""

import copy
from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor

import mixture_core
from mixture_core import MixtureState, Moments
from mixture_core.testing import oracle_batch_moments, oracle_derived, oracle_merge
from mixture_torch import MixtureStats
from tests.tolerances import FLOAT32

BEYOND = 1.8e13  # what the README says is ignored
SEEDING_ROWS = 4  # times K, likewise
SLACK = 1e-5  # of (|x| + |c|)^2: squared distances that differ by less may be either way round in float32
SMALLEST = 1.2e-38  # what is smaller, float32 holds with fewer digits
SQUARES = ("Sigma", "B", "trace_B", "opnorm_B")


class Reference:
    """What the statistics of an estimator have to be.

    Args:
        wrapper: The estimator, whose state is looked at only where its responsibilities do not tell what it did.
        unit: Size of the embeddings, for where there is nothing but rounding to compare.
    """

    def __init__(self, wrapper: MixtureStats, *, unit: float) -> None:
        self.wrapper, self.config, self.unit = wrapper, wrapper.config.core, unit
        self.moments: Moments | None = None  # float64
        self.waiting: list[Tensor] | None = None if self.config.uses_labels else []  # None once it has started
        self.token: Any = None
        self.parts: list[Tensor] = []  # R of the calls of the step under way
        self.before: MixtureState | None = None  # the estimator's state, from which components are moved
        self.n_steps, self.counted = 0, False  # since it has started, and whether the step under way is counted
        self.followed = {"updates": 0, "assignments checked": 0, "near ties": 0, "moves": 0, "resyncs": 0}

    def kept(self) -> "Reference":
        """What a state_dict keeps of it."""
        kept = copy.copy(self)
        kept.token, kept.parts = None, []
        return kept

    def usable(self, x: Tensor, y: Tensor) -> Tensor:
        """Which rows count, (N,) bool."""
        usable = (x.double().abs() <= BEYOND).all(dim=1)
        return usable & (y >= 0) if self.config.uses_labels else usable

    def update(self, x: Tensor, y: Tensor, stats: Mapping[str, Tensor], *, token: Any) -> None:
        """Takes a batch in, and checks that the responsibilities could not be others.

        Args:
            x: (N, D) float32.
            y: (N,) labels.
            stats: What the estimator returned for it.
            token: Of the step.
        """
        R, usable = stats["R"].double(), self.usable(x, y)
        assert R.sum(dim=1).tolist() == usable.double().tolist(), "rows of R sum to 1, or to 0 where they are ignored"
        assert bool(((R == 0) | (R == 1)).all()), "a row belongs to one component"
        assert int(stats["n_ignored"]) == int((~usable).sum()), "n_ignored counts the rows that are ignored"
        continues = token is not None and token == self.token and self.moments is not None
        earlier = self.parts if continues else []
        if n_relocated := int(stats["n_relocated"]):
            assert not any(R_.any() for R_ in earlier), "nothing is moved within a step"
            self.follow_move(n_relocated)
        moments, anew = self.start(x[usable])
        if anew and any(R_.any() for R_ in earlier):
            self.resync(sum(float(R_.sum()) for R_ in [*earlier, R]))
        else:
            rows, members = x[usable].double(), R[usable]
            if self.config.uses_labels:
                assert torch.equal(members.argmax(dim=1), y[usable]), "responsibilities are the labels"
            else:
                self.doubt(rows, members, moments.mean)
            if len(rows) and not any(R_.any() for R_ in earlier):
                moments = self.history(moments)
            self.moments = oracle_merge(moments, oracle_batch_moments(rows, members))
        self.token, self.parts = token, [*earlier, R]
        self.before = self.wrapper.state
        self.counted = continues and self.counted
        if self.waiting is None and R.any() and not self.counted:
            self.n_steps, self.counted = self.n_steps + 1, True
        self.followed["updates"] += 1

    def start(self, rows: Tensor) -> tuple[Moments, bool]:
        """What an update with these usable rows starts from, and whether that is the estimator's start."""
        K, D = self.config.K, rows.shape[1]
        zero = torch.zeros(K, dtype=torch.float64)
        nothing = Moments(weight=zero, mean=zero.new_zeros(K, D), covariance=zero.new_zeros(K, D, D))
        if self.waiting is None:
            return self.moments or nothing, False
        if self.moments is not None and not len(rows):
            return self.moments, False
        seen = [*self.waiting, rows]
        generator = torch.Generator().manual_seed(self.wrapper.config.seed)
        seeds = mixture_core.init(self.config, torch.cat(seen), generator=generator).moments.mean
        self.waiting = seen if len(torch.cat(seen)) < SEEDING_ROWS * K else None
        return Moments(weight=zero, mean=seeds.double(), covariance=nothing.covariance), True

    def history(self, m: Moments) -> Moments:
        """What the first usable rows of a step are merged into."""
        if self.config.averages:
            return Moments(weight=self.config.ema_decay * m.weight, mean=m.mean, covariance=m.covariance)
        mean = torch.zeros_like(m.mean) if self.config.uses_labels else m.mean
        return Moments(weight=torch.zeros_like(m.weight), mean=mean, covariance=torch.zeros_like(m.covariance))

    def doubt(self, rows: Tensor, members: Tensor, centroids: Tensor) -> None:
        """Checks that every row belongs to the nearest centroid of the last of Lloyd's iterations, or to a tie."""
        for _ in range(self.config.max_assign_iters - 1):
            distances, slack = squared_distances(rows, centroids)
            nearest = distances.min(dim=1)
            rivals = (
                distances <= (nearest.values + slack.gather(1, nearest.indices[:, None])[:, 0])[:, None] + slack
            ) & (centroids[None] != centroids[nearest.indices][:, None]).any(dim=2)
            if rivals.any():
                self.followed["near ties"] += 1
                return
            R = torch.nn.functional.one_hot(nearest.indices, self.config.K).double()
            count = R.sum(dim=0)[:, None]
            centroids = torch.where(count > 0, R.mT @ rows / count.clamp(min=1), centroids)
        distances, slack = squared_distances(rows, centroids)
        chosen = members.argmax(dim=1, keepdim=True)
        excess = distances.gather(1, chosen) - slack.gather(1, chosen) - distances - slack
        assert not len(rows) or float(excess.max()) <= 0, "a row belongs to its nearest centroid"
        self.followed["assignments checked"] += 1

    def follow_move(self, n_relocated: int) -> None:
        """Moves components as the estimator has, which has to be due and to leave the whole as it was."""
        assert self.config.relocates, "nothing is moved if that is off"
        assert self.n_steps % self.config.window == 0, "components are moved once a window"
        assert self.before is not None
        assert self.moments is not None
        state, n = mixture_core.relocate(self.before)
        assert int(n) == n_relocated, "the state alone says what is moved"
        m = self.moments
        self.moments = _double(state.moments)
        light = m.weight < 0.01 / self.config.K * m.weight.sum() * (1 + FLOAT32)
        dropped = light & (state.moments.mean != self.before.moments.mean).any(dim=1)
        kept = Moments(weight=torch.where(dropped, 0.0, m.weight), mean=m.mean, covariance=m.covariance)
        whole, wanted = oracle_derived(_whole(self.moments)), oracle_derived(_whole(kept))
        for key, unit in (("mu", self.unit), ("Sigma", self.unit**2)):
            error = float((whole[key] - wanted[key]).abs().max())
            bound = FLOAT32 * max(float(wanted[key].abs().max()), unit, SMALLEST)
            assert error <= bound, f"a move leaves {key} of all"
        self.followed["moves"] += n_relocated

    def resync(self, weight: float) -> None:
        """Goes on from the estimator's state: calls of a step before the start count once more, with an R unknown."""
        state = self.wrapper.state
        assert state is not None
        m = state.moments
        assert float(m.weight.sum()) == weight, "all usable rows of the step count"
        self.moments = _double(m)
        self.followed["resyncs"] += 1

    def expected(self) -> dict[str, Tensor]:
        """The statistics, float64."""
        assert self.moments is not None
        return oracle_derived(self.moments)

    def compare(self, stats: Mapping[str, Tensor], expected: dict[str, Tensor]) -> float:
        """Checks statistics, and returns the largest relative difference."""
        total = float(expected["trace_B"] + (expected["pi"] * expected["Sigma"].diagonal(dim1=1, dim2=2).sum(1)).sum())
        worst = 0.0
        for key, wanted in expected.items():
            found, unit = stats[key].double(), self.unit**2 if key in SQUARES else self.unit if key == "mu" else 0.0
            assert bool(found.isfinite().all()), f"{key} is finite"
            assert found.shape == wanted.shape, f"{key} has shape {tuple(wanted.shape)}"
            if key == "participation_ratio" and total < max(FLOAT32 * self.unit**2, 10 * SMALLEST):
                continue  # of nothing but rounding
            error = float((found - wanted).abs().max()) - SMALLEST
            error /= max(float(wanted.abs().max()), unit, SMALLEST)
            assert error <= FLOAT32, f"{key} is off by {error:.1e}"
            worst = max(worst, error)
        return worst


def squared_distances(rows: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances, (N, K), and how far float32 may be off."""
    sizes = rows.norm(dim=1)[:, None] + centroids.norm(dim=1)
    return (rows[:, None] - centroids).square().sum(dim=2), SLACK * sizes.square() + SMALLEST


def _double(m: Moments) -> Moments:
    return Moments(weight=m.weight.double(), mean=m.mean.double(), covariance=m.covariance.double())


def _whole(m: Moments) -> Moments:
    """All components as one."""
    parts = [
        Moments(weight=m.weight[k : k + 1], mean=m.mean[k : k + 1], covariance=m.covariance[k : k + 1])
        for k in range(len(m.weight))
        if m.weight[k] > 0
    ]
    return reduce(oracle_merge, parts)
