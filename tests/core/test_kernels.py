"""The Triton kernels against plain float64 formulas: on the GPU where there is one, else in Triton's interpreter.

The interpreter must be chosen before Triton is imported, so that without a GPU one test runs all others in a process
of their own.
"""

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
from tests.tolerances import FLOAT32, relative_error

DEVICE = "cpu" if kernels.INTERPRETED or not torch.cuda.is_available() else "cuda"
READY = kernels.INTERPRETED or DEVICE == "cuda"
SHAPES = [(300, 3, 5), (67, 65, 3), (150, 130, 2), (40, 1, 1), (1, 3, 2), (3, 2, 20), (130, 4, 70), (0, 3, 2)]
ODD_VALUES = [float("nan"), float("inf"), -float("inf"), 1e20]

needs_kernels = pytest.mark.skipif(not READY, reason="runs on a GPU or in the interpreter's own process")


def interprets() -> bool:
    """Whether Triton's interpreter works here: that of 3.6 and before does not with NumPy 2.3 and after."""
    major, minor = (int(part) for part in kernels.triton.__version__.split(".")[:2])
    return (major, minor) >= (3, 7) or tuple(int(part) for part in numpy.__version__.split(".")[:2]) < (2, 3)


@pytest.mark.skipif(READY or not kernels.AVAILABLE, reason="no Triton, or no need for a process of their own")
@pytest.mark.skipif(kernels.AVAILABLE and not interprets(), reason="Triton's interpreter and NumPy do not go together")
def test_kernels_pass_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--no-header", str(Path(__file__).resolve())]
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


@needs_kernels
@pytest.mark.parametrize(("N", "D", "K"), SHAPES)
def test_nearest_is_the_nearest_centroid(N: int, D: int, K: int) -> None:
    x, centroids = batch(N, D, K)
    index, R = nearest(x, centroids)
    distance = (x.double()[:, None] - centroids.double()).square().sum(dim=2)
    assert index.dtype == torch.int32
    assert R.dtype == torch.float32
    chosen = distance.gather(1, index.long()[:, None])[:, 0]
    assert ((chosen - distance.amin(dim=1)) <= FLOAT32 * distance.amax(dim=1)).all()
    assert torch.equal(R, torch.nn.functional.one_hot(index.long(), K).float())


@needs_kernels
@pytest.mark.parametrize("distance", [1e2, 1e5, 1e7])
@pytest.mark.parametrize("D", [16, 70])
def test_nearest_is_right_in_groups_far_apart(D: int, distance: float) -> None:
    x, means = batch(400, D, 8)
    x[::2, 3] += distance
    means[4:, 3] += distance
    index, _ = nearest(x, means)
    squares = (x.double()[:, None] - means.double()).square().sum(dim=2)
    chosen = squares.gather(1, index.long()[:, None])[:, 0]
    assert ((chosen - squares.amin(dim=1)) <= FLOAT32 / 10 * chosen).all()


@needs_kernels
@pytest.mark.parametrize(("D", "K"), [(3, 5), (65, 140)])
def test_nearest_of_equal_centroids_is_the_first(D: int, K: int) -> None:
    x, centroids = batch(100, D, K)
    centroids = centroids[torch.arange(K) % 3]
    index, _ = nearest(x, centroids)
    assert index.max() <= 2
    again, _ = nearest(x, centroids[:3])
    assert torch.equal(index, again)


@needs_kernels
@pytest.mark.parametrize("value", ODD_VALUES)
@pytest.mark.parametrize(("D", "K"), [(3, 4), (65, 70)])
def test_nearest_of_a_row_that_is_not_usable_is_nobody(value: float, D: int, K: int) -> None:
    x, centroids = batch(50, D, K)
    expected, _ = nearest(x, centroids)
    expected[[7, 49]] = K
    x[7, D - 1] = x[49, 0] = value
    index, R = nearest(x, centroids)
    assert torch.equal(index, expected)
    assert torch.equal(R.sum(dim=1) == 0, ~usable_rows(x))


