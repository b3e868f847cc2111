"""Derivatives of the statistics agree with finite differences, and stay finite beside what has none."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp

from mixture_core import MixtureConfig, MixtureState, Moments, batch_moments, init, step
from tests.core.common import DERIVED, gaussians
from tests.tolerances import FLOAT32, FLOAT64, relative_error

K, N, D = 4, 10, 3
BAD = 5  # the row that holds a NaN
# Central differences of width 1e-5 in float64: 1e-10 of truncation and as much of rounding, times the curvature.
FINITE_DIFFERENCES = 1e-7
WIDTH = 1e-5
SUPERVISED = MixtureConfig(K=K, assigner="label_supervised")
CONFIGS = [MixtureConfig(K=K), MixtureConfig(K=K, mode="per_batch"), SUPERVISED]


def problem(config: MixtureConfig) -> tuple[MixtureState, Tensor, Tensor]:
    """State, embeddings and labels in float64, with an empty component far away and a NaN row."""
    x, labels, means = gaussians(0, N=2 * N, D=D, K=K - 1)
    x, means = x.double(), torch.cat([means, torch.full((1, D), 1e4)]).double()
    moments = Moments(weight=torch.zeros(K).double(), mean=means, covariance=torch.zeros(K, D, D, dtype=torch.float64))
    state, _ = step(MixtureState(config=config, moments=moments), x[:N], labels[:N])
    x, labels = x[N:], labels[N:]
    x[BAD, 1] = float("nan")
    return state, x, labels


def reading(state: MixtureState, labels: Tensor, name: str) -> Callable[[Tensor], Tensor]:
    """One statistic of a step, as a function of the embeddings."""
    return lambda rows: step(state, rows, labels)[1][name]


def differences(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Central differences of a function of x, with one trailing dimension per dimension of x."""
    columns = []
    for index in range(x.numel()):
        shift = torch.zeros(x.numel(), dtype=x.dtype)
        shift[index] = WIDTH
        shift = shift.reshape(x.shape)
        columns.append((function(x + shift) - function(x - shift)) / (2 * WIDTH))
    return torch.stack(columns, dim=-1).reshape(*columns[0].shape, *x.shape)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", [name for name in DERIVED if name != "pi"])
def test_jacrev_of_a_statistic_equals_finite_differences(config: MixtureConfig, name: str) -> None:
    state, x, labels = problem(config)
    function = reading(state, labels, name)
    jacobian = jacrev(function)(x)
    assert relative_error(jacobian, differences(function, x)) <= FINITE_DIFFERENCES
    assert not jacobian[..., BAD, :].any()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", DERIVED)
def test_forward_and_reverse_derivatives_agree(config: MixtureConfig, name: str) -> None:
    state, x, labels = problem(config)
    function = reading(state, labels, name)
    tangent = torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    value, forward = jvp(function, (x,), (tangent,))
    _, pull = vjp(function, x)
    cotangent = torch.randn(value.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    # Two sums in different order, which may cancel: hence relative to the sum of absolute values.
    (gradient,) = pull(cotangent)
    difference = (gradient * tangent).sum() - (forward * cotangent).sum()
    assert difference.abs() <= 10 * FLOAT64 * (1 + (gradient * tangent).abs().sum())


@pytest.mark.parametrize("config", CONFIGS[::2])
@pytest.mark.parametrize("name", ["trace_B", "participation_ratio"])
def test_hessian_of_a_scalar_equals_finite_differences_of_its_gradient(config: MixtureConfig, name: str) -> None:
    state, x, labels = problem(config)
    gradient = grad(reading(state, labels, name))
    actual = hessian(reading(state, labels, name))(x)
    assert relative_error(actual, differences(gradient, x)) <= FINITE_DIFFERENCES
    assert not actual[BAD].any()
    assert not actual[:, :, BAD].any()


def test_grad_with_respect_to_the_state_equals_finite_differences() -> None:
    state, x, labels = problem(SUPERVISED)

    def function(mean: Tensor) -> Tensor:
        moments = Moments(weight=state.moments.weight, mean=mean, covariance=state.moments.covariance)
        return step(MixtureState(config=SUPERVISED, moments=moments), x, labels)[1].participation_ratio

    assert relative_error(grad(function)(state.moments.mean), differences(function, state.moments.mean)) <= 1e-7


# Soft responsibilities


def soft_problem() -> tuple[Tensor, Tensor]:
    """Embeddings with a NaN row, and R with an empty component, an ignored row and zeros."""
    x = gaussians(3, N=N, D=D, K=2).embeddings.double()
    R = torch.rand(N, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    R[R < 0.3] = 0.0
    R[:, 2], R[1] = 0.0, 0.0
    x[BAD, 0] = float("nan")
    return x, R


@pytest.mark.parametrize("name", DERIVED)
def test_grad_under_soft_responsibilities_equals_finite_differences(name: str) -> None:
    x, R = soft_problem()

    def function(rows: Tensor) -> Tensor:
        return getattr(batch_moments(rows, R), name)

    expected = differences(function, x)
    actual = jacrev(function)(x)
    scale = max(1.0, float(expected.abs().max()))  # pi does not depend on x
    assert (actual - expected).abs().max() <= FINITE_DIFFERENCES * scale


@pytest.mark.parametrize("name", DERIVED)
def test_grad_with_respect_to_responsibilities_equals_finite_differences(name: str) -> None:
    x, R = soft_problem()
    occupied = torch.arange(K) != 2  # an empty component's statistics have a step at weight 0

    def function(R: Tensor) -> Tensor:
        return getattr(batch_moments(x, torch.where(occupied, R, 0.0)), name)

    assert relative_error(jacrev(function)(R), differences(function, R)) <= FINITE_DIFFERENCES


@pytest.mark.parametrize("name", DERIVED)
def test_grad_with_respect_to_responsibilities_is_finite_with_zeros_among_them(name: str) -> None:
    x, R = soft_problem()
    assert jacrev(lambda R: getattr(batch_moments(x, R), name))(R).isfinite().all()


# Where there is nothing to differentiate


EMPTY, COINCIDING = torch.full((6, D), float("nan")), torch.full((6, D), 0.3)


@pytest.mark.parametrize("x", [EMPTY, COINCIDING, torch.zeros(6, D), 1e12 * torch.eye(6, D), 1e-18 * torch.eye(6, D)])
@pytest.mark.parametrize("name", DERIVED)
@pytest.mark.parametrize("config", [CONFIGS[0], SUPERVISED])
def test_derivatives_of_degenerate_batches_are_finite(x: Tensor, name: str, config: MixtureConfig) -> None:
    state, labels = init(config, x), torch.tensor([0, 0, 1, 1, -1, 7])
    function = reading(state, labels, name)
    assert jacrev(function)(x).isfinite().all()
    assert jacfwd(function)(x).isfinite().all()


def test_float32_gradient_of_opnorm_equals_that_of_the_eigenvalue() -> None:
    x, labels, _ = gaussians(0, N=64, D=6, K=4)
    state = init(MixtureConfig(K=4, assigner="label_supervised"), x)
    expected = grad(lambda rows: torch.linalg.eigvalsh(step(state, rows, labels)[1].B)[-1])(x.double())
    actual = grad(reading(state, labels, "opnorm_B"))(x)
    assert relative_error(actual, expected) <= FLOAT32
