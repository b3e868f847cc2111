"""The Triton kernels against plain float64 formulas: on the GPU where there is one, else in Triton's interpreter.

The interpreter must be chosen before Triton is imported, so that without a GPU one test runs all others in a process
of their own.
"""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor

from mixture_core import Moments, kernels
from mixture_core.assign import _by_differences, _by_kernels
from mixture_core.inputs import usable_rows
from mixture_core.kernels.assign import component_means, group, nearest
from mixture_core.kernels.moments import absorb as absorb_by_kernels
from mixture_core.kernels.summary import summary
from tests.tolerances import FAR_FROM_ZERO, FLOAT32, relative_error

INSTALLED = importlib.util.find_spec("triton") is not None
DEVICE = "cpu" if kernels.INTERPRETED or not torch.cuda.is_available() else "cuda"
READY = kernels.INTERPRETED or DEVICE == "cuda"
SHAPES = [(67, 65, 3), (150, 130, 2), (1, 1, 1), (80, 4, 11), (0, 3, 2)]
ODD_VALUES = [float("nan"), float("inf"), -float("inf"), 1e20]

ANYWHERE = ("test_kernels_pass_in_the_interpreter", "test_a_gpu_without_a_compiler_is_told_of_and_done_without")


@pytest.fixture(autouse=True)
def ready(request: pytest.FixtureRequest) -> None:
    if not READY and request.node.name not in ANYWHERE:
        pytest.skip("runs on a GPU or in the interpreter's own process")


def interprets() -> bool:
    """Whether Triton's interpreter works here: that of 3.6 and before does not with NumPy 2.3 and after."""
    major, minor = (int(part) for part in importlib.metadata.version("triton").split(".")[:2])
    return (major, minor) >= (3, 7) or tuple(int(part) for part in numpy.__version__.split(".")[:2]) < (2, 3)


@pytest.mark.skipif(READY or not INSTALLED, reason="no Triton, or no need for a process of their own")
@pytest.mark.skipif(INSTALLED and not interprets(), reason="Triton's interpreter and NumPy do not go together")
def test_kernels_pass_in_the_interpreter() -> None:
    options = ("-n", "0", "-p", "no:cacheprovider", "--no-header")
    command = [sys.executable, "-m", "pytest", *options, str(Path(__file__).resolve())]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "passed" in result.stdout


def batch(N: int, D: int, K: int, *, seed: int = 0, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Rows of spread 1, and centroids among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=generator) + offset
    centroids = torch.randn(K, D, generator=generator) + offset
    return x.to(DEVICE), centroids.to(DEVICE)


def ragged(N: int, K: int, *, seed: int = 0) -> Tensor:
    """Indices of which every third component has no row and the second one has one at most; some rows are nobody's."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, K + 1, (N,), generator=generator)
    index[(index % 3 == 2) & (index < K)] = 0
    index[index == 1] = 0
    index[N // 2 : N // 2 + 1] = min(1, K - 1)
    return index.to(torch.int32).to(DEVICE)


def history(K: int, D: int, *, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, mean and covariance, some of whose weights are 0."""
    generator = torch.Generator().manual_seed(seed)
    weight = 30 * torch.rand(K, generator=generator)
    weight[3::4] = 0
    factor = torch.randn(K, D, D, generator=generator)
    mean = torch.randn(K, D, generator=generator)
    return weight.to(DEVICE), mean.to(DEVICE), (factor @ factor.mT / D).to(DEVICE)


def absorb(weight: Tensor, mean: Tensor, covariance: Tensor, *batch: Tensor) -> tuple[Tensor, ...]:
    """`absorb_by_kernels` into memory that holds NaN before, of which none may be left in the lower triangle."""
    out = torch.full_like(covariance, float("nan"))
    return absorb_by_kernels(weight, mean, torch.zeros_like(mean), covariance, *batch, out=out)


def rows_of(x: Tensor, index: Tensor, k: int) -> Tensor:
    return x[index == k].double()


