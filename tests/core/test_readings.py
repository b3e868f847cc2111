"""Readings of moments against their papers' definitions on the raw rows."""

import math
import sys

import pytest
import torch
from torch import Tensor

from mixture_core import MixtureConfig, Moments, batch_moments, init, readings, step
from tests.core.common import gaussians
from tests.tolerances import FLOAT32, relative_error

K = 8


def rows_and_moments(D: int) -> tuple[Tensor, Tensor, Moments]:
    """Rows of overlapping clusters, their labels, and their moments after 100 merges."""
    x, labels, _ = gaussians(0, N=6400, D=D, K=K, apart=3.0)
    x = 2 + x * torch.arange(1, D + 1) ** -0.3
    state = init(MixtureConfig(K=K, assigner="label_supervised", ema_decay=1 - 1e-15), x)
    for rows, index in zip(x.split(64), labels.split(64), strict=True):
        state, _ = step(state, rows, index)
    return x.double(), labels, state.moments


def exp_entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum().exp()


@pytest.mark.parametrize("D", [32, 128, 512])
def test_readings_equal_their_definition_on_the_rows(D: int) -> None:
    x, labels, moments = rows_and_moments(D)
    T = x.mT.cov(correction=0)
    means = torch.stack([x[labels == k].mean(dim=0) for k in range(K)])
    within = sum((x[labels == k] - means[k]).mT @ (x[labels == k] - means[k]) for k in range(K)) / len(x)
    assert isinstance(within, Tensor)
    eigenvalues, size = torch.linalg.eigvalsh(T).flip(0), torch.linalg.svdvals(x)
    deviation = means - x.mean(dim=0)
    norm = deviation.norm(dim=1)
    apart = ~torch.eye(K, dtype=torch.bool)
    cosine = torch.nn.functional.cosine_similarity(deviation[:, None], deviation, dim=2)[apart]
    expected = {
        readings.total: T,
        readings.trace_T: T.trace(),
        readings.share_B: 1 - within.trace() / T.trace(),
        readings.participation_ratio: T.trace() ** 2 / T.square().sum(),
        readings.spectrum: eigenvalues,
        readings.effective_rank: exp_entropy(eigenvalues / eigenvalues.sum()),
        readings.rankme: exp_entropy(size / size.sum() + 1e-7),
        readings.std: x.std(dim=0, correction=0).mean(),
        readings.effective_components: exp_entropy(labels.bincount() / len(x)),
        readings.nc1: (within @ torch.linalg.pinv(deviation.mT @ deviation / K, hermitian=True, rtol=1e-9)).trace() / K,
        lambda m: readings.nc2(m).equinorm: norm.std(correction=0) / norm.mean(),
        lambda m: readings.nc2(m).equiangle: (cosine + 1 / (K - 1)).abs().mean(),
    }
    for reading, value in expected.items():
        assert relative_error(reading(moments), value) <= FLOAT32, reading
    assert readings.rank_B(moments) == K - 1


def test_alpha_req_is_the_exponent_of_a_power_law() -> None:
    x = torch.eye(200, dtype=torch.float64) * (torch.arange(1, 201) ** -0.75)
    x = torch.cat([x, -x])
    assert float(readings.alpha_req(batch_moments(x, torch.ones(400, 1)))) == pytest.approx(1.5)
    with pytest.raises(ValueError, match="`first` must be at least 1 and less than 8"):
        readings.alpha_req(batch_moments(x[:, :8], torch.ones(400, 1)))


def test_rankme_at_exact_low_rank_is_what_float32_can_tell() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6400, 4, generator=generator) @ torch.randn(4, 64, generator=generator)
    state = init(MixtureConfig(K=1, ema_decay=1 - 1e-15), x)
    for rows in x.split(64):
        state, _ = step(state, rows)
    assert 4.0 <= float(readings.rankme(state.moments)) <= 4.2


