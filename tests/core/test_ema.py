"""What `mode: ema` remembers."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mixture_core import MixtureConfig, MixtureState, batch_moments, init, responsibilities_from_labels, step
from mixture_core.testing import embeddings, labels
from tests.core.common import assert_moments_close, assert_same_bits, gaussians
from tests.tolerances import FLOAT32, FLOAT64, relative_error

SUPERVISED = MixtureConfig(K=3, assigner="label_supervised", ema_decay=0.8)


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


def test_class_keeps_mean_and_covariance_till_it_returns_however_late() -> None:
    generator = torch.Generator().manual_seed(0)
    x, other, back = (torch.randn(32, 4, generator=generator) + mean for mean in (5.0, 0.0, 9.0))
    state, before = step(init(SUPERVISED, x), x, torch.full((32,), 2))
    for _ in range(500):  # through denormal weights to 0
        state, stats = step(state, other, torch.zeros(32, dtype=torch.int64))
    assert stats.pi[2] == 0
    assert relative_error(stats.mu[2], before.mu[2]) <= FLOAT32
    assert relative_error(stats.Sigma[2], before.Sigma[2]) <= FLOAT32
    _, stats = step(state, back, torch.full((32,), 2))
    assert relative_error(stats.mu[2], back.mean(dim=0)) <= FLOAT32
    assert relative_error(stats.Sigma[2], torch.cov(back.T, correction=0)) <= FLOAT32


def test_idle_steps_do_not_decay() -> None:
    x = gaussians(0, N=64).embeddings
    state, _ = step(init(MixtureConfig(), x), x)
    idle: MixtureState = state
    for _ in range(100):
        idle, _ = step(idle, torch.full((3, 16), float("nan")))
    assert_same_bits(step(idle, x)[0].moments, step(state, x)[0].moments)
