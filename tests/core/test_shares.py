"""A step whose rows are spread over ranks, which here are threads that exchange what `Peers.total` is given."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mixture_core import MixtureConfig, MixtureState, Moments, StepStats, init
from mixture_core.peers import ALONE, Peers, nth_largest
from mixture_core.shares import advance_share
from mixture_core.step import advance
from mixture_core.testing import embeddings, labels, mixtures, oracle_step, states
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
        """Returns what the function returns on each rank, given its peers."""

        def on_one(rank: int) -> Any:
            try:
                return function(Peers(lambda tensor: self._total(rank, tensor), rank, len(self.shapes)))
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
            lambda peers: advance_share(state, rows[peers.rank], given[peers.rank], peers=peers, continues=continues)
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

    @property
    def n_revived(self) -> set[int]:
        """As the ranks have it."""
        return {int(stats.n_revived) for stats in self.stats}


@st.composite
def cuts(draw: st.DrawFn, N: int) -> list[int]:
    """Draws how many of N rows each of one to four ranks has, which may be none."""
    inner = sorted(draw(st.lists(st.integers(0, N), max_size=3)))
    return [end - start for start, end in zip([0, *inner], [*inner, N], strict=True)]


@st.composite
def problems(draw: st.DrawFn, *, D: int | tuple[int, int] = (1, 6)) -> tuple[MixtureState, Tensor, list[int], Tensor]:
    """Draws a state in which nothing is moved, rows in float64, how they are spread, and their labels."""
    config = MixtureConfig(
        K=draw(st.integers(1, 6)),
        assigner=draw(st.sampled_from(("kmeans_online", "label_supervised"))),
        mode=draw(st.sampled_from(("ema", "per_batch", "label_supervised"))),
        max_assign_iters=draw(st.integers(1, 4)),
        revive_below=0,
    )
    state = draw(states(config=config, D=D, dtype=torch.float64))
    x = draw(embeddings(D=state.moments.mean.shape[1], dtype=torch.float64, with_bad_rows=True))
    return state, x, draw(cuts(len(x))), draw(labels(N=len(x), K=config.K))


def with_dead_component(dtype: torch.dtype = torch.float64, *, N: int = 240) -> tuple[MixtureState, Tensor]:
    """A state of which one component is dead and far from the batch, and a batch."""
    x, _, means = gaussians(0, N=N, D=4, K=6)
    weight, mean = torch.full((6,), 50.0), means.clone()
    weight[5], mean[5] = 1e-3, 1e4
    moments = Moments(weight=weight, mean=mean, covariance=torch.eye(4).repeat(6, 1, 1))
    moments = Moments(**{name: getattr(moments, name).to(dtype) for name in ("weight", "mean", "covariance")})
    return MixtureState(config=MixtureConfig(K=6), moments=moments), x.to(dtype)


def per_step(config: MixtureConfig, D: int) -> int:
    """The numbers that a rank sends in a step in which nothing is dead."""
    iterations = 1 if config.uses_labels else config.max_assign_iters
    return iterations * config.K * (1 + D) + config.K * D * (D + 1) // 2 + 2


# What comes of it


@given(problems())
def test_shares_have_the_moments_of_one_step(problem: tuple[MixtureState, Tensor, list[int], Tensor]) -> None:
    state, x, sizes, own = problem
    expected, _ = advance(state, x, own)
    assert_moments_close(Together(state, x, sizes, own).states[0].moments, expected.moments, FLOAT64)


@given(problems())
def test_shares_have_the_rows_of_R_of_one_step(problem: tuple[MixtureState, Tensor, list[int], Tensor]) -> None:
    state, x, sizes, own = problem
    together = Together(state, x, sizes, own)
    assert torch.equal(together.R, advance(state, x, own)[1].R)
    assert [len(stats.R) for stats in together.stats] == sizes


@given(problems())
def test_shares_count_the_ignored_rows_of_all(problem: tuple[MixtureState, Tensor, list[int], Tensor]) -> None:
    state, x, sizes, own = problem
    assert Together(state, x, sizes, own).n_ignored == {int(advance(state, x, own)[1].n_ignored)}


@given(problems())
def test_shares_that_continue_a_step_have_the_moments_of_one(
    problem: tuple[MixtureState, Tensor, list[int], Tensor],
) -> None:
    state, x, sizes, own = problem
    expected, _ = advance(state, x, own, continues=True)
    assert_moments_close(Together(state, x, sizes, own, continues=True).states[0].moments, expected.moments, FLOAT64)


@given(problems())
def test_shares_end_in_the_same_bits_on_all_ranks(problem: tuple[MixtureState, Tensor, list[int], Tensor]) -> None:
    first, *others = Together(*problem).states
    for other in others:
        assert_same_bits(other.moments, first.moments)


@given(problems())
def test_state_and_statistics_of_shares_hold_the_same(problem: tuple[MixtureState, Tensor, list[int], Tensor]) -> None:
    together = Together(*problem)
    for state, stats in zip(together.states, together.stats, strict=True):
        assert_same_bits(state.moments, stats.moments)


@given(mixtures(N=(24, 64), K=(1, 6)), st.sampled_from(("ema", "per_batch")), st.integers(1, 4), st.data())
def test_shares_in_float32_have_the_moments_of_the_oracle(
    mixture: Any, mode: Any, iterations: int, data: st.DataObject
) -> None:
    x, _, means = mixture
    config = MixtureConfig(K=len(means), mode=mode, max_assign_iters=iterations, revive_below=0)
    state = init(config, x)
    sizes = data.draw(cuts(len(x)))
    for _ in range(3):
        expected, _ = oracle_step(state, x)
        state = Together(state, x, sizes).states[0]
        assert state.moments.mean.dtype == torch.float32
        assert_moments_close(state.moments, expected.moments, FLOAT32)


@pytest.mark.parametrize("sizes", [[0], [0, 0, 0], [2, 0, 1]])
@pytest.mark.parametrize("mode", ["ema", "per_batch"])
def test_shares_without_a_usable_row_leave_the_state(sizes: list[int], mode: Any) -> None:
    config = MixtureConfig(K=3, mode=mode)
    mean = torch.arange(6.0).view(3, 2)
    moments = Moments(weight=torch.ones(3), mean=mean, covariance=torch.eye(2).repeat(3, 1, 1))
    x = torch.full((sum(sizes), 2), float("nan"))
    together = Together(MixtureState(config=config, moments=moments), x, sizes)
    assert_same_bits(together.states[0].moments, moments)


def test_share_of_a_rank_that_is_alone_is_the_batch() -> None:
    state, x = with_dead_component()
    (expected, wanted), (new, stats) = advance(state, x), advance_share(state, x, peers=ALONE)
    assert_moments_close(new.moments, expected.moments, FLOAT64)
    assert stats.n_revived == wanted.n_revived == 1


# Embeddings far from 0


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("assigner", ["kmeans_online", "label_supervised"])
def test_shares_far_from_zero_have_the_covariance_of_the_oracle(assigner: Any, iterations: int, world: int) -> None:
    x, own, means = gaussians(3, N=512, D=8, K=4)
    x, means = 1000 + 1e-3 * x, 1000 + 1e-3 * means
    config = MixtureConfig(K=4, assigner=assigner, max_assign_iters=iterations, revive_below=0)
    state = expected = init(config, means)
    for _ in range(3):
        expected, _ = oracle_step(expected, x, own)
        state = Together(state, x, [512 // world] * world, own).states[0]
        assert relative_error(state.moments.covariance, expected.moments.covariance) <= FLOAT32


# Dead components


@given(st.data())
def test_shares_move_a_dead_component_to_where_one_step_does(data: st.DataObject) -> None:
    state, x = with_dead_component()
    expected, stats = advance(state, x)
    together = Together(state, x, data.draw(cuts(len(x))))
    assert together.n_revived == {int(stats.n_revived)} == {1}
    assert_moments_close(together.states[0].moments, expected.moments, FLOAT64)


@given(st.data())
def test_shares_move_a_dead_component_to_the_same_bits(data: st.DataObject) -> None:
    state, x = with_dead_component(torch.float32)
    first, *others = Together(state, x, data.draw(cuts(len(x)))).states
    for other in others:
        assert_same_bits(other.moments, first.moments)


@pytest.mark.parametrize("sizes", [[240], [80, 160], [0, 240, 0], [1, 200, 39, 0]])
def test_shares_move_a_dead_component_whatever_rows_are_unusable(sizes: list[int]) -> None:
    state, x = with_dead_component()
    x[::7] = float("nan")
    expected, _ = advance(state, x)
    assert_moments_close(Together(state, x, sizes).states[0].moments, expected.moments, FLOAT64)


def test_shares_that_continue_a_step_move_nothing() -> None:
    state, x = with_dead_component()
    assert Together(state, x, [100, 140], continues=True).n_revived == {0}


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1000.1])
def test_shares_move_nothing_where_all_rows_coincide(value: float) -> None:
    x = torch.full((37, 3), value)
    state = init(MixtureConfig(K=4), x)
    for _ in range(5):
        together = Together(state, x, [20, 0, 17])
        assert together.n_revived == {0}
        state = together.states[0]


# What ranks send


@given(problems())
def test_every_rank_sends_the_documented_number_of_numbers(
    problem: tuple[MixtureState, Tensor, list[int], Tensor],
) -> None:
    state, _, sizes, _ = problem
    assert Together(*problem).sent == [per_step(state.config, state.moments.mean.shape[1])] * len(sizes)


@pytest.mark.parametrize("sizes", [[240], [80, 160], [0, 240, 0], [60, 60, 60, 60]])
def test_every_rank_sends_the_documented_number_more_where_a_component_is_dead(sizes: list[int]) -> None:
    state, x = with_dead_component(torch.float32)
    K, D = state.moments.mean.shape
    more = 1027 + 2 * D + K + len(sizes)
    assert Together(state, x, sizes).sent == [per_step(state.config, D) + more] * len(sizes)


@given(st.data())
def test_all_ranks_send_the_same_shapes_in_the_same_order(data: st.DataObject) -> None:
    state, x = with_dead_component(torch.float32)
    first, *others = Together(state, x, data.draw(cuts(len(x)))).shapes
    assert others == [first] * len(others)


# The n-th largest of all


@given(st.data(), st.sampled_from((torch.float32, torch.float64)))
def test_nth_largest_is_that_of_a_stable_sort(data: st.DataObject, dtype: torch.dtype) -> None:
    N = data.draw(st.integers(1, 40))
    few = st.sampled_from(
        (0.0, 1e-40, 0.5, 1.0, 1.0 + 2**-20, 3.0, 3e38)
    )  # few of them: ties, within ranks and between
    values = torch.tensor(data.draw(st.lists(few | st.floats(0, 1e6), min_size=N, max_size=N)), dtype=dtype)
    used = torch.tensor(data.draw(st.lists(st.booleans(), min_size=N, max_size=N)))
    used[data.draw(st.integers(0, N - 1))] = True
    n, sizes = data.draw(st.integers(0, int(used.sum()) - 1)), data.draw(cuts(N))
    values = torch.where(used, values, -1.0)
    found = torch.cat(
        Exchange(len(sizes)).run(
            lambda peers: nth_largest(
                values.split(sizes)[peers.rank], used.split(sizes)[peers.rank], torch.tensor(n), peers
            )
        )
    )
    assert found.nonzero().flatten().tolist() == [values.sort(descending=True, stable=True).indices[n]]


@pytest.mark.parametrize("world", [1, 3])
def test_nth_largest_of_nothing_is_nothing(world: int) -> None:
    values, used = torch.tensor([1.0, 2.0]), torch.zeros(2, dtype=torch.bool)
    found = Exchange(world).run(lambda peers: nth_largest(values, used, torch.tensor(0), peers))
    assert not torch.cat(found).any()