def union(weight: Tensor, mean: Tensor, covariance: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of history and rows of one component, in float64, by the definition."""
    w_a, mean, covariance = weight.double(), mean.double(), covariance.double()
    if len(rows) == 0:
        return mean, covariance
    m_b, w = rows.mean(dim=0), w_a + len(rows)
    scatter, d = (rows - m_b).mT @ (rows - m_b), m_b - mean
    return mean + d * len(rows) / w, (w_a * covariance + scatter) / w + w_a * len(rows) / w**2 * torch.outer(d, d)


# Who belongs where


@pytest.mark.parametrize(("N", "D", "K"), [*SHAPES, (80, 4, 66)])
def test_nearest_is_the_nearest_centroid(N: int, D: int, K: int) -> None:
    x, centroids = batch(N, D, K)
    index, R = nearest(x, centroids)
    distance = (x.double()[:, None] - centroids.double()).square().sum(dim=2)
    assert index.dtype == torch.int32
    assert R.dtype == torch.float32
    chosen = distance.gather(1, index.long()[:, None])[:, 0]
    assert ((chosen - distance.amin(dim=1)) <= FLOAT32 * distance.amax(dim=1)).all()
    assert torch.equal(R, torch.nn.functional.one_hot(index.long(), K).float())


@pytest.mark.parametrize(("spread", "offset"), [(1.0, 1000.0), (1e-4, 0.1)])
def test_nearest_is_right_far_from_zero(spread: float, offset: float) -> None:
    _, means = batch(0, 16, 6)
    x = means.repeat(40, 1) + 0.1 * batch(240, 16, 1, seed=3)[0]
    x, means = x * spread + offset, means * spread + offset
    index, _ = nearest(x, means)
    assert torch.equal(index.cpu(), torch.arange(6, dtype=torch.int32).repeat(40))


@pytest.mark.parametrize(("D", "distance"), [(16, 1e2), (70, 1e5), (16, 1e7)])
def test_nearest_is_right_in_groups_far_apart(D: int, distance: float) -> None:
    x, means = batch(130, D, 8)
    x[::2, 3] += distance
    means[4:, 3] += distance
    index, _ = nearest(x, means)
    squares = (x.double()[:, None] - means.double()).square().sum(dim=2)
    chosen = squares.gather(1, index.long()[:, None])[:, 0]
    assert ((chosen - squares.amin(dim=1)) <= FLOAT32 / 10 * chosen).all()


@pytest.mark.parametrize(("D", "K"), [(3, 5), (65, 140)])
def test_nearest_of_equal_centroids_is_the_first(D: int, K: int) -> None:
    x, centroids = batch(20, D, K)
    centroids = centroids[torch.arange(K) % 3]
    index, _ = nearest(x, centroids)
    assert index.max() <= 2
    again, _ = nearest(x, centroids[:3])
    assert torch.equal(index, again)


def test_nearest_of_a_row_that_is_not_usable_is_nobody() -> None:
    D, K = 65, 66
    x, centroids = batch(50, D, K)
    expected, _ = nearest(x, centroids)
    rows = torch.arange(8) * 7  # the last one is row 49
    expected[rows.to(DEVICE)] = K
    x[rows, torch.tensor([0, D - 1]).repeat_interleave(4)] = torch.tensor(ODD_VALUES).repeat(2).to(DEVICE)
    index, R = nearest(x, centroids)
    assert torch.equal(index, expected)
    assert torch.equal(R.sum(dim=1) == 0, ~usable_rows(x))


@pytest.mark.parametrize(("N", "K"), [(0, 3), (1, 1), (50, 80), (4097, 3), (9000, 5)])
def test_group_is_a_stable_counting_sort(N: int, K: int) -> None:
    index = torch.randint(-2, K + 2, (N,), generator=torch.Generator().manual_seed(0)).to(torch.int32).to(DEVICE)
    order, offsets = group(index, K)
    assert offsets.tolist() == [0, *torch.tensor([(index == k).sum() for k in range(K)]).cumsum(dim=0).tolist()]
    for k in range(K):
        assert order[offsets[k] : offsets[k + 1]].tolist() == (index == k).nonzero()[:, 0].tolist()


def test_lloyd_by_kernels_equals_the_definition() -> None:
    x, centroids = batch(100, 16, 5)
    x[7, 3], centroids[4] = ODD_VALUES[0], 1e4  # a row that is ignored, and a centroid without rows
    index, R = _by_kernels(x, centroids, 3)
    expected = _by_differences(x, centroids, 3)
    assert torch.equal(index.long(), expected)
    assert torch.equal(R, torch.nn.functional.one_hot(expected, 6)[:, :5].float())


# Means and covariances


@pytest.mark.parametrize(("N", "D", "K"), SHAPES)
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_component_means_are_the_means(N: int, D: int, K: int, offset: float) -> None:
    x, previous = batch(N, D, K, offset=offset)
    index = ragged(N, K)
    means = component_means(x, *group(index, K), previous)
    for k in range(K):
        rows = rows_of(x, index, k)
        if len(rows):
            assert relative_error(means[k], rows.mean(dim=0)) <= FLOAT32
        else:
            assert torch.equal(means[k], previous[k])


@pytest.mark.parametrize(("N", "D", "K"), SHAPES)
def test_absorb_is_the_union_of_history_and_batch(N: int, D: int, K: int) -> None:
    x, _ = batch(N, D, K)
    index, (weight, mean, covariance) = ragged(N, K), history(K, D)
    x[index == K] = float("nan")
    weight_ab, mean_ab, _, covariance_ab = absorb(weight, mean, covariance, x, *group(index, K))
    for k in range(K):
        rows = rows_of(x, index, k)
        expected_mean, expected = union(weight[k], mean[k], covariance[k], rows)
        assert weight_ab[k] == weight[k] + len(rows)
        assert relative_error(mean_ab[k], expected_mean) <= FLOAT32
        # What one row, or rounding, leaves of a covariance is measured by the rows themselves.
        error = (covariance_ab[k].double() - expected).tril().abs().max()
        assert error <= FLOAT32 / 10 * max(float(expected.abs().max()), 1.0)


@pytest.mark.parametrize(("offset", "spread"), [(1000.0, 1.0), (1.0, 1e-3), (0.0, 1e12)])
def test_absorb_of_no_history_is_the_batch_wherever_it_lies(offset: float, spread: float) -> None:
    x, mean = batch(200, 35, 2)
    x = x * spread + offset
    index = torch.zeros(200, dtype=torch.int32, device=DEVICE)
    weight, covariance = torch.zeros(2, device=DEVICE), torch.full((2, 35, 35), 1e30, device=DEVICE)
    grouped = group(index, 2)
    _, mean_ab, _, covariance_ab = absorb(weight, mean, covariance, x, *grouped)
    expected_mean, expected = union(weight[0], mean[0], 0 * covariance[0], x.double())
    assert relative_error(mean_ab[0], expected_mean) <= FLOAT32
    assert relative_error(covariance_ab[0].tril(), expected.tril()) <= FLOAT32
    assert torch.equal(mean_ab[1], mean[1])
    assert torch.equal(covariance_ab[1].tril(), covariance[1].tril())


@pytest.mark.parametrize("weight", [0.0, 50.0, 1e6])
def test_absorb_keeps_what_rounding_takes_from_the_mean(weight: float) -> None:
    x, _ = batch(200, 35, 1, offset=1e4)
    index, weights = torch.zeros(200, dtype=torch.int32, device=DEVICE), torch.tensor([weight], device=DEVICE)
    mean, residual = x[:1].clone(), torch.full((1, 35), 3e-4, device=DEVICE)
    covariance = torch.zeros(1, 35, 35, device=DEVICE)
    _, new, left, _ = absorb_by_kernels(
        weights, mean, residual, covariance, x, *group(index, 1), out=torch.empty_like(covariance)
    )
    history = mean.double() + residual
    expected = history + (x.double().mean(dim=0) - history) * (200 / (200 + weight))
    assert torch.equal(new, (new.double() + left).float())
    assert (new.double() + left - expected).abs().max() <= FLOAT32


def test_absorb_in_place_is_absorb_and_leaves_absent_components_alone() -> None:
    x, _ = batch(70, 70, 5)
    index, (weight, mean, covariance) = ragged(70, 5), history(5, 70)
    arguments = (x, *group(index, 5))
    expected = absorb(weight, mean, covariance, *arguments)[3].tril()
    absent = covariance[2].clone()
    new = absorb_by_kernels(weight, mean, torch.zeros_like(mean), covariance, *arguments, out=covariance)[3]
    assert new.data_ptr() == covariance.data_ptr()
    assert torch.equal(covariance.tril(), expected)
    assert torch.equal(covariance[2], absent)


def test_absorb_reads_and_changes_none_of_its_arguments_above_the_diagonal() -> None:
    x, _ = batch(70, 70, 3)
    index, (weight, mean, covariance) = ragged(70, 3), history(3, 70)
    arguments = (x, *group(index, 3))
    above = torch.where(torch.ones_like(covariance).triu(diagonal=1) > 0, float("nan"), covariance)
    before = (weight.clone(), mean.clone(), above.clone(), x.clone())
    expected, new = (absorb(weight, mean, old, *arguments)[3].tril() for old in (covariance, above))
    assert torch.equal(new, expected)
    for argument, copy in zip((weight, mean, above, x), before, strict=True):
        torch.testing.assert_close(argument, copy, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [0.1, 1000.1, 1e12])
def test_absorb_of_coinciding_rows_has_no_covariance(value: float) -> None:
    x = torch.full((37, 5), value, device=DEVICE)
    index = torch.zeros(37, dtype=torch.int32, device=DEVICE)
    index[36] = 1  # a component of a single row
    mean, covariance = torch.zeros(2, 5, device=DEVICE), torch.zeros(2, 5, 5, device=DEVICE)
    results = absorb(mean[:, 0].clone(), mean, covariance, x, *group(index, 2))
    assert relative_error(results[1], x[:2]) <= FLOAT32
    assert results[3].tril().abs().max() <= (torch.finfo(torch.float32).eps * value) ** 2


# What is logged


@pytest.mark.parametrize(("D", "K", "scale"), [(3, 1, 1.0), (1, 5, 1e13), (65, 3, 1e-15), (20, 128, 1.0)])
def test_summary_is_what_moments_derive(D: int, K: int, scale: float) -> None:
    weight, mean, _ = history(K, D)
    weight, mean = weight + 0.1, mean * scale
    exact = Moments(weight=weight.double(), mean=mean.double(), covariance=weight.new_zeros(K, D, D).double())
    expected = torch.stack([exact.pi.min(), exact.pi.max(), exact.trace_B, exact.opnorm_B])
    actual = summary(weight, mean)
    for found, wanted in zip(actual, expected, strict=True):
        assert relative_error(found, wanted) <= FLOAT32


def test_summary_is_exact_far_from_zero() -> None:
    weight, mean, _ = history(6, 20)
    exact = Moments(weight=weight.double(), mean=(mean + 1000).double(), covariance=weight.new_zeros(6, 20, 20))
    actual = summary(weight, mean + 1000)
    assert relative_error(actual[2:], torch.stack([exact.trace_B, exact.opnorm_B])) <= FAR_FROM_ZERO


def test_summary_of_coinciding_means_has_no_spread() -> None:
    actual = summary(torch.ones(3, device=DEVICE), torch.full((3, 4), 0.1, device=DEVICE))
    assert relative_error(actual[:2], torch.full((2,), 1 / 3, device=DEVICE)) <= FLOAT32
    assert actual[2:].abs().max() <= (torch.finfo(torch.float32).eps * 0.1) ** 2


def test_summary_without_weight_is_0() -> None:
    assert not summary(torch.zeros(3, device=DEVICE), torch.ones(3, 4, device=DEVICE)).any()


# Where they work


def test_kernels_are_usable_on_float32_alone() -> None:
    assert kernels.usable_on(torch.zeros(3, 2, device=DEVICE), K=3)
    assert not kernels.usable_on(torch.zeros(3, 2, device=DEVICE, dtype=torch.float64), K=3)


def test_kernels_repeat_bit_for_bit() -> None:
    x, centroids = batch(100, 65, 2)
    index, (weight, mean, covariance) = ragged(100, 2), history(2, 65)

    def once() -> list[Tensor]:
        index_again, _ = nearest(x, centroids)
        results = absorb(weight, mean, covariance, x, *group(index, 2))
        return [index_again, *results[:3], results[3].tril(), summary(weight, mean)]

    for first, second in zip(once(), once(), strict=True):
        assert torch.equal(first, second)


def test_a_gpu_without_a_compiler_is_told_of_and_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nMore of it.")

    kernels._work_on.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "launch", broken)
        patch.setattr(torch, "zeros", lambda *_, **__: None)  # on a GPU that may not be there
        patch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
        with pytest.warns(UserWarning, match=r"Triton cannot run here.*: RuntimeError: Failed to find C compiler.$"):
            assert not kernels._work_on(torch.device("cuda", 0))
        assert not kernels._work_on(torch.device("cuda", 0))  # and says so once
    kernels._work_on.cache_clear()