def test_log_likelihood_is_that_of_torchs_mixture() -> None:
    x, _, moments = rows_and_moments(16)
    pooled = (moments.pi[:, None, None] * moments.Sigma).sum(dim=0).double()
    component = torch.distributions.MultivariateNormal(
        moments.mu.double(), 0.5 * moments.Sigma.double() + 0.5 * pooled, validate_args=False
    )
    mixture = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(moments.pi.double()), component)
    found = readings.log_likelihood(moments, x[:100], shrinkage=0.5)
    assert relative_error(found, mixture.log_prob(x[:100])) <= 1e-4
    with pytest.raises(ValueError, match="`shrinkage` must be in"):
        readings.log_likelihood(moments, x, shrinkage=2.0)


def test_log_likelihood_is_finite_if_rows_lie_in_a_subspace() -> None:
    x = torch.randn(50, 3) @ torch.randn(3, 64)
    assert readings.log_likelihood(batch_moments(x, torch.ones(50, 2)), x).isfinite().all()


def test_log_likelihood_is_finite_beside_a_dead_component_of_former_scale() -> None:
    x, R = torch.randn(24, 32), torch.eye(3)[torch.arange(24) % 3]
    m, shrunk = batch_moments(x, R), torch.tensor([1e-6, 1e-6, 1.0])
    moments = Moments(
        weight=m.weight * torch.tensor([1.0, 1.0, 1e-8]), mean=m.mean, covariance=m.covariance * shrunk[:, None, None]
    )
    assert readings.log_likelihood(moments, x).isfinite().all()


def test_match_finds_the_order_of_components_with_scipy_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, moments = rows_and_moments(16)
    order = torch.randperm(K, generator=torch.Generator().manual_seed(0))
    other = Moments(weight=moments.weight, mean=moments.mean[order] + 0.01, covariance=moments.covariance)
    assert torch.equal(order[readings.match(moments, other)], torch.arange(K))
    with pytest.raises(ValueError, match="`b` must have the K and D of `a`"):
        readings.match(moments, batch_moments(torch.zeros(1, 2), torch.ones(1, 1)))
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r'^`match` needs SciPy: pip install "mixture-diagnostics\[match\]".$'):
        readings.match(moments, other)


FIGURES = [
    readings.trace_T,
    readings.share_B,
    readings.participation_ratio,
    readings.effective_rank,
    readings.rankme,
    lambda m: readings.alpha_req(m, first=2),
    readings.std,
    readings.effective_components,
    readings.nc1,
    lambda m: sum(readings.nc2(m)),
    lambda m: readings.log_likelihood(m, torch.ones(3, 6)).sum(),
]


@pytest.mark.parametrize("figure", FIGURES)
def test_readings_have_derivatives_and_work_under_vmap(figure) -> None:  # type: ignore[no-untyped-def]  # lambdas
    R = torch.rand(3, 40, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = torch.randn(3, 40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    together = torch.func.vmap(lambda x, R: figure(batch_moments(x, R)))(x, R)
    alone = torch.stack([figure(batch_moments(*each)) for each in zip(x, R, strict=True)])
    assert relative_error(together, alone) <= 1e-9
    gradient = torch.func.grad(lambda x: figure(batch_moments(x, R[0])))(x[0])
    away = torch.zeros_like(x[0])
    away[3, 2] = 1e-5
    slope = (figure(batch_moments(x[0] + away, R[0])) - figure(batch_moments(x[0] - away, R[0]))) / 2e-5
    assert math.isclose(float(gradient[3, 2]), float(slope), rel_tol=1e-4, abs_tol=1e-7)


@pytest.mark.parametrize("figure", FIGURES[:-1])
def test_readings_are_finite_at_collapse_and_without_weight(figure) -> None:  # type: ignore[no-untyped-def]  # lambdas
    for x, R in ((torch.ones(5, 6), torch.ones(5, 3)), (torch.ones(5, 6), torch.zeros(5, 3))):
        assert figure(batch_moments(x, R)).isfinite()
        assert torch.func.grad(lambda x, R=R: figure(batch_moments(x, R)))(x).isfinite().all()
