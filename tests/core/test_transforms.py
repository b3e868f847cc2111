"""vmap and compile of the pure functions agree with plain calls."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.func import vmap

from mixture_core import MixtureConfig, MixtureState, Moments, StepStats, assign, init, merge, step
from tests.core.common import DERIVED, assert_moments_close, gaussians, stack
from tests.tolerances import FLOAT32, relative_error

K, N, D = 5, 40, 3
CONFIGS = [
    MixtureConfig(K=K),
    MixtureConfig(K=K, mode="per_batch", max_assign_iters=1),
    MixtureConfig(K=K, assigner="label_supervised"),
    MixtureConfig(K=K, mode="label_supervised"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch(seed: int, rows: int = N) -> tuple[Tensor, Tensor]:
    """Embeddings with a NaN row, and labels that leave the last component empty."""
    x, labels, _ = gaussians(seed, N=rows, D=D, K=K - 1)
    x[rows // 2, 1] = float("nan")
    return x, labels


def warm(config: MixtureConfig, seed: int) -> MixtureState:
    """A state after two steps, whose last component is empty and far away."""
    state = init(config, batch(seed)[0])
    for later in (1, 2):
        state, _ = step(state, *batch(seed + later))
    empty, m = torch.arange(K) == K - 1, state.moments
    moments = Moments(
        weight=torch.where(empty, 0.0, m.weight), mean=torch.where(empty[:, None], 1e4, m.mean), covariance=m.covariance
    )
    return MixtureState(config=config, moments=moments)


def assert_results_close(actual: tuple[MixtureState, StepStats], expected: tuple[MixtureState, StepStats]) -> None:
    (state, stats), (expected_state, expected_stats) = actual, expected
    assert state.config == expected_state.config
    assert_moments_close(state.moments, expected_state.moments, FLOAT32)
    for name in ("R", "n_ignored"):
        assert torch.equal(stats[name], expected_stats[name]), name
    for name in DERIVED:
        assert relative_error(stats[name], expected_stats[name]) <= FLOAT32, name


def item(results: tuple[MixtureState, StepStats], index: int) -> tuple[MixtureState, StepStats]:
    """One of the results that vmap stacked."""
    return torch.utils._pytree.tree_map(lambda leaf: leaf[index], results)


# vmap


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("over_states", "over_batches"), [(True, True), (True, False), (False, True)])
def test_vmap_equals_a_loop(config: MixtureConfig, over_states: bool, over_batches: bool) -> None:
    states = [warm(config, seed if over_states else 0) for seed in range(3)]
    batches = [batch(10 + seed if over_batches else 10) for seed in range(3)]
    in_dims = (0 if over_states else None, *[0 if over_batches else None] * 2)
    rows = stack(*batches) if over_batches else batches[0]
    results = vmap(step, in_dims=in_dims)(stack(*states) if over_states else states[0], *rows)
    for index, (state, (x, labels)) in enumerate(zip(states, batches, strict=True)):
        assert_results_close(item(results, index), step(state, x, labels))


def test_vmap_of_assign_and_merge_equals_a_loop() -> None:
    states, (x, _) = [warm(CONFIGS[0], seed) for seed in range(2)], batch(10)
    assert torch.equal(
        vmap(assign, in_dims=(0, None))(stack(*states), x), torch.stack([assign(state, x) for state in states])
    )
    a, b = (state.moments for state in states)
    merged = vmap(merge)(stack(a, b), stack(b, a))
    assert_moments_close(merged, stack(merge(a, b), merge(b, a)), FLOAT32)


# compile


def test_compiled_step_equals_plain_step() -> None:
    state, (x, labels) = warm(CONFIGS[0], 0), batch(10)
    assert_results_close(torch.compile(step, fullgraph=True)(state, x, labels), step(state, x, labels))


@pytest.mark.parametrize("config", CONFIGS[1:])
def test_compiled_steps_are_one_graph(config: MixtureConfig) -> None:
    counter = CompileCounter()
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    state = expected = warm(config, 0)
    for seed in range(4):
        x, labels = batch(10 + seed)
        state, stats = compiled(state, x, labels)
        expected, expected_stats = step(expected, x, labels)
    assert counter.frame_count == 1
    assert_results_close((state, stats), (expected, expected_stats))


def test_compiled_steps_of_ever_new_sizes_are_few_graphs() -> None:
    counter = CompileCounter()
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    state = expected = warm(CONFIGS[0], 0)
    for rows in range(20, 25):
        x, labels = batch(rows, rows)
        state, stats = compiled(state, x, labels)
        expected, expected_stats = step(expected, x, labels)
    assert counter.frame_count <= 2  # the first size, and then any
    assert_results_close((state, stats), (expected, expected_stats))


def test_compiled_step_inside_a_training_step_gives_its_gradient() -> None:
    state, x = warm(CONFIGS[0], 0), batch(10)[0].nan_to_num()

    def loss(weight: Tensor) -> Tensor:
        return step(state, x * weight)[1].trace_B

    weight = torch.ones(D, requires_grad=True)
    (expected,) = torch.autograd.grad(loss(weight), weight)
    (actual,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(weight), weight)
    assert relative_error(actual, expected) <= FLOAT32
