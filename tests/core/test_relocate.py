"""`relocate`: wasted components go to where they are missed, and the whole stays what it was."""

from functools import reduce
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, jvp, vmap

from mixture_core import MixtureConfig, MixtureState, Moments, batch_moments, relocate, step
from mixture_core.relocate import DEAD
from mixture_core.testing import oracle_merge, states
from tests.core.common import assert_moments_close, assert_same_bits, gaussians, stack
from tests.tolerances import FLOAT32, FLOAT64, relative_error

K, D = 8, 16


def whole(m: Moments, keep: Tensor | None = None) -> Moments:
    """All components as one, in float64; those of weight 0, and those not to keep, left out."""
    kept = [k for k in range(len(m.weight)) if m.weight[k] > 0 and (keep is None or keep[k])]
    parts = [Moments(**{name: getattr(m, name)[k : k + 1] for name in ("weight", "mean", "covariance")}) for k in kept]
    return reduce(oracle_merge, parts)


def kept(before: Moments, after: Moments) -> Tensor:
    """Whether a component's weight is kept: not if it was dead and has moved."""
    return (before.pi >= DEAD / len(before.weight)) | (before.mean == after.mean).all(dim=1)


def state_of(means: Tensor, *, weight: Tensor | None = None, spread: float = 1.0) -> MixtureState:
    """Round components, equally heavy unless they have weights."""
    K, D = means.shape
    weight = torch.full((K,), 100.0) if weight is None else weight
    moments = Moments(weight=weight, mean=means.clone(), covariance=spread**2 * torch.eye(D).repeat(K, 1, 1))
    return MixtureState(config=MixtureConfig(K=K), moments=moments)


def merged_pair() -> tuple[MixtureState, Tensor]:
    """Eight clusters: one component has two of them, and two components have one together; and the clusters' means."""
    _, _, means = gaussians(1, K=K, D=D)
    state = state_of(means)
    m = state.moments
    m.mean[0], m.weight[0] = (means[0] + means[1]) / 2, 200.0
    m.covariance[0] += torch.outer(means[0] - means[1], means[0] - means[1]) / 4
    side = torch.nn.functional.one_hot(torch.tensor(3), D) * 0.8
    m.mean[1], m.mean[2] = means[2] + side, means[2] - side
    m.weight[1:3] = 50.0
    return state, means


def with_dead(n: int, *, weight: float = 0.0) -> tuple[MixtureState, Tensor]:
    """Eight clusters, of which the first component has n + 1, beside n dead components; and the clusters' means."""
    x, own, means = gaussians(2, N=4096, K=K, D=D)
    R = torch.nn.functional.one_hot(torch.where(own <= n, 0, own), K).float()
    m = batch_moments(x, R)
    m.weight[1 : n + 1], m.mean[1 : n + 1] = weight, 1e5
    return MixtureState(config=MixtureConfig(K=K), moments=m), means


def distances(state: MixtureState, means: Tensor) -> Tensor:
    """How far each cluster's nearest component is, (K,)."""
    return torch.cdist(means, state.moments.mean).min(dim=1).values


# What moves


def test_component_of_a_shared_cluster_goes_to_the_one_that_has_two() -> None:
    state, means = merged_pair()
    new, n_relocated = relocate(state)
    assert int(n_relocated) == 1
    assert distances(state, means)[:2].min() > 5
    assert distances(new, means).max() < 4
    x, _, _ = gaussians(1, K=K, D=D, N=4096)
    new, _ = step(step(new, x)[0], x)
    assert distances(new, means).max() < 1
    assert int(relocate(new)[1]) == 0


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("weight", [0.0, 1e-3])
def test_dead_components_all_go_at_one_time_to_the_component_that_has_their_clusters(n: int, weight: float) -> None:
    state, means = with_dead(n, weight=weight)
    new, n_relocated = relocate(state)
    assert int(n_relocated) == n
    x, _, _ = gaussians(2, N=4096, K=K, D=D)
    for _ in range(3):
        for _ in range(new.config.window):
            new, _ = step(new, x)
        new, _ = relocate(new)
    assert distances(new, means).max() < 1


@pytest.mark.parametrize("seed", range(3))
def test_separate_clusters_stay_where_they_are(seed: int) -> None:
    state = state_of(gaussians(seed).means)
    new, n_relocated = relocate(state)
    assert new is state
    assert n_relocated == 0
    assert (n_relocated.dtype, n_relocated.shape) == (torch.int64, ())


@pytest.mark.parametrize(("share", "moved"), [(0.9, 1), (1.1, 0)])
def test_dead_is_what_has_less_than_a_hundredth_of_its_share(share: float, moved: int) -> None:
    weight = torch.full((K,), 100.0)
    weight[3] = share * DEAD / K * 700
    means = gaussians(0).means
    means[3] *= 1e3  # too far to be merged
    assert int(relocate(state_of(means, weight=weight))[1]) == moved


@pytest.mark.parametrize("offset", [0.0, 1.0, 1e4])
def test_coinciding_rows_move_nothing(offset: float) -> None:
    means = torch.full((4, 3), offset)
    state = state_of(means, weight=torch.tensor([100.0, 0.0, 0.0, 50.0]), spread=2**-24 * offset)
    assert relocate(state)[1] == 0


@pytest.mark.parametrize(
    "options", [{"relocate": False}, {"mode": "per_batch"}, {"assigner": "label_supervised"}, {"K": 1}], ids=str
)
def test_nothing_moves_where_nothing_may(options: dict[str, object]) -> None:
    config = MixtureConfig(**{"K": K, **options})  # type: ignore[arg-type]
    m = with_dead(2)[0].moments
    moments = Moments(weight=m.weight[: config.K], mean=m.mean[: config.K], covariance=m.covariance[: config.K])
    state = MixtureState(config=config, moments=moments)
    new, n_relocated = relocate(state)
    assert new is state
    assert n_relocated == 0


