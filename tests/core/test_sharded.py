"""A step whose rows are spread over ranks, which here are threads that exchange what `total` is given."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mixture_core import MixtureConfig, MixtureState, Moments, StepStats, init
from mixture_core.sharded import advance_share
from mixture_core.step import advance
from mixture_core.testing import embeddings, labels, oracle_step, states
from tests.core.common import assert_moments_close, assert_same_bits, gaussians
from tests.tolerances import FLOAT32, FLOAT64, relative_error

LIMIT = 20.0  # seconds that a rank waits for the others


class Exchange:
    """What ranks add up, and how much each of them sends."""

    def __init__(self, world: int) -> None:
        self.shapes: list[list[tuple[int, ...]]] = [[] for _ in range(world)]
        self._barrier = threading.Barrier(world, timeout=LIMIT)
        self._tensors = [torch.empty(0)] * world
        self._pool = ThreadPoolExecutor(world)

    def run(self, function: Any) -> list[Any]:
        """Returns what the function returns on each rank, given the rank and its `total`."""

        def on_one(rank: int) -> Any:
            try:
                return function(rank, lambda tensor: self._total(rank, tensor))
            except BaseException:
                self._barrier.abort()  # or the others wait
                raise

        with self._pool:
            return [future.result() for future in [self._pool.submit(on_one, r) for r in range(len(self.shapes))]]

    def sent(self) -> list[int]:
        """How many numbers each rank has sent."""
        return [sum(torch.Size(shape).numel() for shape in shapes) for shapes in self.shapes]

    def _total(self, rank: int, tensor: Tensor) -> Tensor:
        self.shapes[rank].append(tuple(tensor.shape))
        self._tensors[rank] = tensor
        self._barrier.wait()
        whole = torch.stack(self._tensors).sum(dim=0)
        self._barrier.wait()
        return whole


class Together:
    """A step of ranks.

    Args:
        state: Of all.
        x: (N, D) rows of all.
        sizes: How many of them each rank has.
        labels: (N,) of all.
        continues: As in `advance`.
    """

    def __init__(
        self, state: MixtureState, x: Tensor, sizes: list[int], labels: Tensor | None = None, *, continues: bool = False
    ) -> None:
        exchange, rows = Exchange(len(sizes)), x.split(sizes)
        given = [None] * len(sizes) if labels is None else labels.split(sizes)
        results = exchange.run(
            lambda rank, total: advance_share(state, rows[rank], given[rank], total=total, continues=continues)
        )
        self.states: list[MixtureState] = [state for state, _ in results]
        self.stats: list[StepStats] = [stats for _, stats in results]
        self.sent, self.shapes = exchange.sent(), exchange.shapes

    @property
    def R(self) -> Tensor:
        """Of all rows."""
        return torch.cat([stats.R for stats in self.stats])

    @property
    def n_ignored(self) -> set[int]:
        """As the ranks have it."""
        return {int(stats.n_ignored) for stats in self.stats}


@st.composite
def cuts(draw: st.DrawFn, N: int) -> list[int]:
    """Draws how many of N rows each of one to four ranks has, which may be none."""
    inner = sorted(draw(st.lists(st.integers(0, N), max_size=3)))
    return [end - start for start, end in zip([0, *inner], [*inner, N], strict=True)]


@st.composite
def problems(draw: st.DrawFn, *, D: int | tuple[int, int] = (1, 6)) -> tuple[MixtureState, Tensor, list[int], Tensor]:
    """Draws a state, rows in float64, how they are spread, and their labels."""
    config = MixtureConfig(
        K=draw(st.integers(1, 6)),
        assigner=draw(st.sampled_from(("kmeans_online", "label_supervised"))),
        mode=draw(st.sampled_from(("ema", "per_batch", "label_supervised"))),
        max_assign_iters=draw(st.integers(1, 4)),
    )
    state = draw(states(config=config, D=D, dtype=torch.float64))
    x = draw(embeddings(D=state.moments.mean.shape[1], dtype=torch.float64, with_bad_rows=True))
    return state, x, draw(cuts(len(x))), draw(labels(N=len(x), K=config.K))


def per_step(config: MixtureConfig, D: int) -> int:
    """The numbers that a rank sends in a step."""
    iterations = 1 if config.uses_labels else config.max_assign_iters
    return iterations * config.K * (1 + D) + config.K * D * (D + 1) // 2 + 2


# What comes of it


@given(problems())
def test_shares_give_what_one_step_gives(problem: tuple[MixtureState, Tensor, list[int], Tensor]) -> None:
    state, x, sizes, own = problem
    together, (expected, stats) = Together(state, x, sizes, own), advance(state, x, own)
    assert_moments_close(together.states[0].moments, expected.moments, FLOAT64)
    assert torch.equal(together.R, stats.R)
    assert [len(stats.R) for stats in together.stats] == sizes
    assert together.n_ignored == {int(stats.n_ignored)}


@given(problems())
def test_shares_that_continue_a_step_have_the_moments_of_one(
    problem: tuple[MixtureState, Tensor, list[int], Tensor],
) -> None:
    state, x, sizes, own = problem
    expected, _ = advance(state, x, own, continues=True)
    assert_moments_close(Together(state, x, sizes, own, continues=True).states[0].moments, expected.moments, FLOAT64)


@given(problems())
def test_shares_end_in_the_same_bits_on_all_ranks(problem: tuple[MixtureState, Tensor, list[int], Tensor]) -> None:
    together = Together(*problem)
    for state, stats in zip(together.states, together.stats, strict=True):
        assert_same_bits(state.moments, together.states[0].moments)
        assert_same_bits(stats.moments, state.moments)


@pytest.mark.parametrize("sizes", [[0], [0, 0, 0], [2, 0, 1]])
@pytest.mark.parametrize("mode", ["ema", "per_batch"])
def test_shares_without_a_usable_row_leave_the_state(sizes: list[int], mode: Any) -> None:
    config = MixtureConfig(K=3, mode=mode)
    mean = torch.arange(6.0).view(3, 2)
    moments = Moments(weight=torch.ones(3), mean=mean, covariance=torch.eye(2).repeat(3, 1, 1))
    x = torch.full((sum(sizes), 2), float("nan"))
    together = Together(MixtureState(config=config, moments=moments), x, sizes)
    assert_same_bits(together.states[0].moments, moments)


@given(problems())
def test_share_of_a_rank_that_is_alone_is_the_batch(problem: tuple[MixtureState, Tensor, list[int], Tensor]) -> None:
    state, x, _, own = problem
    new, _ = advance_share(state, x, own, total=lambda tensor: tensor)
    assert_moments_close(new.moments, advance(state, x, own)[0].moments, FLOAT64)


# Embeddings far from 0


@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize(
    ("assigner", "iterations"), [("kmeans_online", 1), ("kmeans_online", 2), ("label_supervised", 1)]
)
def test_shares_far_from_zero_have_the_covariance_of_the_oracle(assigner: Any, iterations: int, world: int) -> None:
    x, own, means = gaussians(3, N=512, D=8, K=4)
    x, means = 1000 + 1e-3 * x, 1000 + 1e-3 * means
    config = MixtureConfig(K=4, assigner=assigner, max_assign_iters=iterations)
    state = expected = init(config, means)
    for _ in range(3):
        expected, _ = oracle_step(expected, x, own)
        state = Together(state, x, [512 // world] * world, own).states[0]
        assert relative_error(state.moments.covariance, expected.moments.covariance) <= FLOAT32


# What ranks send


@given(problems())
def test_all_ranks_send_the_documented_numbers_in_the_same_shapes(
    problem: tuple[MixtureState, Tensor, list[int], Tensor],
) -> None:
    state, _, sizes, _ = problem
    together = Together(*problem)
    assert together.sent == [per_step(state.config, state.moments.mean.shape[1])] * len(sizes)
    assert together.shapes == [together.shapes[0]] * len(sizes)
