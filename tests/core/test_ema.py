"""What `mode: ema` remembers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mixture_core import MixtureConfig, MixtureState, batch_moments, init, responsibilities_from_labels, step
from mixture_core.testing import embeddings, labels
from tests.core.common import assert_moments_close, assert_same_bits, gaussians
from tests.tolerances import FLOAT32, FLOAT64, relative_error

SUPERVISED = MixtureConfig(K=3, assigner="label_supervised")


def normal(generator: torch.Generator, N: int, mean: float) -> Tensor:
    return mean + torch.randn(N, 4, generator=generator)


@given(st.lists(embeddings(N=(0, 12), D=3, dtype=torch.float64), min_size=1, max_size=8), st.data())
def test_steps_are_one_batch_in_which_old_samples_weigh_less(batches: list[Tensor], data: st.DataObject) -> None:
    config = MixtureConfig(K=2, assigner="label_supervised", ema_decay=0.8)
    own = [data.draw(labels(N=x.shape[0], K=2)) for x in batches]
    state = init(config, batches[0])
    ages = []
    for x, indices in zip(batches, own, strict=True):
        state, stats = step(state, x, indices)
        idle = bool(stats.n_ignored == x.shape[0])  # a batch without a usable row does not age the others
        ages = [age + (not idle) for age in ages] + [0]
    R = [0.8**age * responsibilities_from_labels(indices, 2).double() for age, indices in zip(ages, own, strict=True)]
    assert_moments_close(state.moments, batch_moments(torch.cat(batches), torch.cat(R)), FLOAT64)


def test_first_batch_weighs_no_more_than_its_age_allows() -> None:
    x = torch.zeros(10, 1)
    state = init(MixtureConfig(K=1, ema_decay=0.99), x)
    state, _ = step(state, x)
    for _ in range(99):
        state, stats = step(state, x + 1)
    share = 0.99**99 * (1 - 0.99) / (1 - 0.99**100)  # 0.006; 0.37 if parameters were averaged from the first batch on
    assert relative_error(1 - stats.mu[0, 0], torch.tensor(share)) <= 1e-4  # a difference from 1 has lost three digits


def test_class_present_in_every_tenth_step_keeps_mean_and_covariance() -> None:
    generator = torch.Generator().manual_seed(0)
    state = init(SUPERVISED, torch.zeros(0, 4))
    rare = normal(generator, 64, 5.0)
    for t in range(300):
        x = torch.cat([normal(generator, 64, -1.0), rare]) if t % 10 == 0 else normal(generator, 64, -1.0)
        own = torch.cat([torch.zeros(64), torch.full((x.shape[0] - 64,), 2.0)]).long()
        state, stats = step(state, x, own)
        assert relative_error(stats.mu[2], rare.mean(dim=0)) <= FLOAT32, t
        assert relative_error(stats.Sigma[2], torch.cov(rare.T, correction=0)) <= FLOAT32, t


def test_class_absent_for_4000_steps_keeps_mean_and_covariance() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([normal(generator, 64, -1.0), normal(generator, 64, 5.0)])
    own = torch.tensor([0] * 64 + [2] * 64)
    state, before = step(init(SUPERVISED, x), x, own)
    for _ in range(4000):
        state, after = step(state, x[:64], own[:64])
    assert relative_error(after.mu[2], before.mu[2]) <= FLOAT32
    assert relative_error(after.Sigma[2], before.Sigma[2]) <= FLOAT32
    assert after.pi[2] == 0


def test_class_that_returns_after_its_weight_was_lost_is_that_of_its_new_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    x, other, back = (normal(generator, 32, mean) for mean in (5.0, 0.0, 9.0))
    state, _ = step(init(SUPERVISED, x), x, torch.full((32,), 2))
    for _ in range(2500):  # through denormal weights to 0
        state, _ = step(state, other, torch.zeros(32, dtype=torch.int64))
    _, stats = step(state, back, torch.full((32,), 2))
    assert relative_error(stats.mu[2], back.mean(dim=0)) <= FLOAT32
    assert relative_error(stats.Sigma[2], torch.cov(back.T, correction=0)) <= FLOAT32


@pytest.mark.parametrize("steps", [1, 10, 300])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_total_is_within_plus_between_after_any_number_of_steps(steps: int, offset: float) -> None:
    x, _, means = gaussians(3, N=64, D=5, K=4)
    x, means = x + offset, means + offset
    state = init(MixtureConfig(K=4), x)
    single = init(MixtureConfig(K=1, assigner="label_supervised"), x)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = means[torch.randint(4, (64,), generator=generator)] + torch.randn(64, 5, generator=generator)
        state, stats = step(state, batch)
        single, whole = step(single, batch, torch.zeros(64, dtype=torch.int64))
    within = (stats.pi[:, None, None] * stats.Sigma).sum(dim=0)
    assert relative_error(within + stats.B, whole.Sigma[0]) <= FLOAT32


def test_motion_of_a_mean_enters_its_covariance() -> None:
    # Over the exponential window, motion v per step adds v v^T decay / (1 - decay)^2.
    x = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    state = init(MixtureConfig(K=1, ema_decay=0.9), x)
    for t in range(500):
        state, stats = step(state, x + 0.5 * t)
    assert relative_error(stats.Sigma[0, 0, 0], torch.tensor(1 + 0.25 * 0.9 / 0.01)) <= FLOAT64


def test_idle_steps_do_not_decay() -> None:
    x = gaussians(0, N=64).embeddings
    state, _ = step(init(MixtureConfig(), x), x)
    idle: MixtureState = state
    for _ in range(100):
        idle, _ = step(idle, torch.full((3, 16), float("nan")))
    assert_same_bits(step(idle, x)[0].moments, step(state, x)[0].moments)