@needs_kernels
@pytest.mark.parametrize(("N", "K"), [(0, 3), (1, 1), (50, 80), (4097, 3), (9000, 5)])
def test_group_is_a_stable_counting_sort(N: int, K: int) -> None:
    index = torch.randint(-2, K + 2, (N,), generator=torch.Generator().manual_seed(0)).to(torch.int32).to(DEVICE)
    order, offsets = group(index, K)
    assert offsets.tolist() == [0, *torch.tensor([(index == k).sum() for k in range(K)]).cumsum(dim=0).tolist()]
    for k in range(K):
        assert order[offsets[k] : offsets[k + 1]].tolist() == (index == k).nonzero()[:, 0].tolist()


@needs_kernels
@pytest.mark.parametrize("iterations", [1, 3])
def test_lloyd_by_kernels_equals_the_definition(iterations: int) -> None:
    x, centroids = batch(300, 16, 5)
    x[7, 3], centroids[4] = ODD_VALUES[0], 1e4  # a row that is ignored, and a centroid without rows
    index, R = _by_kernels(x, centroids, iterations)
    expected = _by_differences(x, centroids, iterations)
    assert torch.equal(index.long(), expected)
    assert torch.equal(R, torch.nn.functional.one_hot(expected, 6)[:, :5].float())


# Means and covariances


@needs_kernels
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


@needs_kernels
@pytest.mark.parametrize(("N", "D", "K"), SHAPES)
def test_absorb_is_the_union_of_history_and_batch(N: int, D: int, K: int) -> None:
    x, _ = batch(N, D, K)
    index, (weight, mean, covariance) = ragged(N, K), history(K, D)
    weight_ab, mean_ab, _, covariance_ab = absorb(weight, mean, covariance, x, *group(index, K))
    for k in range(K):
        rows = rows_of(x, index, k)
        expected_mean, expected = union(weight[k], mean[k], covariance[k], rows)
        assert weight_ab[k] == weight[k] + len(rows)
        assert relative_error(mean_ab[k], expected_mean) <= FLOAT32
        # What one row, or rounding, leaves of a covariance is measured by the rows themselves.
        error = (covariance_ab[k].double() - expected).tril().abs().max()
        assert error <= FLOAT32 / 10 * max(float(expected.abs().max()), 1.0)


@needs_kernels
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


@needs_kernels
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


@needs_kernels
def test_absorb_in_place_is_absorb_and_leaves_absent_components_alone() -> None:
    x, _ = batch(150, 70, 5)
    index, (weight, mean, covariance) = ragged(150, 5), history(5, 70)
    arguments = (x, *group(index, 5))
    expected = absorb(weight, mean, covariance, *arguments)[3].tril()
    absent = covariance[2].clone()
    new = absorb_by_kernels(weight, mean, torch.zeros_like(mean), covariance, *arguments, out=covariance)[3]
    assert new.data_ptr() == covariance.data_ptr()
    assert torch.equal(covariance.tril(), expected)
    assert torch.equal(covariance[2], absent)


@needs_kernels
def test_absorb_reads_and_changes_none_of_its_arguments_above_the_diagonal() -> None:
    x, _ = batch(150, 70, 3)
    index, (weight, mean, covariance) = ragged(150, 3), history(3, 70)
    arguments = (x, *group(index, 3))
    above = torch.where(torch.ones_like(covariance).triu(diagonal=1) > 0, float("nan"), covariance)
    before = (weight.clone(), mean.clone(), above.clone(), x.clone())
    expected, new = (absorb(weight, mean, old, *arguments)[3].tril() for old in (covariance, above))
    assert torch.equal(new, expected)
    for argument, copy in zip((weight, mean, above, x), before, strict=True):
        torch.testing.assert_close(argument, copy, rtol=0, atol=0, equal_nan=True)


