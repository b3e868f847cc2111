"""What a change of the data does to the statistics of several steps."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mixture_core import MixtureConfig, MixtureState, Moments, StepStats, step
from mixture_core.testing import Mixture, mixtures
from tests.tolerances import FAR_FROM_ZERO, FLOAT32, relative_error

MIXTURES = mixtures(N=24, D=(1, 5), K=(2, 5))
SCALARS = ("trace_B", "opnorm_B", "participation_ratio")


def run(means: Tensor, *batches: Tensor) -> StepStats:
    """Statistics after steps from given centroids, which nothing but Lloyd moves."""
    K, D = means.shape
    moments = Moments(weight=torch.zeros(K), mean=means, covariance=torch.zeros(K, D, D))
    state = MixtureState(config=MixtureConfig(K=K), moments=moments)
    for x in batches:
        state, stats = step(state, x)
    return stats


def assert_stats_equal(actual: StepStats, expected: dict[str, Tensor], tolerance: float = FLOAT32) -> None:
    for name, value in expected.items():
        error = relative_error(actual[name], value)
        assert error <= tolerance, (name, error)


@given(MIXTURES, st.permutations(range(12)))
def test_order_of_rows_does_not_matter(mixture: Mixture, order: list[int]) -> None:
    x, _, means = mixture
    plain, permuted = run(means, x[:12], x[12:]), run(means, x[:12][order], x[12:][order])
    assert torch.equal(permuted.R, plain.R[order])
    assert_stats_equal(permuted, {name: plain[name] for name in ("pi", "mu", "Sigma", "B", *SCALARS)})


@given(MIXTURES, st.data())
def test_order_of_components_does_not_matter(mixture: Mixture, data: st.DataObject) -> None:
    x, _, means = mixture
    order = data.draw(st.permutations(range(means.shape[0])))
    plain, permuted = run(means, x[:12], x[12:]), run(means[order], x[:12], x[12:])
    assert torch.equal(permuted.R, plain.R[:, order])
    own = {"pi": plain.pi[order], "mu": plain.mu[order], "Sigma": plain.Sigma[order]}
    assert_stats_equal(permuted, own | {name: plain[name] for name in ("B", *SCALARS)})


@given(MIXTURES, st.sampled_from([-64.0, 1.0, 1024.0]))
def test_translation_moves_the_means_alone(mixture: Mixture, shift: float) -> None:
    x, _, means = mixture
    x = (x * 1024).round() / 1024  # so that moving the rows is exact
    plain, moved = run(means, x[:12], x[12:]), run(means + shift, x[:12] + shift, x[12:] + shift)
    assert torch.equal(moved.R, plain.R)
    assert_stats_equal(
        moved, {"mu": plain.mu + shift, **{name: plain[name] for name in ("pi", "Sigma", "B", *SCALARS)}}, FAR_FROM_ZERO
    )


@given(MIXTURES, st.integers(0, 99))
def test_rotation_rotates_means_and_matrices(mixture: Mixture, seed: int) -> None:
    x, _, means = mixture
    D = x.shape[1]
    Q = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q

    def rotate(rows: Tensor) -> Tensor:
        return (rows.double() @ Q).float()

    plain, rotated = run(means, x[:12], x[12:]), run(rotate(means), rotate(x[:12]), rotate(x[12:]))
    assert torch.equal(rotated.R, plain.R)
    matrices = {name: (Q.mT @ plain[name].double() @ Q).float() for name in ("Sigma", "B")}
    assert_stats_equal(
        rotated, {"mu": rotate(plain.mu), **matrices, **{name: plain[name] for name in ("pi", *SCALARS)}}
    )


@given(MIXTURES, st.sampled_from([1e-6, 1e-3, 2.0, 1e6]))
def test_scale_goes_into_means_once_and_into_matrices_twice(mixture: Mixture, factor: float) -> None:
    x, _, means = mixture
    plain, scaled = run(means, x[:12], x[12:]), run(factor * means, factor * x[:12], factor * x[12:])
    assert torch.equal(scaled.R, plain.R)
    squared = {name: plain[name] * factor**2 for name in ("Sigma", "B", "trace_B", "opnorm_B")}
    assert_stats_equal(
        scaled, {"mu": plain.mu * factor, "pi": plain.pi, "participation_ratio": plain.participation_ratio, **squared}
    )