def test_halves_of_a_light_component_are_not_dead() -> None:
    weight, mean = torch.tensor([100.0, 0.0, 0.8, 100.0]), torch.tensor([[0.0], [3.0], [50.0], [10.0]])
    moments = Moments(weight=weight, mean=mean, covariance=torch.tensor([1.0, 1.0, 1e6, 1.0])[:, None, None])
    new, _ = relocate(MixtureState(config=MixtureConfig(K=4), moments=moments))
    before = whole(moments, torch.tensor([True, False, True, True]))
    assert_moments_close(whole(new.moments), before, FLOAT32)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_state_moves_nothing(value: float) -> None:
    state, _ = with_dead(2)
    state.moments.covariance[5, 0, 0] = value
    assert relocate(state)[1] == 0
    assert vmap(relocate)(stack(state))[1] == 0


# What stays


@pytest.mark.parametrize(
    ("options", "tolerance"), [({"dtype": torch.float64}, FLOAT64), ({"offset": 100.0}, 100 * FLOAT32)]
)
@given(data=st.data())
def test_mean_and_covariance_of_all_stay_but_for_dead_weight(
    data: st.DataObject, options: dict[str, Any], tolerance: float
) -> None:
    state = data.draw(states(K=(2, 12), D=(1, 6), scale=3.0, **options))
    state = MixtureState(config=MixtureConfig(K=len(state.moments.weight)), moments=state.moments)
    if not state.moments.weight.any():
        return
    new, _ = relocate(state)
    before, after = whole(state.moments, kept(state.moments, new.moments)), whole(new.moments)
    assert relative_error(after.mean, before.mean) <= tolerance
    assert_moments_close(after, before, tolerance, scale=3.0)


@pytest.mark.parametrize(("N", "D"), [(100, 400), (1000, 400), (100_000, 8)])
def test_halves_lie_as_far_apart_as_the_true_variance_says_and_not_the_noise(N: int, D: int) -> None:
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    m = batch_moments(x, torch.stack([torch.ones(N), torch.zeros(N)], dim=1))
    config = MixtureConfig(K=2, ema_decay=0.5)
    weight = m.weight / (1 + config.ema_decay)  # so much decayed weight is as exact as N rows
    state = MixtureState(config=config, moments=Moments(weight=weight, mean=m.mean, covariance=m.covariance))
    moved, n_relocated = relocate(state)
    assert n_relocated == 1
    assert float(torch.pdist(moved.moments.mean)) == pytest.approx(2 * (2 / torch.pi) ** 0.5, rel=0.1)


def test_relocate_writes_to_none_of_its_arguments() -> None:
    state, _ = with_dead(2)
    before = state_of(state.moments.mean)
    before.moments.weight.copy_(state.moments.weight)
    before.moments.covariance.copy_(state.moments.covariance)
    new, n_relocated = relocate(state)
    assert n_relocated == 2
    assert_same_bits(state.moments, before.moments)
    new.moments.mean.fill_(7)
    assert_same_bits(state.moments, before.moments)


@pytest.mark.parametrize("scale", [1e-20, 1e-12, 1e12])
def test_any_scale_is_the_same(scale: float) -> None:
    state, _ = merged_pair()
    m = state.moments
    scaled = Moments(weight=m.weight, mean=m.mean * scale, covariance=m.covariance * scale**2)
    new, n_relocated = relocate(MixtureState(config=state.config, moments=scaled))
    assert n_relocated == 1
    assert relative_error(new.moments.mean / scale, relocate(state)[0].moments.mean) <= FLOAT32


# Transforms


def test_relocate_under_vmap_equals_a_loop() -> None:
    several = [merged_pair()[0], with_dead(3)[0], state_of(gaussians(0).means), with_dead(1, weight=1e-3)[0]]
    results, counts = vmap(relocate)(stack(*several))
    for n, state in enumerate(several):
        new, n_relocated = relocate(state)
        assert counts[n] == n_relocated
        found = Moments(**{name: getattr(results.moments, name)[n] for name in ("weight", "mean", "covariance")})
        assert_moments_close(found, new.moments, FLOAT32)


def test_derivatives_of_relocate_are_finite_in_both_directions() -> None:
    state, _ = with_dead(2)
    m = state.moments
    m.covariance[1:3] = 0.0

    def size(weight: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
        moments = Moments(weight=weight, mean=mean, covariance=covariance)
        new, _ = relocate(MixtureState(config=state.config, moments=moments))
        return new.moments.mean.square().sum() + new.moments.covariance.square().sum()

    values = (m.weight.double(), m.mean.double(), m.covariance.double())
    gradients = grad(size, argnums=(0, 1, 2))(*values)
    assert all(gradient.isfinite().all() for gradient in gradients)
    tangents = tuple(torch.ones_like(value) for value in values)
    _, along = jvp(size, values, tangents)
    expected = sum((gradient * tangent).sum() for gradient, tangent in zip(gradients, tangents, strict=True))
    assert relative_error(along, torch.as_tensor(expected)) <= 1e-9


def test_relocate_compiles_in_one_graph() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(relocate, fullgraph=True, backend="aot_eager")
    for state in (with_dead(3)[0], merged_pair()[0]):
        (found, count), (wanted, expected) = compiled(state), relocate(state)
        assert count == expected
        assert_moments_close(found.moments, wanted.moments, FLOAT32)
    torch._dynamo.reset()