@needs_kernels
@pytest.mark.parametrize("value", [0.1, 1000.1, 1e12])
def test_absorb_of_coinciding_rows_has_no_covariance(value: float) -> None:
    x = torch.full((37, 5), value, device=DEVICE)
    index = torch.zeros(37, dtype=torch.int32, device=DEVICE)
    index[36] = 1  # a component of a single row
    mean, covariance = torch.zeros(2, 5, device=DEVICE), torch.zeros(2, 5, 5, device=DEVICE)
    results = absorb(mean[:, 0].clone(), mean, covariance, x, *group(index, 2))
    assert relative_error(results[1], x[:2]) <= FLOAT32
    assert results[3].tril().abs().max() <= (torch.finfo(torch.float32).eps * value) ** 2


@needs_kernels
def test_absorb_ignores_rows_that_are_not_usable() -> None:
    x, centroids = batch(90, 5, 3)
    x[::10] = torch.tensor(ODD_VALUES[0], device=DEVICE)
    x[5, 2] = 1e20
    index, _ = nearest(x, centroids)
    weight, mean, covariance = history(3, 5)
    results = absorb(weight, mean, covariance, x, *group(index, 3))
    assert float(results[0].sum() - weight.sum()) == pytest.approx(80, rel=FLOAT32)
    for k in range(3):
        expected_mean, expected = union(weight[k], mean[k], covariance[k], rows_of(x, index, k))
        assert relative_error(results[1][k], expected_mean) <= FLOAT32
        assert relative_error(results[3][k].tril(), expected.tril()) <= FLOAT32


# What is logged


@needs_kernels
@pytest.mark.parametrize(("D", "K"), [(3, 1), (1, 5), (65, 3), (130, 20), (7, 40), (20, 128)])
@pytest.mark.parametrize("scale", [1.0, 1e13, 1e-15])
def test_summary_is_what_moments_derive(D: int, K: int, scale: float) -> None:
    weight, mean, _ = history(K, D)
    weight, mean = weight + 0.1, mean * scale
    exact = Moments(weight=weight.double(), mean=mean.double(), covariance=weight.new_zeros(K, D, D).double())
    expected = torch.stack([exact.pi.min(), exact.pi.max(), exact.trace_B, exact.opnorm_B])
    actual = summary(weight, mean)
    for found, wanted in zip(actual, expected, strict=True):
        assert relative_error(found, wanted) <= FLOAT32


@needs_kernels
def test_summary_of_coinciding_means_has_no_spread() -> None:
    actual = summary(torch.ones(3, device=DEVICE), torch.full((3, 4), 0.1, device=DEVICE))
    assert relative_error(actual[:2], torch.full((2,), 1 / 3, device=DEVICE)) <= FLOAT32
    assert actual[2:].abs().max() <= torch.finfo(torch.float32).eps ** 2


@needs_kernels
def test_summary_without_weight_is_0() -> None:
    assert not summary(torch.zeros(3, device=DEVICE), torch.ones(3, 4, device=DEVICE)).any()


# Where they work


@needs_kernels
def test_kernels_repeat_bit_for_bit() -> None:
    x, centroids = batch(300, 65, 4)
    index, (weight, mean, covariance) = ragged(300, 4), history(4, 65)

    def once() -> list[Tensor]:
        index_again, _ = nearest(x, centroids)
        results = absorb(weight, mean, covariance, x, *group(index, 4))
        return [index_again, *results[:3], results[3].tril(), summary(weight, mean)]

    for first, second in zip(once(), once(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_kernels_can_be_held_by_a_graph() -> None:
    x, centroids = batch(300, 65, 4)
    index, (weight, mean, covariance) = ragged(300, 4), history(4, 65)

    def once() -> list[Tensor]:
        index_again, _ = nearest(x, centroids)
        order, offsets = group(index, 4)
        results = absorb(weight, mean, covariance, x, order, offsets)
        return [index_again, *results[:3], results[3].tril(), summary(weight, mean)]

    expected = once()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = once()
    graph.replay()
    for first, second in zip(held, expected, strict=True):
        assert torch.equal(first, second)


@pytest.mark.skipif(not kernels.AVAILABLE, reason="no Triton")
def test_a_gpu_for_which_nothing_can_be_compiled_is_told_of_and_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
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
